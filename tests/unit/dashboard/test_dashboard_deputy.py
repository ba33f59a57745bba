"""Buttons of a dashboard that reads files: who is asked, when, and what comes back."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from orchestrator.dashboard.deputy import Deputy
from orchestrator.dashboard.sources import FileSource
from orchestrator.rundir import RunDir
from tests.unit.dashboard.synthetic_journal import write_run
from tests.unit.report.synthetic_run import SyntheticRun

# Answers as `orchestrator.operate` does, in a process of its own.
CONTROLLER = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    if request["args"]["action"] == "drain":
        reply = {"error": {"message": "no member of that name", "place": None, "remedy": None, "code": 2}}
    else:
        reply = {"ok": json.dumps([request["do"], request["run"], request["args"]])}
    print(json.dumps(reply), flush=True)
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    directory = RunDir(write_run(SyntheticRun(rounds=2, inner_steps=2, kill_round=None), tmp_path / "run"))
    directory.summary.unlink()
    directory.cluster_file.write_text(json.dumps({"address": "1.2.3.4:5", "node_ip": "", "local": True, "run": "one"}))
    return directory


def test_only_a_run_that_goes_on_has_buttons(run_dir: RunDir) -> None:
    source = FileSource(run_dir.path)
    source.refresh()
    assert source.able() == (), "nobody holds the directory"
    with run_dir.lock():
        source.refresh()
        assert {"drain", "pause", "resume", "save", "stop"} == set(source.able())
        chaotic = FileSource(run_dir.path, chaos=True)
        chaotic.refresh()
        assert set(chaotic.able()) - set(source.able()) == {"kill"}
        assert source.act("kill", "island-0", "me").startswith("refused")
        run_dir.cluster_file.unlink()
        assert source.able() == (), "no controller is known"
        assert source.act("save", "", "me").startswith("refused")
    source.close()


def test_the_controller_is_asked_and_its_answer_comes_back(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Deputy, "_command", lambda self: ([sys.executable, "-c", CONTROLLER], dict(os.environ)))
    source = FileSource(run_dir.path)
    try:
        asked = json.loads(source.act("save", "", "dashboard, 127.0.0.1"))
        assert asked == ["act", "one", {"action": "save", "member": "", "by": "dashboard, 127.0.0.1"}]
        assert source.act("drain", "island-9", "me") == "not done: no member of that name"
    finally:
        source.close()


def test_a_process_that_cannot_ask_is_told(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Deputy, "_command", lambda self: ([sys.executable, "-c", "pass"], dict(os.environ)))
    source = FileSource(run_dir.path)
    try:
        assert source.act("save", "", "me").startswith("not done: what answers about the runs has ended")
    finally:
        source.close()
