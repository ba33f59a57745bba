"""What can be made to go wrong in one island's process while it runs.

`Chaos` is put around the context that an island is given (`Chaos.context`): what it posts, hears and fetches passes
here, and so do its clock and the ends of its steps. Without a fault everything passes at once; the code of the island
knows nothing of it. `Chaos.apply` begins a fault from any thread, and ends it after its time. Links: `faults.links`.
"""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, cast

from faults.links import OF_LINKS, Lasting, LinkedTransport, Links
from faults.plan import ATTACKS, LABEL_FLIP, PlannedFault
from faults.process import FullDisk, JumpClock, die, pause, run_out_of_memory
from workers.context import IslandContext
from workers.messages import Announce, Batch, Envelope, Offer, Peers
from workers.transport.base import Transport

if TYPE_CHECKING:
    from torch import Tensor

    from faults.eavesdrop import Eavesdropper

log = logging.getLogger("atoll.chaos")

RECENT_STEPS = 16


class Chaos:
    """The faults of one island's process."""

    def __init__(self, context: IslandContext) -> None:
        """`context`: what the island would be given; `self.context` is what it is given instead."""
        self.name = context.spec.name
        self.clock = JumpClock(context.clock)
        self.disk = FullDisk()
        self._inner = context
        self._changed = threading.Condition()
        self._factor = 1.0
        self._hung = self._nan = self._corrupt = False
        self._lasting = Lasting(self._change)
        self.links = Links(self.name)
        self._stepped_s: float | None = None
        self._gaps: deque[float] = deque(maxlen=RECENT_STEPS)
        self.out = self.links.line(context.post, name="out")
        self.into = self.links.line(self._deliver, name="in")
        self.context: IslandContext = _ChaosContext(self, context)
        self._attack = Attack(self.name, self.context)

    # ------------------------------------------------------------ faults begin and end

    def apply(self, fault: PlannedFault) -> None:
        """Begin a fault of this member, or a cut of a link to it. Raises ValueError for one that is not for members."""
        log.warning("injected: %s", fault)
        match "attack" if fault.kind in ATTACKS else fault.kind:
            case "kill":
                die()
            case "oom":
                run_out_of_memory()
            case "stop":
                assert fault.for_s is not None
                pause(fault.for_s)
            case "clock_jump":
                assert fault.by_s is not None
                self.clock.jump(fault.by_s)
            case "nan":
                self._nan = True
            case "corrupt":
                self._corrupt = True
            case kind if kind in OF_LINKS:
                self.links.apply(fault)
                if kind == "heal" and fault.targets == (self.name,):
                    self._recover()
            case "hang" | "slow" | "disk_full" | "attack" as kind:
                self._lasting.set(fault, on=True, what=kind)
            case _:
                raise ValueError(f"{fault.kind} is no fault of a member")

    def _change(self, fault: PlannedFault, on: bool) -> None:
        with self._changed:
            match fault.kind:
                case "hang":
                    self._hung = on
                case "slow":
                    self._factor = (fault.factor or 1.0) if on else 1.0
                case "disk_full":
                    self.disk.fill() if on else self.disk.free()
                case _:
                    self._attack.end()
                    if on:
                        self._attack.begin(fault)
            self._changed.notify_all()

    def _recover(self) -> None:
        """Whatever lasts here is over, also what began without an end."""
        with self._changed:
            self._hung, self._factor = False, 1.0
            self._attack.end()
            self.disk.free()
            self._changed.notify_all()

    # ------------------------------------------------------------ what passes

    def listen(self, deliver: Callable[[Batch], None] | None) -> None:
        """The island says by what it hears."""
        self._inner.deliver = deliver

    def _deliver(self, batch: Batch) -> None:
        for body in batch.bodies:
            match body:
                case Peers(peers=peers):
                    self.links.addresses.update({address: who.rpartition(".")[0] for who, address, _ in peers})
                    self._attack.num_others = len(peers) - 1
                case Announce():
                    self._attack.hear(body)
                case _:
                    pass
        if self._inner.deliver is not None:
            self._inner.deliver(batch)

    def say(self, envelope: Envelope) -> None:
        """The island says something to the controller."""
        if self._corrupt:
            for body in envelope.bodies:
                if isinstance(body, Offer):
                    self._corrupt = False
                    _flip_a_byte(self._inner, body, envelope)
        self.out.put(envelope)

    def stepped(self) -> None:
        """The training thread has made a step: it is slowed down, hangs, or loses its numbers here."""
        now = time.monotonic()
        if self._stepped_s is not None:
            self._gaps.append(now - self._stepped_s)
        if self._factor > 1.0 and self._gaps:
            time.sleep((self._factor - 1.0) * statistics.median(self._gaps))
        with self._changed:
            while self._hung:
                self._changed.wait()
        if self._nan:
            self._nan = False
            _lose_numbers(self._inner)
        self._stepped_s = time.monotonic()
        if self._inner.on_step is not None:
            self._inner.on_step()


