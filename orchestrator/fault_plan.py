"""The faults that a run is given: a plan in TOML (`run.fault_plan`, `--faults`), and single ones (`--fault`)."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from faults.plan import PlannedFault, parse_fault, read_plan
from orchestrator.build import island_name
from orchestrator.errors import UserError

if TYPE_CHECKING:
    from orchestrator.config import RunConfig

ELASTIC_ISLANDS = 4096  # names that machines may bring which join later


def read_faults(config: RunConfig, single: Sequence[str], members: Collection[str]) -> tuple[PlannedFault, ...]:
    """The faults of a resolved configuration and of the command line, checked against the run's members.

    Raises:
        UserError: the file cannot be read. FaultPlanError: an unknown kind, a fault that names nobody, a wrong value.
    """
    if config.run.elastic:
        members = [island_name(i) for i in range(ELASTIC_ISLANDS)]
    planned = load_plan(Path(config.run.fault_plan), members) if config.run.fault_plan is not None else ()
    return (*planned, *(parse_fault(text, members) for text in single))


def load_plan(path: Path, members: Collection[str]) -> tuple[PlannedFault, ...]:
    """Read a file of `[[fault]]` tables; raises as `read_faults`."""
    try:
        tables = tomllib.loads(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the fault plan: {error}", place="run.fault_plan") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"not valid TOML: {error}", place=str(path)) from error
    return read_plan(tables, members, place=str(path))
