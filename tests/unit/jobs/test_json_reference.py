"""docs/reference/json.md is what the models say, every `--json` is in it, and real outputs fit their models."""

from __future__ import annotations

import json
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


def json_commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[str]:
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from json_commands(inner, (*path, name))
    elif any("--json" in parameter.opts for parameter in command.params):
        yield " ".join(path)


def test_every_json_output_is_described() -> None:
    told = [f"{command.removeprefix('atoll ')} " for command in OUTPUTS]
    assert [name for name in json_commands(cli) if not any(text.startswith(f"{name} ") for text in told)] == []


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
    places = {"RUN": str(run_dir), "BASE": str(run_dir.parent)}
    code = main([places.get(text, text.replace("BASE/", f"{run_dir.parent}/")) for text in arguments])
    said = capsys.readouterr()
    assert code == 0, said.err
    OUTPUTS[described].model_validate_json(said.out)
    assert json.loads(said.out)
