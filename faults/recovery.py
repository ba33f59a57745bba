"""What is done about a member whose process ended: start it again, wait before that, or give it up. Pure.

Each kind of failure has a budget of its own, counted in a sliding window of run time: a machine that is taken away
(`preempted`, or `lost` with its node or its link) says nothing about the member's code and spends no budget of crashes.
Ends before the first step are a loop when they follow each other: longer and longer waits between them, then an end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

Kind = Literal["crash", "died", "hung", "lost", "preempted"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# What tells of the member itself; an end before the first step by one of these counts for a loop.
OWN_FAULTS: frozenset[Kind] = frozenset({"crash", "died", "hung"})
GIVEN_UP = "given_up"
"""The fault in the journal of a member that is not started again."""
MEANING: Mapping[Kind, str] = {
    "crash": "raised an exception",
    "died": "died",
    "hung": "hung",
    "lost": "was lost",
    "preempted": "was taken away",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Budgets:
    """How many failures of each kind a member may have within `window_s` seconds; None = any number.

    Attributes:
        early: failures in a row before the first step, after which the member is given up; None = any number.
        backoff_s: wait before the second try after an early failure; twice as long before each further one.
        max_backoff_s: the longest wait.
    """

    per_kind: Mapping[Kind, int | None] = field(
        default_factory=lambda: {"crash": 20, "died": 20, "hung": 20, "lost": None, "preempted": None}
    )
    window_s: float = 3600.0
    early: int | None = 5
    backoff_s: float = 1.0
    max_backoff_s: float = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Restart:
    """Start another process in `after_s` seconds."""

    after_s: float
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class GiveUp:
    """Start no other process; `verdict` says what came to what limit, and what the last failure was."""

    verdict: str


Action = Restart | GiveUp


@dataclass(kw_only=True, slots=True)
class RecoveryPolicy:
    """The failures of all members of a run."""

    budgets: Budgets = field(default_factory=Budgets)
    failures_s: dict[tuple[str, Kind], list[float]] = field(default_factory=lambda: defaultdict(list))
    early: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def note(self, name: str, kind: Kind, at_s: float) -> None:
        """A failure of an earlier controller's life, at run time `at_s`: it has spent its budget."""
        self.failures_s[name, kind].append(at_s)

    def stepped(self, name: str) -> None:
        """A process of `name` has made a step: it is in no loop."""
        self.early[name] = 0

    def spent(self, name: str, kind: Kind, at_s: float) -> int:
        """Failures of a kind within the window before `at_s`."""
        recent = [t for t in self.failures_s[name, kind] if at_s - t <= self.budgets.window_s]
        self.failures_s[name, kind] = recent
        return len(recent)

    def failed(self, name: str, kind: Kind, at_s: float, *, stepped: bool, why: str) -> Action:
        """A process of `name` ended at run time `at_s`. `stepped`: it had made an inner step."""
        self.note(name, kind, at_s)
        if stepped:
            self.early[name] = 0
        elif kind in OWN_FAULTS:
            self.early[name] += 1
        num, limit = self.spent(name, kind, at_s), self.budgets.per_kind.get(kind)
        if limit is not None and num > limit:
            window = f"within {self.budgets.window_s:g} s, run.max_restarts is {limit}"
            return GiveUp(
                verdict=f"{name} is given up: it {MEANING[kind]} {num} times ({window}); the last time: {why}"
            )
        in_row, most = self.early[name], self.budgets.early
        if most is not None and in_row >= most:
            loop = f"{in_row} processes in a row ended before their first step"
            return GiveUp(verdict=f"{name} is given up: {loop} (run.max_early_deaths is {most}); the last one: {why}")
        return Restart(after_s=self._wait_s(in_row), reason=why)

    def _wait_s(self, in_row: int) -> float:
        if in_row < 2:
            return 0.0
        return float(min(self.budgets.backoff_s * 2 ** (in_row - 2), self.budgets.max_backoff_s))
