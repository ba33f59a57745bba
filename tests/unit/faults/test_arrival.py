"""Processes that were started and do not join: who is given up, when, and why."""

from __future__ import annotations

import pytest

from faults.arrival import FIRST_ANSWER_S, UNWATCHED_S, Arrival
from faults.stragglers import FIRST_STEPS_PATIENCES

LIMBO_S, LOOK_S = 120.0, 2.0


def looks(arrival: Arrival, seconds: float, *, answered: bool) -> tuple[str, str] | None:
    """Look at it regularly for so long, or until there is a verdict."""
    now, end = arrival.looked_s, arrival.looked_s + seconds
    while now < end:
        now += LOOK_S
        if (verdict := arrival.look(now, answered=answered)) is not None:
            return verdict
    return None


@pytest.mark.parametrize(("limbo_s", "limit_s"), [(LIMBO_S, LIMBO_S), (5.0, FIRST_ANSWER_S)])
def test_one_that_never_answers_is_lost_but_may_load_its_code(limbo_s: float, limit_s: float) -> None:
    arrival = Arrival(patience_s=limbo_s, began_s=100.0)
    assert looks(arrival, limit_s, answered=False) is None
    assert arrival.look(arrival.looked_s + LOOK_S, answered=False) == (
        "lost",
        f"it was started {limit_s + LOOK_S:.1f} s ago and has answered nothing (limit {limit_s:g} s)",
    )


@pytest.mark.parametrize("limbo_s", [LIMBO_S, 6.0])
def test_one_that_is_stopped_later_has_limbo_from_its_last_answer(limbo_s: float) -> None:
    arrival = Arrival(patience_s=limbo_s, began_s=0.0)
    assert looks(arrival, 2 * limbo_s, answered=True) is None
    assert looks(arrival, limbo_s, answered=False) is None
    assert looks(arrival, LOOK_S, answered=False) == (
        "lost",
        f"silent for {limbo_s + LOOK_S:.1f} s before it joined, limbo is over",
    )


def test_one_that_answers_and_never_joins_hangs() -> None:
    arrival = Arrival(patience_s=LIMBO_S, began_s=0.0)
    limit_s = FIRST_STEPS_PATIENCES * LIMBO_S
    assert looks(arrival, limit_s, answered=True) is None
    assert arrival.look(limit_s + LOOK_S, answered=True) == (
        "hung",
        "it answers, and has not joined for 602.0 s (limit 600 s)",
    )


def test_one_that_was_cut_off_and_is_back_is_waited_for_again() -> None:
    arrival = Arrival(patience_s=LIMBO_S, began_s=0.0)
    for _ in range(3):
        assert looks(arrival, LIMBO_S, answered=False) is None
        assert looks(arrival, LOOK_S, answered=True) is None


def test_time_in_which_the_controller_stood_still_does_not_count() -> None:
    arrival = Arrival(patience_s=LIMBO_S, began_s=0.0)
    assert looks(arrival, LOOK_S, answered=True) is None
    assert looks(arrival, LIMBO_S - UNWATCHED_S, answered=False) is None
    assert arrival.look(arrival.looked_s + 100 * LIMBO_S, answered=False) is None
    assert arrival.look(arrival.looked_s + UNWATCHED_S, answered=False) is None
    assert looks(arrival, LOOK_S, answered=False) is not None
