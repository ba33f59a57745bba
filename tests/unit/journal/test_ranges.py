from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers import ranges
from workers.ranges import Range

range_ = st.tuples(st.integers(0, 60), st.integers(1, 12)).map(lambda pair: (pair[0], pair[0] + pair[1]))
range_lists = st.lists(range_, max_size=8)
"""Any ranges: overlapping, touching, in any order."""


def positions(spans: object) -> list[int]:
    return [x for start, stop in spans for x in range(start, stop)]  # type: ignore[attr-defined]


def is_interval_set(spans: tuple[Range, ...]) -> bool:
    """Sorted, disjoint, not empty, and merged wherever two touch."""
    return all(start < stop for start, stop in spans) and all(a[1] < b[0] for a, b in itertools.pairwise(spans))


@given(range_lists)
def test_count_is_the_number_of_positions(spans: list[Range]) -> None:
    assert ranges.count(spans) == len(positions(spans))


@given(range_lists, range_lists)
def test_append_keeps_the_order_of_positions(spans: list[Range], extra: list[Range]) -> None:
    joined: list[Range] = []
    ranges.append(joined, spans)
    ranges.append(joined, extra)
    assert positions(joined) == positions(spans) + positions(extra)
    assert all(a[1] != b[0] for a, b in itertools.pairwise(joined))


@pytest.mark.parametrize("bad", [(3, 3), (5, 4)])
def test_append_refuses_an_empty_or_backward_range(bad: Range) -> None:
    with pytest.raises(ValueError, match=f"{bad[0]}:{bad[1]}"):
        ranges.append([], [bad])


@given(range_lists, st.data())
def test_cut_is_a_slice_of_the_positions(spans: list[Range], data: st.DataObject) -> None:
    total = ranges.count(spans)
    since = data.draw(st.integers(0, total))
    upto = data.draw(st.integers(since, total))
    assert positions(ranges.cut(spans, since, upto)) == positions(spans)[since:upto]


@given(range_lists, st.data())
def test_cuts_that_follow_each_other_make_the_whole(spans: list[Range], data: st.DataObject) -> None:
    total = ranges.count(spans)
    edges = sorted({0, total, *data.draw(st.lists(st.integers(0, total), max_size=4))})
    joined: list[Range] = []
    for since, upto in itertools.pairwise(edges):
        ranges.append(joined, ranges.cut(spans, since, upto))
    whole: list[Range] = []
    ranges.append(whole, spans)
    assert joined == whole


@given(range_lists)
def test_cut_refuses_what_is_not_there(spans: list[Range]) -> None:
    total = ranges.count(spans)
    with pytest.raises(ValueError, match="beyond"):
        ranges.cut(spans, 0, total + 1)
    with pytest.raises(ValueError, match="forward"):
        ranges.cut(spans, 1, 0)
    with pytest.raises(ValueError, match="forward"):
        ranges.cut(spans, -1, 0)


@given(range_lists, range_lists)
def test_set_operations_are_those_of_plain_sets(first: list[Range], second: list[Range]) -> None:
    a, b = set(positions(first)), set(positions(second))
    for result, expected in (
        (ranges.union(first, second), a | b),
        (ranges.subtract(first, second), a - b),
        (ranges.intersect(first, second), a & b),
    ):
        assert is_interval_set(result)
        assert positions(result) == sorted(expected)


@given(range_lists, st.integers(0, 100))
def test_take_splits_a_set_at_a_number_of_positions(spans: list[Range], num: int) -> None:
    free = ranges.union(spans, ())
    taken, rest = ranges.take(free, num)
    assert positions(taken) == positions(free)[:num]
    assert positions(rest) == positions(free)[num:]
    assert is_interval_set(taken)
    assert is_interval_set(rest)
