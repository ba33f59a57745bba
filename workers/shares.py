"""What a member makes of the shares that the journal gives: its local steps in a round, and the fleet's samples.

The controller decides (`orchestrator/shares.py`) and journals a `SharesRecord`; it is in force until the next one.
Pure: no clock, no threads. A member that the record does not name does all inner steps of the strategy.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

from workers.records import SharesRecord

MIN_TIMES = 4
KEPT_TIMES = 16


def share_of(shares: SharesRecord, member: str) -> tuple[int, int] | None:
    """`(local steps, samples of one step)` of `name.incarnation`, or None if the record does not name it."""
    if member not in shares.members:
        return None
    place = shares.members.index(member)
    return shares.steps[place], shares.batch_sizes[place]


def round_steps(shares: SharesRecord | None, member: str, inner_steps: int) -> int:
    """Local steps of `member` in a round in which the quickest makes `inner_steps`; at least one.

    The record says it for the round length of its time; another one (synchronous warm-up) keeps the proportions.
    """
    share = share_of(shares, member) if shares is not None else None
    if shares is None or share is None:
        return max(inner_steps, 1)
    return max(share[0] * inner_steps // shares.inner_steps, 1)


def fleet_samples(shares: SharesRecord | None, member: str, live: Sequence[str]) -> float:
    """Samples that all live members plan for each sample that `member` plans: what its reckoned progress grows by.

    Members without a share count as the mean of those that have one. Without shares all count the same.
    """
    mine = share_of(shares, member) if shares is not None else None
    if shares is None or mine is None:
        return float(max(len(live), 1))
    of = {m: n * size for m, n, size in zip(shares.members, shares.steps, shares.batch_sizes, strict=True)}
    planned = [of[m] for m in live if m in of]
    mean = sum(planned) / len(planned) if planned else float(mine[0] * mine[1])
    return max(mean * max(len(live), 1) / (mine[0] * mine[1]), 1.0)


class StepTimes:
    """How long a member's inner steps take: the median of the last few, so that one slow step changes nothing."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=KEPT_TIMES)

    def add(self, seconds: float) -> None:
        """A step took that long, loading of its data included; 0 is no measurement."""
        if seconds > 0.0:
            self._times.append(seconds)

    @property
    def median_s(self) -> float:
        """Seconds of one inner step; 0 before `MIN_TIMES` steps, the first of which are slower than the rest."""
        return statistics.median(self._times) if len(self._times) >= MIN_TIMES else 0.0
