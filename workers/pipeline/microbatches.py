"""A trainer's microbatches on their way through the stages: a pure machine, `handle(event, now_s) -> commands`.

A microbatch goes forward through stages 0 to S-2, then backward through S-1 (which also computes the loss) to 0. The
tensor at each boundary is kept by the shell from the reply that brought it until `Release`: until the step is
*committed* in every stage. With them any peer can do any call again:

    forward failed or timed out     -> another peer, at once: a forward leaves nothing behind
    backward refused                -> another peer, at once: the peer said that it is not done
    backward timed out              -> Withdraw; "not done" -> another peer; "done" -> it counts where it is
    withdrawal unanswered, or dead  -> AskFence; another peer only once the controller has fenced the first one
    a peer was fenced for a step    -> all that it had counted in that step is computed again elsewhere
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from workers.pipeline.calls import BACKWARD_SIZE, FORWARD_SIZE, Call, Direction
from workers.pipeline.router import Router

MAX_DOUBLINGS = 8


# ---------------------------------------------------------------- events


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOpened:
    """These microbatches are this trainer's in a step; all stages have the parameters for it."""

    step: int
    microbatches: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Announced:
    """A peer serves a stage."""

    peer: str
    stage: int
    announcement: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Replied:
    """A call was done; the shell holds its tensor. `seconds` is the peer's own time for it."""

    call: Call
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """The peer did not do the call and will not: nothing was counted. `lasting`: it serves this stage no more."""

    call: Call
    reason: str
    lasting: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Unreachable:
    """The call, or its withdrawal, failed on the way or its peer died: nobody knows what was done."""

    call: Call
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Withdrawn:
    """The peer's answer to a withdrawal. With `done` the shell has fetched the reply again."""

    call: Call
    done: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Fenced:
    """The controller excluded a peer from a step: nothing that it counted there will be in the commit."""

    peer: str
    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Committed:
    """A stage has committed a step."""

    stage: int
    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Tick:
    """Time passed."""


Event = StepOpened | Announced | Replied | Refused | Unreachable | Withdrawn | Fenced | Committed | Tick

# ---------------------------------------------------------------- commands


@dataclass(frozen=True, kw_only=True, slots=True)
class Send:
    """Send the call with the kept tensors it needs."""

    call: Call


@dataclass(frozen=True, kw_only=True, slots=True)
class Withdraw:
    """Ask the call's peer whether it is done; "not done" is a promise."""

    call: Call


