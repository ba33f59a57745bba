"""Topologies of the lab as TOML: those that come with Atoll, and files of the user."""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import ValidationError

from faults.lab.topology import Topology
from orchestrator.config_errors import explain
from orchestrator.errors import UserError
from orchestrator.names import nearest


def load_topology(name: str | Path) -> Topology:
    """Read a topology: the name of one that comes with Atoll, or the path of a file.

    Raises:
        UserError: not found, not TOML, an unknown key or node, a wrong value, or settings that do not fit.
    """
    path = find_topology(name)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the topology: {error}", place=str(path)) from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"not valid TOML: {error}", place=str(path)) from error
    try:
        return Topology.model_validate(tables)
    except ValidationError as error:
        raise explain(error, Topology, lambda key: f"{path}, {key}" if key else str(path)) from error


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
