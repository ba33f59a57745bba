"""Delete, double, swap or edit any row of a journal: the ledger names that row, or the first that no longer follows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from journal_histories import SEQ_LEN, Story, chain_rows

from orchestrator.ledger import recompute
from orchestrator.ledger_view import Verdict, anchor_digest, judge
from orchestrator.segments import segment_name
from workers.pair_records import PairCommitRecord, PairRosterRecord
from workers.records import (
    KINDS,
    AbandonRecord,
    CommitRecord,
    FenceRecord,
    GenesisRecord,
    JoinRecord,
    LeaseRecord,
    OperatorRecord,
    Record,
    RefusalRecord,
    RollbackRecord,
    Row,
    ScopeRecord,
    StandingRecord,
    StopRecord,
    TermRecord,
    canonical,
    chain_hash,
    dump_row,
)

Lines = list[bytes]
OF_PIPELINES = {
    "pipeline_genesis",
    "serve",
    "step",
    "step_fence",
    "stage_commit",
    "stage_count",
    "stage_sync",
    "work_lost",
    "left",
}


def lives_of(story: list[Record], name: str) -> list[int]:
    """Incarnations of a member that live at the end."""
    joined = {record.incarnation for record in story if isinstance(record, JoinRecord) and record.member == name}
    return sorted(
        joined - {record.incarnation for record in story if isinstance(record, FenceRecord) and record.member == name}
    )


def history() -> list[Row]:
    """Two fragments, three members, several controllers; every kind of row is in it."""
    for seed in range(1000):
        asked = OperatorRecord(action="drain", member="island-1", by="dashboard", outcome="asked", t_s=12.5)
        roster = PairRosterRecord(round_=0, groups=("island-0.1+island-1.1",))
        refused = RefusalRecord(member="island-1", incarnation=1, why="too long")
        banned = StandingRecord(member="island-1", standing="banned", serial=3, why="refused 3 times")
        story = Story(seed, num_fragments=2, operations=True).run(90).records
        owned = ScopeRecord(members=("island-2",), ranges=((10**6, 10**6 + 50),))
        story = [made for record in story for made in (record, *([owned] if isinstance(record, GenesisRecord) else ()))]
        left = AbandonRecord(member="island-2", ranges=owned.ranges, why="not here")
        away = [FenceRecord(member="island-2", incarnation=n, why="left") for n in lives_of(story, "island-2")]
        story += [roster, refused, banned, asked, *away, left, StopRecord(reason="done")]
        rows = chain_rows(story)
        if {row.record.kind for row in rows} == set(KINDS) - OF_PIPELINES - {PairCommitRecord.kind} and len(
            {type(r.record) for r in rows[-10:]}
        ) > 7:
            return rows
    raise AssertionError("no seed gives every kind of row")


ROWS = history()
LINES = [dump_row(row) for row in ROWS]
LEDGER = recompute(ROWS)
SUMMARY = {
    "journal_rows": len(ROWS),
    "journal_hash": ROWS[-1].hash,
    "seq_len": SEQ_LEN,
    "tokens_committed": LEDGER.tokens(SEQ_LEN)["committed"],
    "tokens_reissued": LEDGER.tokens(SEQ_LEN)["reissued"],
    "tokens_lost": LEDGER.tokens(SEQ_LEN)["lost"],
    "tokens_dropped": LEDGER.tokens(SEQ_LEN)["dropped"],
    "exchanges_committed": LEDGER.exchanges_committed,
    "params": LEDGER.num_params,
    "anchor_digest": anchor_digest(LEDGER),
    "initial_val_loss": LEDGER.initial_val_loss,
    "final_val_loss": LEDGER.final_val_loss,
}


def write_merged(run_dir: Path, lines: Iterable[bytes]) -> None:
    (run_dir / "journal.jsonl").write_bytes(b"".join(lines))


def write_segments(run_dir: Path, lines: Iterable[bytes]) -> None:
    """One file per controller: a term's row begins the next."""
    files: list[Lines] = [[]]
    for line in lines:
        if json.loads(line)["kind"] == "term" and files[-1] and files[-1][-1] != line:
            files.append([])
        files[-1].append(line)
    for number, content in enumerate(files, start=1):
        (run_dir / segment_name(number)).write_bytes(b"".join(content))


def check(run_dir: Path, lines: Iterable[bytes], layout: Callable[[Path, Iterable[bytes]], None]) -> Verdict:
    for path in run_dir.iterdir():
        path.unlink()
    layout(run_dir, lines)
    (run_dir / "summary.json").write_text(json.dumps(SUMMARY))
    return judge(run_dir)


def named(verdict: Verdict) -> set[int]:
    """Every row number that the verdict tells."""
    texts = [str(finding) for finding in verdict.findings]
    texts += [comparison.note for comparison in verdict.comparisons if comparison.agrees is False]
    return {int(number) for text in texts for number in re.findall(r"\brows? (\d+)", text)}


def edited(line: bytes) -> bytes:
    """Some number of the row changed, and the row's own hash made to fit."""
    body: dict[str, Any] = json.loads(line)
    body.pop("hash")
    number = next((name for name, value in body.items() if name != "seq" and type(value) is int), None)
    if number is not None:
        body[number] += 1
    elif "values" in body:
        body["values"]["exchange.copies"] = 1
    elif body["kind"] in (ScopeRecord.kind, AbandonRecord.kind):
        body["ranges"][0][1] += 1
    else:
        text = next(name for name, value in body.items() if name not in ("prev", "kind") and isinstance(value, str))
        body[text] += "1"
    prev = body.pop("prev")
    return json.dumps({"prev": prev, "hash": chain_hash(prev, canonical(body)), **body}).encode() + b"\n"


