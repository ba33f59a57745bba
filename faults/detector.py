"""Who has fallen silent, and who stands out: the two tests that verdicts on members rest on. Pure; clock passed in.

Silence is judged by phi-accrual (Hayashibara et al. 2004, "The phi accrual failure detector", equation 1): how unlikely
is a gap of this length, given the gaps seen before? What differs from the paper: a floor under the gap (a collector or
a compiler stops a process for longer than any history of heartbeats tells), a floor under the deviation, and a ceiling
(a history of long gaps must not hide a dead member for ever).

Slowness is judged by comparison with the others: median and median absolute deviation, which a few outliers do not
move.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

WINDOW = 100
PHI = 8.0
"""Suspicion at this phi: one false verdict in 10^8 gaps, where gaps are as regular as they were."""
CEILING = 3.0
"""However irregular the heartbeats were, this many times the floor is silence."""
MAX_GAP_FLOORS = 2.0


def phi(silence_s: float, mean_s: float, std_s: float) -> float:
    """`-log10` of the probability that a gap lasts longer than `silence_s`, for normally distributed gaps."""
    tail = 0.5 * math.erfc((silence_s - mean_s) / (std_s * math.sqrt(2.0)))
    return -math.log10(tail) if tail > 0.0 else math.inf


@dataclass(kw_only=True, slots=True)
class SilenceDetector:
    """The gaps between messages of one member.

    Attributes:
        floor_s: no shorter silence makes suspect (the pause floor).
        expected_s: the gap that is expected before there is a history.
        threshold: phi that makes suspect.
    """

    floor_s: float
    expected_s: float
    threshold: float = PHI
    gaps_s: array[float] = field(default_factory=lambda: array("d"))  # of thousands of members: one block each
    oldest: int = 0

    def heard(self, gap_s: float) -> None:
        """A message came `gap_s` after the one before. Bursts count as one: only gaps of some length tell a rhythm."""
        if gap_s < self.expected_s / 4:
            return
        longest_s = MAX_GAP_FLOORS * self.floor_s
        if gap_s > longest_s:
            gap_s = longest_s
        if len(self.gaps_s) < WINDOW:
            self.gaps_s.append(gap_s)
        else:
            self.gaps_s[self.oldest] = gap_s
            self.oldest = (self.oldest + 1) % WINDOW

    def phi(self, silence_s: float) -> float:
        """How surprising a silence is; rises with it."""
        mean_s, std_s = self._rhythm()
        return phi(silence_s, mean_s, std_s)

    def is_silent(self, silence_s: float) -> bool:
        """Whether the member is suspect after `silence_s`: longer than the floor and surprising, or endless."""
        if silence_s <= self.floor_s:
            return False
        return self.phi(silence_s) >= self.threshold or silence_s > CEILING * self.floor_s

    def _rhythm(self) -> tuple[float, float]:
        """Mean and deviation of the gaps, with the expected one counted in, and a floor under the deviation."""
        gaps = [self.expected_s, *self.gaps_s]
        mean_s = sum(gaps) / len(gaps)
        variance = sum((gap - mean_s) ** 2 for gap in gaps) / len(gaps)
        return mean_s, max(math.sqrt(variance), self.expected_s / 4)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Median and median absolute deviation of at least one value."""
    middle = median(values)
    return middle, median(abs(value - middle) for value in values)


def is_outlier(value: float, others: Iterable[float], *, factor: float, deviations: float) -> bool:
    """Whether `value` is far above what the others have: beyond `factor` times their median **and** beyond their
    median plus `deviations` median absolute deviations. Without others nobody is.
    """
    return Spread(others).has_outlier(value, factor=factor, deviations=deviations)


class Spread:
    """Values in order, for comparing each of them with all the others without sorting these every time."""

    def __init__(self, values: Iterable[float]) -> None:
        """Sorts them once."""
        self.values = sorted(values)

    def has_outlier(self, value: float, *, factor: float, deviations: float, among: bool = False) -> bool:
        """`is_outlier` of a value against these; `among`: it is one of them, and is compared with the rest."""
        num = len(self.values) - among
        if num < 1 or value <= factor * self.values[(num - 1) // 2]:  # as in `least_outlier`
            return False
        without = bisect_left(self.values, value) if among else len(self.values)
        middle = self._mean_of_middle(num, lambda place: self._at(place, without))
        if value <= factor * middle:
            return False
        deviation = self._mean_of_middle(num, lambda rank: self._distance(rank, middle, num, without))
        return value > middle + deviations * deviation

    def least_outlier(self, *, factor: float) -> float:
        """None of these values is an outlier among the others up to here: their middle is no less than that."""
        num = len(self.values) - 1
        return factor * self.values[(num - 1) // 2] if num >= 1 else math.inf

    def _at(self, place: int, without: int) -> float:
        return self.values[place if place < without else place + 1]

    @staticmethod
    def _mean_of_middle(num: int, of_rank: Callable[[int], float]) -> float:
        """The median of `num` values, as `statistics.median` has it."""
        high = of_rank(num // 2)
        return high if num % 2 else (of_rank(num // 2 - 1) + high) / 2

    def _distance(self, rank: int, middle: float, num: int, without: int) -> float:
        """The distance to `middle` that has this rank: those that are nearer are neighbours in the order."""
        low, high = 0, num - rank - 1  # where the window of the rank + 1 nearest may begin
        while low < high:
            begin = (low + high) // 2
            if middle - self._at(begin, without) > self._at(begin + rank + 1, without) - middle:
                low = begin + 1
            else:
                high = begin
        return max(abs(self._at(low, without) - middle), abs(self._at(low + rank, without) - middle))
