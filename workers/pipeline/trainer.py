"""A trainer's process without its shell: it holds no parameters, draws samples, and sends them through the stages.

What goes where is decided by `Microbatches` and `TrainerDesk`; here calls become requests, and replies become kept
tensors. The shell (`Hands`) carries requests to peers, fetches their tensors on threads of its own, and comes back with
events.
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
from workers.pipeline.calls import Call
from workers.pipeline.messages import Evaluate, FromTrainer, GaveUp, OpenStep, PeerPlace
from workers.pipeline.microbatches import Refused
from workers.pipeline.peer import FETCH_TIMEOUT_S, Reply, Request
from workers.pipeline.pieces import MAX_PROBE_BYTES, PROBE
from workers.pipeline.spec import PipelineSpec
from workers.pipeline.trainer_desk import TrainerDesk
from workers.samples import cut, evenly_spread
from workers.store import BlobStore
from workers.transport.base import Transport

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


class TrainerHost(TrainerDesk):
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
        super().__init__(name, spec.num_stages, spec.pipeline, clock, sticky=spec.is_local, retry_s=retry_s)
        self.spec = spec
        self._store, self._transport, self._hands = store, transport, hands
        self._reader = PackReader(spec.pack)
        self._boundary = Boundary(spec.pipeline.boundary, spec.train.seed)
        self._num_microbatches = 1
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._losses: dict[int, float] = {}
        self._sizes: list[int] = []
        self._num_errors = 0
        # By which peers learn how far they are, before the first placement.
        values = spec.pipeline.microbatch_size * spec.boundary_values
        size = min(self._boundary.num_bytes(values), MAX_PROBE_BYTES)
        store.put(PROBE, np.zeros(size, dtype=np.uint8))

    # ------------------------------------------------------------ what the desk asks for

    def _lay_out(self, message: OpenStep | Evaluate) -> tuple[int, ...]:
        self._losses, self._num_errors = {}, 0
        size = self.spec.pipeline.microbatch_size
        if isinstance(message, OpenStep):
            self._num_microbatches = message.num_microbatches
            for microbatch in message.microbatches:
                start = message.first_sample + microbatch * size
                positions = np.arange(start, start + size, dtype=np.int64)
                ids = sample_ids(positions, size=self._reader.num_samples("train"), seed=self.spec.train.seed)
                self._keep_samples(microbatch, self._reader.batch(ids))
            return message.microbatches
        # Fixed samples, evenly spread over the validation part, forward through all stages.
        pieces = list(cut(evenly_spread(self.spec.num_validation, self.spec.eval.windows), size))
        self._num_microbatches, self._sizes = len(pieces), [len(ids) for ids in pieces]
        for number, ids in enumerate(pieces):
            self._keep_samples(number, self._reader.batch(ids, "val"))
        return tuple(range(len(pieces)))

    def _send(self, place: PeerPlace, call: Call) -> None:
        self._hands.send(place, self._request(call))

    def _withdraw(self, place: PeerPlace, call: Call) -> None:
        self._hands.withdraw(place, call, self.round_)

    def _report(self, message: FromTrainer) -> None:
        self._hands.tell(message)

    def _loss(self, stage: int) -> float | None:
        return sum(loss for _, loss in sorted(self._losses.items())) if stage == self.num_stages - 1 else None

    def _score(self) -> float:
        return math.fsum(self._losses[number] * size for number, size in enumerate(self._sizes)) / sum(self._sizes)

    # ------------------------------------------------------------ what comes of requests

    def replied(self, call: Call, round_: int, reply: Reply, data: NDArray[Any] | None) -> None:
        """A peer answered, and `data` is what it made."""
        if self._is_stale(call, round_):
            return
        if reply.begin in (Begin.RUN, Begin.DONE):
            self._take(call, reply, data)
        self._answered(call, reply.begin, reply.seconds)

    def withdrawn(self, call: Call, round_: int, reply: Reply | None, data: NDArray[Any] | None) -> None:
        """A peer answered a withdrawal: with the reply of what it has counted, or with None."""
        if self._is_stale(call, round_):
            return
        if reply is not None:
            self._take(call, reply, data)
        self._given_back(call, done=reply is not None)

    def failed(self, call: Call, round_: int, reason: str) -> None:
        """A peer raised an error in a call: nothing was counted (`StagePeer.run`), it can go elsewhere at once."""
        if self._is_stale(call, round_):
            return
        self._num_errors += 1
        if self._num_errors > MAX_ERRORS:
            self._hands.tell(GaveUp(step=self.step, round_=self.round_, reason=f"{call.peer}: {reason}"))
        self._tell(Refused(call=call, reason=reason))

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

    def _request(self, call: Call) -> Request:
        backward, last = call.direction == "backward", self.num_stages - 1
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

    def _keep_samples(self, microbatch: int, tokens: NDArray[np.int64]) -> None:
        self._keep(microbatch, "input", 0, tokens[:, :-1])
        self._keep(microbatch, "other", self.num_stages - 1, tokens[:, 1:])

    def _keep(self, microbatch: int, what: str, stage: int, values: NDArray[np.int64]) -> None:
        key = self._kept(microbatch, what, stage)
        self._store.put(key, np.ascontiguousarray(values))
        self._shapes[key] = values.shape

    def _forget(self, step: int) -> None:
        self._store.discard(f"kept/{step}")
        self._shapes = {key: shape for key, shape in self._shapes.items() if not key.startswith(f"kept/{step}/")}
