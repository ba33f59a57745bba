"""What a trainer makes of its messages, whatever carries its tensors: of `TrainerHost` and of simulated ones. Pure.

The controller's messages may be repeated and late, and so may what peers answer: of each step and round only the newest
counts. What goes where is decided by `Microbatches`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from workers.pipeline.accumulator import Begin
from workers.pipeline.calls import Call, evaluation_of
from workers.pipeline.config import PipelineConfig
from workers.pipeline.messages import (
    Evaluate,
    Evaluated,
    FenceWanted,
    FromTrainer,
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
from workers.pipeline.router import Router

LASTING = (Begin.DRAINING,)
SMOOTHING = 0.3
"""Of measured throughput: a step has few calls of each peer, and a peer that slows down must be noticed within some."""


class TrainerDesk(ABC):
    """See the module. Not thread-safe: one thread calls it."""

    def __init__(
        self,
        name: str,
        num_stages: int,
        pipeline: PipelineConfig,
        clock: Callable[[], float],
        *,
        sticky: bool,
        retry_s: float = 0.2,
    ) -> None:
        """`sticky`: a microbatch stays with the peers that had it, which train on it for themselves."""
        self.name, self.num_stages, self._clock = name, num_stages, clock
        self.machine = Microbatches(
            num_stages=num_stages,
            router=Router(trainer=name, smoothing=SMOOTHING),
            max_in_flight=pipeline.in_flight,
            forward_timeout_s=pipeline.forward_timeout_s,
            backward_timeout_s=pipeline.backward_timeout_s,
            retry_s=retry_s,
            sticky=sticky,
        )
        self._newest = (0, 0, -1, 0)  # life, serial, step and round that were opened
        self._behind = 0  # updates that the parameters of the step lack
        self._evaluation = (0, 0)  # life and number
        # What is under way: a step, or an evaluation.
        self.step, self.round_ = 0, 0
        self._places: dict[str, PeerPlace] = {}
        self._num_events = 0

    # ------------------------------------------------------------ for the shell

    @abstractmethod
    def _lay_out(self, message: OpenStep | Evaluate) -> tuple[int, ...]:
        """Keep ready what the microbatches of a step or an evaluation need; their numbers."""

    @abstractmethod
    def _send(self, place: PeerPlace, call: Call) -> None:
        """Call a peer; then `_answered` or `unreachable`."""

    @abstractmethod
    def _withdraw(self, place: PeerPlace, call: Call) -> None:
        """Ask a peer to forget a call; then `_given_back` or `unreachable`."""

    @abstractmethod
    def _report(self, message: FromTrainer) -> None:
        """Tell the controller."""

    @abstractmethod
    def _loss(self, stage: int) -> float | None:
        """Of the step that is under way, where a stage has one."""

    @abstractmethod
    def _score(self) -> float:
        """What the evaluation came to."""

    @abstractmethod
    def _forget(self, step: int) -> None:
        """Nothing of a step is needed any more."""

    # ------------------------------------------------------------ the controller

    def handle(self, message: ToTrainer) -> None:
        """A message of the controller; all may be repeated."""
        match message:
            case OpenStep():
                newest = (message.life, message.serial, message.step, message.round_)
                if newest > self._newest:
                    self._newest, self._behind = newest, message.behind
                    self._begin(message.step, message.round_, message)
            case Evaluate():
                if (message.life, message.number) > self._evaluation:
                    self._evaluation, self._behind = (message.life, message.number), 0
                    self._begin(evaluation_of(message.version), message.number, message)
            case Peers(peers=peers):
                self._announce(peers)
            case PeerFenced(peer=peer, step=step):
                self._tell(Fenced(peer=peer, step=step))
            case StepCommitted(step=step):
                for stage in range(self.num_stages):
                    self._tell(Committed(stage=stage, step=step))

    def _begin(self, step: int, round_: int, message: OpenStep | Evaluate) -> None:
        self.machine.restart(self.step)
        self._forget(self.step)
        self.step, self.round_ = step, round_
        microbatches = self._lay_out(message)
        self._announce(message.peers)
        self._tell(StepOpened(step=self.step, microbatches=microbatches))

    def _announce(self, peers: tuple[PeerPlace, ...]) -> None:
        for name in self._places.keys() - {place.peer for place in peers}:
            self.machine.router.ban(name, "it does not serve any more")
        self._places |= {place.peer: place for place in peers}
        for place in peers:
            self._tell(Announced(peer=place.peer, stage=place.stage, announcement=place.announcement))

    # ------------------------------------------------------------ what comes of requests

    def _is_stale(self, call: Call, round_: int) -> bool:
        return (call.step, round_) != (self.step, self.round_)

    def _answered(self, call: Call, begin: Begin, seconds: float) -> None:
        """A peer answered: it has done the call, or refuses it."""
        if begin in (Begin.RUN, Begin.DONE):
            self._tell(Replied(call=call, seconds=seconds))
        else:
            self._tell(Refused(call=call, reason=begin.value, lasting=begin in LASTING))

    def _given_back(self, call: Call, *, done: bool) -> None:
        """A peer answered a withdrawal; `done`: it has counted the call."""
        self._tell(Withdrawn(call=call, done=done))
        # It answers, so it serves: it is not banned any longer than that.
        self.machine.router.lift(call.peer)

    def unreachable(self, call: Call, round_: int, reason: str) -> None:
        """The way to a peer, or to its tensors, is not there, or it failed in the call."""
        if not self._is_stale(call, round_):
            self._tell(Unreachable(call=call, reason=reason))

    def tick(self) -> None:
        """Time has passed."""
        deadline_s = self.machine.next_deadline_s()
        if deadline_s is not None and deadline_s <= self._clock():
            self._tell(Tick())

    def heartbeat(self) -> Heartbeat:
        """What the controller is told every so often."""
        queues = tuple(sorted(self.machine.queues().items()))
        return Heartbeat(progress=self._num_events, owes=self.machine.num_in_flight > 0, queues=queues)

    # ------------------------------------------------------------ commands

    def _tell(self, event: Event) -> None:
        self._num_events += 1
        for command in self.machine.handle(event, self._clock()):
            self._obey(command)

    def _obey(self, command: Command) -> None:
        match command:
            case Send(call=call):
                self._send(self._places[call.peer], call)
            case Withdraw(call=call):
                self._withdraw(self._places[call.peer], call)
            case AskFence(peer=peer, step=step, reason=reason):
                self._report(FenceWanted(peer=peer, step=step, round_=self.round_, reason=reason))
            case StageDone(step=step, stage=stage, counted=counted):
                self._report(self._ready(step, stage, counted))
            case Release(step=step):
                self._forget(step)
            case Scored():
                version, number = evaluation_of(self.step), self._evaluation[1]
                self._report(Evaluated(version=version, number=number, loss=self._score()))
                self._forget(self.step)

    def _ready(self, step: int, stage: int, counted: tuple[tuple[int, str], ...]) -> StageReady:
        router = self.machine.router
        speeds = {name: router.throughput(name) for name in router.serving(stage)}
        return StageReady(
            step=step, round_=self.round_, stage=stage, counted=counted, loss=self._loss(stage), throughputs=speeds
        )
