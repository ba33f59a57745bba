"""The configuration of a run: sections, presets, files, `--set`, and where each value came from.

Only this module reads TOML. Every section is a strict model beside the component that it configures.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from orchestrator.alarms import NotifyConfig
from orchestrator.config_checks import find_problems
from orchestrator.config_errors import CROSS_CHECK, Locate, dotted_keys, explain
from orchestrator.errors import UserError
from orchestrator.names import nearest
from orchestrator.settings import ExchangeConfig, MetricsConfig, RobustConfig, RunSection
from orchestrator.toml_writer import format_tables
from strategies.config import CodecConfig, Section, StrategyConfig
from workers.config import DataConfig, EvalConfig, ModelConfig, TrainConfig
from workers.pipeline.config import PipelineConfig

DEFAULT = "default"
IN_PYTHON = "the configuration that was given"
PLAIN_VALUES = (bool, int, float, str, list, dict)
# A key that is set displaces the others of its group where they came from a weaker place (a preset, a file).
SOURCES = ("data.path", "data.corpus", "data.samples")
ALTERNATIVES = {key: tuple(other for other in SOURCES if other != key) for key in SOURCES}


class RunConfig(Section):
    """Everything that decides what a run does; frozen, and the same on every member."""

    run: RunSection = Field(default_factory=RunSection, description="How many islands, and how the run is kept.")
    train: TrainConfig = Field(default_factory=TrainConfig, description="The inner loop of one island.")
    data: DataConfig = Field(default_factory=DataConfig, description="Where the tokens come from.")
    model: ModelConfig = Field(default_factory=ModelConfig, description="The built-in decoder, or a factory.")
    strategy: StrategyConfig = Field(default_factory=StrategyConfig, description="When members synchronise, and how.")
    codec: CodecConfig = Field(default_factory=CodecConfig, description="How values become bytes on the wire.")
    pipeline: PipelineConfig = Field(
        default_factory=PipelineConfig, description="Stages of a model that no single worker holds."
    )
    exchange: ExchangeConfig = Field(default_factory=ExchangeConfig, description="How a synchronisation is agreed on.")
    robust: RobustConfig = Field(default_factory=RobustConfig, description="Members that send wrong updates.")
    eval: EvalConfig = Field(default_factory=EvalConfig, description="Validation of the anchor.")
    notify: NotifyConfig = Field(default_factory=NotifyConfig, description="A command to run when something happens.")
    metrics: MetricsConfig = Field(default_factory=MetricsConfig, description="What leaves for monitoring systems.")

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        for problem in find_problems(self):
            context = {"key": problem.key, "message": problem.message, "remedy": problem.remedy}
            raise PydanticCustomError(CROSS_CHECK, "{message}; try {remedy}", context)
        return self

    def to_toml(self, notes: Mapping[str, str] | None = None) -> str:
        """This configuration with every value, as TOML that `parse_config` reads back to an equal one.

        Args:
            notes: "section.key" -> comment behind the value.

        Raises:
            UserError: `model.options` holds a value that TOML cannot express.
        """
        try:
            return format_tables(self.to_tables(), notes)
        except ValueError as error:
            raise UserError(str(error), remedy="only numbers, text, true/false, lists and tables") from error

    def to_tables(self) -> dict[str, dict[str, Any]]:
        """Section -> key -> plain value; None for a key that is not set."""
        return {name: _dump(getattr(self, name)) for name in type(self).model_fields}

    def with_values(self, values: Mapping[str, Any]) -> RunConfig:
        """A copy with other values, checked like a file.

        Args:
            values: "section.key" -> value.

        Raises:
            UserError: an unknown key, a wrong value, or settings that do not fit.
        """
        tables = self.to_tables()
        for key, value in values.items():
            section, _, name = key.partition(".")
            tables.setdefault(section, {})[name] = value
        return _build(tables, lambda key: DEFAULT)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedConfig:
    """A configuration, and where each of its values came from.

    Attributes:
        config: the checked configuration.
        source: the preset or file, as messages call it.
        origins: "section.key" -> "default", "preset demo:12", "my.toml:3", "--set ..." for every key.
    """

    config: RunConfig
    source: str
    origins: Mapping[str, str]

    def to_toml(self) -> str:
        """The resolved configuration as TOML with the origin of each value behind it."""
        return self.config.to_toml(self.origins)


def load_config(run: str | Path, *, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read a preset, a TOML file or the configuration in a run directory, and apply `--set` values to it.

    Args:
        run: name of a preset, path of a file, or a run directory.
        overrides: "section.key=value"; the value is TOML, or else text. An empty value sets the key back to
            its default. A later one wins.

    Raises:
        UserError: not found, not TOML, an unknown key, a wrong value, or settings that do not fit.
    """
    path, source = find_config(run)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the configuration: {error}",
            place=str(path),
            remedy="a TOML file in UTF-8 that this user can read; atoll config presets lists what needs no file",
        ) from error
    stem = re.sub(r"[^A-Za-z0-9_.-]", "-", path.stem).lstrip("-._")[:64]
    return parse_config(text, source=source, name=stem or None, overrides=overrides)


