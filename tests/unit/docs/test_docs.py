"""The README and the documents are true in what can be checked: commands, settings, targets, links, files, names."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import click
import pytest

from orchestrator.bans import Standing
from orchestrator.cli.main import BAD_INPUT, INTERRUPTED, READER_GONE, cli
from orchestrator.config import RunConfig, load_config
from orchestrator.config_errors import dotted_keys
from orchestrator.errors import ClusterUnreachable, RunFailed, UserError, VerificationFailed
from orchestrator.launch import EXIT
from orchestrator.membership import Status
from orchestrator.metrics import Phase
from orchestrator.summary import Summary
from strategies.config import CodecConfig, StrategyConfig

ROOT = Path(__file__).resolve().parents[3]
READMES = [ROOT / "README.md", ROOT / "cluster_configs" / "README.md"]
DOCUMENTS = sorted([*READMES, *(ROOT / "docs").rglob("*.md")])
PACKAGES = ("strategies", "faults", "workers", "orchestrator", "benchmarks", "tests")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Commands and settings of later issues that a document may name where it says that they are not there yet.
PLANNED_COMMANDS = set[str]()
# Methods and functions of Python and of libraries that documents name.
FOREIGN_NAMES = {"len", "load_state_dict", "requires_grad_", "backward", "zero_grad", "IterableDataset"}

# The log tells what was, and names what may be gone by now.
PRESENT = [path for path in DOCUMENTS if path.name != "log.md"]

every_present_document = pytest.mark.parametrize("document", PRESENT, ids=lambda path: str(path.relative_to(ROOT)))
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def read(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def prose(document: Path) -> str:
    return FENCE.sub("", read(document))


def spans(document: Path) -> list[str]:
    """What stands between backticks in the text."""
    return re.findall(r"`([^`\n]+)`", prose(document))


def shell_lines(document: Path) -> Iterator[str]:
    """Lines of code blocks that are no Python, JSON or TOML, with continued ones joined."""
    for language, block in FENCE.findall(read(document)):
        if language in ("", "sh", "bash", "console"):
            yield from block.replace("\\\n", " ").splitlines()


def words(line: str, command: str) -> list[str] | None:
    """The arguments of `command` in a shell line, None if the line runs something else."""
    try:
        parts = shlex.split(line.removeprefix("$ "), comments=True)
    except ValueError:
        return None
    return parts[1:] if parts and Path(parts[0]).name == command else None


# ---------------------------------------------------------------- commands


def check_parses(arguments: list[str]) -> None:
    """Parse a whole command line as the command would, without running it."""
    rest, context = list(arguments), click.Context(cli, info_name="atoll")
    while isinstance(context.command, click.Group):
        name, command, rest = context.command.resolve_command(context, rest)
        assert command is not None
        if isinstance(command, click.Group) and rest:
            context = click.Context(command, info_name=name, parent=context)
        else:
            context = command.make_context(name, rest, parent=context)
            break
    if "overrides" in context.params and (run := context.params.get("run")):
        load_config(run, overrides=context.params["overrides"])


def check_names(arguments: list[str]) -> None:
    """A command that is only mentioned: it exists, and has the options that are named."""
    command: click.Command = cli
    while isinstance(command, click.Group) and arguments and not arguments[0].startswith("-"):
        assert isinstance(command, click.Group)
        found = command.get_command(click.Context(command), arguments[0])
        assert found is not None, f"no command {arguments[0]!r}"
        command, arguments = found, arguments[1:]
    known = {name for parameter in command.params for name in parameter.opts} | {"--help", "-h"}
    used = {word.partition("=")[0] for word in (word.strip("[],|") for word in arguments) if word.startswith("-")}
    assert used <= known, f"no option {sorted(used - known)}"


@every_document
def test_command_lines_parse(document: Path) -> None:
    for line in shell_lines(document):
        arguments = words(line, "atoll")
        if arguments is None or "..." in arguments:
            continue
        try:
            check_parses(arguments)
        except (click.ClickException, ValueError) as error:
            pytest.fail(f"{line.strip()}: {getattr(error, 'message', error)}")


@every_present_document
def test_commands_in_the_text_exist(document: Path) -> None:
    for span in spans(document):
        arguments = words(span, "atoll")
        if not arguments or arguments[0] in PLANNED_COMMANDS:
            continue
        try:
            check_names(arguments)
        except AssertionError as error:
            pytest.fail(f"`{span}`: {error}")


@every_document
def test_targets_of_make_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.MULTILINE))
    for line in [*shell_lines(document), *spans(document)]:
        used = [word for word in words(line, "make") or () if "=" not in word and not word.startswith("-")]
        assert set(used) <= targets, line


# ---------------------------------------------------------------- settings


def is_key(name: str) -> bool:
    """`section.key`, a table below it, or a free key of a table that takes any."""
    known = set(dotted_keys(RunConfig))
    if name in known or any(key.startswith(name + ".") for key in known):
        return True
    return name.startswith(("train.per_island.", "model.options."))


@every_present_document
def test_settings_exist(document: Path) -> None:
    sections = "|".join(RunConfig.model_fields)
    for span in spans(document):
        match = re.match(rf"(?:--set )?((?:{sections})\.[a-z_0-9.]*[a-z_0-9])(?![\w(])", span)
        if match is None or re.search(r"\.(py|toml|jsonl?)$", match[1]):
            continue
        if re.match(r"model\.(layers\.\d|embed_tokens|norm)", match[1]):  # names of tensors
            continue
        assert is_key(match[1]), f"`{span}`: there is no setting {match[1]}"


def choices(section: type[StrategyConfig | CodecConfig]) -> tuple[str, ...]:
    """The names that a section's `name` may have."""
    return get_args(section.model_fields["name"].annotation)


