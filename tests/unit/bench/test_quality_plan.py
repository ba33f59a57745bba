"""What the quality benchmark runs next, given what is finished."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.quality_plan import (
    LR_GRID,
    OUTER_PAIRS,
    ROWS,
    SWEEP_SEED,
    Job,
    Length,
    Losses,
    Rates,
    chosen_rates,
    next_jobs,
    round_rate,
    sweep,
)

LENGTH = Length(steps=60, short_steps=20, seeds=(1, 2))
BY_NAME = {row.name: row for row in ROWS}


def record(job: Job, final: float | None) -> dict[str, Any]:
    return {"row": job.row.name, "seed": job.seed, "steps": job.steps, "settings": job.settings, "final": final}


def run_all(loss: Callable[[Job], float | None], *, limit: int = 400) -> tuple[list[dict[str, Any]], list[Job]]:
    """Do what is asked for, one job at a time, until nothing is."""
    records: list[dict[str, Any]] = []
    order: list[Job] = []
    for _ in range(limit):
        todo = next_jobs(Losses(records), LENGTH)
        if not todo:
            return records, order
        order.append(todo[0])
        records.append(record(todo[0], loss(todo[0])))
    raise AssertionError(f"still not done after {limit} jobs")


def bowl(best_lr: float, best_outer: tuple[float, float]) -> Callable[[Job], float]:
    def loss(job: Job) -> float:
        outer = job.rates.outer or best_outer
        away = abs(math.log(job.rates.lr / best_lr)) + abs(outer[0] - best_outer[0]) + abs(outer[1] - best_outer[1])
        return 2.0 + away + 0.001 * job.seed

    return loss


def test_search_finds_rates_and_the_table_uses_them_for_every_seed() -> None:
    records, order = run_all(bowl(5e-3, (0.9, 0.7)))
    rates = chosen_rates(Losses(records), LENGTH)
    assert rates["ddp"] == Rates(lr=5e-3)
    assert rates["diloco-30"] == Rates(lr=5e-3, outer=(0.9, 0.7))
    for row in ROWS:
        table = [job for job in order if job.row is row and job.seed != SWEEP_SEED]
        assert [job.seed for job in table] == [1, 2]
        assert {job.rates for job in table} == {rates[row.tuned_as]}
        assert {job.steps for job in table} == {60}


def test_nothing_runs_twice_and_finished_jobs_are_skipped() -> None:
    records, order = run_all(bowl(5e-3, (0.9, 0.7)))
    assert len({str(sorted(job.settings.items())) for job in order}) == len(order)
    assert next_jobs(Losses(records), LENGTH) == []
    lost = records.pop(7)
    again = next_jobs(Losses(records), LENGTH)
    assert lost["settings"] in [job.settings for job in again]


def test_table_of_a_finished_sweep_goes_seed_by_seed() -> None:
    _, order = run_all(bowl(5e-3, (0.9, 0.7)))
    table = [(not job.row.goal, job.seed) for job in order if job.seed != SWEEP_SEED]
    assert table == sorted(table)
    assert table[0] == (False, 1)


@pytest.mark.parametrize("best_lr", [4e-4, 3e-2])
def test_a_best_rate_at_the_edge_is_not_believed(best_lr: float) -> None:
    records, order = run_all(bowl(best_lr, (0.9, 0.5)))
    chosen = chosen_rates(Losses(records), LENGTH)["ddp"].lr
    tried = [job.rates.lr for job in order if job.row.name == "ddp"]
    assert min(tried) < chosen < max(tried)
    assert abs(math.log(chosen / best_lr)) < math.log(1.6)


def test_a_run_that_diverged_is_never_chosen() -> None:
    def loss(job: Job) -> float | None:
        return None if job.rates.lr >= 5e-3 else bowl(5e-3, (0.9, 0.5))(job)

    records, _ = run_all(loss)
    assert chosen_rates(Losses(records), LENGTH)["average-30"].lr == 3e-3


def test_int8_rows_differ_from_fp32_in_codec_and_warm_up_only() -> None:
    rates = Rates(lr=5e-3, outer=(0.9, 0.7))
    fp32, int8, warm = (
        Job(row=BY_NAME[name], rates=rates, seed=1, steps=60).settings.items()
        for name in ("diloco-30", "diloco-30-int8", "diloco-30-int8-warm")
    )
    assert set(fp32 ^ int8) == {("codec.name", "fp32"), ("codec.name", "int8")}
    assert set(int8 ^ warm) == {("strategy.warmup_sync", 0.1)}


def test_sweep_asks_for_the_grid_first() -> None:
    state = sweep(BY_NAME["diloco-10"], Losses([]), steps=60, short_steps=20)
    assert [job.rates for job in state.todo] == [Rates(lr=lr, outer=OUTER_PAIRS[0]) for lr in LR_GRID]
    assert {(job.seed, job.steps) for job in state.todo} == {(SWEEP_SEED, 20)}
    assert state.chosen is None


def test_rates_have_two_digits() -> None:
    assert round_rate(8e-3 * 1.6) == 0.013
    assert round_rate(2e-3 / 1.6) == pytest.approx(0.00125, rel=0.05)
