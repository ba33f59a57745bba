"""Topologies of the lab and schedules of link changes as TOML: those that come with Atoll, and files of the user."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from faults.lab.schedule import LinkChange
from faults.lab.topology import Topology
from orchestrator.config_errors import explain
from orchestrator.errors import UserError
from orchestrator.names import nearest

Model = TypeVar("Model", bound=BaseModel)
EXAMPLE_CHANGE = '[[links]], then at_s = 20, action = "cut", target = "eu"'


def load_topology(name: str | Path) -> Topology:
    """Read a topology: the name of one that comes with Atoll, or the path of a file.

    Raises:
        UserError: not found, not TOML, an unknown key or node, a wrong value, or settings that do not fit.
    """
    path = find_topology(name)
    return _checked(Topology, _read(path), str(path))


def load_schedule(path: Path) -> list[LinkChange]:
    """Read a file of link changes; whether they fit a topology is `check_changes`' to say.

    Raises:
        UserError: it cannot be read, is not TOML, or has an unknown key or a wrong value.
    """
    tables = _read(path)
    if set(tables) != {"links"}:
        raise UserError(
            f"a schedule has [[links]] tables and nothing else, this one has {', '.join(tables) or 'nothing'}",
            place=str(path),
            remedy=f"{EXAMPLE_CHANGE}; a fault plan with both goes to atoll train --faults",
        )
    return read_changes(tables["links"], path)


def read_changes(changes: Any, path: Path) -> list[LinkChange]:
    """The link changes of a file, from its tables `[[links]]`; raises as `load_schedule`."""
    if not isinstance(changes, list) or not changes or not all(isinstance(change, dict) for change in changes):
        raise UserError("links is a list of tables [[links]]", place=str(path), remedy=EXAMPLE_CHANGE)
    return [_checked(LinkChange, change, f"{path}, links[{index}]") for index, change in enumerate(changes)]


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot be read: {error}",
            place=str(path),
            remedy=f"the path of a TOML file in UTF-8, or one of {', '.join(list_topologies())}",
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(
            f"not valid TOML: {error}", place=str(path), remedy="tables as docs/lab.md describes them"
        ) from error


def _checked(model: type[Model], values: Any, place: str) -> Model:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise explain(error, model, lambda key: f"{place}, {key}" if key else place) from error


def find_topology(name: str | Path) -> Path:
    """The file of a topology.

    Raises:
        UserError: there is none; names the nearest.
    """
    known = list_topologies()
    if str(name) in known:
        return known[str(name)]
    if Path(name).is_file():
        return Path(name)
    near, choices = nearest(Path(name).stem, list(known)), ", ".join(known)
    remedy = f"{near} (topologies are {choices})" if near else f"the path of a TOML file, or one of {choices}"
    raise UserError(f"no topology or file is called {str(name)!r}", remedy=remedy)


def list_topologies() -> dict[str, Path]:
    """Name -> file of the topologies that come with Atoll, in alphabetical order."""
    package = Path(__file__).resolve().parent
    installed = package / "topologies"
    folder = installed if installed.is_dir() else package.parent / "cluster_configs" / "topologies"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}
