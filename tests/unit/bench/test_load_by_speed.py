"""What the benchmark of load by speed makes of its measurements; the runs themselves are Ray's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import load_by_speed as bench


def pair(fast: float, loss: float, seed: int = 1) -> dict[str, Any]:
    equal, quick = {"tokens_per_s": 100.0, "val_loss": 2.0}, {"tokens_per_s": 100.0 * fast, "val_loss": 2.0 * loss}
    return {"seed": seed, "steps": 600, "commit": "c", "equal": equal, "by_speed": quick}


def test_a_speed_leaves_out_the_beginning_and_the_last_commit() -> None:
    commits = [(1.0, 100), (9.0, 200), (10.0, 300), (12.0, 700), (30.0, 1000)]
    assert bench.speed(commits, 1000) == pytest.approx(500 / 3.0)
    with pytest.raises(ValueError, match="take more --steps"):
        bench.speed(commits[-2:], 1000)


@pytest.mark.parametrize(
    ("pairs", "met"),
    [
        ([pair(2.3, 1.0), pair(2.2, 0.99), pair(1.0, 1.0)], True),  # the median counts
        ([pair(2.3, 1.0), pair(2.1, 1.0), pair(2.15, 1.0)], False),
        ([pair(2.4, 1.004), pair(2.4, 1.02)], False),  # faster, and worse
    ],
)
def test_both_goals_must_be_met(pairs: list[dict[str, Any]], met: bool) -> None:
    assert bench.judge(pairs)["met"] is met


def test_pairs_that_are_kept_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[str, int]] = []

    def measure(load: str, seed: int, steps: int) -> dict[str, float]:
        if len(measured) == 4:
            raise KeyboardInterrupt
        measured.append((load, seed))
        return pair(2.4, 1.0)[load]

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "KEPT", tmp_path / "kept.json")
    monkeypatch.setattr(bench, "environment", lambda: {"commit": "c"})
    with pytest.raises(KeyboardInterrupt):
        bench.main(["--pairs", "3"])
    assert [p["seed"] for p in json.loads((tmp_path / "kept.json").read_text())["pairs"]] == [1, 2]
    measured.clear()
    assert bench.main(["--pairs", "3"]) == 0
    assert measured == [("equal", 3), ("by_speed", 3)]
