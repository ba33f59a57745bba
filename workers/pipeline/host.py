"""A stage peer's process without its shell: states of stages, calls of trainers, and its part of each commit.

Numbered calls of one step, all from the controller, which decides everything: `Collect` (what was counted; gradients
can be fetched), `Reduce` (add these chunks), `Spread` (fetch the sums, compute the next state), and once the step is on
the record `Apply`. A peer holds the state of the stage that it serves, and those of which it is the buddy: a buddy
takes part in `Spread` and `Apply` like anybody else.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from strategies.codecs.base import is_finite
from workers.pipeline.accumulator import Begin
from workers.pipeline.boundary import Boundary
from workers.pipeline.calls import BACKWARD_SIZE, Call
from workers.pipeline.memory import machine_bytes
from workers.pipeline.messages import (
    Alive,
    Applied,
    Apply,
    Collect,
    Done,
    DropStage,
    FenceStep,
    FromPeer,
    Have,
    Holds,
    LocalStep,
    Offered,
    OfferWork,
    Ping,
    Probe,
    Probed,
    Reduce,
    Reduced,
    SaveStage,
    Spread,
    TakeStage,
    ToPeer,
)
from workers.pipeline.peer import NotFinite, Reply, Request, StagePeer
from workers.pipeline.pieces import Pieces
from workers.pipeline.spec import TIED, PipelineSpec
from workers.pipeline.state import Flats, StageState, flatten
from workers.pipeline.user_layers import build_stage, loss_of
from workers.store import BlobStore
from workers.transport.base import Transport

VERSION_WAIT_S = 2.0


class PeerError(Exception):
    """An order that cannot be obeyed now; says what is held instead."""


class Damaged(Exception):
    """The parameters that this process holds are not finite, and those of nobody else: it cannot go on."""


class PeerHost:
    """See the module. `process`: name of the process; `calls` may come on several threads, and so may orders."""

    def __init__(
        self,
        spec: PipelineSpec,
        process: str,
        store: BlobStore,
        transport: Transport,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.spec, self.process = spec, process
        self.held: dict[int, StageState] = {}
        self.serving: StagePeer | None = None
        self.busy_s = 0.0
        self._pieces = Pieces(spec, store, transport)
        self._store, self._transport = store, transport
        self._clock, self._sleep = clock, sleep
        self._pace_s = spec.pipeline.pace_for(process)
        self._rounds: dict[int, int] = {}
        # Of `_rounds` and of the numbers of calls: withdrawals and pings do not wait for what is computed.
        self._noted = threading.Lock()
        self._num_begun = self._num_ended = 0
        # One call at a time: a peer is one device. Orders that change what calls see take it too.
        self._compute = threading.RLock()
        self._orders = threading.RLock()
        self._moved = threading.Condition()
        # What a fault injector puts at the end of each call, which has taken so many seconds. Nothing in production.
        self.after_call: Callable[[float], None] = lambda seconds: None

    def present(self) -> dict[str, Any]:
        """What a controller that does not know this process asks for: fields of its `Joined`."""
        with self._orders:
            states = sorted(self.held.items())
            return {
                "memory_bytes": self.spec.pipeline.peer_memory_bytes or machine_bytes(),
                "held": tuple((stage, state.version) for stage, state in states),
                "has_next": tuple((stage, state.next.digest) for stage, state in states if state.next is not None),
                "serves": self.serving.stage if self.serving is not None else None,
            }

    # ------------------------------------------------------------ trainers

    def call(self, request: Request) -> Reply:
        """Do a call of a trainer. Raises what transport and codec raise; nothing is counted then."""
        with self._noted:
            self._num_begun += 1
        try:
            return self._call(request)
        finally:
            with self._noted:
                self._num_ended += 1

    def _call(self, request: Request) -> Reply:
        peer = self._wait_for(request)
        if peer is None:
            return Reply(begin=Begin.OTHER_VERSION)
        asked_s = self._clock()
        fetched = peer.fetch(request)
        fetch_s = self._clock() - asked_s
        with self._compute:
            if self.serving is not peer or not self._is_current(request.call.step, request.round_):
                return Reply(begin=Begin.OTHER_VERSION)
            began_s = self._clock()
            try:
                with self._computes_with(request):
                    reply = peer.run(request, fetched)
            except NotFinite as error:
                self._must_be_sound(peer, error)
                raise
            self._keep_pace(request.call, began_s)
            self.after_call(self._clock() - began_s)
            seconds = self._clock() - began_s
            self.busy_s += seconds
        # The next call's tensors come while this one computes: the longer of the two is what a call takes.
        return replace(reply, seconds=max(seconds, fetch_s))

    def _computes_with(self, request: Request) -> AbstractContextManager[None]:
        """The parameters for a call: those that the peer has."""
        return nullcontext()

    def _must_be_sound(self, peer: StagePeer, error: NotFinite) -> None:
        """What is committed is finite, and a step that is not is never made: if these values are not, they are broken.

        Else the numbers of the run are: no other peer would do better.
        """
        for name, parameter in peer.model.names.items():
            if not is_finite(parameter.detach()):
                raise Damaged(f"{peer.name} holds {name} with values that are not finite; {error}") from error

    def lose_a_number(self) -> None:
        """Injected fault: one value of what this peer computes with is not a number any more."""
        with self._compute:
            if self.serving is not None:
                with torch.no_grad():
                    next(iter(self.serving.model.names.values())).view(-1)[0] = math.nan

    def withdraw(self, call: Call, round_: int) -> Reply | None:
        """The reply of a backward that is counted here; None: this attempt is not, and never will be."""
        peer = self.serving
        # Of a round that no call has come of yet: the promise is made in that round, or its first call would undo it.
        if peer is None or peer.name != call.peer or not self._is_current(call.step, round_):
            return None  # whatever it was is void
        return peer.withdraw(call)

    def _wait_for(self, request: Request) -> StagePeer | None:
        """The peer that the call is for, once it has the parameters of the step; None if it is not here."""
        deadline_s = time.monotonic() + VERSION_WAIT_S
        with self._moved:
            while True:
                peer = self.serving
                if peer is None or peer.name != request.call.peer:
                    return None
                if peer.accumulator.version >= request.version and not self._waits(request.version):
                    return peer
                if not self._moved.wait(deadline_s - time.monotonic()):
                    return None

    def _waits(self, version: int) -> bool:
        """Whether the parameters for a step are not here yet, although the step before it is done with."""
        return False

    def _keep_pace(self, call: Call, began_s: float) -> None:
        pace_s = self._pace_s * (BACKWARD_SIZE if call.direction == "backward" else 1.0)
        left_s = began_s + pace_s - self._clock()
        if left_s > 0:
            self._sleep(left_s)

    def _is_current(self, step: int, round_: int) -> bool:
        """Whether a round is the newest; a newer one than was known begins the step anew."""
        with self._noted:
            known = self._rounds.get(step, 0)
            if round_ > known:
                self._rounds[step] = round_
                if self.serving is not None:
                    self.serving.restart(step)
            return round_ >= known

    # ------------------------------------------------------------ the controller

    def do(self, order: ToPeer) -> FromPeer:
        """Obey an order; all may be repeated. Raises PeerError, or what the transport raises."""
        match order:
            case Probe(addresses=addresses):
                return Probed(seconds=self._pieces.probe(addresses, self._clock))
            case TakeStage():
                return self._take(order)
            case Collect():
                return self._collect(order)
            case Reduce():
                return Reduced(sums=self._pieces.reduce(order))
            case Spread():
                return self._spread(order)
            case Apply():
                return self._apply(order)
            case FenceStep(peer=name, step=step, round_=round_):
                peer = self.serving
                if peer is not None and peer.name == name and self._is_current(step, round_):
                    peer.fence(step)
            case DropStage(stage=stage):
                self._drop(stage)
            case SaveStage():
                self._save(order)
            case Ping():
                with self._noted:
                    return Alive(progress=self._num_ended, owes=self._num_begun > self._num_ended)
            case LocalStep() | OfferWork():
                raise PeerError(f"{self.process} makes no steps of its own: {order}")
        return Done()

    def _take(self, order: TakeStage) -> Holds:
        with self._orders:
            state = self.held.get(order.stage)
            if state is None or state.version != order.version:
                state = self._obtain(order)
                self.held[order.stage] = state
                self._pieces.publish_state(state)
            if order.serve_as is not None:
                step = state.version if order.step is None else order.step
                self._serve(state, order.serve_as, step)
            return Holds(stage=order.stage, version=state.version, digest=state.digest)

    def _obtain(self, order: TakeStage) -> StageState:
        if order.from_folder is not None:
            return self._load(order.stage, Path(order.from_folder), order.version)
        if order.sources:
            flats = self._pieces.pull(order.stage, order.version, order.sources)
            return StageState(self.spec, order.stage, flats, version=order.version)
        if order.version != 0:
            raise PeerError(f"stage {order.stage} at version {order.version} is held nowhere")
        model = build_stage(self.spec, self.spec.stages[order.stage])
        state = StageState.begin(self.spec, order.stage, model)
        if order.tied_from is not None:
            last = self.spec.num_stages - 1
            state.flats |= self._pieces.pull(last, 0, (order.tied_from,), units=(TIED,))
        return state

    def _serve(self, state: StageState, name: str, step: int) -> None:
        known = self.serving
        if known is not None and known.name == name and known.accumulator.version == step:
            return  # of the same name with an older state: a step was committed on its way, and nobody has called it
        spec = self.spec
        model = build_stage(spec, spec.stages[state.stage])
        peer = StagePeer(
            name=name,
            stage=state.stage,
            num_stages=spec.num_stages,
            model=model,
            loss_fn=loss_of(spec),
            boundary=Boundary(spec.pipeline.boundary, spec.train.seed),
            optimizer=None,
            store=self._store,
            transport=self._transport,
            seed=spec.train.seed,
            ordered=not spec.is_local,
            version=step,
            num_open_steps=2 if spec.pipeline.delayed else 1,
        )
        with self._compute, self._moved:
            for held in self.held.values():
                held.bind_nothing()
            self._bind(state, peer)
            self.serving = peer
            self._moved.notify_all()

    def _bind(self, state: StageState, peer: StagePeer) -> None:
        """What a peer computes with is the state itself."""
        state.bind(peer.model)

    def _collect(self, order: Collect) -> Offered:
        peer = self.serving
        if peer is None or peer.name != order.peer:
            return Offered(microbatches=())
        with self._compute:
            if not self._is_current(order.step, order.round_):
                raise PeerError(f"{order.peer} is in a newer round of step {order.step}")
            with peer.book:
                offer = peer.accumulator.offer(order.step)
                if self.spec.is_local:
                    return Offered(microbatches=offer)  # nobody fetches gradients
                parts = {m: peer.gradients.parts(order.step, 0)[m] for m in offer}
        for microbatch, named in parts.items():
            prefix = f"piece/{order.step}/{order.round_}/{order.peer}/{microbatch}"
            flats = flatten(self.spec, peer.stage, named)
            self._pieces.publish(prefix, flats, counters=(order.step, microbatch, peer.stage))
        return Offered(microbatches=offer)

    def _spread(self, order: Spread) -> Have:
        state = self._state_at(order.stage, order.step)
        gradients = self._pieces.results(order)
        with self._orders:
            if state.version != order.step:
                raise PeerError(f"{self.process} moved on to version {state.version} of stage {order.stage}")
            following = state.compute_next(
                gradients,
                lr=order.lr,
                scale=order.scale,
                version=order.next_version,
                rounds=dict(order.outer_rounds),
            )
            for (unit, field), flat in following.flats.items():
                # The norm of the sums is finite, or nobody would have been asked.
                if not is_finite(flat):
                    raise Damaged(
                        f"{self.process} holds {unit} of stage {order.stage} with a {field} that is no number"
                    )
            return Have(digest=following.digest)

    def _state_at(self, stage: int, version: int) -> StageState:
        state = self.held.get(stage)
        if state is None or state.version != version:
            what = "nothing" if state is None else f"version {state.version}"
            raise PeerError(f"{self.process} holds {what} of stage {stage}, not version {version}")
        return state

    def _apply(self, order: Apply) -> Applied:
        with self._orders, self._compute:
            state = self.held.get(order.stage)
            if state is None or (state.version <= order.step and not state.apply(order.digest, order.version)):
                return Applied(done=False)
            if (peer := self.serving) is not None and peer.stage == order.stage:
                peer.committed(order.step)
            with self._noted:
                self._rounds = {step: round_ for step, round_ in self._rounds.items() if step > order.step}
        self._pieces.publish_state(state)
        self._pieces.forget(order.step)
        with self._moved:
            self._moved.notify_all()
        return Applied(done=True)

    def _drop(self, stage: int) -> None:
        with self._orders:
            if self.serving is None or self.serving.stage != stage:
                self.held.pop(stage, None)
                self._store.discard(f"state/{stage}")

    # ------------------------------------------------------------ files

    def _save(self, order: SaveStage) -> None:
        state = self._state_at(order.stage, order.version)
        folder = Path(order.folder)
        folder.mkdir(parents=True, exist_ok=True)
        flats = {f"{unit}/{field}": flat for (unit, field), flat in state.flats.items()}
        scratch = folder / f".stage-{order.stage}.{self.process}"
        save_file(flats, scratch)
        scratch.replace(folder / f"stage-{order.stage}.safetensors")

    def _load(self, stage: int, folder: Path, version: int) -> StageState:
        path = folder / f"stage-{stage}.safetensors"
        if not path.exists():
            raise PeerError(f"{path} is not here: stage {stage} cannot be taken from this snapshot")
        flats: Flats = {}
        for key, value in load_file(path).items():
            unit, _, field = key.rpartition("/")
            flats[unit, field] = value
        wanted = {unit: self.spec.num_values(unit) for unit in self.spec.units_of(stage)}
        found = {unit: flat.numel() for (unit, _), flat in flats.items()}
        if found != wanted:
            raise PeerError(f"{path} holds {found}, stage {stage} of this run has {wanted} values")
        return StageState(self.spec, stage, flats, version=version)
