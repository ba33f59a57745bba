"""When fragments are sent, when results are due, and how long a late one is waited for."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.schedule import is_due
from workers.send_schedule import SendSchedule


def make(num: int, steps: Callable[[float], int], overlap: int = 0, *, staggered: bool = True) -> SendSchedule:
    return SendSchedule(
        num_fragments=num,
        staggered=staggered,
        inner_steps=lambda fragment, progress: steps(progress),
        overlap_at=lambda fragment, progress: overlap,
    )


def sends(schedule: SendSchedule, num_steps: int, overlap: int, progress: float = 0.0) -> list[tuple[int, int]]:
    """(step, fragment) of each send in a run whose results are always there in time."""
    out, under_way = [], set[int]()
    for _ in range(num_steps + 1):
        for fragment in range(schedule.num_fragments):
            if fragment in under_way and schedule.is_due(fragment):
                under_way.remove(fragment)
                schedule.moved(fragment, progress, included=True)
            if schedule.total_steps and fragment not in under_way and schedule.on_time(fragment, progress):
                schedule.sent(fragment, progress)
                out.append((schedule.total_steps, fragment))
                if overlap == 0:
                    schedule.moved(fragment, progress, included=True)
                else:
                    under_way.add(fragment)
        schedule.total_steps += 1
    return out


@given(num=st.integers(1, 5), slot=st.integers(1, 6), data=st.data())
def test_each_fragment_is_sent_once_in_a_period_whatever_is_under_way(num: int, slot: int, data: st.DataObject) -> None:
    period = num * slot
    overlap = data.draw(st.integers(0, period - 1))
    found = sends(make(num, lambda progress: period, overlap), 4 * period, overlap)
    wanted = [
        (step, fragment)
        for step in range(1, 4 * period + 1)
        for fragment in range(num)
        if is_due(step, fragment=fragment, num_fragments=num, inner_steps=period)
    ]
    assert sorted(found) == wanted


def test_a_whole_round_of_delay_keeps_the_period() -> None:
    assert sends(make(1, lambda progress: 3, 3), 12, 3) == [(3, 0), (6, 0), (9, 0), (12, 0)]


def test_not_staggered_means_all_after_the_same_step() -> None:
    assert sends(make(2, lambda progress: 2, staggered=False), 4, 0) == [(2, 0), (2, 1), (4, 0), (4, 1)]


def test_fragments_spread_when_a_synchronous_warm_up_ends() -> None:
    schedule = make(2, lambda progress: 1 if progress < 0.5 else 4)
    assert sends(schedule, 2, 0) == [(1, 0), (1, 1), (2, 0), (2, 1)]
    for fragment in (0, 1):  # the commit that ends it
        schedule.sent(fragment, 0.5)
        schedule.moved(fragment, 0.5, included=True)
    assert sends(schedule, 8, 0, progress=0.5) == [(5, 0), (7, 1), (9, 0), (11, 1)]


def test_a_late_result_is_waited_for_and_then_not() -> None:
    schedule = make(1, lambda progress: 4, 2)
    schedule.total_steps = 4
    schedule.sent(0, 0.0)
    assert not schedule.is_due(0)
    schedule.total_steps = 6
    assert schedule.is_due(0)
    assert not schedule.waited_out(100.0, 0.0), "nobody waits yet"
    schedule.wait_begins(0, 10.0)
    schedule.wait_begins(0, 12.0)
    assert not schedule.waited_out(14.9, 5.0)
    assert schedule.waited_out(15.0, 5.0)
    schedule.moved(0, 0.0, included=True)
    assert not schedule.waited_out(99.0, 5.0)
    assert schedule.marks == [4], "the period counts from the send"


def test_work_that_was_left_out_begins_a_period_where_it_came_to_the_new_version() -> None:
    schedule = make(1, lambda progress: 4, 2)
    schedule.total_steps = 4
    schedule.sent(0, 0.0)
    schedule.total_steps = 7
    schedule.moved(0, 0.0, included=False)
    assert schedule.marks == [7]


@pytest.mark.parametrize("joined_at", [0, 5])
def test_a_reset_begins_everything_now(joined_at: int) -> None:
    schedule = make(2, lambda progress: 4, 1)
    schedule.total_steps = joined_at
    schedule.restart()
    assert schedule.marks == [joined_at, joined_at]


@given(
    num=st.integers(2, 5), before=st.integers(1, 4), after=st.integers(1, 6), moved=st.integers(0, 4), data=st.data()
)
def test_fragments_are_at_even_distances_again_after_the_period_was_changed(
    num: int, before: int, after: int, moved: int, data: st.DataObject
) -> None:
    """It is set after some fragments of a round were sent: those change a round later, in the order of sends."""
    old, new, moved = num * before, num * after, min(moved, num - 1)
    overlap = data.draw(st.integers(0, min(old, new, before) - 1))
    versions = [0] * num
    since = [3 if fragment < moved else 2 for fragment in range(num)]

    class Counting(SendSchedule):
        def moved(self, fragment: int, progress: float, *, included: bool = False) -> None:
            versions[fragment] += 1
            super().moved(fragment, progress, included=included)

    schedule = Counting(
        num_fragments=num,
        staggered=True,
        inner_steps=lambda fragment, progress: new if versions[fragment] >= since[fragment] else old,
        overlap_at=lambda fragment, progress: overlap,
    )
    found = sends(schedule, 4 * old + 4 * new, overlap)
    last = found[-2 * num :]
    assert [fragment for _, fragment in last[:num]] == [fragment for _, fragment in last[num:]]
    assert {later[0] - earlier[0] for earlier, later in pairwise(last)} == {after}
    for fragment in range(num):
        steps = [step for step, sent in found if sent == fragment]
        gaps = [later - earlier for earlier, later in pairwise(steps)]
        assert all(min(old, new) <= gap <= max(old, new) for gap in gaps), gaps


def test_a_period_of_ones_own_ends_with_ones_own_commit() -> None:
    """What others commit begins no new round, and an open exchange is no reason to offer before the round is over."""
    for own_pace, on_time in ((True, True), (False, False)):
        schedule = SendSchedule(
            num_fragments=1, staggered=False, inner_steps=lambda fragment, progress: 3,
            overlap_at=lambda fragment, progress: 0,
            own_pace=own_pace,
        )  # fmt: skip
        schedule.total_steps = 2
        schedule.moved(0, 0.0)
        schedule.total_steps = 3
        assert schedule.on_time(0, 0.0) is on_time
        assert schedule.joins(late=True, open_seen=True) is not own_pace
        schedule.moved(0, 0.0, included=True)
        assert not schedule.on_time(0, 0.0)
