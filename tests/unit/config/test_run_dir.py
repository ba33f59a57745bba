from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.errors import UserError
from orchestrator.rundir import RunDir, RunDirInUse, collect_versions, create_run_dir, list_runs, open_run_dir

HOLD_THE_LOCK = """
import sys
from pathlib import Path
from orchestrator.rundir import RunDir
with RunDir(Path(sys.argv[1])).lock():
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextmanager
def locked_by_another_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Hold the lock of a run directory in a process of its own until the block ends."""
    command = [sys.executable, "-c", HOLD_THE_LOCK, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_new_run_has_its_own_directory_and_latest_names_it(tmp_path: Path) -> None:
    base = tmp_path / "runs"
    first, second = create_run_dir("demo", base=base), create_run_dir("demo", base=base)
    assert first.path != second.path
    assert re.fullmatch(r"demo-\d{4}-\d\d-\d\d-[0-9a-f]{4}", second.path.name)
    assert os.readlink(base / "latest") == second.path.name
    assert first.logs.is_dir() and first.snapshots.is_dir()
    assert sorted(path.name for path in base.iterdir()) == sorted([first.path.name, second.path.name, "latest"])


def test_latest_that_is_no_link_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "latest").mkdir()
    with pytest.raises(UserError, match="is not a link"):
        create_run_dir("demo", base=tmp_path)


def test_a_named_directory_must_be_empty(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    run_dir = create_run_dir("demo", path=path)
    assert run_dir.path == path
    with pytest.raises(UserError, match=r"is not empty, it has 'logs' in it .*--resume"):
        create_run_dir("demo", path=path)
    assert not (tmp_path / "a" / "latest").exists()


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make the run directory"):
        create_run_dir("demo", path=tmp_path / "file" / "run")


def test_lock_names_the_process_that_holds_it(tmp_path: Path) -> None:
    run_dir = create_run_dir("demo", path=tmp_path / "run")
    with locked_by_another_process(run_dir.path) as process:
        holder = run_dir.holder()
        assert holder is not None
        assert holder.pid == process.pid
        with pytest.raises(RunDirInUse, match=f"is in use by process {process.pid} on "), run_dir.lock():
            pytest.fail("two processes hold the lock")
        with pytest.raises(RunDirInUse, match="is in use"):
            create_run_dir("demo", path=run_dir.path)
        assert run_dir.state() == "running"
    # The process was killed, its lock went with it.
    assert run_dir.holder() is None
    with run_dir.lock():
        assert run_dir.holder() is not None
        with pytest.raises(RunDirInUse, match=f"process {os.getpid()} "), run_dir.lock():
            pytest.fail("locked twice")
    assert run_dir.holder() is None


def test_lock_outlasts_those_who_only_look(tmp_path: Path) -> None:
    run_dir = create_run_dir("demo", path=tmp_path / "run")
    for _ in range(50):
        with run_dir.lock():
            pass
        assert run_dir.holder() is None


def test_versions_of_the_start_stay_when_a_resumed_run_has_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = create_run_dir("demo", path=tmp_path / "run")
    run_dir.record("a = 1\n")
    run_dir.record("a = 2\n")
    started = json.loads(run_dir.versions.read_text())
    assert started == collect_versions()
    assert {"ray", "torch", "pyarrow"} <= started["packages"].keys()
    assert run_dir.config.read_text() == "a = 2\n"
    other = {**started, "python": "3.99"}
    monkeypatch.setattr("orchestrator.rundir.collect_versions", lambda: other)
    run_dir.record("a = 2\n")
    run_dir.record("a = 2\n")
    assert json.loads(run_dir.versions.read_text()) == {**started, "resumed": [other]}


def test_runs_are_listed_oldest_first_with_their_state(tmp_path: Path) -> None:
    runs = [create_run_dir(name, base=tmp_path) for name in ("one", "two", "three")]
    for age, run in enumerate(reversed(runs)):
        run.record("")
        os.utime(run.config, (1_000_000 - age, 1_000_000 - age))
    runs[0].summary.write_text('{"exit_reason": "done"}')
    runs[1].summary.write_text("{ half a")
    (tmp_path / "no-run").mkdir()
    found = list_runs(tmp_path)
    assert [run.path for run in found] == [run.path for run in runs]
    assert [run.state() for run in found] == ["done", "interrupted", "interrupted"]
    assert list_runs(tmp_path / "nowhere") == []


def test_a_run_is_opened_by_path_by_name_and_as_the_latest(tmp_path: Path) -> None:
    run = create_run_dir("demo", base=tmp_path)
    run.record("")
    assert open_run_dir(run.path) == run
    assert open_run_dir(Path(run.path.name), base=tmp_path) == run
    assert open_run_dir(base=tmp_path).path == run.path
    assert open_run_dir(tmp_path / "latest").path == run.path
    with pytest.raises(UserError, match=f"nope is not a run directory .*{run.path.name} is the newest"):
        open_run_dir(Path("nope"), base=tmp_path)
    with pytest.raises(UserError, match=r"latest is not a run directory .*atoll demo"):
        open_run_dir(base=tmp_path / "empty")


def test_every_file_has_one_place() -> None:
    run_dir = RunDir(Path("r"))
    names = "config versions journal metrics summary report snapshots logs lock_file".split()
    assert [getattr(run_dir, name).name for name in names] == [
        "config.toml",
        "versions.json",
        "journal.jsonl",
        "metrics.jsonl",
        "summary.json",
        "report.html",
        "snapshots",
        "logs",
        "LOCK",
    ]
    assert run_dir.log("island-1", 2) == Path("r/logs/island-1-2.log")
    assert run_dir.journal_segment(3) == Path("r/journal.000003.jsonl")
