"""What users ask of a run while it goes on, on the virtual network: other settings, pauses, the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from unittest import mock

import pytest

from orchestrator.simulation.run import SimulationResult, simulate
from orchestrator.simulation.scenario import FaultRates, draw
from workers.live_settings import LiveSettings
from workers.records import Scalar

SEEDS = range(24)
MIXED_SEEDS = range(200, 230)
OPERATIONS = ("change_settings", "pause", "rollback")
NO_FAULTS = {f.name: 0.0 for f in fields(FaultRates) if f.name not in ("mean_gap_s", *OPERATIONS)}


def only(seed: int, **rates: float) -> SimulationResult:
    """No faults but these operations, snapshots often."""
    scenario = draw(seed, members=3)
    exchange = scenario.plan.exchange.model_copy(update={"staleness_limit": 1000})
    plan = replace(scenario.plan, snapshot_every_s=0.3, exchange=exchange)
    chosen = FaultRates(mean_gap_s=0.5, **{**NO_FAULTS, **rates})
    return simulate(seed, scenario=replace(scenario, plan=plan, rates=chosen))


def problems(results: Sequence[SimulationResult]) -> list[str]:
    return [f"seed {r.seed}: invariant {r.invariant}: {r.problem}" for r in results if not r.ok]


def total(results: Sequence[SimulationResult], what: str) -> int:
    return sum(result.counts.get(what, 0) for result in results)


def test_settings_change_at_the_same_version_for_everybody() -> None:
    results = [only(seed, change_settings=1.0) for seed in SEEDS]
    assert problems(results) == []
    assert total(results, "row setting") > len(SEEDS)
    assert total(results, "row fence") == total(results, "told Verify") == 0


def test_a_pause_loses_nothing() -> None:
    results = [only(seed, pause=1.0) for seed in SEEDS]
    assert problems(results) == []
    assert total(results, "row pause") > len(SEEDS)
    assert total(results, "samples lost") == total(results, "row fence") == 0


def test_the_way_back_leaves_every_sample_with_one_fate() -> None:
    results = [only(seed, rollback=1.0) for seed in SEEDS]
    assert problems(results) == []
    assert total(results, "row rollback") > len(SEEDS)
    assert total(results, "states loaded") > len(SEEDS)


def test_all_of_it_among_faults() -> None:
    results = []
    for seed in MIXED_SEEDS:
        scenario = draw(seed)
        assert scenario.rates is not None
        rates = replace(scenario.rates, change_settings=3.0, pause=1.0, rollback=9.0)
        plan = replace(scenario.plan, snapshot_every_s=0.5)
        results.append(simulate(seed, scenario=replace(scenario, rates=rates, plan=plan)))
    assert problems(results) == []
    for kind in ("setting", "pause", "rollback"):
        assert total(results, f"row {kind}") > 5, kind


def at_once(self: LiveSettings, fragment: int, n: int) -> tuple[tuple[str, Scalar], ...]:
    """As if a change held from the moment on in which one hears of it."""
    return tuple(sorted(self.newest().items()))


@pytest.mark.parametrize(
    ("rule", "without"),
    [
        ("workers.live_settings.LiveSettings.at", at_once),
        ("workers.live_settings.LiveSettings.of_members", LiveSettings.at),
    ],
    ids=["settings hold at once", "members compute with what holds at once"],
)
def test_taking_a_rule_out_is_noticed(rule: str, without: Callable[..., object]) -> None:
    with mock.patch(rule, without):
        results = [only(seed, change_settings=1.0) for seed in SEEDS]
    assert problems(results), f"{rule} can be taken out"
