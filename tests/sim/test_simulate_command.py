"""`atoll simulate`: many seeds, kept results, a seed that breaks an invariant, and that every seed has enough in it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import fields
from pathlib import Path
from unittest import mock

import pytest

from orchestrator.cli.main import main
from orchestrator.simulation.batch import MIN_EVENTS, MIN_FAULTS, run_batch, run_block, run_seed
from orchestrator.simulation.run import simulate
from orchestrator.simulation.scenario import FaultRates

SEEDS = 2000
ONLY_IN_OTHER_TESTS = ("distort", "leave", "change_settings", "pause", "rollback")
ONCE_FAILED = (1243, 1714)  # nobody could tell a bad anchor; states fetched from those who are behind, too
VIOLATED = 5


@pytest.mark.timeout(400)
def test_many_seeds_break_no_invariant() -> None:
    """`make simulate` runs a hundred thousand."""
    blocks = list(run_batch(0, SEEDS))
    assert [violation for block in blocks for violation in block.violations] == []
    assert sum(block.num for block in blocks) == SEEDS
    assert min(block.least_events for block in blocks) >= MIN_EVENTS
    assert min(block.least_faults for block in blocks) >= MIN_FAULTS
    counts: Counter[str] = Counter()
    for block in blocks:
        counts.update(block.counts)
    kinds = {f.name for f in fields(FaultRates)} - {"mean_gap_s", *ONLY_IN_OTHER_TESTS}
    assert {kind for kind in kinds if counts[f"fault {kind}"] < SEEDS / 500} == set(), "hardly ever"
    rare = (
        "results held back",
        "steps with several exchanges under way",
        "row revoke",
        "row drop",
        "states loaded",
        "places taken by a standby with a state",
    )
    assert min(counts[what] for what in rare) > SEEDS / 100, counts
    assert counts["commits"] > 5 * SEEDS, "most of them never begin to train"


def test_seeds_that_once_failed() -> None:
    assert [simulate(seed).problem for seed in ONCE_FAILED] == [""] * len(ONCE_FAILED)


def test_every_seed_has_enough_in_it() -> None:
    """Those that are over too soon at the first attempt are made longer."""
    results = [run_seed(seed) for seed in (5, 10, 19, 26, 31)]
    assert all(result.num_events >= MIN_EVENTS and result.num_faults >= MIN_FAULTS for result in results)
    assert all(result.counts["attempts of the seed"] > 1 for result in results)
    again = run_seed(31)
    assert (again.digest, again.num_faults) == (results[-1].digest, results[-1].num_faults)


def test_results_are_kept_and_gone_on_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep = tmp_path / "seeds.jsonl"
    words = ["simulate", "--seeds", "60", "--workers", "1", "--keep", str(keep), "--json"]
    assert main(words) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["seeds"], first["violations"]) == (60, 0)
    assert len(keep.read_text().splitlines()) == 2
    keep.write_text(keep.read_text()[:-40])  # killed while it wrote
    with mock.patch("orchestrator.simulation.batch.run_block", side_effect=run_block) as run:
        assert main(words) == 0
    assert [call.args[:2] for call in run.call_args_list] == [(50, 10)]
    assert json.loads(capsys.readouterr().out)["events"] == first["events"]
    with mock.patch("orchestrator.simulation.batch.code_digest", return_value="other code"):
        assert [block.num for block in run_batch(0, 1, workers=1, keep=keep)] == [1]


def test_a_violation_is_printed_and_runs_again(capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch("orchestrator.desk.may_tell", lambda decided, flushed: True):
        assert main(["simulate", "--seeds", "60", "--workers", "1"]) == VIOLATED
        said = capsys.readouterr()
        assert "violation" in said.out
        again = next(line for line in said.err.splitlines() if "again: atoll simulate --seed" in line)
        words = again.split("atoll ")[1].split()
        assert main(words) == VIOLATED
        assert "VIOLATION of invariant" in capsys.readouterr().out


def test_a_trace_needs_a_seed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--trace"]) == 2
    assert "--trace needs --seed" in capsys.readouterr().err
