"""A trainer's process without its shell: it holds no parameters, draws samples, and sends them through the stages.

What goes where is decided by `Microbatches`; here its commands become requests, and replies become kept tensors. The
shell (`Hands`) carries requests to peers, fetches their tensors on threads of its own, and comes back with events.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from workers.data.permutation import sample_ids
from workers.data.reader import PackReader
from workers.pipeline.accumulator import Begin
from workers.pipeline.boundary import Boundary
from workers.pipeline.calls import Call, evaluation_of
from workers.pipeline.messages import (
    Evaluate,
    Evaluated,
    FenceWanted,
    FromTrainer,
    GaveUp,
    Heartbeat,
    OpenStep,
    PeerFenced,
    PeerPlace,
    Peers,
    StageReady,
    StepCommitted,
    ToTrainer,
)
from workers.pipeline.microbatches import (
    Announced,
    AskFence,
    Command,
    Committed,
    Event,
    Fenced,
    Microbatches,
    Refused,
    Release,
    Replied,
    Scored,
    Send,
    StageDone,
    StepOpened,
    Tick,
    Unreachable,
    Withdraw,
    Withdrawn,
)
from workers.pipeline.peer import FETCH_TIMEOUT_S, Reply, Request
from workers.pipeline.router import Router
from workers.pipeline.spec import PipelineSpec
from workers.samples import cut, evenly_spread
from workers.store import BlobStore
from workers.transport.base import Transport

LASTING = (Begin.DRAINING,)
SMOOTHING = 0.3
"""Of measured throughput: a step has few calls of each peer, and a peer that slows down must be noticed within some."""
MAX_ERRORS = 30
"""Errors of peers in one round of a step, after which it is not their fault."""


class Hands(Protocol):
    """What a trainer asks of its shell; none of these may block or call back before it returns."""

    def send(self, place: PeerPlace, request: Request) -> None:
        """Call `PeerHost.call`, fetch the reply's tensor, then `TrainerHost.replied` or `TrainerHost.unreachable`."""

    def withdraw(self, place: PeerPlace, call: Call, round_: int) -> None:
        """Call `PeerHost.withdraw`, fetch, then `TrainerHost.withdrawn` or `TrainerHost.unreachable`."""

    def tell(self, message: FromTrainer) -> None:
        """Tell the controller."""


