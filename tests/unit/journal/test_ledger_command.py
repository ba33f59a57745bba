from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from journal_histories import SEQ_LEN, Story, chain_rows

from orchestrator.ledger import ledger_command, recompute
from orchestrator.ledger_view import anchor_digest
from workers.records import Row, dump_row


def write_run(run_dir: Path, rows: list[Row], **changed: object) -> None:
    """A journal; with changes (also none: `seq_len`) a summary that agrees with it but for them."""
    (run_dir / "journal.jsonl").write_bytes(b"".join(dump_row(row) for row in rows))
    if changed:
        ledger = recompute(rows)
        tokens = ledger.tokens(SEQ_LEN)
        summary = {
            "journal_rows": len(rows), "journal_hash": rows[-1].hash, "tokens_committed": tokens["committed"],
            "tokens_reissued": tokens["reissued"], "tokens_lost": tokens["lost"], "params": ledger.num_params,
            "tokens_dropped": tokens["dropped"],
            "exchanges_committed": ledger.exchanges_committed, "anchor_digest": anchor_digest(ledger),
            "initial_val_loss": ledger.initial_val_loss, "final_val_loss": ledger.final_val_loss,
        }  # fmt: skip
        (run_dir / "summary.json").write_text(json.dumps({**summary, **changed}))


@pytest.fixture
def rows() -> list[Row]:
    return chain_rows(Story(1, num_fragments=2).run(150).records)


def test_a_sound_run_as_json(tmp_path: Path, rows: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    ledger = recompute(rows)
    tokens = ledger.tokens(SEQ_LEN)
    write_run(tmp_path, rows, seq_len=SEQ_LEN)
    assert ledger_command(tmp_path, True) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["ok"]
    assert out["samples"] == ledger.samples()
    assert out["tokens"] == tokens
    assert out["journal"] == {"rows": len(rows), "hash": rows[-1].hash}
    assert {d["kind"] for d in out["deviations"]} == {"partial", "dropped", "returned", "reissued", "revoked"}
    assert [c["agrees"] for c in out["summary"]] == [True] * 10
    assert out["findings"] == []


def test_a_sound_run_as_a_table(tmp_path: Path, rows: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, rows)
    (tmp_path / "config.toml").write_text(f'[data]\ncorpus = "stdlib"\nseq_len = {SEQ_LEN}\n')
    assert ledger_command(tmp_path, False) == 0
    out = capsys.readouterr().out
    for word in ("full", "partial", "dropped", "free", "in progress", "reissued", "exceptions", "of 2 fragments"):
        assert word in out, word
    assert f"{recompute(rows).tokens(SEQ_LEN)['full']:,}" in out
    assert "there is no summary.json yet" in out
    assert "every sample has one fate" in out


def test_a_broken_chain_is_exit_code_5_with_the_row(
    tmp_path: Path, rows: list[Row], capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, [*rows[:20], *rows[21:]])
    assert ledger_command(tmp_path, False) == 5
    out = capsys.readouterr().out
    assert "WRONG: row 21 (journal.jsonl:21): chain: row 20 is missing before row 21" in out
    assert "put back the file" in out
    assert ledger_command(tmp_path, True) == 5
    assert json.loads(capsys.readouterr().out)["findings"][0]["seq"] == 21


def test_a_violated_rule_is_exit_code_5_with_the_row(
    tmp_path: Path, rows: list[Row], capsys: pytest.CaptureFixture[str]
) -> None:
    records = [row.record for row in rows]
    lease = next(i for i, record in enumerate(records) if record.kind == "lease")
    write_run(tmp_path, chain_rows([*records[:lease], records[lease], *records[lease:]]))
    assert ledger_command(tmp_path, False) == 5
    assert f"WRONG: row {lease + 1} (journal.jsonl:{lease + 2}): lease: " in capsys.readouterr().out


def test_another_sum_is_exit_code_5(tmp_path: Path, rows: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, rows, exchanges_committed=10_000)
    assert ledger_command(tmp_path, False) == 5
    assert "DIFFERS: exchanges_committed: summary 10000" in capsys.readouterr().out


def test_an_unknown_sample_length_is_said(tmp_path: Path, rows: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, rows, tokens_committed=1)
    (tmp_path / "config.toml").write_text('[data]\npath = "/nowhere/pack"\nseq_len = 7\n')
    assert ledger_command(tmp_path, False) == 0
    assert "not compared: tokens_committed" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff"])
def test_an_unreadable_summary_is_exit_code_5(
    tmp_path: Path, rows: list[Row], content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, rows)
    (tmp_path / "summary.json").write_bytes(content)
    assert ledger_command(tmp_path, False) == 5
    assert "DIFFERS: summary.json" in capsys.readouterr().out


def test_a_directory_that_is_no_run_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "missing", Path(__file__)):
        assert ledger_command(path, False) == 2
        assert f"{path} is no run directory" in capsys.readouterr().err


def test_text_of_the_journal_is_not_taken_for_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = Story(1).run(30).records
    write_run(tmp_path, chain_rows([replace(records[0], controller="[bold]x"), *records[1:], records[1]]))  # type: ignore[call-arg]
    assert ledger_command(tmp_path, False) == 5
    assert "WRONG" in capsys.readouterr().out


def test_it_loads_neither_torch_nor_ray_and_is_quick(tmp_path: Path, rows: list[Row]) -> None:
    write_run(tmp_path, rows)
    code = (
        "import sys, pathlib; from orchestrator.ledger import ledger_command\n"
        f"code = ledger_command(pathlib.Path({str(tmp_path)!r}), False)\n"
        "assert not {'torch', 'ray', 'numpy'} & set(sys.modules), 'heavy module'\n"
        "sys.exit(code)"
    )
    started_s = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - started_s < 5
