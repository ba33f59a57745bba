"""Who is here: the processes behind the members, when they were heard, and what they last said. Pure; clock passed in.

The journal decides who is a member; this table is what a controller knows in memory about the processes, and is
rebuilt from heartbeats after a restart. Suspicion is reversible and costs nothing; only a fence (journalled) is final.

    joining    its process was admitted and holds no state of every fragment yet
    healthy    it holds the state
    slow       its steps take much longer than the others' (`faults/stragglers.py`); nothing is taken from it
    suspect    silent (`faults/detector.py`) or hanging: not waited for, owns nothing; keeps its leases and its place
    draining   it was asked to leave, and hands over what it has
    fenced     not in this table any more: final for that incarnation, and in the journal
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from faults.detector import SilenceDetector
from faults.stragglers import HANG_S, Progress, SlowJudge, hang, has_shared_cause
from workers.messages import FragmentReport, Hello, ProcessInfo
from workers.records import MemberId

if TYPE_CHECKING:
    from orchestrator.run_state import Membership

Status = Literal["joining", "healthy", "slow", "suspect", "draining"]
COMPARE_EVERY_S, COMPARE_S_PER_MEMBER = 1.0, 1e-3


DRIFT = 1e-4
"""Seconds a second that a clock may run slower than another before times that it tells are off."""


def process_of(nonce: str) -> str:
    """What names a process: it takes a new nonce `<first>+<n>` for each incarnation."""
    return nonce.split("+")[0]


@dataclass(kw_only=True, slots=True)
class MemberClock:
    """A member's clock: what the controller adds to get its own time, and where the member's last span ended."""

    offset_s: float | None = None
    seen_s: float = 0.0
    span_end_s: float = float("-inf")

    def offset(self, sent_s: float, now: float) -> float:
        """The smallest difference seen so far: messages arrive late, never early. It follows clocks that drift."""
        found = now - sent_s
        if self.offset_s is not None:
            found = min(found, self.offset_s + DRIFT * (now - self.seen_s))
        self.offset_s, self.seen_s = found, now
        return found

    def span(self, start_s: float, end_s: float) -> tuple[float, float]:
        """A span cut to what comes after the one before it: a better offset may have moved it back a little."""
        start_s, end_s = max(start_s, self.span_end_s), max(end_s, self.span_end_s)
        self.span_end_s = end_s
        return start_s, end_s


@dataclass(kw_only=True, slots=True)
class Process:
    """A live incarnation's process. Times are the controller's own clock.

    `entry`: what the journal says of the incarnation, at hand, since looking up one of thousands waits for memory;
    `consumed`: samples, by its last heartbeat or what it has offered since; `holds_state`: of every fragment;
    `here`: its incarnation lives; `bytes_before`: what it had sent by the heartbeat before.
    """

    id: MemberId
    entry: Membership
    nonce: str
    info: ProcessInfo
    joined_s: float
    heard_s: float
    silence: str = ""
    hanging: str = ""
    slowness: str = ""
    draining: str = ""
    recovered: str = ""
    gaps: SilenceDetector | None = None
    hello: Hello | None = None
    consumed: int = 0
    holds_state: bool = False
    first_step_s: float | None = None
    stepping_since_s: float | None = None
    clock: MemberClock = field(default_factory=MemberClock)
    here: bool = True
    rows_sent: int = 0
    bytes_before: int = 0

    @property
    def status(self) -> Status:
        """What it is judged to be; the worst of what is known counts."""
        if self.is_suspect():
            return "suspect"
        if self.draining:
            return "draining"
        if not self.ready():
            return "joining"
        return "slow" if self.slowness else "healthy"

    def is_suspect(self) -> bool:
        """Whether it is silent or hangs."""
        return bool(self.silence or self.hanging)

    @property
    def reason(self) -> str:
        """Why it has its status."""
        match self.status:
            case "suspect":
                return self.silence or self.hanging
            case "draining":
                return self.draining
            case "joining":
                return "holds no state yet"
            case "slow":
                return self.slowness
            case _:
                return self.recovered or "holds the state"

    def progress(self) -> Progress:
        """What it last said of its training thread."""
        told = self.hello
        return Progress() if told is None else Progress(doing=told.doing, for_s=told.doing_s, step_s=told.step_s)

    def said(self, hello: Hello, now: float) -> bool:
        """It told how far it is; whether that includes its first inner step."""
        self.hello = hello
        self.holds_state = bool(hello.fragments)
        for report in hello.fragments:  # no `all`: everybody says this all the time
            if report.n < 0:
                self.holds_state = False
        return hello.consumed != self.consumed and self.consumed_to(hello.consumed, now)

    def consumed_to(self, consumed: int, now: float) -> bool:
        """It has trained on that much; whether that includes its first inner step."""
        first_step = self.consumed == 0 and consumed > 0
        if first_step:
            self.stepping_since_s = now
        self.consumed = consumed
        return first_step

    def trained_by(self, now: float, heartbeat_s: float) -> int:
        """Samples that it has probably consumed: to its last heartbeat's count comes what it made since, at its speed.

        At most one heartbeat's worth (had it lived longer, it would have been heard again), in whole steps.
        """
        since_s = self.stepping_since_s
        if self.hello is None or self.hello.waiting or since_s is None or self.heard_s <= since_s:
            return self.consumed
        per_s = self.consumed / (self.heard_s - since_s)
        steps = int(per_s * min(now - self.heard_s, heartbeat_s)) // max(self.info.batch_size, 1)
        return self.consumed + steps * self.info.batch_size

    @property
    def is_steady(self) -> bool:
        """Whether its steps have a usual length by now, so that one that takes too long is noticed."""
        told = self.progress()
        return told.step_s > 0.0 and told.doing not in ("starting", "first_steps")

    @property
    def stepped(self) -> bool:
        """Whether this incarnation has made an inner step."""
        return self.consumed > 0

    def blocked(self, fragment: int, head: int, watermark: int) -> bool:
        """Whether it has nothing to offer above `watermark` and makes no step either: it waits for another fragment.

        What it said before it had version `head` of this fragment does not count: it goes on with that one. Nor does
        that it waits for leases: whoever is asked about here has some, and did not know when it spoke. (It may evaluate
        first; an exchange closed without it, and the run had other bits than its twin in one process.)
        """
        report = self.report(fragment)
        waits = self.hello is not None and self.hello.waiting in ("bound", "exchange", "leaving")
        return waits and report is not None and report.n >= head and self.consumed <= watermark

    def report(self, fragment: int) -> FragmentReport | None:
        """What it last said about one fragment."""
        if self.hello is None or fragment >= len(self.hello.fragments):
            return None
        return self.hello.fragments[fragment]

    def ready(self) -> bool:
        """Whether it holds a state of every fragment, so that it can train, offer and own parts."""
        return self.holds_state


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A change of judgement on a member, with its reason. `hung`: it is to be ended; `fence`: limbo is over."""

    id: MemberId
    verdict: Literal["suspect", "healthy", "slow", "hung", "fence"]
    reason: str


