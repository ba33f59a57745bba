"""Sets of sample positions that change: disjoint half-open intervals, kept sorted and merged.

`workers.ranges` has the pure functions on small lists; here each change costs a binary search, so that a journal of
many thousand leases is recomputed in seconds.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence

from workers.ranges import Range


class IntervalSet:
    """A set of integers, stored as intervals."""

    __slots__ = ("_starts", "_stops", "num")

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        """The union of `ranges`. `num`: how many integers are in the set."""
        self._starts: list[int] = []
        self._stops: list[int] = []
        self.num = 0
        self.add(ranges)

    def __iter__(self) -> Iterator[Range]:
        return iter(zip(self._starts, self._stops, strict=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IntervalSet) and self._starts == other._starts and self._stops == other._stops

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"IntervalSet({list(self)})"

    def add(self, ranges: Iterable[Range]) -> None:
        """Put `ranges` in; what is in already stays."""
        for start, stop in ranges:
            if start >= stop:
                continue
            first, last = bisect_left(self._stops, start), bisect_right(self._starts, stop)
            if first < last:
                start, stop = min(start, self._starts[first]), max(stop, self._stops[last - 1])
                self.num -= sum(self._stops[first:last]) - sum(self._starts[first:last])
            self._starts[first:last] = [start]
            self._stops[first:last] = [stop]
            self.num += stop - start

    def remove(self, ranges: Iterable[Range]) -> None:
        """Take `ranges` out; what is not in is ignored."""
        for start, stop in ranges:
            first, last = bisect_right(self._stops, start), bisect_left(self._starts, stop)
            if first >= last or start >= stop:
                continue
            before, after = self._starts[first], self._stops[last - 1]
            self.num -= sum(self._stops[first:last]) - sum(self._starts[first:last])
            kept = [(a, b) for a, b in ((before, start), (stop, after)) if a < b]
            self._starts[first:last] = [a for a, _ in kept]
            self._stops[first:last] = [b for _, b in kept]
            self.num += sum(b - a for a, b in kept)

    def common(self, ranges: Iterable[Range]) -> list[Range]:
        """The parts of `ranges` that are in the set, in the order of `ranges`."""
        out: list[Range] = []
        for start, stop in ranges:
            index = bisect_right(self._stops, start)
            while index < len(self._starts) and self._starts[index] < stop:
                out.append((max(start, self._starts[index]), min(stop, self._stops[index])))
                index += 1
        return out

    def missing(self, ranges: Iterable[Range]) -> list[Range]:
        """The parts of `ranges` that are not in the set, in the order of `ranges`."""
        out: list[Range] = []
        for start, stop in ranges:
            for low, high in self.common([(start, stop)]):
                if start < low:
                    out.append((start, low))
                start = high
            if start < stop:
                out.append((start, stop))
        return out


def coverage(sets: Sequence[IntervalSet]) -> list[tuple[int, int, int]]:
    """`(start, stop, k)` of every stretch that is in `k > 0` of `sets`, in order; stretches of equal k are merged."""
    changes: dict[int, int] = {}
    for intervals in sets:
        for start, stop in intervals:
            changes[start] = changes.get(start, 0) + 1
            changes[stop] = changes.get(stop, 0) - 1
    out: list[tuple[int, int, int]] = []
    depth, previous = 0, 0
    for position in sorted(changes):
        if depth:
            if out and out[-1][1] == previous and out[-1][2] == depth:
                out[-1] = (out[-1][0], position, depth)
            else:
                out.append((previous, position, depth))
        depth, previous = depth + changes[position], position
    return out
