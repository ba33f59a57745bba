"""Members with packs of their own, under the faults of every seed: nobody else is ever leased a sample of them."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest

from orchestrator.run_state import RunState
from orchestrator.simulation.run import SimulationResult, simulate
from orchestrator.simulation.scenario import Scenario, brief
from workers.ranges import Range

SEEDS = range(3000, 3060)


def with_own_packs(seed: int) -> Scenario:
    """A part of the samples are the first member's alone, and a few the last one's.

    With every other seed most are, and nobody waits for long: what an owner is away from at the end is dropped.
    """
    scenario = brief(seed)
    total, islands = scenario.plan.total_samples, scenario.plan.islands
    own = {islands[0]: 2 * total // 3 if seed % 2 else total // 4, islands[-1]: max(total // 8, 1)}
    plan = replace(scenario.plan, own_samples=tuple(sorted(own.items())), own_wait_s=0.0 if seed % 2 else 600.0)
    if not seed % 2:
        return replace(scenario, plan=plan)
    return replace(scenario, plan=plan, fault_s=15.0, max_faults=24)


def run(seed: int) -> SimulationResult:
    return simulate(seed, scenario=with_own_packs(seed))


def test_no_seed_hands_them_to_others_or_loses_one() -> None:
    results = {seed: run(seed) for seed in SEEDS}
    assert [f"seed {s}: invariant {r.invariant}: {r.problem}" for s, r in results.items() if not r.ok] == []
    assert sum(r.num_faults for r in results.values()) >= 5 * len(SEEDS), "the faults did not fire"
    assert all(r.counts["row scope"] >= 1 for r in results.values())
    abandoned = {seed for seed, r in results.items() if r.counts.get("row abandon", 0)}
    assert len(abandoned) >= 3 and all(seed % 2 for seed in abandoned)
    assert sum(r.counts.get("row settle", 0) for r in results.values()) > len(SEEDS), "nothing was ever given back"


def everybodys(state: RunState, name: str) -> tuple[Range, ...]:
    return () if name else state.free


def all_of_it(state: RunState, name: str) -> tuple[Range, ...]:
    return (state.scopes.own[name],)


MUTANTS = {
    "what an owner has trained on is given up with the rest": ("orchestrator.leases.rest_of", all_of_it),
    "what the dead give back goes to whoever wants it": ("orchestrator.leases.free_of", everybodys),
    "own samples are not looked at": ("orchestrator.leases._take_own", lambda state, name, want: ((), want)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_taking_a_rule_out_is_noticed(name: str) -> None:
    target, without = MUTANTS[name]
    with mock.patch(target, without):
        assert any(not run(seed).ok for seed in SEEDS), f"{target} can be taken out unnoticed"
