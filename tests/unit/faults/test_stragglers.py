"""Hangs and slowness, judged by what members tell; and what a member tells (`workers/pace.py`)."""

from __future__ import annotations

import pytest

from faults.stragglers import Progress, SlowJudge, hang, has_shared_cause
from workers.pace import Pace

PATIENCE_S = 120.0


def hangs(doing: str, for_s: float, step_s: float = 0.1) -> tuple[bool, bool]:
    """Whether it hangs, and whether it is to be ended."""
    found = hang(Progress(doing=doing, for_s=for_s, step_s=step_s), PATIENCE_S)
    return (False, False) if found is None else (True, found[1])


def test_a_step_hangs_after_three_seconds_or_four_steps() -> None:
    assert hangs("stepping", 2.9) == (False, False)
    assert hangs("stepping", 3.1) == (True, False)
    assert hangs("stepping", 6.1) == (True, True), "twice as long: it is ended"
    assert hangs("stepping", 7.9, step_s=2.0) == (False, False)
    assert hangs("stepping", 8.1, step_s=2.0) == (True, False)


@pytest.mark.parametrize(
    "doing", ["waiting", "evaluating", "saving", "between", "exchanging", "first_steps", "starting", "over"]
)
def test_what_has_no_usual_length_is_no_hang(doing: str) -> None:
    assert hangs(doing, 100.0) == (False, False)
    assert hangs("", 1e9) == (False, False), "who says nothing of it is not judged"


def test_patience_ends_for_what_may_take_long() -> None:
    assert hangs("evaluating", 121.0) == (True, True)
    assert hangs("first_steps", 599.0) == (False, False)
    assert hangs("first_steps", 601.0) == (True, True)
    assert hangs("over", 1e9) == (False, False)


def test_the_reason_names_what_it_does_and_the_limit() -> None:
    found = hang(Progress(doing="stepping", for_s=3.25, step_s=0.12), PATIENCE_S)
    assert found is not None
    assert found[0] == "heartbeats, but stepping for 3.2 s (limit 3.0 s, its steps take 0.12 s)"


def test_when_most_stand_still_it_is_not_their_fault() -> None:
    assert not has_shared_cause(1, 1) and not has_shared_cause(1, 8) and not has_shared_cause(4, 8)
    assert has_shared_cause(5, 8) and has_shared_cause(2, 2)


# ---------------------------------------------------------------- slowness


def test_slow_is_said_after_some_looks_and_taken_back_after_as_many() -> None:
    judge = SlowJudge(windows=3)
    steps = {"a": 0.1, "b": 0.11, "c": 0.5}
    assert [judge.look(steps) for _ in range(4)] == [
        {}, {}, {"c": "0.5 s a step, the others take 0.1 to 0.11 s"}, {},
    ]  # fmt: skip
    steps["c"] = 0.12
    assert [judge.look(steps) for _ in range(4)] == [{}, {}, {"c": ""}, {}]


def test_a_short_stutter_is_not_slowness() -> None:
    judge = SlowJudge(windows=3)
    for step_s in (0.5, 0.5, 0.1) * 10:
        assert judge.look({"a": 0.1, "b": 0.1, "c": step_s}) == {}


def test_who_left_is_forgotten_and_nobody_alone_is_slow() -> None:
    judge = SlowJudge(windows=1)
    assert "c" in judge.look({"a": 0.1, "b": 0.1, "c": 0.5})
    assert judge.look({"a": 0.1, "b": 0.1}) == {} and judge.slow == set()
    assert judge.look({"a": 9.0}) == {}


# ---------------------------------------------------------------- what members tell


def test_a_pace_tells_usual_steps_without_the_first() -> None:
    pace, now = Pace(), 0.0
    for step_s in (20.0, 0.1, 0.1, 0.3, 0.1):
        pace.begin("step", now)
        assert pace.doing == ("first_steps" if pace.num_steps < 3 else "stepping")
        now += step_s
        pace.stepped(now)
        assert pace.doing != "between", "the built-in loop has nothing to do between two steps"
    assert pace.usual_step_s() == pytest.approx(0.1)


def test_an_own_loop_may_do_in_a_step_what_it_did_before() -> None:
    pace = Pace(own_loop=True, steps_s=Pace().steps_s)
    pace.steps_s.extend([0.1] * 9 + [5.0])
    assert pace.usual_step_s() == 2.5, "evaluating every tenth step is its habit"
    pace.stepped(1.0)
    assert pace.doing == "between"


def test_time_in_which_the_whole_process_stood_still_is_no_step() -> None:
    pace = Pace(tick_s=0.5, num_steps=9)
    for tick in range(4):
        pace.tick(tick * 0.5)
    pace.begin("step", 1.6)
    pace.tick(31.5)  # it was stopped for 30 s
    assert 31.5 - pace.since_s < 1.5
    for tick in range(1, 20):  # but a thread that hangs beside a living one is seen
        pace.tick(31.5 + tick * 0.5)
    assert 41.0 - pace.since_s > 9.0
