"""Local states that buddies keep, among random faults: a residual is never counted twice, and never for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from unittest import mock

from orchestrator.simulation import copies as simulated
from orchestrator.simulation.run import SimulationResult, simulate
from orchestrator.simulation.scenario import FaultRates, brief

SEEDS = range(24)
MIXED_SEEDS = range(200, 224)
NO_FAULTS = {f.name: 0.0 for f in fields(FaultRates) if f.name != "mean_gap_s"}
DEATHS = FaultRates(**{**NO_FAULTS, "mean_gap_s": 0.4, "kill": 1.0, "false_verdict": 0.2, "controller_crash": 0.1})


def with_buddies(seed: int, *, rates: FaultRates | None = None) -> SimulationResult:
    """Processes that die between commits, or (no `rates`) every fault that the simulator has."""
    scenario = replace(brief(seed, members=3), feedback=True, num_nodes=3)
    plan = replace(scenario.plan, keeps_copies=True)
    if rates is not None:
        plan = replace(plan, total_samples=60, exchange=plan.exchange.model_copy(update={"quorum": 0.5}))
        scenario = replace(scenario, rates=rates, max_faults=10, calm_commits=1, fault_s=8.0)
    return simulate(seed, scenario=replace(scenario, plan=plan))


def problems(results: Sequence[SimulationResult]) -> list[str]:
    return [f"seed {r.seed}: invariant {r.invariant}: {r.problem}" for r in results if not r.ok]


def total(results: Sequence[SimulationResult], what: str) -> int:
    return sum(result.counts.get(what, 0) for result in results)


def test_copies_among_faults_break_nothing() -> None:
    deaths = [with_buddies(seed, rates=DEATHS) for seed in SEEDS]
    mixed = [with_buddies(seed) for seed in MIXED_SEEDS]
    assert problems([*deaths, *mixed]) == []
    assert total(deaths, "copies restored") >= len(SEEDS)
    assert total(deaths, "residuals owed: yes") > 3 and total(deaths, "residuals owed: no") > 3


def test_a_residual_that_is_restored_without_asking_the_journal_is_found() -> None:
    with mock.patch.object(simulated, "residual_fate", lambda manifest, fragment, log, **rest: "yes"):
        found = next((r for seed in SEEDS if not (r := with_buddies(seed, rates=DEATHS)).ok), None)
    assert found is not None and found.invariant in (3, 6), "the simulator does not see what the rule prevents"


def test_what_the_simulator_found_stays_found() -> None:
    """1021: a copy named an offer that was committed, but not applied yet, as the one that left its residual. 1048: two
    incarnations inherited one residual, and both sent it. 1037 (every fault): one was sent before the version that
    left it was held, and that version was taken back.
    """
    results = [with_buddies(seed, rates=DEATHS) for seed in (1021, 1048, 1104, 1171)]
    assert problems([*results, with_buddies(1037)]) == []
