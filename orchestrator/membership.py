"""Who is here: the processes behind the members, when they were heard, and what they last said. Pure; clock passed in.

The journal decides who is a member; this table is what a controller knows in memory about the processes, and is
rebuilt from heartbeats after a restart. Suspicion is reversible and costs nothing; only a fence (journalled) is final.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from workers.messages import FragmentReport, Hello, ProcessInfo
from workers.records import MemberId

Status = Literal["joining", "healthy", "suspect"]


DRIFT = 1e-4
"""Seconds a second that a clock may run slower than another before times that it tells are off."""


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
    """A live incarnation's process. Times are the controller's own clock."""

    id: MemberId
    nonce: str
    info: ProcessInfo
    joined_s: float
    heard_s: float
    status: Status = "joining"
    reason: str = "joined"
    hello: Hello | None = None
    first_step_s: float | None = None
    stepping_since_s: float | None = None
    clock: MemberClock = field(default_factory=MemberClock)
    rows_sent: int = 0

    @property
    def consumed(self) -> int:
        """Samples it has consumed, by its last heartbeat."""
        return self.hello.consumed if self.hello else 0

    def said(self, hello: Hello, now: float) -> bool:
        """It told how far it is; whether that includes its first inner step."""
        first_step = not self.stepped and hello.consumed > 0
        if first_step:
            self.stepping_since_s = now
        self.hello = hello
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
    def stepped(self) -> bool:
        """Whether this incarnation has made an inner step."""
        return self.hello is not None and self.hello.consumed > 0

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

    def behind(self, fragment: int, head: int) -> int:
        """How many versions it has yet to apply, by its last heartbeat."""
        report = self.report(fragment)
        return 0 if report is None else max(head - report.n, 0)

    def ready(self) -> bool:
        """Whether it holds a state of every fragment, so that it can train, offer and own parts."""
        return self.hello is not None and bool(self.hello.fragments) and all(f.n >= 0 for f in self.hello.fragments)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A change of judgement on a member, with its reason."""

    id: MemberId
    verdict: Literal["suspect", "healthy", "fence"]
    reason: str


@dataclass(kw_only=True, slots=True)
class Roll:
    """The processes of all live incarnations."""

    suspect_s: float
    limbo_s: float
    processes: dict[MemberId, Process] = field(default_factory=dict)
    judged_s: float | None = None

    def heard(self, member: MemberId, now: float) -> Verdict | None:
        """A message arrived from `member`."""
        process = self.processes[member]
        process.heard_s = now
        if process.status != "suspect":
            return None
        process.status, process.reason = "healthy", "heard again"
        return Verdict(id=member, verdict="healthy", reason="heard again")

    def judge(self, now: float) -> list[Verdict]:
        """Silence: suspect after `suspect_s` (reversible), fence when limbo is over (final).

        Only time counts in which the controller listened: when its own process stood still (a disk that takes long to
        write the journal, a suspended machine), what members said meanwhile is still waiting to be read.
        """
        deaf_s = 0.0 if self.judged_s is None else now - self.judged_s
        self.judged_s = now
        if deaf_s > self.suspect_s / 2:
            for process in self.processes.values():
                process.heard_s = min(process.heard_s + deaf_s, now)
        out: list[Verdict] = []
        for process in self.processes.values():
            silence = now - process.heard_s
            if silence > self.limbo_s:
                out.append(Verdict(id=process.id, verdict="fence", reason=f"silent for {silence:.1f} s, limbo is over"))
            elif silence > self.suspect_s and process.status != "suspect":
                process.status = "suspect"
                process.reason = f"silent for {silence:.1f} s"
                out.append(Verdict(id=process.id, verdict="suspect", reason=process.reason))
        return out
