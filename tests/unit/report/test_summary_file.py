"""summary.json: what is written is read again, and what is wrong is named."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.report import console_table
from orchestrator.summary import FaultRow, Summary, SummaryError, load_summary, save_summary

MINIMAL = Summary(run_id="r", exit_reason="done", seconds=3.0, params=10, tokens_committed=0)
FULL = MINIMAL.model_copy(
    update={
        "initial_val_loss": 5.5,
        "final_val_loss": 1.6,
        "faults": (FaultRow(kind="kill", member="island-1", detected_after_s=0.1, back_after_s=4.0),),
    }
)
ISSUE_FIELDS = (
    "schema_version run_id exit_reason seconds params initial_val_loss final_val_loss tokens_committed tokens_lost "
    "tokens_reissued exchanges_committed exchanges_discarded bytes_sent control_bytes_sent "
    "bytes_sent_per_param_per_round tokens_per_s compute_utilization goodput codec_backend peak_memory_bytes "
    "anchor_digest faults"
).split()


@pytest.mark.parametrize("summary", [MINIMAL, FULL])
def test_what_is_saved_is_loaded(summary: Summary, tmp_path: Path) -> None:
    assert load_summary(save_summary(summary, tmp_path).parent) == summary
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_every_field_is_there_and_described() -> None:
    assert set(ISSUE_FIELDS) <= set(Summary.model_fields)
    fields = {**Summary.model_fields, **FaultRow.model_fields}
    assert [name for name, field in fields.items() if not field.description] == []


def test_a_loss_that_is_not_finite_is_not_known(tmp_path: Path) -> None:
    diverged = Summary.model_validate({**MINIMAL.model_dump(), "final_val_loss": float("nan")})
    save_summary(diverged, tmp_path)
    assert load_summary(tmp_path).final_val_loss is None


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_summary(MINIMAL, tmp_path)

    def full_disk(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("orchestrator.summary.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_summary(FULL, tmp_path)
    assert load_summary(tmp_path) == MINIMAL
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"schema_version": 2}, "schema_version = 2"),
        ({"seconds": "long"}, "seconds = 'long'"),
        ({"goodputt": 1.0}, "goodputt"),
        ({"faults": [{"kind": "kill", "member": 3}]}, "faults.0.member = 3"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, object], named: str, tmp_path: Path) -> None:
    values = {**json.loads(FULL.model_dump_json()), **change}
    (tmp_path / "summary.json").write_text(json.dumps(values))
    with pytest.raises(SummaryError) as error:
        load_summary(tmp_path)
    assert named in str(error.value)
    assert str(tmp_path / "summary.json") in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", '{"schema_version": 1', "\x00\xff"])
def test_what_is_no_summary_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(SummaryError, match="not a JSON object"):
        load_summary(tmp_path)


def test_no_summary_is_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_summary(tmp_path)


@pytest.mark.parametrize("summary", [MINIMAL, FULL, FULL.model_copy(update={"exit_reason": "failed", "error": "[x]"})])
def test_console_table_says_what_the_summary_says(summary: Summary) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(console_table(summary))
    text = console.export_text()
    assert summary.exit_reason in text
    assert summary.final_val_loss is None or "1.600" in text
    assert not summary.faults or "noticed after 100 ms, back after 4 s" in text
    assert summary.error is None or "[x]" in text
