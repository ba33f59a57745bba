"""A run read from its files: figures that agree with the summary, a replay, files that grow, break and move."""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from faults.recovery import GIVEN_UP, KINDS
from orchestrator.config import load_config
from orchestrator.dashboard.book import RunBook
from orchestrator.dashboard.columns import Window
from orchestrator.dashboard.controller_source import ControllerSource
from orchestrator.dashboard.controls import pipeline_part
from orchestrator.dashboard.feed import FeedPart, part_from_json, part_to_json
from orchestrator.dashboard.figures import run_figures, run_links
from orchestrator.dashboard.series import run_series, run_timeline
from orchestrator.dashboard.sources import FileSource
from orchestrator.errors import UserError
from orchestrator.metrics import EvalRow, ExchangeRow, FaultEvent
from orchestrator.segments import read_run
from orchestrator.summary import load_summary
from tests.unit.dashboard.synthetic_journal import KILLED_S, NOTICED_S, JournalOf, write_pipeline, write_run
from tests.unit.report.synthetic_run import TOKENS_PER_STEP, SyntheticRun
from workers.records import (
    GENESIS_HASH,
    FaultRecord,
    JoinRecord,
    OperatorRecord,
    Row,
    TermRecord,
    dump_row,
    make_row,
)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> tuple[SyntheticRun, Path]:
    run = SyntheticRun(rounds=20, inner_steps=10, kill_round=8)
    return run, write_run(run, tmp_path_factory.mktemp("book") / "run")


def read(run_dir: Path) -> FileSource:
    source = FileSource(run_dir)
    while source.refresh():
        pass
    return source


def fault_of(run: SyntheticRun) -> FaultEvent:
    return next(row for row in run.rows if isinstance(row, FaultEvent))


def test_figures_are_those_of_the_summary(story: tuple[SyntheticRun, Path]) -> None:
    _, run_dir = story
    now, summary = run_figures(read(run_dir).book, None), load_summary(run_dir)
    figures, ledger = now["figures"], now["ledger"]
    assert now["state"] == "done" and not now["problem"]
    assert figures["val_loss"] == summary.final_val_loss
    assert figures["val_loss_first"] == summary.initial_val_loss
    assert figures["tokens"] == ledger["committed"] == summary.tokens_committed
    assert figures["bytes_sent"] == summary.bytes_sent
    assert figures["utilization"] == pytest.approx(summary.compute_utilization, rel=0.02)
    assert figures["goodput"] == pytest.approx(summary.goodput, rel=0.02)
    assert figures["num_faults"] == 1
    assert ledger["lost"] == 17 * TOKENS_PER_STEP
    assert ledger["journal_rows"] == len(read_run(run_dir).rows)
    assert [member["name"] for member in now["members"]] == ["island-0", "island-1", "island-2"]
    assert [member["incarnation"] for member in now["members"]] == [1, 2, 1]


def test_data_parallel_is_counted_from_the_steps_that_were_made(story: tuple[SyntheticRun, Path]) -> None:
    run, run_dir = story
    figures = run_figures(read(run_dir).book, None)["figures"]
    steps = sum(row.kind == "step" for row in run.rows)
    assert figures["num_steps"] == steps
    assert figures["bytes_data_parallel"] == round(4 * run.params * 2 * 2 / 3 * steps)


