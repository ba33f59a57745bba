"""The inner steps of a member that are not committed in every fragment yet (pure); `workers/sync.py` and the simulator.

A step is known by the sample at which it ends, counted in the order of the member's leases, and by the versions of the
fragments that it was made at.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence


class OpenSteps:
    """Oldest first."""

    def __init__(self, steps: Iterable[tuple[int, Sequence[int]]] = ()) -> None:
        """`steps`: `(end, versions)` each, as they are saved."""
        self._steps = deque((end, tuple(versions)) for end, versions in steps)

    def __len__(self) -> int:
        """Steps that some fragment lacks."""
        return len(self._steps)

    def __iter__(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """`(end, versions)` each."""
        return iter(self._steps)

    def add(self, end: int, versions: Sequence[int]) -> None:
        """One more step was made."""
        self._steps.append((end, tuple(versions)))

    def clear(self) -> None:
        """All of it was dropped."""
        self._steps.clear()

    def committed(self, upto: int) -> None:
        """Every fragment has committed what ends up to there."""
        while self._steps and self._steps[0][0] <= upto:
            self._steps.popleft()

    def beyond(self, watermark: int) -> int:
        """Steps that a fragment with this watermark has not committed."""
        return sum(1 for end, _ in self._steps if end > watermark)

    def born(self, fragment: int, since: int) -> int:
        """The version of a fragment that its oldest step beyond `since` was made at."""
        return next(versions[fragment] for end, versions in self._steps if end > since)