@dataclass(frozen=True, kw_only=True, slots=True)
class AskFence:
    """Ask the controller to fence a peer for a step."""

    peer: str
    step: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StageDone:
    """All of this trainer's microbatches are counted in a stage, where `counted` says (again after a loss)."""

    step: int
    stage: int
    counted: tuple[tuple[int, str], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """The step is committed in every stage: its tensors are not needed any more."""

    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """All microbatches of an evaluation went through all stages: it is over, and nothing of it is kept."""

    step: int


Command = Send | Withdraw | AskFence | StageDone | Release | Scored


@dataclass(kw_only=True, slots=True)
class _Job:
    """One call that is wanted: waiting for a peer, under way, or in doubt."""

    call: Call | None = None
    deadline_s: float = 0.0
    state: Literal["waiting", "sent", "withdrawing", "fencing"] = "waiting"
    not_before_s: float = 0.0
    avoid: set[str] = field(default_factory=set)
    num_timeouts: int = 0


@dataclass(kw_only=True, slots=True)
class _Microbatch:
    num_inputs: int = 1  # stages whose input is kept; that of stage 0 are the tokens
    num_gradients: int = 0  # stages, from the last one, whose backward has given the gradient of its input
    started: bool = False
    forwarded: dict[int, str] = field(default_factory=dict)  # stage -> peer whose forward is kept
    counted: dict[int, str] = field(default_factory=dict)  # stage -> peer
    jobs: dict[tuple[Direction, int], _Job] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class _Step:
    microbatches: dict[int, _Microbatch]
    committed: set[int] = field(default_factory=set)
    reported: set[int] = field(default_factory=set)
    fenced: set[str] = field(default_factory=set)


def after_timeout(direction: Direction) -> Literal["elsewhere", "withdraw"]:
    """What follows a call without an answer: a backward may have been counted."""
    return "elsewhere" if direction == "forward" else "withdraw"


def patience(num_timeouts: int) -> float:
    """Factor of a call's timeout after some that were too short: a slow peer that is the last of its stage must do."""
    return float(2 ** min(num_timeouts, MAX_DOUBLINGS))


def lost_with(peer: str, counted: dict[int, str]) -> list[int]:
    """Stages in which a microbatch was counted by a peer that was fenced."""
    return [stage for stage, holder in counted.items() if holder == peer]


class Microbatches:
    """See the module. `max_in_flight` bounds the microbatches that have begun and are not yet counted everywhere.

    `sticky`: a backward goes to the peer that did the forward where it can, since no other one has its parameters.
    """

    def __init__(
        self,
        *,
        num_stages: int,
        router: Router,
        max_in_flight: int,
        forward_timeout_s: float = 30.0,
        backward_timeout_s: float = 75.0,
        retry_s: float = 0.5,
        sticky: bool = False,
    ) -> None:
        assert num_stages >= 1 and max_in_flight >= 1, f"{num_stages} stages, {max_in_flight} in flight"
        self.router = router
        self._num_stages = num_stages
        self._max_in_flight = max_in_flight
        self._timeout_s: dict[Direction, float] = {"forward": forward_timeout_s, "backward": backward_timeout_s}
        self._retry_s, self._sticky = retry_s, sticky
        self._attempt = 0
        self._steps: dict[int, _Step] = {}
        self.counts: dict[str, int] = {}

    # ------------------------------------------------------------ what happens

    def handle(self, event: Event, now_s: float) -> list[Command]:
        """One event in, what to do out."""
        commands: list[Command] = []
        match event:
            case StepOpened():
                assert event.step not in self._steps, f"step {event.step} was opened before"
                self._steps[event.step] = _Step(microbatches={m: _Microbatch() for m in event.microbatches})
            case Announced():
                self.router.announce(event.peer, stage=event.stage, announcement=event.announcement)
            case Replied():
                self._on_replied(event)
            case Refused():
                self._on_refused(event, now_s)
            case Unreachable():
                commands += self._on_unreachable(event, now_s)
            case Withdrawn():
                self._on_withdrawn(event)
            case Fenced():
                self._on_fenced(event)
            case Committed():
                commands += self._on_committed(event)
            case Tick():
                commands += self._on_tick(now_s)
        commands += self._send_what_can(now_s)
        commands += self._report()
        return commands

    def restart(self, step: int) -> None:
        """Forget a step that is begun anew; its calls are stale, and attempts go on rising."""
        self._steps.pop(step, None)

    def next_deadline_s(self) -> float | None:
        """When a `Tick` is due at the latest; None if nothing waits for time."""
        times = [
            job.not_before_s if job.state == "waiting" else job.deadline_s
            for _, _, _, job in self._jobs()
            if job.state != "waiting" or job.not_before_s > 0
        ]
        return min(times, default=None)

    @property
    def num_in_flight(self) -> int:
        """Microbatches that have begun and are not counted in every stage."""
        return sum(
            microbatch.started and not self._is_over(number, microbatch)
            for number, step in self._steps.items()
            for microbatch in step.microbatches.values()
        )

    def _is_over(self, step: int, microbatch: _Microbatch) -> bool:
        if step < 0:
            return microbatch.num_inputs > self._num_stages
        return len(microbatch.counted) == self._num_stages

    def queues(self) -> dict[str, int]:
        """Calls that each peer has not answered."""
        found: dict[str, int] = {}
        for _, _, _, job in self._jobs():
            if job.call is not None and job.state == "sent":
                found[job.call.peer] = found.get(job.call.peer, 0) + 1
        return found

    @property
    def num_kept(self) -> int:
        """Boundary tensors (activations and gradients) that the shell keeps."""
        return sum(
            microbatch.num_inputs - 1 + min(microbatch.num_gradients, self._num_stages - 1)
            for step in self._steps.values()
            for microbatch in step.microbatches.values()
        )

    def _job_of(self, call: Call) -> _Job | None:
        """The job that a call belongs to, None if the call is not the current one any more."""
        microbatch = self._microbatch(call)
        job = microbatch.jobs.get((call.direction, call.stage)) if microbatch else None
        if job is None or job.call != call:
            self._count("stale answers")
            return None
        return job

    def _microbatch(self, call: Call) -> _Microbatch | None:
        step = self._steps.get(call.step)
        return step.microbatches.get(call.microbatch) if step else None

    def _on_replied(self, event: Replied) -> None:
        call = event.call
        self.router.answered(call.peer, size=call.size, seconds=event.seconds)
        self.router.lift(call.peer)  # late or not: it answers, so it serves
        if self._job_of(call) is not None:
            self._finish(call)

    def _finish(self, call: Call) -> None:
        microbatch = self._microbatch(call)
        assert microbatch is not None, f"no microbatch for {call}"
        del microbatch.jobs[(call.direction, call.stage)]
        if call.direction == "forward":
            microbatch.forwarded[call.stage] = call.peer
            microbatch.num_inputs = max(microbatch.num_inputs, call.stage + 2)
        else:
            microbatch.counted[call.stage] = call.peer
            microbatch.num_gradients = max(microbatch.num_gradients, self._num_stages - call.stage)

    def _on_refused(self, event: Refused, now_s: float) -> None:
        if event.lasting:
            self.router.ban(event.call.peer, event.reason)
        if (job := self._job_of(event.call)) is not None:
            self._count("refused")
            self._elsewhere(job, event.call.peer, not_before_s=now_s + self._retry_s)

    def _on_unreachable(self, event: Unreachable, now_s: float) -> list[Command]:
        self.router.ban(event.call.peer, event.reason)
        job = self._job_of(event.call)
        return [] if job is None else self._in_doubt(job, event.call, event.reason, now_s, asked=True)

    def _on_withdrawn(self, event: Withdrawn) -> None:
        job = self._job_of(event.call)
        if job is None:
            return
        if event.done:
            self._count("done after all")
            self._finish(event.call)
        else:
            self._count("not done")
            self._elsewhere(job, event.call.peer)

    def _on_fenced(self, event: Fenced) -> None:
        step = self._steps.get(event.step)
        if step is None:
            return
        step.fenced.add(event.peer)
        for microbatch in step.microbatches.values():
            for job in microbatch.jobs.values():
                if job.call is not None and job.call.peer == event.peer:
                    self._elsewhere(job, event.peer)
            for stage in lost_with(event.peer, microbatch.counted):
                if stage not in step.committed:
                    del microbatch.counted[stage]
                    step.reported.discard(stage)
                    self._count("computed again")

    def _on_committed(self, event: Committed) -> list[Command]:
        step = self._steps.get(event.step)
        if step is None:
            return []
        step.committed.add(event.stage)
        if len(step.committed) < self._num_stages:
            return []
        del self._steps[event.step]
        return [Release(step=event.step)]

    def _on_tick(self, now_s: float) -> list[Command]:
        commands: list[Command] = []
        for _, _, _, job in list(self._jobs()):
            if job.state in ("sent", "withdrawing", "fencing") and job.deadline_s <= now_s:
                assert job.call is not None, "a job under way has a call"
                self.router.ban(job.call.peer, f"no answer to {job.call.direction}")
                self._count(f"timeouts of {job.state}")
                job.num_timeouts += job.state == "sent"
                commands += self._in_doubt(job, job.call, "no answer", now_s, asked=job.state != "sent")
        return commands

    # ------------------------------------------------------------ what follows

    def _in_doubt(self, job: _Job, call: Call, reason: str, now_s: float, *, asked: bool) -> list[Command]:
        """No answer. `asked`: withdrawing would not help, or did not."""
        if after_timeout(call.direction) == "elsewhere":
            self._elsewhere(job, call.peer)
            return []
        job.deadline_s = now_s + self._timeout_s["forward"]
        if asked:
            job.state = "fencing"
            return [AskFence(peer=call.peer, step=call.step, reason=f"{reason}: {call.direction} {call.microbatch}")]
        job.state = "withdrawing"
        return [Withdraw(call=call)]

    def _elsewhere(self, job: _Job, peer: str, *, not_before_s: float = 0.0) -> None:
        job.call, job.state, job.not_before_s = None, "waiting", not_before_s
        job.avoid.add(peer)
        self._count("sent elsewhere")

    def _send_what_can(self, now_s: float) -> Iterator[Send]:
        free = self._max_in_flight - self.num_in_flight
        for number, step in sorted(self._steps.items()):
            for identity, microbatch in step.microbatches.items():
                if not microbatch.started:
                    if free <= 0:
                        continue
                    microbatch.started, free = True, free - 1
                self._want(number, step, microbatch)
                # A copy: nothing is added below, but the order of jobs must not depend on it.
                for (direction, stage), job in list(microbatch.jobs.items()):
                    if job.state == "waiting" and job.not_before_s <= now_s:
                        yield from self._send(job, step, number, identity, stage, direction, now_s)

    def _want(self, number: int, step: _Step, microbatch: _Microbatch) -> None:
        """Every call whose tensors are here and whose result is not, becomes a job."""
        last = self._num_stages - 1
        if number < 0:
            if microbatch.num_inputs <= self._num_stages:
                microbatch.jobs.setdefault(("forward", microbatch.num_inputs - 1), _Job())
            return
        for stage in range(min(microbatch.num_inputs, last)):
            if stage + 1 == microbatch.num_inputs:
                microbatch.jobs.setdefault(("forward", stage), _Job())
        for stage in range(last, -1, -1):
            has_input, has_gradient = stage < microbatch.num_inputs, microbatch.num_gradients >= last - stage
            if has_input and has_gradient and stage not in microbatch.counted and stage not in step.committed:
                microbatch.jobs.setdefault(("backward", stage), _Job())

    def _send(
        self, job: _Job, step: _Step, number: int, identity: int, stage: int, direction: Direction, now_s: float
    ) -> Iterator[Send]:
        size = FORWARD_SIZE if direction == "forward" else BACKWARD_SIZE
        forwarded = step.microbatches[identity].forwarded.get(stage) if direction == "backward" else None
        prefer = forwarded if self._sticky else None
        peer = self.router.choose(stage, size=size, avoid=job.avoid | step.fenced, prefer=prefer)
        if peer is None:
            # Everybody was tried: whoever refused or failed for a while may be asked again.
            job.avoid.clear()
            job.not_before_s = now_s + self._retry_s
            return
        self._attempt += 1
        job.call = Call(
            step=number, microbatch=identity, stage=stage, direction=direction, attempt=self._attempt, peer=peer
        )
        timeout_s = self._timeout_s[direction] * patience(job.num_timeouts)
        job.state, job.deadline_s, job.not_before_s = "sent", now_s + timeout_s, 0.0
        yield Send(call=job.call)

    def _report(self) -> Iterator[StageDone | Scored]:
        for number, step in sorted(self._steps.items()):
            if number < 0:
                if all(self._is_over(number, microbatch) for microbatch in step.microbatches.values()):
                    del self._steps[number]
                    yield Scored(step=number)
                continue
            for stage in range(self._num_stages):
                if stage in step.reported or stage in step.committed:
                    continue
                if all(stage in microbatch.counted for microbatch in step.microbatches.values()):
                    step.reported.add(stage)
                    counted = tuple((m, one.counted[stage]) for m, one in sorted(step.microbatches.items()))
                    yield StageDone(step=number, stage=stage, counted=counted)

    def _jobs(self) -> Iterable[tuple[int, int, int, _Job]]:
        for number, step in self._steps.items():
            for identity, microbatch in step.microbatches.items():
                for (_, stage), job in microbatch.jobs.items():
                    yield number, identity, stage, job

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1