def test_a_replay_shows_each_moment_as_it_was(story: tuple[SyntheticRun, Path]) -> None:
    run, run_dir = story
    book, fault = read(run_dir).book, fault_of(run)
    assert fault.injected_s is not None and fault.back_s is not None
    before = run_figures(book, fault.injected_s - 0.2)
    during = run_figures(book, (fault.detected_s or 0) + 0.2)
    after = run_figures(book, fault.back_s + 3)
    states = [{member["name"]: member["doing"] for member in at["members"]} for at in (before, during, after)]
    assert [one["island-1"] for one in states] == [states[0]["island-1"], "dead", states[2]["island-1"]]
    assert "dead" not in (states[0]["island-1"], states[2]["island-1"])
    assert [at["figures"]["num_faults"] for at in (before, during, after)] == [0, 1, 1]
    assert [at["figures"]["num_live"] for at in (before, during, after)] == [3, 2, 3]
    done = [row for row in run.rows if isinstance(row, ExchangeRow) and row.t_s <= during["at_s"]]
    assert during["ledger"]["committed"] == done[-1].tokens_committed
    assert during["figures"]["bytes_sent"] == sum(row.bytes for row in done)
    evals = [row for row in run.rows if isinstance(row, EvalRow) and row.t_s <= during["at_s"]]
    assert during["figures"]["val_loss"] == evals[-1].val_loss
    assert "back_s" not in next(e for e in during["events"] if e["kind"] == "kill")["after"]
    assert "back_s" in next(e for e in after["events"] if e["kind"] == "kill")["after"]


def test_curves_and_timeline_have_the_death_and_what_came_after(story: tuple[SyntheticRun, Path]) -> None:
    run, run_dir = story
    book, fault = read(run_dir).book, fault_of(run)
    window = Window(start_s=0.0, end_s=book.end_s, num_bins=300)
    series, lanes = run_series(book, window), run_timeline(book, window)
    assert set(series["loss"]) == {"island-0", "island-1", "island-2"}
    middle = ((fault.detected_s or 0) + 0.2) / window.width_s
    assert series["loss"]["island-1"][int(middle)] is None
    assert any(value is not None for value in series["loss"]["island-1"][int(middle) :])
    rows = {row["name"]: row["phases"] for row in lanes["rows"]}
    assert rows["island-1"][int(middle)] == "d"
    assert "d" not in rows["island-0"] + rows["island-2"]
    assert [one["member"] for one in lanes["faults"]] == ["island-1"]
    assert lanes["silences"] and lanes["silences"][0][0] == "island-2"
    committed = [value for value in series["bytes"]["sent"] if value is not None]
    assert committed == sorted(committed) and committed[-1] == sum(row.bytes for row in book.exchanges)
    assert json.dumps([series, lanes], allow_nan=False)


def test_many_members_become_a_band_and_picked_ones_keep_their_curve(tmp_path: Path) -> None:
    book = read(write_run(SyntheticRun(islands=20, rounds=4, inner_steps=5, kill_round=2), tmp_path / "many")).book
    window = Window(start_s=0.0, end_s=book.end_s, num_bins=50)
    series = run_series(book, window, ["island-7", "nobody"])
    assert list(series["loss"]) == ["island-7"]
    for low, p10, p50, p90, high in zip(
        *(series["band"][k] for k in ("low", "p10", "p50", "p90", "high")), strict=True
    ):
        assert low is None or low <= p10 <= p50 <= p90 <= high
    links = run_links(book, book.end_s)
    assert len(links["links"]) == 20 * 19 and max(a for a, *_ in links["links"]) < len(links["names"])


@pytest.mark.parametrize("kind", KINDS)
def test_however_a_member_ends_it_is_told_once_and_as_bad(kind: str) -> None:
    book = RunBook()
    fault = FaultEvent(t_s=9.0, fault=kind, member="island-0", injected_s=8.9, detected_s=9.0, estimated=True)
    book.add_metrics(json.dumps({"kind": fault.kind, **asdict(fault)}).encode() + b"\n")
    rows = list[Row]()
    for record in (
        TermRecord(lineage=0, number=1, controller="c"),
        JoinRecord(member="island-0", incarnation=1, nonce="n", node="node"),
        FaultRecord(fault=kind, member="island-0", injected=False, t_s=9.0, detail="why"),
        FaultRecord(fault=GIVEN_UP, member="island-0", injected=False, t_s=9.5, detail="too often"),
    ):
        rows.append(make_row(len(rows), rows[-1].hash if rows else GENESIS_HASH, record))
    book.add_records(rows)
    told = [(event["kind"], event["tone"]) for event in run_figures(book, None)["events"]]
    assert told == [(GIVEN_UP, "bad"), (kind, "bad")]