def parse_config(
    text: str, *, source: str = "configuration", name: str | None = None, overrides: Sequence[str] = ()
) -> LoadedConfig:
    """Build a configuration from TOML text and `--set` values.

    Args:
        text: the TOML document.
        source: what messages call it.
        name: `run.name` where neither the text nor an override sets it.
        overrides: as for `load_config`.

    Raises:
        UserError: not TOML, an unknown key, a wrong value, or settings that do not fit.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(
            f"not valid TOML: {error}",
            place=source,
            remedy="text goes in quotes, tables are [section]; atoll config show demo prints a file to begin with",
        ) from error
    lines = _key_lines(text)
    origins = {key: f"{source}:{lines[key]}" if key in lines else source for key in _keys_of(tables)}
    if name is not None and "run.name" not in origins and isinstance(tables.setdefault("run", {}), dict):
        tables["run"]["name"] = name
        origins["run.name"] = f"name of {source}"
    for override in overrides:
        _apply_override(tables, origins, override)
    config = _build(tables, _locator(origins, source))
    complete = {key: origins.get(key, DEFAULT) for key in dotted_keys(RunConfig)}
    return LoadedConfig(config=config, source=source, origins=complete)


def make_config(values: Mapping[str, Any], *, base: RunConfig | None = None) -> RunConfig:
    """Build a configuration from values in Python.

    Args:
        values: "section.key" -> value, or section -> table of its values.
        base: what they are set in; without it, the defaults.

    Raises:
        UserError: an unknown key, a wrong value, or settings that do not fit.
    """
    tables: dict[str, Any] = base.to_tables() if base is not None else {}
    flat = flatten(values)
    for key, value in flat.items():
        for other in ALTERNATIVES.get(key, ()) if value is not None else ():
            if other not in flat:
                _unset(tables, other.split("."))
        _set(tables, key.split("."), str(value) if isinstance(value, Path) else value, IN_PYTHON)
    return _build(tables, lambda key: IN_PYTHON)


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Tables of sections as "section.key" names, so that two ways to say the same thing meet."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        table = isinstance(value, Mapping) and "." not in name
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if table else {name: value}
    return flat


def find_config(run: str | Path) -> tuple[Path, str]:
    """The file of a preset, a path or a run directory, and what messages call it.

    Raises:
        UserError: there is no such preset, file or run directory; names the nearest preset.
    """
    name = str(run)
    presets = list_presets()
    if name in presets:
        return presets[name], f"preset {name}"
    path = Path(run)
    if (path / "config.toml").is_file():
        return path / "config.toml", str(path / "config.toml")
    if path.is_file():
        return path, name
    near = nearest(Path(name).stem, list(presets))
    choices = ", ".join(presets)
    remedy = f"{near} (presets are {choices})" if near else f"the path of a TOML file, or a preset: {choices}"
    raise UserError(f"no preset, file or run directory is called {name!r}", remedy=remedy)


def list_presets() -> dict[str, Path]:
    """Name -> file of the presets that come with Atoll, in alphabetical order."""
    return {path.stem: path for path in sorted(presets_dir().glob("*.toml"), key=lambda path: path.stem)}


def purpose_of(preset: Path) -> str:
    """The comment that a preset begins with, in one line."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), preset.read_text(encoding="utf-8").splitlines())
    return " ".join(line.removeprefix("#").strip() for line in lines)


