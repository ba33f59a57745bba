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
from collections import deque
from collections.abc import Iterable, Sequence
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
    gaps_s: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def heard(self, gap_s: float) -> None:
        """A message came `gap_s` after the one before. Bursts count as one: only gaps of some length tell a rhythm."""
        if gap_s >= self.expected_s / 4:
            self.gaps_s.append(min(gap_s, MAX_GAP_FLOORS * self.floor_s))

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
    known = list(others)
    if not known:
        return False
    middle, deviation = spread(known)
    return value > factor * middle and value > middle + deviations * deviation
