"""A process that was started and has not joined yet: how long it is waited for. Pure; clock passed in.

Members are judged by what they say (`faults/detector.py`, `faults/stragglers.py`). Of a process that has said nothing
yet only this is known: it is on a machine, and it answers there, or does not. One that is stopped or cut off is silent,
and has the patience that a silent member has; until its first answer a minute at least, for it may still be loading its
code. One that answers may hang all the same (an import, a file system): it has as long as a member for its first steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from faults.stragglers import Progress, hang_limit_s

FIRST_ANSWER_S = 60.0
UNWATCHED_S = 10.0
"""Between two looks that are further apart the one who looks stood still: of that time nothing is known."""


@dataclass(kw_only=True, slots=True)
class Arrival:
    """One process on its way.

    Attributes:
        patience_s: how long it may be silent (`exchange.limbo_s`).
        began_s: when it was first seen on a machine; until then it waits for a place, and for as long as that takes.
    """

    patience_s: float
    began_s: float
    has_answered: bool = False
    heard_s: float = field(init=False)
    looked_s: float = field(init=False)

    def __post_init__(self) -> None:
        """Nothing is known before it was seen."""
        self.heard_s = self.looked_s = self.began_s

    def look(self, now: float, *, answered: bool) -> tuple[Literal["lost", "hung"], str] | None:
        """The verdict, with its reason, on a process that has not joined by `now`; None: it is waited for.

        `answered`: it did so just now. To be called at least every `UNWATCHED_S`.
        """
        unwatched_s, self.looked_s = now - self.looked_s, now
        if unwatched_s > UNWATCHED_S:
            self.began_s += unwatched_s
            self.heard_s += unwatched_s
        if answered:
            self.heard_s, self.has_answered = now, True
        silence_s, taken_s = now - self.heard_s, now - self.began_s
        if self.has_answered and silence_s > self.patience_s:
            return "lost", f"silent for {silence_s:.1f} s before it joined, limbo is over"
        first_s = max(self.patience_s, FIRST_ANSWER_S)
        if not self.has_answered and silence_s > first_s:
            return "lost", f"it was started {silence_s:.1f} s ago and has answered nothing (limit {first_s:g} s)"
        limit_s = hang_limit_s(Progress(doing="starting"), self.patience_s)
        assert limit_s is not None
        if self.has_answered and taken_s > limit_s:
            return "hung", f"it answers, and has not joined for {taken_s:.1f} s (limit {limit_s:g} s)"
        return None
