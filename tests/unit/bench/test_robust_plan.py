"""What `make bench-robust` runs, and how it judges what is there of it."""

from __future__ import annotations

from typing import Any

from benchmarks import rule_time
from benchmarks.robust_plan import ATTACKERS, GOSSIP, INNER_STEPS, PRESET, SEEDS, STEPS, all_jobs, judge
from orchestrator.config import load_config


def record(job: str, final: float | None, *, seed: int = 1, **more: Any) -> dict[str, Any]:
    empty: dict[str, Any] = {"banned": [], "refused_early": [], "groups": [], "exchanges": 20}
    return {"job": job, "seed": seed, "final": final, **empty, **more}


def found(records: list[dict[str, Any]], text: str) -> tuple[str, bool | None]:
    (goal,) = [goal for goal in judge(records) if text in goal.text]
    return goal.found, goal.met


def test_every_run_is_there_once_and_its_settings_are_those_of_a_run() -> None:
    jobs = list(all_jobs(STEPS, SEEDS))
    assert len({(job.name, job.seed) for job in jobs}) == len(jobs) <= 100
    for job in jobs:
        config = load_config(job.preset, overrides=job.overrides).config
        assert config.run.islands == 8 and config.train.seed == job.seed
        if job.gossip:
            assert config.strategy.inner_steps_at(0.0) == STEPS, "one full merge, at the end"
            assert config.strategy.in_pairs
    names = {job.name for job in jobs if job.seed == 3}
    assert {f"gossip/{name}" for name in GOSSIP} <= names and f"{PRESET}/verify/noise" in names
    assert STEPS % INNER_STEPS == 0


def test_goals_are_judged_by_what_is_there() -> None:
    assert {goal.met for goal in judge([])} == {None}
    runs = [record("mean/clean/tuned", float(seed), seed=seed) for seed in (2, 3)]
    runs += [record("mean/clean", 2.0, seed=2), record("gossip/noloco", 2.04, seed=2, groups=[2])]
    assert found(runs, "NoLoCo, 8 islands") == ("+2.00 %, 1 seed", True)
    assert found(runs, "no exchange has more than its pair")[1] is False, "twenty exchanges of all"
    runs[-1]["exchanges"] = 1
    assert found(runs, "no exchange has more than its pair")[1] is True
    runs += [record("mean/noise", None, seed=2)]
    runs += [record(f"{PRESET}/verify/noise", None, seed=2, refused_early=list(ATTACKERS))]
    assert found(runs, "noise: within 3 %") == ("diverged, 1 seed", False)
    assert found(runs, "noise: plain averaging") == ("diverged", True)
    assert found(runs, "noise: both attackers named") == ("yes", True)
    runs += [record("mean/clean/skewed", 2.0), record(f"{PRESET}/verify/clean/skewed/wide", 2.01)]
    assert found(runs, "with robust.clip_times = 2") == ("+0.50 %, 1 seed", True)
    runs.append(record("clip/clean/skewed", 2.0, banned=["island-0"]))
    assert found(runs, "no honest member is banned")[1] is False


def test_the_time_of_an_exchange_is_judged_by_what_was_measured_in_turn() -> None:
    def place(cost: float) -> dict[str, Any]:
        return {"over_mean": {PRESET: {"median": cost}, "mean again": {"median": 0.99}}}

    assert rule_time.goals({}) == []
    (paced, loopback) = rule_time.goals({"paced": place(1.04), "loopback": place(1.11)})
    assert "50 Mbit/s a member" in paced[0] and paced[1:] == ("+4.0 % (plain averaging against itself -1.0 %)", True)
    assert "loopback" in loopback[0] and not loopback[2]
