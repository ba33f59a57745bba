"""Gaps, goals and files of the quality benchmark."""

from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import RUNS, RunsFile, main, read_runs
from benchmarks.quality_best import best_text, link_table
from benchmarks.quality_links import PARAMS, Link, predicted_s, training_s
from benchmarks.quality_plan import LR_GRID, Job, Length, Losses, next_jobs
from benchmarks.quality_plot import LABEL_GAP, Curve, Point, plot, spread_labels, tick_step
from benchmarks.quality_report import gap_curve, goals_of, lines_of, paired, write_report

LENGTH = Length(steps=60, short_steps=20, seeds=(1, 2))
LOSS = {
    "ddp": 2.0,
    "diloco-30": 2.08,
    "diloco-30-int8": 2.084,
    "diloco-30-int8-warm": 2.06,
    "alone": 2.3,
    "average-30": 2.14,
    "diloco-10": 2.04,
    "diloco-100": 2.2,
    "streaming-30-e3m0": 2.09,
    "eager-30": 2.12,
    "delayed-30": 2.16,
    "muloco-30-int4": 2.02,
    "sparseloco-30": 2.18,
    "async-30-int8": 2.1,
    "decoupled-30-e3m0": 2.095,
}


def record(job: Job) -> dict[str, Any]:
    lr_penalty = abs(job.rates.lr - LR_GRID[2])
    outer_penalty = 0.0 if job.rates.outer in (None, (0.9, 0.7), (0.4, 0.9), (1.0, 0.0)) else 0.01
    final = LOSS[job.row.name] * (1 + 0.01 * (job.seed % 7)) + lr_penalty + outer_penalty
    early = final * (1.0 if job.row.name == "ddp" else 1.1)
    return {
        "row": job.row.name, "seed": job.seed, "steps": job.steps, "settings": job.settings, "corpus": "c",
        "final": final, "curve": [[0.0, 5.5], [0.3, early], [1.0, final]], "params": 1000, "exchanges": 2,
        "bytes_sent": 4_000_000, "virtual_s": 0.05 * job.steps, "anchor_digest": "d", "seconds": 1.0, "cpu_s": 1.0,
        "environment": {"processor": "P", "cores": 2, "commit": "abc", "date": "2026-01-01", "torch": "2"},
    }  # fmt: skip


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    while todo := next_jobs(Losses(out), LENGTH):
        out.append(record(todo[0]))
    return out


def test_a_gap_is_paired_by_seed() -> None:
    found = paired({1: 2.1, 2: 4.4, 3: 9.0}, {1: 2.0, 2: 4.0})
    assert found is not None
    assert found.by_seed == pytest.approx({1: 0.05, 2: 0.10})
    assert (found.mean, found.low, found.high) == pytest.approx((0.075, 0.05, 0.10))
    assert str(found) == "+7.50 % (+5.00 to +10.00)"
    assert paired({1: 2.0}, {2: 2.0}) is None


def test_gap_over_tokens_uses_common_checkpoints() -> None:
    ours = {1: {"curve": [[0.0, 5.0], [0.1, 3.3], [0.2, None], [1.0, 2.1]]}}
    base = {1: {"curve": [[0.0, 5.0], [0.1, 3.0], [0.2, 2.5], [0.3, 2.4], [1.0, 2.0]]}}
    curve = gap_curve(ours, base)
    assert [share for share, _ in curve] == [0.1, 1.0]
    assert [gap.mean for _, gap in curve] == pytest.approx([0.10, 0.05])


def test_goals_of_finished_runs(records: list[dict[str, Any]]) -> None:
    lines = lines_of(records, LENGTH)
    assert [line.row.name for line in lines] == list(LOSS)
    goals = goals_of(lines, LENGTH)
    assert [goal.met for goal in goals] == [True, True, True, True, True]
    assert goals[0].measured == "+4.20 % (+4.20 to +4.20)"
    assert goals[3].measured == "+14.62 % to +4.20 %"


def test_a_goal_needs_all_seeds(records: list[dict[str, Any]]) -> None:
    partial = [r for r in records if not (r["row"] == "diloco-30-int8" and r["seed"] == 2)]
    goals = goals_of(lines_of(partial, LENGTH), LENGTH)
    assert [goal.met for goal in goals] == [False, True, False, False, True]
    assert goals[0].measured == "+4.20 %"


def test_a_row_that_diverged_is_shown_and_misses_its_goal(records: list[dict[str, Any]], tmp_path: Path) -> None:
    bad = [{**r, "final": None, "curve": r["curve"][:2]} if r["row"] == "diloco-30-int8" else r for r in records]
    report = write_report(bad, LENGTH, tmp_path)
    assert not report.goals[0].met
    assert "inf" in report.text


