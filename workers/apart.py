"""Members that this one could not reach: knocked at until they answer, so that the controller need not wait. Pure.

The controller deals no parts to a pair that could not reach each other, and so neither would ever notice that it can.
A knock is a fetch of nothing: whatever the other one answers, it was reached. Where it answers knocks and pieces fail
again soon (a link that carries little only), it is not knocked at any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from workers.records import MemberId

KNOCK_EVERY_S = 1.0
KNOCK_FOR_S = 30.0
"""The controller tries a pair again after as long by itself."""
TRUST_S = 60.0
"""A knock that was answered less than this before a fetch failed says nothing of fetches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reached:
    """Member to controller: whom it could not get pieces from answers again."""

    member: MemberId


@dataclass(kw_only=True, slots=True)
class Apart:
    """Who could not be reached, since when, when it was knocked at and when it answered, and who is being asked now."""

    missed_s: dict[MemberId, float] = field(default_factory=dict)
    knocked_s: dict[MemberId, float] = field(default_factory=dict)
    reached_s: dict[MemberId, float] = field(default_factory=dict)
    asked: set[MemberId] = field(default_factory=set)

    def miss(self, member: MemberId, now: float) -> None:
        """A fetch from it failed."""
        self.reached_s = {other: at_s for other, at_s in self.reached_s.items() if now - at_s <= TRUST_S}
        if member not in self.reached_s:
            self.missed_s[member] = now

    def due(self, peers: Mapping[str, tuple[str, tuple[int, ...]]], now: float) -> list[tuple[MemberId, str]]:
        """`(member, address)` of those to knock at now, one knock at a time; who is no member any more is forgotten."""
        for member, missed_s in list(self.missed_s.items()):
            if now - missed_s > KNOCK_FOR_S or str(member) not in peers:
                self._forget(member)
        found = [
            (member, peers[str(member)][0])
            for member in self.missed_s
            if member not in self.asked and now - self.knocked_s.get(member, float("-inf")) >= KNOCK_EVERY_S
        ]
        for member, _ in found:
            self.knocked_s[member] = now
            self.asked.add(member)
        return found

    def answered(self, member: MemberId, now: float, *, reached: bool) -> bool:
        """A knock is over; whether that is news: it could not be reached, and now it can."""
        self.asked.discard(member)
        if not reached or member not in self.missed_s:
            return False
        self._forget(member)
        self.reached_s[member] = now
        return True

    def _forget(self, member: MemberId) -> None:
        for known in (self.missed_s, self.knocked_s, self.reached_s):
            known.pop(member, None)
