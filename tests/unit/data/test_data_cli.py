"""`atoll data pack` and what importing it costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from orchestrator.cli.data import data
from workers.data.errors import DataError
from workers.data.index import load_index

ROOT = Path(__file__).resolve().parents[3]


def test_pack_command_makes_a_pack_and_says_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": f"document {i}"}) for i in range(80)))
    out = tmp_path / "pack"
    arguments = ["pack", str(tmp_path / "a.jsonl"), "--out", str(out), "--text-field", "body"]
    done = CliRunner().invoke(data, [*arguments, "--seq-len", "8", "--val-fraction", "0.2"], catch_exceptions=False)
    index = load_index(out)
    assert done.exit_code == 0 and (index.seq_len, index.val_fraction) == (8, 0.2)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("80 documents, ") and lines[-1] == str(out) and index.digest in done.stdout


def test_pack_command_leaves_the_users_mistake_to_the_boundary(tmp_path: Path) -> None:
    done = CliRunner().invoke(data, ["pack", str(tmp_path / "nowhere"), "--out", str(tmp_path / "pack")])
    assert isinstance(done.exception, DataError) and "nowhere: no such file or folder" in str(done.exception)


def test_pack_command_wants_a_source_and_an_output() -> None:
    for arguments in (["pack", "--out", "x"], ["pack", "a.txt"]):
        assert CliRunner().invoke(data, arguments).exit_code == 2


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        ("workers.data.index, workers.data.permutation, orchestrator.cli.data", "torch ray pyarrow rich tokenizers"),
        ("workers.data.corpus, workers.data.reader, workers.data.pack", "torch ray tokenizers"),
    ],
)
def test_what_is_imported(modules: str, unwanted: str) -> None:
    program = f"import sys, {modules}; print([m for m in '{unwanted}'.split() if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.stdout == "[]\n", done.stdout + done.stderr