def test_unequal_islands_are_shown_beside_those_that_would_wait_for_the_slowest(records: list[dict[str, Any]]) -> None:
    """60 steps of a second: in step with one that needs two, 120 s; waiting for nobody, what the run took."""
    lines = lines_of(records, LENGTH)
    by_name = {line.row.name: line for line in lines}
    run = by_name["ddp"].runs[1]
    assert (training_s(run), training_s(run, slowest=2.0)) == (60.0, 120.0)
    pushes = by_name["async-30-int8"].runs[1]
    assert training_s(pushes) == pytest.approx(60.0, rel=0.01)
    with pytest.raises(ValueError, match="had unequal islands already"):
        training_s(pushes, slowest=2.0)
    table = link_table(lines)
    assert [row.split(" | ")[0] for row in table[-4:]] == [
        "| data parallel, one island half as fast",
        "| DiLoCo, H = 30, int8, one island half as fast",
        f"| {by_name['async-30-int8'].row.label}",
        f"| {by_name['decoupled-30-e3m0'].row.label}",
    ]


def test_waiting_is_predicted_from_bytes_delays_and_what_a_strategy_hides() -> None:
    link = Link(name="1 byte/s a parameter", bits_per_s=8.0 * PARAMS, one_way_s=0.2)
    run = {"row": "r", "steps": 60, "exchanges": 2, "params": 1000, "bytes_sent": 8000}  # 4 s and 1 s of delay each

    def seconds(**settings: object) -> float:
        return predicted_s({**run, "settings": {"strategy.inner_steps": 30, **settings}}, link, islands=1)

    assert seconds(**{"strategy.name": "diloco"}) == pytest.approx(70.0)
    assert seconds(**{"strategy.name": "streaming", "strategy.overlap_steps": 3}) == pytest.approx(64.0)
    assert seconds(**{"strategy.name": "delayed"}) == pytest.approx(60.0)
    pushing = {**run, "settings": {"strategy.name": "async-dn"}}  # each of 4 islands waits for its own pushes
    assert predicted_s({**pushing, "bytes_sent": 32000}, link, islands=4) == pytest.approx(62.5)


def test_the_best_is_named_and_ties_are_called_ties(records: list[dict[str, Any]]) -> None:
    text = best_text(lines_of(records, LENGTH))
    assert "Lowest loss but for data parallel: MuLoCo" in text and "does not tell it" not in text
    close = [
        {**r, "final": r["final"] * (0.965 + 0.015 * r["seed"])} if r["row"] == "diloco-10" else r for r in records
    ]
    text = best_text(lines_of(close, LENGTH))
    assert 'does not tell it from "' in text
    assert best_text([]) == "Too few rows are finished to name the best."


@pytest.mark.parametrize("num", [0, 1, 12, None])
def test_files_are_written_from_whatever_is_there(
    records: list[dict[str, Any]], num: int | None, tmp_path: Path
) -> None:
    write_report(records[:num], LENGTH, tmp_path)
    assert (tmp_path / "quality.md").read_text().startswith("# Loss against")
    assert len(json.loads((tmp_path / "quality.json").read_text())["goals"]) == 5
    root = ElementTree.parse(tmp_path / "quality.svg").getroot()
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == (len(LOSS) - 1 if num is None else 0)


def test_labels_of_the_plot_do_not_overlap() -> None:
    placed = spread_labels([100.0, 101.0, 99.0, 390.0, 395.0], low=40, high=394)
    ordered = sorted(placed)
    assert all(b - a >= LABEL_GAP - 1e-9 for a, b in itertools.pairwise(ordered))
    assert ordered[-1] <= 394
    assert placed[2] < placed[0] < placed[1] < placed[3] < placed[4]


@pytest.mark.parametrize("span", [0.003, 0.02, 0.15, 0.6, 3.0])
def test_plot_has_a_readable_number_of_ticks(span: float) -> None:
    assert 0.5 < span / tick_step(span) <= 10
    points = tuple(Point(share=s, mean=span * s, low=span * s, high=span * s) for s in (0.5, 1.0))
    ElementTree.fromstring(plot([Curve(label="a < b", points=points)]))


# The results file ------------------------------------------------------------------------------------------------


def test_finished_runs_are_read_back(tmp_path: Path) -> None:
    runs = RunsFile(tmp_path / "new" / RUNS)
    runs.append({"corpus": "a", "final": 1.5})
    runs.append({"corpus": "b", "final": None})
    again = RunsFile(tmp_path / "new" / RUNS)
    assert again.records == runs.records
    assert again.of_corpus("a") == [{"corpus": "a", "final": 1.5}]


def test_a_torn_last_line_is_dropped_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / RUNS
    path.write_text('{"corpus": "a", "final": 1.0}\n{"corpus": "a", "fin')
    runs = RunsFile(path)
    assert [r["final"] for r in runs.records] == [1.0]
    runs.append({"corpus": "a", "final": 2.0})
    assert [r["final"] for r in RunsFile(path).records] == [1.0, 2.0]


def test_a_spoiled_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / RUNS
    path.write_text('{"final": 1.0}\nnonsense\n{"final": 2.0}\n')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        read_runs(path)


def test_report_only_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--report", "--out", str(tmp_path)]) == 1
    assert "not run" in capsys.readouterr().out
    assert not (tmp_path / RUNS).exists()
