"""`atoll chaos`, `atoll storm` and fault plans on the command line: what is wrong is said before anything happens."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from orchestrator.cli.main import main
from orchestrator.config import load_config
from orchestrator.fault_plan import read_faults


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.toml").write_text(load_config("debug").config.to_toml())
    return path


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("error:") == 1
    return said.err


def test_a_storm_writes_into_no_run_of_another(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["storm", "--minutes", "0.2", "--dir", str(run_dir)]) == 2
    assert f"{run_dir} is not empty" in one_error(capsys)


def test_a_run_that_never_began(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chaos", "kill:island-1", "--run", str(run_dir)]) == 2
    assert "does not say where its run is" in one_error(capsys)


def test_a_run_that_is_over(run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOLL_STATE_DIR", str(run_dir / "state"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    (run_dir / "ray.json").write_text(json.dumps({"gcs_address": f"127.0.0.1:{port}", "node_ip": "127.0.0.1"}))
    assert main(["chaos", "kill:island-1", "--run", str(run_dir)]) == 4
    assert "no Ray cluster answers" in one_error(capsys)
    (run_dir / "summary.json").write_text('{"exit_reason": "done"}')
    assert main(["chaos", "kill:island-1", "--run", str(run_dir)]) == 2
    assert "does not go on: it is done" in one_error(capsys)


def test_a_plan_that_names_nobody_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plan.toml").write_text('[[fault]]\nkind = "kill"\ntarget = "island-7"\nround = 1\n')
    assert main(["train", "debug", "--faults", "plan.toml"]) == 2
    error = one_error(capsys)
    assert "plan.toml, fault 1: there is no member 'island-7'; this run has island-0, island-1" in error
    assert not Path("runs").exists()
    assert main(["train", "debug", "--faults", "none.toml"]) == 2
    assert "cannot read the fault plan" in one_error(capsys)


def test_faults_of_the_file_and_of_the_command_line_add_up(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text('[[fault]]\nkind = "storm"\nrate = 60\n')
    config = load_config("debug", overrides=[f"run.fault_plan={tmp_path / 'plan.toml'}"]).config
    faults = read_faults(config, ["kill:island-0@round=1"], ["island-0", "island-1"])
    assert [fault.kind for fault in faults] == ["storm", "kill"]


def test_a_run_that_others_join_may_have_faults_for_them() -> None:
    config = load_config("debug", overrides=["run.elastic=true", "run.address=auto"]).config
    assert [f.target for f in read_faults(config, ["kill:island-300@round=1"], ["island-0"])] == ["island-300"]
    with pytest.raises(ValueError, match=r"no member 'reef'; this run has island-0, .* and 4084 more"):
        read_faults(config, ["kill:reef@round=1"], ["island-0"])


def test_a_storm_of_an_unknown_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["storm", "--kinds", "kill+rain"]) == 2
    assert "a storm has no kind 'rain'" in one_error(capsys)


def test_the_schema_of_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["storm", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"throughput", "participation", "kinds", "digest_mismatches"} <= schema["properties"].keys()
