"""How the benchmark of a viewer's cost reckons."""

from __future__ import annotations

import pytest

from benchmarks.dashboard_cost import Block, Moment, block_between, compare


def moment(at_s: float, num_tokens: int, others_cpu_s: float, dashboard_cpu_s: float = 0.0) -> Moment:
    return Moment(at_s=at_s, num_tokens=num_tokens, others_cpu_s=others_cpu_s, dashboard_cpu_s=dashboard_cpu_s)


def block(tokens_per_s: float, others_cpu: float, *, watched: bool) -> Block:
    return Block(watched=watched, seconds=10.0, tokens_per_s=tokens_per_s, others_cpu=others_cpu, dashboard_cpu=0.01)


def test_a_block_is_what_lies_between_two_commits() -> None:
    found = block_between(moment(10.0, 1000, 1.0), moment(20.0, 6000, 1.5, 0.2), watched=True)
    assert (found.seconds, found.tokens_per_s, found.others_cpu, found.dashboard_cpu) == (10.0, 500.0, 0.05, 0.02)


def test_costs_are_differences_of_pairs_and_not_of_means() -> None:
    # The machine slows down to half on the way; the viewer costs 0.4 % of two cores all the same.
    pairs = [(block(speed * 0.996, 0.058, watched=True), block(speed, 0.05, watched=False)) for speed in (100.0, 50.0)]
    found = compare(pairs, cores=2)
    assert found["speed"]["mean"] == pytest.approx(0.996) and found["speed"]["error"] == pytest.approx(0.0, abs=1e-9)
    assert found["processor"]["mean"] == pytest.approx(0.004) and found["met"]


@pytest.mark.parametrize(("speed", "others_cpu"), [(0.95, 0.05), (1.0, 0.08)])
def test_an_aim_that_is_missed_is_said(speed: float, others_cpu: float) -> None:
    alone = block(100.0, 0.05, watched=False)
    pairs = [(block(100.0 * speed, others_cpu, watched=True), alone)] * 4
    assert not compare(pairs, cores=2)["met"]


def test_noise_is_not_taken_for_a_cost_of_the_speed() -> None:
    pairs = [
        (block(100.0 * factor, 0.056, watched=True), block(100.0, 0.05, watched=False))
        for factor in (0.97, 1.02, 0.98, 1.03)
    ]
    assert compare(pairs, cores=2)["met"]