def test_a_growing_run_is_read_piece_by_piece(tmp_path: Path) -> None:
    whole = write_run(SyntheticRun(rounds=12, inner_steps=6, kill_round=5), tmp_path / "whole")
    live = tmp_path / "live"
    live.mkdir()
    shutil.copy(whole / "config.toml", live)
    source = FileSource(live)
    files = {name: (whole / name).read_bytes() for name in ("metrics.jsonl", "journal.jsonl")}
    for share in (0.0, 0.13, 0.5, 0.501, 0.77, 1.0):
        for name, data in files.items():  # cut anywhere, in the middle of a row as well
            (live / name).write_bytes(data[: int(share * len(data))])
        source.refresh()
    grown, read_once = run_figures(source.book, 10.0), run_figures(read(whole).book, 10.0)
    for one in (grown, read_once):
        for key in ("version", "run_id", "state", "live"):
            one.pop(key)
        one["ledger"].pop("discarded")  # from the summary, which only the whole run has
    assert grown == read_once


def test_space_that_is_reserved_behind_the_journal_is_not_read(tmp_path: Path) -> None:
    run_dir = write_run(SyntheticRun(rounds=3, inner_steps=4, kill_round=None), tmp_path / "run", stopped=False)
    path = run_dir / "journal.jsonl"
    path.write_bytes(path.read_bytes() + b"\0" * 4096)
    source = read(run_dir)
    assert source.book.num_rows == len(read_run(run_dir).rows)
    data = path.read_bytes().rstrip(b"\0")
    last = read_run(run_dir).rows[-1]
    record = OperatorRecord(action="save", member="", by="me", outcome="asked", t_s=1.0)
    path.write_bytes(data + dump_row(make_row(last.seq + 1, last.hash, record)) + b"\0" * 4096)
    source.refresh()
    assert [one.text for one in source.book.happenings] == ["save: asked"]


def test_a_later_controller_and_a_merge_of_the_segments_are_followed(tmp_path: Path) -> None:
    run = SyntheticRun(rounds=4, inner_steps=4, kill_round=None)
    run_dir = write_run(run, tmp_path / "run", stopped=False)
    source = read(run_dir)
    rows = JournalOf(run).build(nodes=3, stopped=False)
    later = make_row(len(rows), rows[-1].hash, TermRecord(lineage=0, number=2, controller="d"))
    (run_dir / "journal.000002.jsonl").write_bytes(dump_row(later))
    source.refresh()
    assert source.book.num_rows == len(rows) + 1 and not source.book.problem
    (run_dir / "journal.jsonl").write_bytes(b"".join(map(dump_row, [*rows, later])))
    (run_dir / "journal.000002.jsonl").unlink()
    source.refresh()
    assert source.book.num_rows == len(rows) + 1 and not source.book.problem


def test_rows_that_cannot_be_read_are_counted_and_said(tmp_path: Path) -> None:
    run_dir = write_run(SyntheticRun(rounds=3, inner_steps=4, kill_round=None), tmp_path / "run")
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write(b'not json\n{"kind":"step"}\n["a"]\n{"kind":"of a later version"}\n')
    assert run_figures(read(run_dir).book, None)["problem"] == "3 rows of metrics.jsonl could not be read"


def pipeline_lines() -> bytes:
    lines = []
    for step, (t_s, rate, val_loss) in enumerate(((1.0, None, None), (2.0, 1.5, 4.25), (2.5, 1.5, 4.25))):
        stage = {"stage": 0, "params": 10, "bytes": 80, "peers": {"a": rate}, "buddies": ["b"], "moving_here": []}
        row = {"t_s": t_s, "step": step, "loss": 4.5, "seconds": 1.0, "attempts": 1, "stages": [stage], "no_move": ""}
        row["val_loss"] = val_loss
        lines.append(json.dumps(row).encode() + b"\n")
    return b"".join(lines)


