"""Pipelines under random kills, cuts, lost and doubled messages, joins and moves; and mutants that it must notice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from unittest import mock

import pytest

from orchestrator.rebalance import Rebalancer
from orchestrator.simulation.swarm import simulate_swarm

NUM_SEEDS = 1000  # 301 once counted a microbatch twice: a refused request came again
BLOCK = 250
MUTANT_SEEDS = range(300)


def join_unchecked(desk: Rebalancer, number: int, assignment: object) -> bool:
    known = desk.open is not None and desk.open.number == number
    if known:
        desk._close("joined")
    return known


MUTANTS: dict[str, tuple[str, Callable[..., object]]] = {
    "not done is no promise": ("workers.pipeline.accumulator.is_refused", lambda attempt, refused: False),
    "a backward that timed out is sent elsewhere at once": (
        "workers.pipeline.microbatches.after_timeout",
        lambda direction: "elsewhere",
    ),
    "what a dead peer had counted is not computed again": (
        "workers.pipeline.microbatches.lost_with",
        lambda peer, counted: [],
    ),
    "a ban is for ever": ("workers.pipeline.router.lifts_ban", lambda announcement, known: False),
    "a mover joins whatever happened to its stage": (
        "orchestrator.rebalance.Rebalancer.join",
        join_unchecked,
    ),
}


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, BLOCK))
def test_once_per_stage_never_empty_and_progress_resumes(first: int) -> None:
    results = [simulate_swarm(seed) for seed in range(first, first + BLOCK)]
    assert [f"seed {result.seed}: {result.problem}" for result in results if not result.ok] == []
    counts: Counter[str] = Counter()
    for result in results:
        counts.update(result.counts)
    rare = (
        "fault kill a third",
        "fault cut",
        "moves",
        "moves given up",
        "done after all",
        "not done",
        "new incarnations",
    )
    assert all(counts[what] > 20 for what in rare), counts
    assert counts["computed again"] > BLOCK and counts["timeouts of withdrawing"] > 20


def test_a_seed_of_a_pipeline_replays_exactly() -> None:
    assert simulate_swarm(12) == simulate_swarm(12)


@pytest.mark.parametrize("name", MUTANTS)
def test_taking_a_rule_of_pipelines_out_is_noticed(name: str) -> None:
    target, without = MUTANTS[name]
    with mock.patch(target, without):
        assert any(not simulate_swarm(seed).ok for seed in MUTANT_SEEDS), f"{target} can be taken out unnoticed"