def _lose_numbers(context: IslandContext) -> None:
    """One parameter is not a number any more."""
    replica = getattr(context.store, "replica", None)
    assert replica is not None, "an island that makes steps has a replica"
    with replica.lock:
        tensor = next(iter(replica.tensors.values()))
        tensor.view(-1)[0] = float("nan")


class Attack:
    """What an island does wrong on purpose; one thing at a time."""

    def __init__(self, name: str, context: IslandContext) -> None:
        """`context`: what the island is given, so that a link that is cut carries nothing to an attacker either."""
        self._name, self._context = name, context
        self._ear: Eavesdropper | None = None
        self._unflip: Callable[[], None] | None = None
        self.num_others = 1

    def hear(self, body: Announce) -> None:
        """Somebody's offer was accepted, as everybody or every owner is told."""
        if self._ear is not None:
            self._ear.hear(body)

    def begin(self, fault: PlannedFault) -> None:
        """From now on. Raises ValueError for an attack that this island cannot make."""
        from faults.attacker import WITH_OTHERS, begin_attack, begin_label_flip
        from faults.eavesdrop import Eavesdropper

        if fault.kind == LABEL_FLIP:
            if self._context.inner is None:
                raise ValueError(f"{fault}: this island has a loop of its own, whose targets nobody knows")
            self._unflip = begin_label_flip(self._context.inner)
            return
        replica = getattr(self._context.store, "replica", None)
        assert replica is not None, "an island that takes part has a replica"
        ear = Eavesdropper(self._name, self._context.transport) if fault.kind in WITH_OTHERS else None
        if ear is None:
            begin_attack(replica, fault.kind)
            return
        self._ear = ear

        def others(fragment: int, where: slice) -> Sequence[Tensor]:
            least = 1 if fault.kind == "copy_cat" else max(self.num_others, 1)
            return ear.others(replica, fragment, replica.parts[fragment].n, where, least=least)

        begin_attack(replica, fault.kind, others=others, z=fault.factor)

    def end(self) -> None:
        """From now on it is honest."""
        from faults.attacker import end_attack

        if self._unflip is not None:
            self._unflip()
        replica = getattr(self._context.store, "replica", None)
        if replica is not None:
            end_attack(replica)
        self._ear = self._unflip = None


def _flip_a_byte(context: IslandContext, offer: Offer, envelope: Envelope) -> None:
    """One byte of what it publishes is another one than it announces."""
    from workers.digest import digest
    from workers.jobs import piece_key
    from workers.records import MemberId, OfferId

    assert envelope.incarnation is not None
    member = MemberId(name=envelope.name, incarnation=envelope.incarnation)
    for chunk in range(len(offer.chunk_digests)):
        key = piece_key(offer.fragment, OfferId(member=member, seq=offer.seq), chunk)
        data = context.store.get(key)
        if data is not None:
            damaged = bytearray(data)
            damaged[len(damaged) // 2] ^= 0x40
            context.store.put(key, damaged, digest_hex=digest(damaged))


class _ChaosContext(IslandContext):
    """A context whose calls in all directions pass `Chaos`."""

    def __init__(self, chaos: Chaos, inner: IslandContext) -> None:
        self._chaos = chaos
        values = {field.name: getattr(inner, field.name) for field in fields(inner) if field.name != "deliver"}
        values["transport"] = cast(Transport, LinkedTransport(inner.transport, chaos.links))
        super().__init__(**{**values, "post": chaos.say, "clock": chaos.clock, "on_step": chaos.stepped})

    @property
    def deliver(self) -> Callable[[Batch], None] | None:
        """What the island hears by, behind the faults; None before it has begun."""
        return self._chaos.into.put if self._chaos._inner.deliver is not None else None

    @deliver.setter
    def deliver(self, deliver: Callable[[Batch], None] | None) -> None:
        self._chaos.listen(deliver)
