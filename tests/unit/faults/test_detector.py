"""Silence and outliers: phi-accrual with a floor, a ceiling and no history; comparison with the others."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faults.detector import CEILING, PHI, SilenceDetector, Spread, is_outlier, phi, spread


def lan(gaps: list[float] | None = None) -> SilenceDetector:
    detector = SilenceDetector(floor_s=2.5, expected_s=0.5)
    for gap in gaps or []:
        detector.heard(gap)
    return detector


def silent_after(detector: SilenceDetector) -> float:
    return next(tenths / 10 for tenths in range(1, 10_000) if detector.is_silent(tenths / 10))


def test_phi_is_the_improbability_of_a_gap() -> None:
    assert phi(1.0, 1.0, 0.1) == pytest.approx(math.log10(2)), "half of all gaps are longer than the mean"
    assert phi(1.0 + 1.6449 * 0.1, 1.0, 0.1) == pytest.approx(-math.log10(0.05), abs=1e-3)
    assert phi(1e9, 1.0, 0.1) == math.inf


@given(st.floats(0, 100), st.floats(0, 100), st.floats(0.01, 10), st.floats(0.01, 10))
def test_phi_rises_with_silence(one_s: float, other_s: float, mean_s: float, std_s: float) -> None:
    low_s, high_s = sorted((one_s, other_s))
    assert phi(low_s, mean_s, std_s) <= phi(high_s, mean_s, std_s)


def test_without_history_and_with_regular_heartbeats_the_floor_decides() -> None:
    assert silent_after(lan()) == 2.6
    assert silent_after(lan([0.5] * 50)) == 2.6, "under 3 s from the failure, which follows the last heartbeat"


def test_irregular_heartbeats_buy_time_but_not_for_ever() -> None:
    rng = random.Random(0)
    loaded = lan([rng.choice((0.4, 0.6, 1.5, 2.4)) for _ in range(100)])
    assert 4.0 < silent_after(loaded) < 2.5 * CEILING
    hopeless = lan([5.0, 0.2] * 50)
    assert silent_after(hopeless) <= 2.5 * CEILING + 0.1


def test_no_false_verdict_on_gaps_that_follow_the_history() -> None:
    rng = random.Random(1)
    detector, verdicts = lan(), 0
    for _ in range(20_000):  # three hours of heartbeats of a busy machine: late, bunched, never silent
        gap = max(0.05, rng.gauss(0.6, 0.35))
        verdicts += detector.is_silent(gap)
        detector.heard(gap)
    assert verdicts == 0


def test_a_burst_is_one_sign_of_life() -> None:
    detector = lan([0.5] * 20)
    for _ in range(1000):
        detector.heard(0.001)
    assert silent_after(detector) == 2.6 and detector.phi(0.5) < PHI


def test_an_outlier_is_far_from_the_others_in_both_measures() -> None:
    assert spread([1.0, 2.0, 3.0, 4.0, 100.0]) == (3.0, 1.0)
    close = [1.0, 1.02, 0.98]
    assert is_outlier(2.1, close, factor=2.0, deviations=3.0)
    assert not is_outlier(1.9, close, factor=2.0, deviations=3.0), "many deviations, but less than twice"
    assert not is_outlier(2.5, [1.0, 2.0, 0.4], factor=2.0, deviations=3.0), "twice, but they differ that much anyway"
    assert not is_outlier(50.0, [], factor=2.0, deviations=3.0), "nobody to compare with"


VALUES = st.lists(st.floats(min_value=0.01, max_value=100.0), min_size=2, max_size=12)


@given(values=VALUES, place=st.integers(0, 11), deviations=st.floats(min_value=0.0, max_value=5.0))
def test_comparing_with_the_others_in_order_is_comparing_with_a_list_of_them(
    values: list[float], place: int, deviations: float
) -> None:
    place %= len(values)
    value, others = values[place], values[:place] + values[place + 1 :]
    middle, deviation = spread(others)
    expected = value > 1.5 * middle and value > middle + deviations * deviation
    assert Spread(values).has_outlier(value, factor=1.5, deviations=deviations, among=True) == expected
    assert is_outlier(value, others, factor=1.5, deviations=deviations) == expected
