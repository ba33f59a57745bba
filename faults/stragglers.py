"""Who is slow, and who makes no step any more: judged by what members tell of themselves. Pure; clock passed in.

A member measures its own steps on its own clock and tells with each heartbeat what its training thread does
(`Activity`), since when, and how long its steps usually take. Clocks of two machines are never compared.

A hang is a step that does not end: longer than `HANG_S` and than `HANG_STEPS` times the member's own median step. What
has no usual length (the first steps, which compile; evaluating, saving, applying a commit, what a loop of one's own
does between two steps) has the patience of the whole run instead; a member that waits says so again and again.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from faults.detector import Spread

Activity = Literal[
    "starting", "stepping", "first_steps", "between", "exchanging", "waiting", "evaluating", "saving", "over", ""
]

HANG_S = 3.0
HANG_STEPS = 4.0
END_AFTER = 2.0
"""A member that hangs is suspect at once, and is ended when it has hung this many times as long as that took."""
FIRST_STEPS_PATIENCES = 5.0
"""Compiling may take this many patiences."""
SLOW_FACTOR = 2.0
SLOW_DEVIATIONS = 3.0
SLOW_WINDOWS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """What a member says of its training thread: what it does, for how long, and its usual step; seconds."""

    doing: str = ""
    for_s: float = 0.0
    step_s: float = 0.0


def hang_limit_s(progress: Progress, patience_s: float) -> float | None:
    """After how long what a member does is a hang; None: never (it is over, or it does not say what it does)."""
    match progress.doing:
        case "stepping":
            return max(HANG_S, HANG_STEPS * progress.step_s)
        case "first_steps" | "starting":
            return FIRST_STEPS_PATIENCES * patience_s
        case "waiting" | "between" | "exchanging" | "evaluating" | "saving":
            return patience_s
        case _:
            return None


def hang(progress: Progress, patience_s: float) -> tuple[str, bool] | None:
    """Whether a member hangs: the reason, and whether it has hung for so long that it is to be ended.

    `patience_s`: for what has no usual length. Only time that the member itself has measured counts: how long ago it
    said so is silence, which is judged elsewhere.
    """
    limit_s = hang_limit_s(progress, patience_s)
    if limit_s is None or progress.for_s <= limit_s:
        return None
    usual = f", its steps take {progress.step_s:.2g} s" if progress.doing == "stepping" else ""
    what = progress.doing.replace("_", " ")
    why = f"heartbeats, but {what} for {progress.for_s:.1f} s (limit {limit_s:.1f} s{usual})"
    return why, progress.for_s > (END_AFTER * limit_s if progress.doing == "stepping" else limit_s)


def has_shared_cause(num_hanging: int, num_stepping: int) -> bool:
    """Whether so many stand still at once that the cause is not theirs: a machine, a disk. None of them is ended.

    Two members of a run of two do not tell: with one hanging the other is alone, with both nobody can say.
    """
    return num_hanging >= 2 and 2 * num_hanging > num_stepping


Name = TypeVar("Name", bound=Hashable)


@dataclass(kw_only=True, slots=True)
class SlowJudge(Generic[Name]):
    """Verdicts on slowness that do not flicker: so many looks in a row must agree, in either direction."""

    windows: int = SLOW_WINDOWS
    slow: set[Name] = field(default_factory=set)
    streaks: dict[Name, int] = field(default_factory=dict)  # looks in a row that disagreed; not of who has none

    def look(self, steps_s: Mapping[Name, float]) -> dict[Name, str]:
        """One look at everybody's usual step, seconds: `{member: reason}` of those whose verdict changed.

        The reason is empty for who is not slow any more. Who is not in `steps_s` is forgotten.
        """
        changed: dict[Name, str] = {}
        for name in [*self.streaks]:
            if name not in steps_s:
                del self.streaks[name]
        self.slow &= steps_s.keys()
        everybody = Spread(steps_s.values())
        least_s = everybody.least_outlier(factor=SLOW_FACTOR)
        for name, step_s in steps_s.items():
            if step_s <= least_s:  # nearly always
                outlier = False
            else:
                outlier = everybody.has_outlier(step_s, factor=SLOW_FACTOR, deviations=SLOW_DEVIATIONS, among=True)
            if outlier == (name in self.slow):
                self.streaks.pop(name, None)
                continue
            self.streaks[name] = self.streaks.get(name, 0) + 1
            if self.streaks[name] < self.windows:
                continue
            del self.streaks[name]
            others = [other_s for other, other_s in steps_s.items() if other != name]
            changed[name] = self._reason(step_s, others) if outlier else ""
            (self.slow.add if outlier else self.slow.discard)(name)
        return changed

    @staticmethod
    def _reason(step_s: float, others: list[float]) -> str:
        low, high = min(others), max(others)
        return f"{step_s:.2g} s a step, the others take {low:.2g} to {high:.2g} s"
