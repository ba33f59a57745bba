"""Which versions a run can go back to: its snapshots on disk. No torch, no Ray."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import UserError
from orchestrator.operations import rollback_problem
from orchestrator.run_state import RunState
from workers.saved import check_snapshot, complete_snapshots, read_manifest

PINNED = "rollback"
ASIDE = "rolled-back"


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A snapshot that a run can go back to."""

    name: str
    path: Path
    versions: tuple[int, ...]
    chains: tuple[str, ...]


def targets(snapshots: Path, state: RunState) -> list[Target]:
    """All there are, newest first."""
    found = []
    for path in complete_snapshots(snapshots):
        manifest = read_manifest(path)
        versions, chains = tuple(map(int, manifest["versions"])), tuple(map(str, manifest["chains"]))
        if rollback_problem(state, versions, chains) is None:
            found.append(Target(name=f"v{max(versions)}", path=path, versions=versions, chains=chains))
    return found


def find_target(snapshots: Path, state: RunState, version: int) -> Target:
    """The snapshot of a version, checked whole.

    Raises:
        UserError: there is none in the run's history; names those that there are.
        SnapshotError: it is damaged.
    """
    known = targets(snapshots, state)
    for target in known:
        if max(target.versions) == version:
            check_snapshot(target.path)
            return target
    numbers = ", ".join(str(max(target.versions)) for target in known) or "none yet"
    raise UserError(
        f"there is no snapshot of version {version} to go back to",
        place=str(snapshots),
        remedy=f"one of these: {numbers} (run.keep_anchors of them are kept, one every run.snapshot_every_s)",
    )


def pin(snapshots: Path, target: Target) -> None:
    """Keep a target under a name that is not cleared away while newer snapshots are written; hard links, no copy."""
    pinned, fresh = snapshots / PINNED, snapshots / f".{PINNED}.tmp"
    if target.path == pinned:
        return
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(target.path, fresh, copy_function=os.link)
    shutil.rmtree(pinned, ignore_errors=True)
    fresh.rename(pinned)


def set_aside_later(snapshots: Path, versions: Sequence[int]) -> None:
    """After a rollback: what was saved later goes to `rolled-back`, where it stays until the next rollback.

    Left where they are they would pass for the run's newest model.
    """
    later = [
        path
        for path in complete_snapshots(snapshots)
        if any(n > to for n, to in zip(read_manifest(path)["versions"], versions, strict=True))
    ]
    aside = snapshots / ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    if later:
        aside.mkdir()
    for path in later:
        path.rename(aside / path.name)