def presets_dir() -> Path:
    """The folder of the presets: inside the package where it is installed, in `cluster_configs` in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "presets"
    return installed if installed.is_dir() else package.parent / "cluster_configs" / "runs"


def config_schema() -> dict[str, Any]:
    """The JSON schema of a run configuration, for editors."""
    return RunConfig.model_json_schema()


def _build(tables: Mapping[str, Any], locate: Locate) -> RunConfig:
    try:
        return RunConfig.model_validate(tables)
    except ValidationError as error:
        raise explain(error, RunConfig, locate) from error


def _locator(origins: Mapping[str, str], source: str) -> Locate:
    """Where a dotted key came from: its own origin, that of a key inside it or around it, or the whole source."""

    def locate(key: str) -> str:
        parts = key.split(".")
        around = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
        inside = [known for known in origins if known.startswith(f"{key}.")]
        return next((origins[known] for known in (key, *inside, *around) if known in origins), source)

    return locate


def _apply_override(tables: dict[str, Any], origins: dict[str, str], override: str) -> None:
    path, separator, text = override.partition("=")
    parts = [part.strip() for part in path.split(".")]
    place = f"--set {override}"
    if not separator or not all(parts):
        raise UserError(f"--set {override!r} is not of the form section.key=value", remedy="--set train.tokens=1000000")
    key = ".".join(parts[:2])
    for other in ALTERNATIVES.get(key, ()) if text else ():
        if not origins.get(other, "").startswith("--set"):
            _unset(tables, other.split("."))
            origins[other] = f"unset by {place}"
    if text:
        _set(tables, parts, parse_value(text), place)
    else:
        _unset(tables, parts)
    origins[key] = place
    # A deeper path has its own origin for messages; it is left out of what `config show --origin` prints.
    origins[".".join(parts)] = place


def _set(tables: dict[str, Any], parts: Sequence[str], value: Any, place: str) -> None:
    table = tables
    for part in parts[:-1]:
        inner = table.setdefault(part, {})
        if not isinstance(inner, dict):
            raise UserError(
                f"{part} is a value, it has no key {parts[-1]!r}",
                place=place,
                remedy=f"--set {'.'.join(parts[:-1])}=VALUE; atoll config show lists the keys",
            )
        table = inner
    table[parts[-1]] = deepcopy(value)


def _unset(tables: dict[str, Any], parts: Sequence[str]) -> None:
    table: Any = tables
    for part in parts[:-1]:
        table = table.get(part) if isinstance(table, dict) else None
    if isinstance(table, dict):
        table.pop(parts[-1], None)


def parse_value(text: str) -> Any:
    """A TOML value, or the text itself where it is none (so that a path needs no quotes)."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    # A date is text here: no setting takes one, and names may look like one.
    is_one_value = list(parsed) == ["value"] and isinstance(parsed["value"], PLAIN_VALUES)
    return parsed["value"] if is_one_value else text


def _keys_of(tables: Mapping[str, Any]) -> Iterator[str]:
    for section, values in tables.items():
        if isinstance(values, dict):
            yield from (f"{section}.{key}" for key in values)
        else:
            yield section


def _key_lines(text: str) -> dict[str, int]:
    """Dotted key -> line, for keys and tables written the plain way; for messages only."""
    lines: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[([^\[\]]+)\]", line):
            table = header[1].strip() + "."
            lines.setdefault(table[:-1], number)
        elif assignment := re.match(r"\s*([A-Za-z0-9_.-]+)\s*=", line):
            lines.setdefault(table + assignment[1], number)
    return lines


def _dump(section: BaseModel) -> dict[str, Any]:
    """The values of a section; inside nested tables what is not set is left out."""
    full, short = section.model_dump(), section.model_dump(exclude_none=True)
    return {key: short.get(key) for key in full}