def test_operating_says_what_each_state_and_exit_code_means() -> None:
    text = (ROOT / "docs" / "operating.md").read_text()
    states = {"running", "paused", "interrupted", *get_args(Summary.model_fields["exit_reason"].annotation)}
    states |= {*get_args(Status), *get_args(Standing), *get_args(Phase)} - {"member"}
    assert {state for state in states if f"`{state}`" not in text} == set()
    codes = {UserError.exit_code, RunFailed.exit_code, ClusterUnreachable.exit_code, VerificationFailed.exit_code}
    codes |= {*EXIT.values(), INTERRUPTED, READER_GONE, BAD_INPUT}
    assert {code for code in codes if f"\n| {code} | " not in text} == set()


def test_every_strategy_and_codec_is_described() -> None:
    described = set(spans(ROOT / "docs" / "strategies.md"))
    names = [name for section in (StrategyConfig, CodecConfig) for name in choices(section)]
    assert set(names) <= described, f"docs/strategies.md does not name {sorted(set(names) - described)}"


# ---------------------------------------------------------------- links, files, names


def anchors(document: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", read(document)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_document
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = document.parent / path if path else document
        assert linked.exists(), f"{target} is not there"
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked), f"{target}: there is no such heading"


@every_present_document
def test_files_exist(document: Path) -> None:
    for span in spans(document):
        if re.fullmatch(rf"({'|'.join(PACKAGES)}|docs|cluster_configs)/[\w./-]*", span):
            assert (ROOT / span).exists(), f"`{span}` is not there"
        elif re.fullmatch(r"[a-z_]+\.py", span):
            everywhere = [*ROOT.glob(span), *(p for package in PACKAGES for p in (ROOT / package).rglob(span))]
            assert everywhere or document.name == "README.md", f"`{span}` is nowhere"


@cache
def names_of_the_code() -> tuple[set[str], dict[str, set[str]], dict[str, set[str]]]:
    """Functions of all kinds, the members of each class, and the bases of each class (by lines: quicker than `ast`)."""
    functions: set[str] = set()
    members: dict[str, set[str]] = {}
    bases: dict[str, set[str]] = {}
    for path in [
        ROOT / "atoll" / "__init__.py",
        *(path for package in PACKAGES[:4] for path in (ROOT / package).rglob("*.py")),
    ]:
        owner = ""
        for indent, kind, name, rest in re.findall(r"^( *)(?:async )?(def|class) (\w+)(.*)$", read(path), re.MULTILINE):
            if kind == "class":
                owner = name
                members.setdefault(owner, set())
                bases.setdefault(owner, set()).update(re.findall(r"\w+", rest))
            else:
                functions.add(name)
                if indent and owner:
                    members[owner].add(name)
    return functions, members, bases


def has_member(owner: str, name: str) -> bool:
    _, members, bases = names_of_the_code()
    return name in members.get(owner, ()) or any(has_member(base, name) for base in bases.get(owner, ()))


@every_present_document
def test_functions_and_classes_exist(document: Path) -> None:
    functions, members, _ = names_of_the_code()
    for span in spans(document):
        call = re.fullmatch(r"(?:([A-Z]\w+)\.)?([a-z_]\w+)\(\)", span)  # with arguments: code of the reader
        kind = re.fullmatch(r"[A-Z][a-z]+(?:[A-Z][a-z0-9]+)+", span)
        if call is not None and call[1] is not None:
            assert has_member(call[1], call[2]), f"`{span}`: class {call[1]} has no {call[2]}()"
        elif call is not None:
            assert call[2] in functions | FOREIGN_NAMES, f"`{span}`: there is no such function"
        elif kind is not None and not span.startswith("Auto"):
            assert span in members.keys() | FOREIGN_NAMES, f"`{span}`: there is no such class"


@every_present_document
def test_functions_are_in_the_file_that_is_named(document: Path) -> None:
    for owner, name, file in re.findall(r"`(?:(\w+)\.)?(\w+)\(\)`\s+in\s+`([\w/]+\.py)`", prose(document)):
        defined = read(ROOT / file)
        assert re.search(rf"^ *(?:async )?def {name}\b", defined, re.MULTILINE), f"{name}() is not in {file}"
        assert not owner or re.search(rf"^class {owner}\b", defined, re.MULTILINE), f"{owner} is not in {file}"


def test_what_the_checks_are_for() -> None:
    for arguments in (["trian"], ["train", "demo", "--sett", "a.b=1"], ["data", "pack", "x"]):
        with pytest.raises(click.ClickException):
            check_parses(arguments)
    with pytest.raises(ValueError, match="unknown key"):
        check_parses(["train", "demo", "--set", "train.lrr=1"])
    with pytest.raises(AssertionError):
        check_names(["train", "--nonsense"])
    assert is_key("train.lr") and is_key("train.per_island.island-1.threads") and not is_key("train.speed")
    assert has_member("Coordinator", "handle") and not has_member("Coordinator", "guess")
