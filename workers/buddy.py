"""A member's part in keeping local states twice (`workers/copies.py`): it makes copies of its own state, keeps those of
others in memory, and begins from one that somebody kept of whoever had its place before.

The training thread exports moments and residuals at a step boundary right after a commit; everything else happens in
jobs beside it: serialising, hashing, fetching. Copies travel as background transfers (`workers/transport/pacing.py`),
piece by piece, and not while an exchange is being decided. What is exported costs at most `SHARE` of the time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import safetensors.torch
from torch import Tensor, nn

from workers import member_events as ev
from workers import messages as msg
from workers.copies import (
    MAX_MANIFEST_BYTES,
    PIECE_BYTES,
    Copy,
    CopyError,
    KeptFragment,
    Manifest,
    last_seq,
    manifest_key,
    newest_first,
    num_pieces,
    parse_manifest,
    piece_key,
    residual_fate,
    why_unfit,
)
from workers.digest import digest
from workers.memory import give_back
from workers.model.errors import ModelError
from workers.optim import InnerOptimizer, export_state, import_state
from workers.records import MemberId
from workers.state_fetch import GROUP_S
from workers.tensor_file import serialised
from workers.transport.base import MAX_KEYS
from workers.transport.errors import TransportError

if TYPE_CHECKING:
    from workers.sync import IslandSync

log = logging.getLogger("atoll.island")

SHARE = 0.02
BUSY_S = 2.0
COPY_LOST, NO_COPY = "copy_lost", "no_copy"


class LocalCopies:
    """The copies of one member. All methods are called with the lock of its `IslandSync` held, but for the jobs."""

    def __init__(self, model: nn.Module, optimizer: InnerOptimizer, staleness_limit: int) -> None:
        """`bind` comes before anything else."""
        self.model, self.optimizer, self.staleness_limit = model, optimizer, staleness_limit
        self.buddy = ""
        self.mine: Copy | None = None
        self.making = self.fetching = self.inheriting = self.off = False
        self.begun: int | None = None  # the incarnation that has begun: with its own state from a disk, or a copy
        self.made: tuple[int, ...] = ()
        self.next_s = float("-inf")
        self.kept: dict[str, Copy] = {}
        self.wards: tuple[Copy, ...] = ()
        self.inherited: tuple[Manifest, dict[str, Tensor]] | None = None
        self.owed: dict[int, tuple[Manifest, Tensor]] = {}

    def bind(self, sync: IslandSync) -> None:
        """The member that this is a part of."""
        self.sync, self.machine, self.store = sync, sync.machine, sync.store

    # ------------------------------------------------------------ what the controller says

    def told(self, body: msg.Keeping | msg.Inherit) -> None:
        """Who keeps what, or who kept what of those that had this place before."""
        if isinstance(body, msg.Inherit):
            if body.sources and self.machine.consumed == 0 and self.begun != self.machine.incarnation:
                self.inheriting, self.begun = True, self.machine.incarnation
                sources = body.sources
                self.sync.threads.do(lambda: self._inherit(sources), waits=True)
            return
        self.buddy = body.buddy
        if self.mine is not None and body.held == self.mine.digest:
            self._withdraw()
        for name in [name for name in self.kept if name not in body.keep]:
            self._discard(self.kept.pop(name).digest)
        self._tell_kept()
        self.wards = body.wards
        if not self.fetching and self._lacking():
            self.fetching = True
            self.sync.threads.do(self._fetch_wards)

    def _lacking(self) -> list[Copy]:
        return [copy for copy in self.wards if self.kept.get(copy.member.name) != copy]

    def _tell_kept(self) -> None:
        self.machine.kept = tuple(copy for _, copy in sorted(self.kept.items()))

    def _withdraw(self) -> None:
        if self.mine is not None:
            self._discard(self.mine.digest)
        self.mine = self.machine.copy = None

    def _discard(self, digest_hex: str) -> None:
        give_back(self.store.discard(f"local/{digest_hex}"))

    # ------------------------------------------------------------ the training thread

    def at_boundary(self) -> bool:
        """Begin from what was inherited, or make a copy if one is due. Whether training is to wait for the former."""
        if self.inheriting:
            return True
        if self.inherited is not None:
            self._begin_from(*self.inherited)
            self.inherited = None
        self._settle_owed()
        self._copy_if_due()
        return False

    def forget(self) -> None:
        """The incarnation is over: nothing of what it made or inherited counts for the next one."""
        self._withdraw()
        self.inherited, self.owed, self.made = None, {}, ()

    def _begin_from(self, manifest: Manifest, tensors: dict[str, Tensor]) -> None:
        machine = self.machine
        assert machine.incarnation is not None
        why = why_unfit(manifest, machine.log, incarnation=machine.incarnation, staleness_limit=self.staleness_limit)
        if why:
            log.info("the copy of %s is not used: %s", manifest.member, why)
            return
        moments = {name[10:]: value for name, value in tensors.items() if name.startswith("optimizer/")}
        try:
            import_state(self.optimizer, self.model, moments)
        except ModelError as error:
            self.sync.bodies.append(msg.FaultSeen(fault=COPY_LOST, detail=f"the copy of {manifest.member}: {error}"))
            return
        for fragment in range(len(manifest.fragments)):
            residual = tensors.get(f"residual/{fragment}")
            if residual is not None:
                self.owed[fragment] = (manifest, residual)
        versions = ", ".join(str(part.n) for part in manifest.fragments)
        log.info("inner optimizer as %s had it after version %s, step %d", manifest.member, versions, manifest.steps)
        self.sync.bodies.append(msg.Inherited(member=manifest.member, steps=manifest.steps))

    def _settle_owed(self) -> None:
        """A residual is added once it is certain that nobody has sent it; not while an own offer is under way."""
        for fragment, (manifest, residual) in list(self.owed.items()):
            state = self.machine.fragments[fragment]
            assert self.machine.incarnation is not None
            fate = residual_fate(
                manifest, fragment, self.machine.log, incarnation=self.machine.incarnation, held=state.n
            )
            part = self.sync.replica.parts[fragment]
            if fate == "wait" or part.sent or state.pending is not None:
                continue
            del self.owed[fragment]
            if fate == "yes":
                value = residual.to(part.anchor.device)
                part.residual = value if part.residual is None else part.residual + value
            log.info(
                "residual of %s, fragment %d: %s", manifest.member, fragment, "taken over" if fate == "yes" else "sent"
            )

    def _copy_if_due(self) -> None:
        machine = self.machine
        versions = tuple(state.n for state in machine.fragments)
        idle = not (self.off or self.making or self.mine is not None or machine.leaving)
        if not (idle and self.buddy and machine.consumed and machine.holds_all() and versions != self.made):
            return
        now = self.sync.clock()
        if now < self.next_s:
            return
        try:
            tensors = {f"optimizer/{name}": value for name, value in export_state(self.optimizer, self.model).items()}
        except ModelError as error:
            self.off = True
            self.sync.bodies.append(msg.FaultSeen(fault=NO_COPY, detail=str(error)))
            return
        fragments = []
        for fragment, (state, part) in enumerate(zip(machine.fragments, self.sync.replica.parts, strict=True)):
            if part.residual is not None:
                tensors[f"residual/{fragment}"] = part.residual.detach().to("cpu", copy=True)
            seq = last_seq(machine.log, fragment, machine.id, upto=state.n)
            fragments.append(
                KeptFragment(n=state.n, chain=state.chain, seq=seq, has_residual=part.residual is not None)
            )
        self.made = versions
        self.next_s = now + (self.sync.clock() - now) / SHARE
        if tensors:
            self.making = True
            kept, steps, member = tuple(fragments), machine.steps, machine.id
            self.sync.threads.do(lambda: self._publish(tensors, kept, steps, member))

    # ------------------------------------------------------------ jobs

    def _publish(
        self, tensors: dict[str, Tensor], fragments: tuple[KeptFragment, ...], steps: int, member: MemberId
    ) -> ev.Event:
        data = memoryview(serialised(tensors))
        pieces = [data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES)]
        manifest = Manifest(
            run_id=self.machine.run_id,
            member=member,
            steps=steps,
            fragments=fragments,
            pieces=tuple(digest(piece) for piece in pieces),
            num_bytes=len(data),
        )
        encoded = manifest.encode()
        name = digest(encoded)
        with self.sync.changed:
            self.making = False
            if self.machine.incarnation == member.incarnation:
                for number, (piece, digest_hex) in enumerate(zip(pieces, manifest.pieces, strict=True)):
                    self.store.put(piece_key(name, number), piece, digest_hex=digest_hex)
                self.store.put(manifest_key(name), encoded, digest_hex=name)
                versions = tuple(part.n for part in fragments)
                self.mine = Copy(member=member, versions=versions, digest=name, num_bytes=len(data))
                self.machine.copy = self.mine
        return ev.Tick()

    def _fetch_wards(self) -> ev.Event:
        """Fetch what is to be kept and is not here; whoever cannot be reached is named again by the controller."""
        try:
            with self.sync.changed:
                lacking = [(copy, self.machine.peers.get(str(copy.member))) for copy in self._lacking()]
            for copy, peer in lacking:
                if peer is None:
                    continue
                try:
                    self._fetch(copy, peer[0], background=1)
                except (TransportError, CopyError) as error:
                    log.info("no copy of %s for now: %s", copy.member, error)
                    continue
                with self.sync.changed:
                    old = self.kept.get(copy.member.name)
                    self.kept[copy.member.name] = copy
                    if old is not None and old.digest != copy.digest:
                        self._discard(old.digest)
                    self._tell_kept()
        finally:
            self.fetching = False
        return ev.Tick()

    def _inherit(self, sources: Sequence[tuple[Copy, str]]) -> ev.Event:
        """Fetch the newest copy that can be had, into the hands of the training thread."""
        addresses = {copy.digest: address for copy, address in sources}
        why = []
        found: tuple[Manifest, dict[str, Tensor]] | None = None
        for copy in newest_first([copy for copy, _ in sources]):
            try:
                manifest, pieces = self._fetch(copy, addresses[copy.digest], background=1)
                found = manifest, safetensors.torch.load(b"".join(pieces))
                break
            except (TransportError, CopyError, safetensors.SafetensorError) as error:
                why.append(f"{copy.member} after version {max(copy.versions)}: {error}")
            finally:
                if copy.digest not in {kept.digest for kept in self.kept.values()}:
                    self._discard(copy.digest)
        with self.sync.changed:
            self.inherited, self.inheriting = found, False
            if found is None:
                self.sync.bodies.append(msg.FaultSeen(fault=COPY_LOST, detail="; ".join(why)))
            self.sync.changed.notify_all()
        return ev.Tick()

    def _fetch(self, copy: Copy, address: str, *, background: int) -> tuple[Manifest, list[memoryview]]:
        """Bring a copy into the own store, each piece checked. Raises TransportError, CopyError."""
        transport, timeout_s = self.sync.transport, self.sync.settings.timeout_s
        key = manifest_key(copy.digest)
        head = transport.fetch(address, [key], timeout_s=timeout_s, max_bytes=MAX_MANIFEST_BYTES)[0]
        if head.digest != copy.digest:
            raise CopyError(f"the copy of {copy.member} at {address} is another one than was announced")
        manifest = parse_manifest(bytes(head.data), run_id=self.machine.run_id, copy=copy)
        if len(manifest.pieces) != num_pieces(manifest.num_bytes):
            raise CopyError(
                f"the copy of {copy.member} has {len(manifest.pieces)} pieces for {manifest.num_bytes} bytes"
            )
        held: list[memoryview] = []
        num = 1
        while len(held) < len(manifest.pieces):
            self._let_exchanges_pass()
            first = len(held)
            wanted = manifest.pieces[first : first + num]
            keys = [piece_key(copy.digest, first + place) for place in range(len(wanted))]
            began_s = self.sync.clock()
            blobs = transport.fetch(
                address, keys, timeout_s=timeout_s, max_bytes=len(keys) * PIECE_BYTES, background=background
            )
            for own_key, blob, digest_hex in zip(keys, blobs, wanted, strict=True):
                if blob.digest != digest_hex:
                    self._discard(copy.digest)
                    raise CopyError(f"a piece of the copy of {copy.member} at {address} is not what its manifest names")
                self.store.put(own_key, blob.data, digest_hex=digest_hex)
                held.append(memoryview(blob.data))
            seconds = self.sync.clock() - began_s
            num = min(2 * num, MAX_KEYS) if seconds < GROUP_S else max(int(num * GROUP_S / seconds), 1)
        self.store.put(key, head.data, digest_hex=copy.digest)
        return manifest, held

    def _let_exchanges_pass(self) -> None:
        """Copies go in idle moments: not while an exchange is decided, as long as that does not take for ever."""
        if self.sync.executor is not None:
            with self.sync.changed:
                self.sync.changed.wait_for(lambda: self.sync.stopped or not self.machine.is_deciding(), timeout=BUSY_S)
