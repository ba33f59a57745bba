"""docs/reference/json.md is what the models say, every `--json` is in it, and real outputs fit their models."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from orchestrator.cli.main import cli, main
from orchestrator.json_docs import OUTPUTS, page
from orchestrator.local import LocalRun
from tests.small_run import make_pack, small_config

DOCUMENT = Path(__file__).parents[3] / "docs" / "reference" / "json.md"


def test_the_page_is_current() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == page(), "python -m orchestrator.json_docs > docs/reference/json.md"


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from commands(inner, (*path, name))
    else:
        yield " ".join(path), command


def json_commands(command: click.Command) -> list[str]:
    found = commands(command)
    return [name for name, one in found if any("--json" in parameter.opts for parameter in one.params)]


def test_every_json_output_is_described() -> None:
    told = [f"{command.removeprefix('atoll ')} " for command in OUTPUTS]
    assert [name for name in json_commands(cli) if not any(text.startswith(f"{name} ") for text in told)] == []


# A schema is JSON already; these print nothing of their own, or what another program prints.
WITHOUT = {"config schema", *(f"lab {name}" for name in ("cut", "down", "exec", "heal", "play", "run", "set"))}


def test_every_command_prints_json_if_asked() -> None:
    assert {name for name, _ in commands(cli)} - set(json_commands(cli)) == WITHOUT


def test_the_link_of_a_dashboard_is_one_line(run_dir: Path) -> None:
    command = [sys.executable, "-m", "orchestrator.cli.main", "dashboard", str(run_dir), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        process.terminate()
        assert process.wait(timeout=30) == 0
    OUTPUTS["atoll dashboard --json"].model_validate_json(said)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("json")
    config = small_config(make_pack(folder))
    run = LocalRun(config, folder / "runs" / "run-1")
    run.start()
    (run.run_dir / "config.toml").write_text(run.config.to_toml())
    (run.run_dir / "logs").mkdir()
    (run.run_dir / "logs" / "island-0-1.log").write_text("a line\n")
    assert run.run() is not None
    run.close()
    return run.run_dir


@pytest.mark.parametrize(
    ("described", "arguments"),
    [
        ("atoll status --json", ["status", "RUN", "--json"]),
        ("atoll ledger --json", ["ledger", "RUN", "--json"]),
        ("atoll runs --json", ["runs", "--base", "BASE", "--json"]),
        ("atoll logs --json", ["logs", "island-0", "--at", "RUN", "--json"]),
        ("atoll bundle --json", ["bundle", "RUN", "--out", "BASE/out.tar.gz", "--json"]),
        ("atoll report --json", ["report", "RUN", "--json"]),
        ("atoll export --out exported --json", ["export", "RUN", "--out", "BASE/exported", "--json"]),
        ("atoll sample --prompt def --json", ["sample", "RUN", "--prompt", "reef", "--max-new-tokens", "2", "--json"]),
        (
            "atoll data pack texts --out packs/mine --json",
            ["data", "pack", "TEXT", "--out", "BASE/mine", "--seq-len", "16", "--val-fraction", "0.3", "--json"],
        ),
        ("atoll data verify packs/mine --json", ["data", "verify", "PACK", "--json"]),
        ("atoll config presets --json", ["config", "presets", "--json"]),
        ("atoll config validate demo --json", ["config", "validate", "demo", "--json"]),
        ("atoll why --json", ["why", "--run", "RUN", "--json"]),
        ("atoll plan demo --json", ["plan", "demo", "--step", "0.1s", "--json"]),
        ("atoll config show demo --origin --json", ["config", "show", "demo", "--origin", "--json"]),
        ("atoll simulate --json", ["simulate", "--seeds", "2", "--workers", "1", "--json"]),
        ("atoll simulate --seed 7 --json", ["simulate", "--seed", "7", "--json"]),
    ],
)
def test_real_outputs_fit(
    described: str, arguments: list[str], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack = run_dir.parents[1] / "pack"
    places = {"RUN": str(run_dir), "BASE": str(run_dir.parent), "PACK": str(pack), "TEXT": f"{pack.parent}/words.txt"}
    code = main([places.get(text, text.replace("BASE/", f"{run_dir.parent}/")) for text in arguments])
    said = capsys.readouterr()
    assert code == 0, said.err
    OUTPUTS[described].model_validate_json(said.out)
    assert json.loads(said.out)
