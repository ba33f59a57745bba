from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.intervals import IntervalSet, coverage
from workers.ranges import Range

ranges_ = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 12)).map(lambda pair: (pair[0], pair[0] + pair[1])), max_size=4
)
steps = st.lists(st.tuples(st.sampled_from(["add", "remove"]), ranges_), max_size=12)


def positions(spans: object) -> list[int]:
    return [x for start, stop in spans for x in range(start, stop)]  # type: ignore[attr-defined]


def build(changes: list[tuple[str, list[Range]]]) -> tuple[IntervalSet, set[int]]:
    intervals, plain = IntervalSet(), set[int]()
    for what, spans in changes:
        if what == "add":
            intervals.add(spans)
            plain |= set(positions(spans))
        else:
            intervals.remove(spans)
            plain -= set(positions(spans))
    return intervals, plain


@given(steps)
def test_changes_are_those_of_a_plain_set(changes: list[tuple[str, list[Range]]]) -> None:
    intervals, plain = build(changes)
    spans = list(intervals)
    assert positions(spans) == sorted(plain)
    assert intervals.num == len(plain)
    assert all(start < stop for start, stop in spans)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(spans))
    assert intervals == IntervalSet(spans)


@given(steps, ranges_)
def test_common_and_missing_part_each_range(changes: list[tuple[str, list[Range]]], spans: list[Range]) -> None:
    intervals, plain = build(changes)
    assert positions(intervals.common(spans)) == [x for x in positions(spans) if x in plain]
    assert positions(intervals.missing(spans)) == [x for x in positions(spans) if x not in plain]


@given(st.lists(steps, max_size=4))
def test_coverage_counts_the_sets_at_each_position(all_changes: list[list[tuple[str, list[Range]]]]) -> None:
    built = [build(changes) for changes in all_changes]
    stretches = coverage([intervals for intervals, _ in built])
    counted = {x: k for start, stop, k in stretches for x in range(start, stop)}
    everything = set().union(*(plain for _, plain in built))
    assert counted == {x: sum(x in plain for _, plain in built) for x in everything}
    assert all(a[1] < b[0] or a[2] != b[2] for a, b in itertools.pairwise(stretches))