@dataclass(kw_only=True, slots=True)
class Roll:
    """The processes of all live incarnations.

    `judges_hangs`: whether a member that makes no step is suspect. Not where nobody could replace it, and where a
    person may sit at the keyboard between two steps.

    What a look at everybody would find is kept while they speak, so that a look costs what has changed: `lasting` are
    those whose last activity took long, `changed` those whose status may be another one since `take_changed`.
    `silent_at_s`: before this time nobody can have been silent for too long.
    """

    suspect_s: float
    limbo_s: float
    heartbeat_s: float = 0.5
    judges_hangs: bool = True
    processes: dict[MemberId, Process] = field(default_factory=dict)
    by_nonce: dict[str, Process] = field(default_factory=dict)
    judged_s: float | None = None
    compared_s: float = float("-inf")
    slow: SlowJudge[MemberId] = field(default_factory=SlowJudge)
    silent_at_s: float = float("-inf")
    lasting: dict[MemberId, None] = field(default_factory=dict)
    changed: dict[MemberId, None] = field(default_factory=dict)

    def add(self, process: Process) -> None:
        """A process was admitted, or came back to this controller."""
        self.processes[process.id] = self.by_nonce[process.nonce] = process
        self.changed[process.id] = None

    def remove(self, member: MemberId) -> Process | None:
        """Its incarnation has ended; the process that it had, if this controller knew one."""
        self.changed[member] = None
        self.lasting.pop(member, None)
        process = self.processes.pop(member, None)
        if process is not None:
            process.here = False
            self.by_nonce.pop(process.nonce, None)
        return process

    def take_changed(self) -> list[MemberId]:
        """Whose status may have changed since this was last asked."""
        changed, self.changed = sorted(self.changed), {}
        return changed

    def said(self, process: Process, hello: Hello, now: float) -> bool:
        """A heartbeat told how far a member is; whether that includes its first inner step."""
        held = process.holds_state
        first_step = process.said(hello, now)
        if process.holds_state != held:
            self.changed[process.id] = None
        if hello.doing_s > HANG_S or hello.doing_s > self.limbo_s:  # nothing that takes no longer is a hang
            self.lasting[process.id] = None
        elif self.lasting and not process.hanging:
            self.lasting.pop(process.id, None)
        return first_step

    def heard(self, process: Process, now: float) -> Verdict | None:
        """A message arrived."""
        gap_s = now - process.heard_s
        if gap_s > 0.0:  # of what comes at the same moment nothing is learnt
            (process.gaps or self._gaps(process)).heard(gap_s)
            process.heard_s = now
        if not process.silence:
            return None
        process.silence = ""
        return self._well_again(process, "heard again")

    def _gaps(self, process: Process) -> SilenceDetector:
        if process.gaps is None:
            process.gaps = SilenceDetector(floor_s=self.suspect_s, expected_s=self.heartbeat_s)
        return process.gaps

    def _well_again(self, process: Process, why: str) -> Verdict | None:
        """One reason for suspicion is gone; there may be another one."""
        process.recovered = why
        self.changed[process.id] = None
        return Verdict(id=process.id, verdict="healthy", reason=why) if process.status != "suspect" else None

    def judge(self, now: float) -> list[Verdict]:
        """Silence and hangs make suspect (reversible); limbo and long hangs end a member (final).

        Only time counts in which the controller listened: when its own process stood still (a disk that takes long to
        write the journal, a suspended machine), what members said meanwhile is still waiting to be read.
        """
        deaf_s = 0.0 if self.judged_s is None else now - self.judged_s
        self.judged_s = now
        if deaf_s > self.suspect_s / 2:
            for process in self.processes.values():
                process.heard_s = min(process.heard_s + deaf_s, now)
        return [*self._judge_silence(now), *self._judge_hangs(), *self._compare(now)]

    def _judge_silence(self, now: float) -> list[Verdict]:
        """Who was not heard. Nobody is looked at before the first could be suspect: who speaks only moves that on."""
        if now <= self.silent_at_s:
            return []
        out: list[Verdict] = []
        least_s = min(self.suspect_s, self.limbo_s)
        self.silent_at_s = now + least_s  # of those who join, or are heard again
        for process in self.processes.values():
            silence_s = now - process.heard_s
            if silence_s > self.limbo_s:
                why = f"silent for {silence_s:.1f} s, limbo is over"
                out.append(Verdict(id=process.id, verdict="fence", reason=why))
            elif silence_s > self.suspect_s and not process.silence and self._gaps(process).is_silent(silence_s):
                process.silence = f"silent for {silence_s:.1f} s"
                self.changed[process.id] = None
                out.append(Verdict(id=process.id, verdict="suspect", reason=process.silence))
            self.silent_at_s = min(self.silent_at_s, process.heard_s + (self.limbo_s if process.silence else least_s))
        return out

    def _judge_hangs(self) -> list[Verdict]:
        """Who says that it lives, and makes no step."""
        if not self.judges_hangs or not self.lasting:
            return []
        talking = [p for m in self.lasting if (p := self.processes.get(m)) is not None and not p.silence]
        found = [hang(p.progress(), self.limbo_s) for p in talking]
        num_hanging = len(found) - found.count(None)
        shared = num_hanging >= 2 and has_shared_cause(num_hanging, self._num_talking())
        out: list[Verdict] = []
        for process, story in zip(talking, found, strict=True):
            if story is None:
                if process.hanging:
                    process.hanging = ""
                    out += filter(None, [self._well_again(process, "makes steps again")])
                continue
            if not process.hanging:
                process.hanging = story[0]
                self.changed[process.id] = None
                out.append(Verdict(id=process.id, verdict="suspect", reason=story[0]))
            if story[1] and (not shared or process.progress().for_s > self.limbo_s):
                out.append(Verdict(id=process.id, verdict="hung", reason=story[0]))
        return out

    def _num_talking(self) -> int:
        return sum(not p.silence and p.hello is not None for p in self.processes.values())

    def _compare(self, now: float) -> list[Verdict]:
        """Whose steps take much longer than everybody else's."""
        if now - self.compared_s < max(COMPARE_EVERY_S, COMPARE_S_PER_MEMBER * len(self.processes)):
            return []
        self.compared_s = now
        changed = self.slow.look(
            {
                member: process.hello.step_s
                for member, process in self.processes.items()
                if process.hello is not None and process.hello.step_s > 0 and not (process.silence or process.hanging)
            }
        )
        out: list[Verdict] = []
        for member, why in changed.items():
            process = self.processes[member]
            process.slowness = why
            self.changed[member] = None
            if why:
                out.append(Verdict(id=process.id, verdict="slow", reason=why))
            else:
                process.recovered = "as quick as the others again"
                out.append(Verdict(id=process.id, verdict="healthy", reason=process.recovered))
        return out
