"""What the ledger keeps of samples that are one member's own: whose they are, what was leased, what was given up."""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import pairwise

from orchestrator.intervals import IntervalSet
from workers import ranges as spans
from workers.ranges import Range
from workers.records import AbandonRecord, ScopeRecord


class OwnSamples:
    """Owners of samples; `cursors`: up to where samples were leased, those of all (key "") and those of each owner."""

    def __init__(self, fail: Callable[[str, str], None]) -> None:
        """`fail(rule, text)` notes a finding at the row that is being replayed."""
        self._fail = fail
        self.of: dict[str, Range] = {}
        self.cursors = {"": 0}

    def set(self, r: ScopeRecord, *, has_issued: bool) -> None:
        """Samples get their owners: once, before the first lease."""
        if self.of or has_issued:
            self._fail("scope", "samples get their owners after the first lease, or twice")
            return
        self.of = dict(zip(r.members, r.ranges, strict=True))
        self.cursors |= {name: start for name, (start, _) in self.of.items()}
        for (_, before), (start, stop) in pairwise(sorted(self.of.values())):
            if not before <= start < stop:
                self._fail("scope", f"samples {start}:{stop} have two owners, or are none")

    def owner(self, member: str, start: int, stop: int) -> str:
        """Whose samples these are: everybody's (empty), or of the member that is leased them; else a finding."""
        low, high = self.of.get(member, (0, 0))
        if low <= start and stop <= high:
            return member
        for name, (first, last) in self.of.items():
            if start < last and first < stop:
                self._fail("lease", f"samples {max(start, first)}:{min(stop, last)} are {name}'s alone")
                return name
        return ""

    def abandon(self, r: AbandonRecord, free: IntervalSet, live: Collection[str]) -> bool:
        """Nobody will train on an owner's samples any more; whether that can be."""
        low, high = self.of.get(r.member, (0, 0))
        if r.member in live:
            self._fail("abandon", f"{r.member} lives")
        cursor = self.cursors.get(r.member, 0)
        known = [(start, stop) for start, stop in r.ranges if stop <= cursor]
        fresh = list(r.ranges[len(known) :])
        if fresh not in ([], [(cursor, high)]) or any(start < low for start, _ in known):
            self._fail("abandon", f"{list(r.ranges)} are not what is left of {r.member}'s own samples {low}:{high}")
            return False
        for start, stop in free.missing(known):
            self._fail("abandon", f"samples {start}:{stop} are given up but were not returned")
        if fresh:
            self.cursors[r.member] = high
        return True

    def waiting(self, free: IntervalSet, live: Collection[str]) -> tuple[tuple[str, int], ...]:
        """Own samples of members that do not live, free or never leased."""
        lacking = [
            (name, spans.count(free.common([span])) + max(span[1] - self.cursors[name], 0))
            for name, span in sorted(self.of.items())
            if name not in live
        ]
        return tuple((name, num) for name, num in lacking if num)
