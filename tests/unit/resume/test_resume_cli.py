"""What `atoll train` says before it starts anything: directories, states and clusters that it cannot work with."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from orchestrator.cli.main import main
from orchestrator.finish import build_summary
from orchestrator.local import LocalRun
from orchestrator.rundir import RunDir
from orchestrator.summary import save_summary
from tests.small_run import TOML, make_pack, small_config

BAD_INPUT, UNREACHABLE = 2, 4


@pytest.fixture(scope="module")
def pack_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("pack"))


@pytest.fixture(scope="module")
def ended_dirs(pack_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run that is done, and one that was stopped."""
    return {kind: _ended_run(pack_dir, tmp_path_factory.mktemp(kind) / "run", kind) for kind in ("done", "stopped")}


def _ended_run(pack_dir: Path, run_dir: Path, kind: str) -> Path:
    run = LocalRun(small_config(pack_dir, "train.tokens=2560"), run_dir)
    run.start()
    if kind == "stopped":
        run.run(until=lambda: run.turns >= 9)
        run.stop()
    else:
        run.run(max_turns=1000)
    (run_dir / "config.toml").write_text(run.config.to_toml())
    save_summary(build_summary(run.host, run.config), run_dir)
    run.close()
    return run_dir


@pytest.fixture
def config_file(pack_dir: Path, tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(TOML + f'\n[data]\npath = "{pack_dir}"\n')
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = BAD_INPUT) -> str:
    assert main(["train", *arguments]) == code
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("error: ") == 1 and "Traceback" not in said
    return said


def test_a_directory_in_use(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    with RunDir(tmp_path / "run").lock():
        assert "in use by process" in refused(capsys, str(config_file), "--run-dir", str(tmp_path / "run"))


def test_a_directory_with_something_in_it(
    config_file: Path, ended_dirs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, str(config_file), "--run-dir", str(ended_dirs["stopped"]))
    assert "is not empty" in said and f"--resume {ended_dirs['stopped']}" in said


def test_nothing_to_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a run directory" in refused(capsys, "--resume", str(tmp_path / "nowhere"))
    assert "is not a run directory" in refused(capsys, "--resume", str(tmp_path))


def test_a_run_that_is_done(ended_dirs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert "is done: there is nothing to go on with" in refused(capsys, "--resume", str(ended_dirs["done"]))


def test_a_setting_that_cannot_change(ended_dirs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "--resume", str(ended_dirs["stopped"]), "--set", "train.lr=0.1")
    assert "train.lr cannot change" in said


@pytest.mark.parametrize("what", ["local state", "journal", "snapshot"])
def test_damage(what: str, ended_dirs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(ended_dirs["stopped"], run_dir)
    if what == "local state":
        (run_dir / "snapshots" / "local" / "island-0" / "tensors.safetensors").write_bytes(b"?")
        expected = "tensors.safetensors: missing or altered"
    elif what == "journal":
        lines = (run_dir / "journal.jsonl").read_bytes().splitlines(keepends=True)
        (run_dir / "journal.jsonl").write_bytes(b"".join([*lines[:3], *lines[4:]]))
        expected = "row 3 is missing before row 4"
    else:
        shutil.rmtree(run_dir / "snapshots" / "local")
        for folder in (run_dir / "snapshots").iterdir():
            (folder / "states.safetensors").write_bytes(b"?")
        expected = "states.safetensors is missing or altered"
    assert expected in refused(capsys, "--resume", str(run_dir))


def test_no_cluster_there(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: whoever dials it is refused
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        arguments = (str(config_file), "--run-dir", str(tmp_path / "run"), "--set", f"run.address={address}")
        said = refused(capsys, *arguments, code=UNREACHABLE)
    assert f"no Ray cluster answers at '{address}'" in said
