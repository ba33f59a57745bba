"""Which faults of a plan are due, and what a storm brings (pure: time, fit members and seed are given).

A storm is a Poisson process. Kind, victim, length and the pause until the next one are drawn from its seed, the same
number of draws for each fault, so that a controller that was restarted goes on where the one before ended.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from faults.plan import KINDS, PlannedFault, due

LASTING_S = (4.0, 8.0)
"""How long what a storm brings lasts, where its kind has a length."""
FEWEST = 2
"""A storm waits while fewer members than this are fit."""
_MASK = (1 << 64) - 1


def uniform(seed: int) -> Iterator[float]:
    """Numbers in [0, 1), the same on every machine for a seed: splitmix64 (Steele, Lea, Flood 2014)."""
    state = seed & _MASK
    while True:
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        mixed = state
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = ((mixed ^ (mixed >> shift)) * factor) & _MASK
        yield ((mixed ^ (mixed >> 31)) >> 11) / (1 << 53)


@dataclass(frozen=True, kw_only=True, slots=True)
class Past:
    """What the journal tells of an injected fault of an earlier controller: the text, and when."""

    text: str
    t_s: float


def storm_text(fault: PlannedFault, storm: PlannedFault, number: int) -> str:
    """How a fault of a storm is written into the journal."""
    return f"{fault} (number {number} of {storm})"


class Storm:
    """One storm that has begun."""

    def __init__(self, plan: PlannedFault, began_s: float, *, drawn: int = 0) -> None:
        """`drawn`: how many of its faults an earlier controller has injected."""
        assert plan.rate is not None and plan.seed is not None
        self.plan, self.began_s, self.drawn = plan, began_s, 0
        self._draws = uniform(plan.seed)
        self.next_s = began_s + self._pause()
        for _ in range(drawn):
            self._draw(("nobody",))

    def _pause(self) -> float:
        assert self.plan.rate is not None
        return -math.log(1.0 - next(self._draws)) * 3600.0 / self.plan.rate

    def is_over(self, now_s: float) -> bool:
        """Whether its time has passed."""
        return self.plan.for_s is not None and now_s >= self.began_s + self.plan.for_s

    def due(self, now_s: float, fit: Sequence[str]) -> tuple[PlannedFault, str] | None:
        """The next fault and its text, if its time has come; the victim is one of `fit`."""
        fit = sorted(name for name in fit if name in self.plan.targets or not self.plan.targets)
        if now_s < self.next_s or self.is_over(self.next_s) or len(fit) < FEWEST:
            return None
        fault = self._draw(fit)
        return fault, storm_text(fault, self.plan, self.drawn)

    def _draw(self, fit: Sequence[str]) -> PlannedFault:
        kinds = self.plan.kinds
        kind, victim = kinds[int(next(self._draws) * len(kinds))], fit[int(next(self._draws) * len(fit))]
        lasting_s = LASTING_S[0] + next(self._draws) * (LASTING_S[1] - LASTING_S[0])
        self.next_s += self._pause()
        self.drawn += 1
        known = KINDS[kind]
        fault = PlannedFault(kind=kind, targets=(victim,), for_s=round(lasting_s, 1))
        if "for_s" not in known.options:
            fault = replace(fault, for_s=None)
        return replace(fault, **{key: value for key, value in known.defaults if key != "for_s"})  # type: ignore[arg-type]


class Schedule:
    """The faults of a run that are still to come."""

    def __init__(self, plan: Sequence[PlannedFault], past: Sequence[Past] = ()) -> None:
        """`past`: what earlier controllers of the run have injected; that is not injected again."""
        self.waiting, self.storms = list(plan), list[Storm]()
        done = list(past)
        for fault in plan:
            found = next((one for one in done if one.text == str(fault)), None)
            if found is None:
                continue
            done.remove(found)
            self.waiting.remove(fault)
            if fault.kind == "storm":
                drawn = sum(one.text.endswith(f" of {fault})") for one in past)
                self.storms.append(Storm(fault, found.t_s, drawn=drawn))

    def unfired(self) -> list[str]:
        """The faults that have not happened, as they were written."""
        return [str(fault) for fault in self.waiting]

    def due(
        self, version: int, now_s: float, here: Collection[str], fit: Sequence[str]
    ) -> list[tuple[PlannedFault, str]]:
        """What is to be injected now, with the text for the journal; each is given once.

        Args:
            version: newest of the first fragment. now_s: seconds into the run.
            here: members that have a process; a fault of another one waits until it has. fit: whom a storm may hit.
        """
        out = []
        for fault in due(self.waiting, version, now_s):
            if fault.kind != "storm" and any(name not in here for name in fault.targets):
                continue
            self.waiting.remove(fault)
            out.append((fault, str(fault)))
            if fault.kind == "storm":
                self.storms.append(Storm(fault, now_s))
        self.storms = [storm for storm in self.storms if not storm.is_over(now_s)]
        out += [found for storm in self.storms if (found := storm.due(now_s, fit)) is not None]
        return out
