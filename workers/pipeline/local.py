"""A pipeline in one process: real stages, real tensors over the loopback transport, virtual time.

For tests, and as the pattern for the shells to come: what a trainer does with the commands of `Microbatches` is in
`LocalPipeline._obey`, what a controller does with a stage's offers in `_commit`. One thread; a peer works through its
queue at its `speed` (calls of size 1 a virtual second). `on_call` may lose a reply or kill the peer at any call.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from workers.pipeline.accumulator import Begin, cover
from workers.pipeline.boundary import Boundary
from workers.pipeline.calls import Call
from workers.pipeline.gradients import Gradients, add_tied, reduce_in_order
from workers.pipeline.layers import StageModel
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
    Send,
    StageDone,
    StepOpened,
    Tick,
    Unreachable,
    Withdraw,
    Withdrawn,
)
from workers.pipeline.peer import FETCH_TIMEOUT_S, Reply, Request, StagePeer
from workers.pipeline.router import Router
from workers.pipeline.stage import Loss
from workers.store import BlobStore
from workers.transport.loopback import LoopbackNetwork, LoopbackTransport

MAX_IDLE_TICKS = 100
"""Ticks in a row in which nothing else happened, after which a step is given up: a stage has nobody left."""

Fate = Literal["ok", "lose the reply", "lose the request", "die before", "die after"]


@dataclass(kw_only=True, slots=True)
class _Host:
    peer: StagePeer
    speed: float
    announcement: int = 1
    free_at_s: float = 0.0
    alive: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """One committed step: loss of the batch, the gradients that were applied, by stage, and which peer did what."""

    loss: float
    gradients: tuple[Gradients, ...]
    counted: tuple[dict[int, str], ...]


class LocalPipeline:
    """See the module. `build(stage)` makes a stage's model at version 0; `peers`: name -> (stage, speed).

    `input_type` and `target_type` are names of `peer.RAW_TYPES`.
    """

    def __init__(
        self,
        *,
        num_stages: int,
        build: Callable[[int], StageModel],
        peers: dict[str, tuple[int, float]],
        loss_fn: Loss,
        optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
        boundary: str = "fp32",
        seed: int = 0,
        max_in_flight: int = 8,
        ordered: bool = True,
        on_call: Callable[[Call], Fate] = lambda call: "ok",
    ) -> None:
        self._num_stages, self._build, self._optimizer, self._loss_fn = num_stages, build, optimizer, loss_fn
        self._boundary, self._seed, self._ordered, self._on_call = Boundary(boundary, seed), seed, ordered, on_call
        self._network = LoopbackNetwork()
        self._store = BlobStore()
        self._transport = LoopbackTransport(self._network, "trainer", self._store)
        self._transport.start()
        self.machine = Microbatches(
            num_stages=num_stages,
            router=Router(trainer="trainer"),
            max_in_flight=max_in_flight,
            forward_timeout_s=30.0,
            backward_timeout_s=75.0,
        )
        self.hosts: dict[str, _Host] = {}
        self.now_s = 0.0
        self.fenced: list[tuple[str, int]] = []
        self._serial = self._idle_ticks = 0
        self._waiting: list[tuple[float, int, Callable[[], None]]] = []
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._losses: dict[int, float] = {}
        self._ready: set[int] = set()
        self._results: dict[int, tuple[Gradients, dict[int, str]]] = {}
        self._inputs: Sequence[Tensor] = ()
        self._targets: Sequence[Tensor] = ()
        self._step = 0
        for name, (stage, speed) in peers.items():
            self.join(name, stage=stage, speed=speed)

    def join(self, name: str, *, stage: int, speed: float = 1.0) -> None:
        """Add a peer, with the parameters and optimizer of a live one of the stage if there is one."""
        store = BlobStore()
        transport = LoopbackTransport(self._network, name, store)
        transport.start()
        model = self._build(stage)
        mates = [host.peer for host in self._live(stage)]
        peer = StagePeer(
            name=name,
            stage=stage,
            num_stages=self._num_stages,
            model=model,
            loss_fn=self._loss_fn,
            boundary=self._boundary,
            optimizer=self._optimizer,
            store=store,
            transport=transport,
            seed=self._seed,
            ordered=self._ordered,
            version=mates[0].accumulator.version if mates else self._step,
        )
        if mates:
            peer.take_state(mates[0])
        self.hosts[name] = _Host(peer=peer, speed=speed, free_at_s=self.now_s)
        self._tell(Announced(peer=name, stage=stage, announcement=1))

    def kill(self, name: str) -> None:
        """End a peer, with everything that it had counted."""
        self.hosts[name].alive = False
        self.hosts[name].peer.transport.stop()

    def train_step(self, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> StepResult:
        """One step on these microbatches. Raises RuntimeError where nothing is left that could finish it."""
        step = self._step
        self._ready, self._results, self._losses = set(), {}, {}
        self._inputs, self._targets = inputs, targets
        for microbatch, (x, y) in enumerate(zip(inputs, targets, strict=True)):
            self._keep(step, microbatch, "input", 0, x)
            self._keep(step, microbatch, "other", self._num_stages - 1, y)
        self._tell(StepOpened(step=step, microbatches=tuple(range(len(inputs)))))
        while len(self._results) < self._num_stages:
            self._run_next()
        self._step += 1
        stages = [self._results[stage] for stage in range(self._num_stages)]
        return StepResult(
            loss=sum(loss for _, loss in sorted(self._losses.items())),
            gradients=tuple(gradients for gradients, _ in stages),
            counted=tuple(counted for _, counted in stages),
        )

    @property
    def num_kept_bytes(self) -> int:
        """Boundary tensors and inputs that the trainer holds now."""
        return self._store.num_bytes

    # ------------------------------------------------------------ time

    def _at(self, time_s: float, what: Callable[[], None]) -> None:
        self._serial += 1
        heapq.heappush(self._waiting, (time_s, self._serial, what))

    def _run_next(self) -> None:
        deadline_s = self.machine.next_deadline_s()
        if self._waiting and (deadline_s is None or self._waiting[0][0] <= deadline_s):
            self._idle_ticks = 0
            self.now_s, _, what = heapq.heappop(self._waiting)
            what()
        elif deadline_s is not None and self._idle_ticks < MAX_IDLE_TICKS:
            self._idle_ticks += 1
            self.now_s = max(self.now_s, deadline_s)
            self._tell(Tick())
        else:
            raise RuntimeError(f"step {self._step} cannot go on; banned are {self.machine.router.banned()}")

    def _tell(self, event: Event) -> None:
        for command in self.machine.handle(event, self.now_s):
            self._obey(command)

    # ------------------------------------------------------------ the trainer's hands

    def _obey(self, command: Command) -> None:
        match command:
            case Send(call=call):
                host = self.hosts[call.peer]
                host.free_at_s = max(host.free_at_s, self.now_s) + call.size / host.speed
                self._at(host.free_at_s, lambda: self._serve(call))
            case Withdraw(call=call):
                self._at(self.now_s, lambda: self._withdraw(call))
            case AskFence():
                self._at(self.now_s, lambda: self._fence(command.peer, command.step))
            case StageDone():
                self._ready.add(command.stage)
                self._at(self.now_s, lambda: self._commit(command.step))
            case Release(step=step):
                self._store.discard(f"kept/{step}")

    def _serve(self, call: Call) -> None:
        host = self.hosts[call.peer]
        fate = self._on_call(call) if host.alive else "ok"
        if fate == "die before":
            self.kill(call.peer)
        if not host.alive:
            self._tell(Unreachable(call=call, reason="it died"))
            return
        if fate == "lose the request":
            return
        reply = host.peer.run(self._request(call))
        if fate == "die after":
            self.kill(call.peer)
            self._tell(Unreachable(call=call, reason="it died"))
        elif fate == "ok":
            self._take(call, reply, seconds=call.size / host.speed)

    def _take(self, call: Call, reply: Reply, *, seconds: float) -> None:
        if reply.begin not in (Begin.RUN, Begin.DONE):
            self._tell(Refused(call=call, reason=reply.begin.value))
            return
        if reply.key:
            data = self._transport.fetch(
                self.hosts[call.peer].peer.transport.address,
                (reply.key,),
                timeout_s=FETCH_TIMEOUT_S,
                max_bytes=self._boundary.num_bytes(torch.Size(reply.shape).numel()),
            )[0].data
            what, stage = ("input", call.stage + 1) if call.direction == "forward" else ("other", call.stage - 1)
            key = self._kept(call.step, call.microbatch, what, stage)
            self._store.put(key, data)
            self._shapes[key] = reply.shape
        if reply.loss is not None:
            self._losses[call.microbatch] = reply.loss
        self._tell(Replied(call=call, seconds=seconds))

    def _withdraw(self, call: Call) -> None:
        host = self.hosts[call.peer]
        if not host.alive:
            self._tell(Unreachable(call=call, reason="it died"))
            return
        if host.peer.accumulator.withdraw(call.step, call.microbatch, call.attempt):
            self._take(call, host.peer.reply_again(call), seconds=call.size / host.speed)
        else:
            self._tell(Withdrawn(call=call, done=False))
        # It answers, so it serves: announced anew.
        host.announcement += 1
        self._tell(Announced(peer=call.peer, stage=host.peer.stage, announcement=host.announcement))

    def _request(self, call: Call) -> Request:
        last = self._num_stages - 1
        backward = call.direction == "backward"
        input_key = self._kept(call.step, call.microbatch, "input", call.stage)
        other_key = self._kept(call.step, call.microbatch, "other", call.stage) if backward else ""
        return Request(
            call=call,
            address=self._transport.address,
            input_key=input_key,
            other_key=other_key,
            input_shape=self._shapes[input_key],
            other_shape=self._shapes[other_key] if backward else (),
            input_type=_type_name(self._inputs[call.microbatch]) if call.stage == 0 else "encoded",
            other_type=_type_name(self._targets[call.microbatch]) if call.stage == last else "encoded",
            weight=1.0 / len(self._inputs),
        )

    @staticmethod
    def _kept(step: int, microbatch: int, what: str, stage: int) -> str:
        return f"kept/{step}/{microbatch}/{what}/{stage}"

    def _keep(self, step: int, microbatch: int, what: str, stage: int, values: Tensor) -> None:
        key = self._kept(step, microbatch, what, stage)
        self._store.put(key, values.contiguous().view(-1).numpy())
        self._shapes[key] = tuple(values.shape)

    # ------------------------------------------------------------ the controller's hands

    def _live(self, stage: int) -> list[_Host]:
        return [host for host in self.hosts.values() if host.alive and host.peer.stage == stage]

    def _fence(self, name: str, step: int) -> None:
        host = self.hosts[name]
        self.fenced.append((name, step))
        if host.peer.stage not in self._results:
            self._ready.discard(host.peer.stage)
        if host.alive:
            host.peer.fence(step)
        self._tell(Fenced(peer=name, step=step))

    def _commit(self, step: int) -> None:
        """Commit the stages that are complete; with tied embeddings the first and the last one together."""
        last = self._num_stages - 1
        tied = next((host.peer.model.copy_of for host in self._live(0)), None) if last else None
        groups = [{0, last}, *({stage} for stage in range(1, last))] if tied else [{s} for s in range(last + 1)]
        for group in groups:
            if group & self._results.keys() or not group <= self._ready:
                continue
            lost = [n for n, h in self.hosts.items() if not h.alive and h.peer.stage in group and self._holds(n, step)]
            for name in lost:
                self._fence(name, step)
            if lost:
                continue
            reduced = {stage: self._reduce(stage, step) for stage in group}
            copies: Gradients = {}
            if tied and last in group:
                reduced[last] = add_tied(reduced[last], reduced[0], tied)
            # The owner first: the first stage takes the values that its step gives.
            for stage in sorted(group, reverse=True):
                self._apply(stage, step, reduced[stage], copies if stage == 0 and tied else {})
                if tied and stage == last:
                    copies = {tied: self._live(last)[0].peer.model.names[tied].detach()}

    def _holds(self, name: str, step: int) -> bool:
        peer = self.hosts[name].peer
        return bool(peer.accumulator.offer(step)) and (name, step) not in self.fenced

    def _reduce(self, stage: int, step: int) -> Gradients:
        offers = {host.peer.name: host.peer.accumulator.offer(step) for host in self._live(stage)}
        lacks = cover(offers, range(len(self._inputs)))
        assert lacks.exact, f"stage {stage} of step {step} is no disjoint cover: {lacks}, of {offers}"
        numbered = sorted(self._live(stage), key=lambda host: host.peer.name)
        return reduce_in_order(host.peer.gradients.parts(step, number) for number, host in enumerate(numbered))

    def _apply(self, stage: int, step: int, reduced: Gradients, copies: Gradients) -> None:
        live = self._live(stage)
        counted = {m: host.peer.name for host in live for m in host.peer.accumulator.offer(step)}
        for host in live:
            host.peer.apply(step, reduced, copies=copies)
        self._results[stage] = (reduced, counted)
        self._at(self.now_s, lambda: self._tell(Committed(stage=stage, step=step)))


def _type_name(values: Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")