MUTATIONS: dict[str, Callable[[int], Lines]] = {
    "delete": lambda i: [*LINES[:i], *LINES[i + 1 :]],
    "double": lambda i: [*LINES[:i], LINES[i], *LINES[i:]],
    "swap": lambda i: [*LINES[:i], *LINES[i : i + 2][::-1], *LINES[i + 2 :]],
    "edit": lambda i: [*LINES[:i], edited(LINES[i]), *LINES[i + 1 :]],
}


def test_the_journal_is_sound_before_it_is_changed(tmp_path: Path) -> None:
    for layout in (write_merged, write_segments):
        verdict = check(tmp_path, LINES, layout)
        assert verdict.ok
        assert [c.agrees for c in verdict.comparisons] == [True] * 10
    assert len(list(tmp_path.glob("journal.*"))) > 2


@pytest.mark.parametrize("layout", [write_merged, write_segments])
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_changed_row_is_named(tmp_path: Path, mutation: str, layout: Callable[[Path, Iterable[bytes]], None]) -> None:
    for i in range(len(LINES) - (mutation == "swap")):
        verdict = check(tmp_path, MUTATIONS[mutation](i), layout)
        assert not verdict.ok, i
        assert named(verdict) & {i, i + 1}, (i, verdict.findings, verdict.comparisons)


@pytest.mark.parametrize("num_cut", [1, 2, 10, len(LINES) - 1])
def test_rows_cut_off_the_end_are_noticed_by_the_summary(tmp_path: Path, num_cut: int) -> None:
    verdict = check(tmp_path, LINES[:-num_cut], write_merged)
    assert not verdict.ok
    assert len(LINES) - num_cut in named(verdict)


def test_rows_added_behind_the_end_are_noticed_unless_a_controller_wrote_them(tmp_path: Path) -> None:
    forged = chain_rows([*(row.record for row in ROWS), StopRecord(reason="again")])
    verdict = check(tmp_path, [dump_row(row) for row in forged], write_merged)
    assert not verdict.ok
    assert named(verdict) == {len(ROWS)}
    last = [row.record for row in ROWS if isinstance(row.record, TermRecord)][-1]
    resumed = chain_rows([*(row.record for row in ROWS), replace(last, number=last.number + 1)])
    verdict = check(tmp_path, [dump_row(row) for row in resumed], write_segments)
    assert verdict.ok
    assert "1 rows of a later controller are not compared" in verdict.comparisons[0].note


@pytest.mark.parametrize("field", [field for field in SUMMARY if field != "seq_len"])
def test_a_figure_taken_out_of_the_summary_is_noticed(tmp_path: Path, field: str) -> None:
    write_merged(tmp_path, LINES)
    left = {key: value for key, value in SUMMARY.items() if key != field}
    (tmp_path / "summary.json").write_text(json.dumps(left))
    wrong = [c for c in judge(tmp_path).comparisons if c.agrees is False]
    assert len(wrong) == 1 and "missing in summary.json" in wrong[0].note


@pytest.mark.parametrize("field", [field for field in SUMMARY if not field.startswith(("journal", "seq_len"))])
def test_another_figure_in_the_summary_is_noticed(tmp_path: Path, field: str) -> None:
    write_merged(tmp_path, LINES)
    value: Any = SUMMARY[field]
    other = value + "0" if isinstance(value, str) else 1 if value is None else value + 1
    (tmp_path / "summary.json").write_text(json.dumps({**SUMMARY, field: other}))
    verdict = judge(tmp_path)
    assert [c.field for c in verdict.comparisons if not c.agrees] == [field]


def rechained(records: list[Record]) -> list[int]:
    """Row numbers with findings when somebody has mended the whole chain after his change."""
    return [finding.seq for finding in recompute(chain_rows(records)).findings]


def test_the_rules_find_a_lease_or_commit_taken_out_although_the_chain_was_mended() -> None:
    records = [row.record for row in ROWS]
    for i, record in enumerate(records):
        later = any(isinstance(r, CommitRecord | LeaseRecord) for r in records[i + 1 :])
        if isinstance(record, LeaseRecord) and any(self_named(r, record) for r in records[i + 1 :]):
            assert rechained([*records[:i], *records[i + 1 :]]), i
        # One that was rolled back with nothing on top of it might as well not have been.
        until = next((k for k, r in enumerate(records) if k > i and isinstance(r, RollbackRecord)), len(records))
        if isinstance(record, CommitRecord) and any(
            isinstance(r, CommitRecord) and r.fragment == record.fragment for r in records[i + 1 : until]
        ):
            assert rechained([*records[:i], *records[i + 1 :]]), i
        if isinstance(record, CommitRecord | LeaseRecord) and later:
            assert rechained([*records[: i + 1], record, *records[i + 1 :]])[0] == i + 1


def self_named(record: Record, lease: LeaseRecord) -> bool:
    """Whether a later row gives the same incarnation another lease."""
    if not isinstance(record, LeaseRecord):
        return False
    return (record.member, record.incarnation) == (lease.member, lease.incarnation)
