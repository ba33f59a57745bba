"""The faults that a run is given: a plan in TOML (`run.fault_plan`, `--faults`), and single ones (`--fault`).

A plan may change the links of a lab as well, in `[[links]]` tables; those go with the machine and not with the members.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from faults.plan import LABEL_FLIP, PlannedFault, parse_fault, read_plan
from orchestrator.build import island_name
from orchestrator.errors import UserError

if TYPE_CHECKING:
    from faults.lab.schedule import LinkChange
    from orchestrator.config import RunConfig

ELASTIC_ISLANDS = 4096  # names that machines may bring which join later


def read_faults(config: RunConfig, single: Sequence[str], members: Collection[str]) -> tuple[PlannedFault, ...]:
    """The faults of a resolved configuration and of the command line, checked against the run's members.

    Raises:
        UserError: the file cannot be read. FaultPlanError: an unknown kind, a fault that names nobody, a wrong value.
    """
    if config.pipeline.stages is not None:
        from orchestrator.pipeline.plan import member_names

        members = member_names(config.pipeline)
    elif config.run.elastic:
        members = [island_name(i) for i in range(ELASTIC_ISLANDS)]
    planned = load_plan(Path(config.run.fault_plan), members) if config.run.fault_plan is not None else ()
    if config.pipeline.stages is None:
        of_islands = (*planned, *(parse_fault(text, members) for text in single))
        for fault in of_islands:
            check_island_fault(fault, own_code_of(config))
        return of_islands
    from orchestrator.pipeline.site import check_pipeline_fault

    for fault in planned:
        check_pipeline_fault(fault, place=f"run.fault_plan, {fault}")
    found = [parse_fault(text, members) for text in single]
    for fault in found:
        check_pipeline_fault(fault, place=f"--fault {fault}")
    return (*planned, *found)


def own_code_of(config: RunConfig) -> str:
    """The setting that names code of the user's which islands train with; nothing where they train with ours."""
    if config.train.loop is not None:
        return "train.loop"
    return "model.factory" if config.model.factory is not None else ""


def check_island_fault(fault: PlannedFault, own_code: str) -> None:
    """Raise UserError for what islands that train with `own_code` cannot be made to do."""
    if fault.kind == LABEL_FLIP and own_code:
        raise UserError(
            f"{fault}: labels are flipped in the built-in loop with the built-in model, and {own_code} is set",
            place=own_code,
            remedy="another attack: docs/faults.md names them",
        )


def read_link_changes(config: RunConfig) -> tuple[LinkChange, ...]:
    """The `[[links]]` of the plan of a resolved configuration, checked against the lab that this machine is part of.

    Raises:
        UserError: the file cannot be read, or a change has an unknown key or a wrong value. LabError: there is no lab,
            or a change names nobody in it.
    """
    if config.run.fault_plan is None or "links" not in (tables := _read(path := Path(config.run.fault_plan))):
        return ()
    from faults.lab.errors import LabError
    from faults.lab.lab import Lab
    from faults.lab.schedule import check_changes
    from orchestrator.topology import read_changes

    changes = read_changes(tables["links"], path)
    try:
        check_changes(changes, Lab.around().topology, file=str(path))
    except LabError as error:
        place = error.place or f"{path}, [[links]]"
        raise LabError(f"link changes are for a lab: {error.message}", place=place, remedy=error.remedy) from error
    return tuple(changes)


def load_plan(path: Path, members: Collection[str]) -> tuple[PlannedFault, ...]:
    """Read the `[[fault]]` tables of a file, which may have `[[links]]` beside them; raises as `read_faults`."""
    tables = _read(path)
    if set(tables) == {"links"}:
        return ()
    faults = {key: value for key, value in tables.items() if key != "links"}
    return read_plan(faults, members, place=str(path))


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the fault plan: {error}",
            place="run.fault_plan",
            remedy="the path of a TOML file, as docs/faults.md describes it",
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(
            f"not valid TOML: {error}", place=str(path), remedy="tables [[fault]] as docs/faults.md describes them"
        ) from error