class TrainerHost:
    """See the module. Not thread-safe: one thread calls it."""

    def __init__(
        self,
        spec: PipelineSpec,
        name: str,
        store: BlobStore,
        transport: Transport,
        hands: Hands,
        clock: Callable[[], float],
        *,
        retry_s: float = 0.2,
    ) -> None:
        self.spec, self.name = spec, name
        self._store, self._transport, self._hands, self._clock = store, transport, hands, clock
        self._reader = PackReader(spec.pack)
        self._boundary = Boundary(spec.pipeline.boundary, spec.train.seed)
        self.machine = Microbatches(
            num_stages=spec.num_stages,
            router=Router(trainer=name, smoothing=SMOOTHING),
            max_in_flight=spec.pipeline.in_flight,
            forward_timeout_s=spec.pipeline.forward_timeout_s,
            backward_timeout_s=spec.pipeline.backward_timeout_s,
            retry_s=retry_s,
            sticky=spec.is_local,
        )
        self._newest = (0, 0, -1, 0)  # life, serial, step and round that were opened
        self._behind = 0
        self._evaluation = (0, 0)  # life and number
        # What is under way: a step, or an evaluation.
        self.step, self.round_ = 0, 0
        self._num_microbatches = 1
        self._places: dict[str, PeerPlace] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._losses: dict[int, float] = {}
        self._sizes: list[int] = []
        self._num_errors = self._num_events = 0

    # ------------------------------------------------------------ the controller

    def handle(self, message: ToTrainer) -> None:
        """A message of the controller; all may be repeated."""
        match message:
            case OpenStep():
                self._open(message)
            case Peers(peers=peers):
                self._announce(peers)
            case PeerFenced(peer=peer, step=step):
                self._tell(Fenced(peer=peer, step=step))
            case Evaluate():
                self._evaluate(message)
            case StepCommitted(step=step):
                for stage in range(self.spec.num_stages):
                    self._tell(Committed(stage=stage, step=step))

    def _open(self, message: OpenStep) -> None:
        newest = (message.life, message.serial, message.step, message.round_)
        if newest <= self._newest:
            return
        self._newest = newest
        self._begin(message.step, message.round_, message.num_microbatches)
        self._behind = message.behind
        self._announce(message.peers)
        size = self.spec.pipeline.microbatch_size
        for microbatch in message.microbatches:
            start = message.first_sample + microbatch * size
            positions = np.arange(start, start + size, dtype=np.int64)
            ids = sample_ids(positions, size=self._reader.num_samples("train"), seed=self.spec.train.seed)
            tokens = self._reader.batch(ids)
            self._keep(microbatch, "input", 0, tokens[:, :-1])
            self._keep(microbatch, "other", self.spec.num_stages - 1, tokens[:, 1:])
        self._tell(StepOpened(step=self.step, microbatches=message.microbatches))

    def _begin(self, step: int, round_: int, num_microbatches: int) -> None:
        self.machine.restart(self.step)
        self._forget(self.step)
        self.step, self.round_ = step, round_
        self._num_microbatches, self._losses = num_microbatches, {}
        self._num_errors = 0

    def _evaluate(self, message: Evaluate) -> None:
        """Fixed samples, evenly spread over the validation part, forward through all stages."""
        if (message.life, message.number) <= self._evaluation:
            return
        self._evaluation = (message.life, message.number)
        num, size = self.spec.num_validation, self.spec.pipeline.microbatch_size
        pieces = list(cut(evenly_spread(num, self.spec.eval.windows), size))
        self._begin(evaluation_of(message.version), message.number, len(pieces))
        self._behind = 0
        self._announce(message.peers)
        for number, ids in enumerate(pieces):
            tokens = self._reader.batch(ids, "val")
            self._keep(number, "input", 0, tokens[:, :-1])
            self._keep(number, "other", self.spec.num_stages - 1, tokens[:, 1:])
        self._sizes = [len(ids) for ids in pieces]
        self._tell(StepOpened(step=self.step, microbatches=tuple(range(len(pieces)))))

    def _scored(self) -> None:
        total = math.fsum(self._losses[number] * size for number, size in enumerate(self._sizes))
        version, number = evaluation_of(self.step), self._evaluation[1]
        self._hands.tell(Evaluated(version=version, number=number, loss=total / sum(self._sizes)))
        self._forget(self.step)

    def _announce(self, peers: tuple[PeerPlace, ...]) -> None:
        for name in self._places.keys() - {place.peer for place in peers}:
            self.machine.router.ban(name, "it does not serve any more")
        self._places |= {place.peer: place for place in peers}
        for place in peers:
            self._tell(Announced(peer=place.peer, stage=place.stage, announcement=place.announcement))

    # ------------------------------------------------------------ what comes of requests

    def replied(self, call: Call, round_: int, reply: Reply, data: NDArray[Any] | None) -> None:
        """A peer answered, and `data` is what it made."""
        if (call.step, round_) != (self.step, self.round_):
            return
        if reply.begin not in (Begin.RUN, Begin.DONE):
            self._tell(Refused(call=call, reason=reply.begin.value, lasting=reply.begin in LASTING))
            return
        self._take(call, reply, data)
        self._tell(Replied(call=call, seconds=reply.seconds))

    def withdrawn(self, call: Call, round_: int, reply: Reply | None, data: NDArray[Any] | None) -> None:
        """A peer answered a withdrawal: with the reply of what it has counted, or with None."""
        if (call.step, round_) != (self.step, self.round_):
            return
        if reply is not None:
            self._take(call, reply, data)
        self._tell(Withdrawn(call=call, done=reply is not None))
        # It answers, so it serves: it is not banned any longer than that.
        self.machine.router.lift(call.peer)

    def unreachable(self, call: Call, round_: int, reason: str) -> None:
        """The way to a peer, or to its tensors, is not there, or it failed in the call."""
        if (call.step, round_) == (self.step, self.round_):
            self._tell(Unreachable(call=call, reason=reason))

    def failed(self, call: Call, round_: int, reason: str) -> None:
        """A peer raised an error in a call: nothing was counted (`StagePeer.run`), it can go elsewhere at once."""
        if (call.step, round_) != (self.step, self.round_):
            return
        self._num_errors += 1
        if self._num_errors > MAX_ERRORS:
            self._hands.tell(GaveUp(step=self.step, round_=self.round_, reason=f"{call.peer}: {reason}"))
        self._tell(Refused(call=call, reason=reason))

    def tick(self) -> None:
        """Time has passed."""
        deadline_s = self.machine.next_deadline_s()
        if deadline_s is not None and deadline_s <= self._clock():
            self._tell(Tick())

    def heartbeat(self) -> Heartbeat:
        """What the controller is told every so often."""
        queues = tuple(sorted(self.machine.queues().items()))
        return Heartbeat(progress=self._num_events, owes=self.machine.num_in_flight > 0, queues=queues)

    def fetch_timed(self, place: PeerPlace, reply: Reply) -> tuple[Reply, NDArray[Any] | None]:
        """The same, and the reply with the seconds that its peer's link makes a call last, if those are more."""
        asked_s = self._clock()
        data = self.fetch(place, reply)
        return replace(reply, seconds=max(reply.seconds, self._clock() - asked_s)), data

    def fetch(self, place: PeerPlace, reply: Reply) -> NDArray[Any] | None:
        """The tensor of a reply, None where it has none; on any thread. Raises TransportError."""
        if not reply.key:
            return None
        limit = self._boundary.num_bytes(math.prod(reply.shape))
        [blob] = self._transport.fetch(place.address, (reply.key,), timeout_s=FETCH_TIMEOUT_S, max_bytes=limit)
        return blob.data

    def _take(self, call: Call, reply: Reply, data: NDArray[Any] | None) -> None:
        if data is not None:
            what, stage = ("input", call.stage + 1) if call.direction == "forward" else ("other", call.stage - 1)
            key = self._kept(call.microbatch, what, stage)
            self._store.put(key, data)
            self._shapes[key] = reply.shape
        if reply.loss is not None:
            self._losses[call.microbatch] = reply.loss

    # ------------------------------------------------------------ commands

    def _tell(self, event: Event) -> None:
        self._num_events += 1
        for command in self.machine.handle(event, self._clock()):
            self._obey(command)

    def _obey(self, command: Command) -> None:
        match command:
            case Send(call=call):
                self._hands.send(self._places[call.peer], self._request(call))
            case Withdraw(call=call):
                self._hands.withdraw(self._places[call.peer], call, self.round_)
            case AskFence(peer=peer, step=step, reason=reason):
                self._hands.tell(FenceWanted(peer=peer, step=step, round_=self.round_, reason=reason))
            case StageDone(step=step, stage=stage, counted=counted):
                self._hands.tell(self._ready(step, stage, counted))
            case Release(step=step):
                self._forget(step)
            case Scored():
                self._scored()

    def _ready(self, step: int, stage: int, counted: tuple[tuple[int, str], ...]) -> StageReady:
        loss = sum(loss for _, loss in sorted(self._losses.items())) if stage == self.spec.num_stages - 1 else None
        names = self.machine.router.serving(stage)
        speeds = {name: self.machine.router.throughput(name) for name in names}
        return StageReady(step=step, round_=self.round_, stage=stage, counted=counted, loss=loss, throughputs=speeds)

    def _request(self, call: Call) -> Request:
        backward, last = call.direction == "backward", self.spec.num_stages - 1
        input_key = self._kept(call.microbatch, "input", call.stage)
        needs_other = backward or (call.step < 0 and call.stage == last)
        other_key = self._kept(call.microbatch, "other", call.stage) if needs_other else ""
        return Request(
            call=call,
            address=self._transport.address,
            input_key=input_key,
            other_key=other_key,
            input_shape=self._shapes[input_key],
            other_shape=self._shapes[other_key] if needs_other else (),
            input_type="int64" if call.stage == 0 else "encoded",
            other_type="int64" if call.stage == last else "encoded",
            weight=1.0 / self._num_microbatches,
            round_=self.round_,
            behind=self._behind,
        )

    def _kept(self, microbatch: int, what: str, stage: int) -> str:
        return f"kept/{self.step}/{self.round_}/{microbatch}/{what}/{stage}"

    def _keep(self, microbatch: int, what: str, stage: int, values: NDArray[np.int64]) -> None:
        key = self._kept(microbatch, what, stage)
        self._store.put(key, np.ascontiguousarray(values))
        self._shapes[key] = values.shape

    def _forget(self, step: int) -> None:
        self._store.discard(f"kept/{step}")
        self._shapes = {key: shape for key, shape in self._shapes.items() if not key.startswith(f"kept/{step}/")}