def test_the_stages_of_a_pipeline_are_shown_as_of_each_step(tmp_path: Path) -> None:
    run_dir = write_run(SyntheticRun(rounds=3, inner_steps=4, kill_round=None), tmp_path / "run")
    assert run_figures(read(run_dir).book, None)["stages"] == []
    (run_dir / "pipeline.jsonl").write_bytes(pipeline_lines() + b"[]\n")
    book = read(run_dir).book
    assert [one["peers"] for one in run_figures(book, None)["stages"]] == [{"a": 1.5}]
    assert [one["peers"] for one in run_figures(book, 1.5)["stages"]] == [{"a": None}]
    assert run_figures(book, 0.5)["stages"] == [] and book.num_bad == 1
    assert run_series(book, Window(start_s=0.0, end_s=3.0, num_bins=3), [])["loss"]["all stages"][1] == 4.5


def test_a_pipeline_is_as_far_as_its_steps_and_its_controller_hands_them_over(tmp_path: Path) -> None:
    (tmp_path / "pipeline.jsonl").write_bytes(pipeline_lines())
    over = asyncio.Event()
    sizes = ["pipeline.microbatches=4", "pipeline.microbatch_size=2", "pipeline.in_flight=4", "train.tokens=8192"]
    config = load_config("swarm", overrides=[*sizes, "data.path=", "data.corpus=stdlib"]).config
    controller = SimpleNamespace(
        failure="",
        run_dir=tmp_path,
        over=over,
        finished=None,
        run_id="swarm",
        config=config,
        journal=SimpleNamespace(rows=[]),
    )

    class Source(ControllerSource):
        def _feed(self, metrics_at: int, journal_at: int) -> FeedPart:
            part = asyncio.run(pipeline_part(controller, metrics_at, journal_at))
            return part_from_json(json.loads(json.dumps(part_to_json(part))))

        def _carry_out(self, action: str, member: str, by: str) -> str:
            raise AssertionError("a pipeline takes no actions")

    source = Source("swarm")
    assert not source.refresh() and not source.refresh() and source.able() == ()
    told = run_figures(source.book, None)
    assert told["stages"][0]["peers"] == {"a": 1.5} and told["problem"] == "" and told["state"] == "running"
    figures = told["figures"]
    assert (figures["tokens"], figures["progress"], figures["rounds"]) == (3 * 4 * 2 * 256, 0.75, 3)
    assert figures["tokens_per_s"] == pytest.approx(2 * 2048 / 1.5) and told["ledger"]["committed"] == 6144
    assert figures["val_loss"] == 4.25 and len(source.book.evals) == 1, "steps repeat the newest one"
    assert run_figures(source.book, 1.5)["figures"]["tokens"] == 2048
    assert told["members"] == [], "all stages together are no member"
    controller.finished = SimpleNamespace(reason="done")
    over.set()
    source.refresh()
    assert source.book.about.state == "done"


def test_a_pipeline_says_who_is_here_what_broke_and_what_was_sent(tmp_path: Path) -> None:
    book = read(write_pipeline(tmp_path / "swarm")).book
    told = run_figures(book, None)
    assert told["problem"] == "" and told["about"]["pipeline"]
    assert [(row["name"], row["incarnation"]) for row in told["members"]] == [
        *((f"peer-{n}", 1 + (n == 1)) for n in range(4)),
        ("trainer-0", 2),
    ]
    figures = told["figures"]
    assert figures["num_faults"] == 2, "a kill and its notice are one"
    assert figures["bytes_sent"] == 30 * 50_000 and figures["bytes_data_parallel"] is None
    then = {moment: run_figures(book, moment)["figures"] for moment in (KILLED_S - 1, NOTICED_S, 15.0)}
    assert [one["num_faults"] for one in then.values()] == [0, 1, 1]
    assert [one["bytes_sent"] for one in then.values()] == [450_000, 500_000, 750_000]


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run directory: it has no config\.toml"):
        FileSource(tmp_path)
