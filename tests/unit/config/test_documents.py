"""What the README and the documents name exists: commands, options, keys, targets of make, files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from orchestrator.cli.main import cli
from orchestrator.config import RunConfig
from orchestrator.config_errors import dotted_keys

ROOT = Path(__file__).resolve().parents[3]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
README_ORDER = ["## Two commands", "## What you see", "## Your own data", "## Your own model", "## Your own loop"]
README_ORDER += ["## Concepts", "## Where it runs", "## Links"]
# Commands of later issues that a decision record may speak of.
PLANNED = {"join", "leave", "doctor"}


def code_in(text: str) -> Iterator[str]:
    """Lines of code blocks, and code between backticks."""
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield from block.splitlines()
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


@pytest.fixture(params=DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def code(request: pytest.FixtureRequest) -> list[str]:
    return list(code_in(request.param.read_text(encoding="utf-8")))


def test_commands_and_their_options_exist(code: list[str]) -> None:
    for line in code:
        match = re.match(r"\$? ?atoll ([a-z]+)(.*)", line.strip())
        if match is None or match[1] in PLANNED:
            continue
        command = cli.get_command(click.Context(cli), match[1])
        assert command is not None, f"no command {match[1]!r}: {line}"
        words = match[2].split()
        if isinstance(command, click.Group) and words and not words[0].startswith("-"):
            command = command.get_command(click.Context(command), words[0])
            assert command is not None, f"no such subcommand: {line}"
        known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
        used = {word.partition("=")[0].strip("[]") for word in words if word.strip("[").startswith("--")}
        assert used <= known, line


def test_keys_of_the_configuration_exist(code: list[str]) -> None:
    sections = "|".join(RunConfig.model_fields)
    known = set(dotted_keys(RunConfig))
    files = {"config.toml", "data.py", "metrics.jsonl", "metrics.py", "model.py", "pipeline.jsonl"}
    for line in code:
        for key in re.findall(rf"(?<![\w./:])((?:{sections})\.[a-z_0-9]+)\b(?!\()", line):
            assert key in known or key in files, f"no key {key}: {line}"


def test_targets_of_make_exist(code: list[str]) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"demo", "test", "check", "bench", "bench-quality", "clean"} <= targets
    used = {match[1] for line in code if (match := re.match(r"\$? ?make ([a-z-]+)", line.strip()))}
    assert used <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target


def test_readme_keeps_its_order() -> None:
    headings = re.findall(r"^## .*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings == README_ORDER
