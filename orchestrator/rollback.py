"""Which versions a run can go back to: its snapshots, in its directory or in `run.snapshots`. No torch, no Ray."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import UserError
from orchestrator.operations import rollback_problem
from orchestrator.run_state import RunState
from workers.saved import check_snapshot, complete_snapshots, read_manifest

if TYPE_CHECKING:
    from workers.snapshot_store import SnapshotStore

PINNED = "rollback"
ASIDE = "rolled-back"


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A snapshot that a run can go back to."""

    name: str
    path: Path
    versions: tuple[int, ...]
    chains: tuple[str, ...]


def targets(snapshots: Path, state: RunState, store: SnapshotStore | None = None) -> list[Target]:
    """All there are, newest first; `store`: where they are kept, if it is not the folder `snapshots`."""
    if store is None:
        known = [(path, read_manifest(path)) for path in complete_snapshots(snapshots)]
    else:
        known = [(snapshots / name, manifest) for name, manifest in store.complete()]
    found = []
    for path, manifest in known:
        versions, chains = tuple(map(int, manifest["versions"])), tuple(map(str, manifest["chains"]))
        if rollback_problem(state, versions, chains) is None:
            found.append(Target(name=f"v{max(versions)}", path=path, versions=versions, chains=chains))
    return found


def find_target(snapshots: Path, state: RunState, version: int, store: SnapshotStore | None = None) -> Target:
    """The snapshot of a version, checked whole.

    Raises:
        UserError: there is none in the run's history, and names those that there are; or the run gossips.
        SnapshotError: it is damaged, or the store cannot be reached.
    """
    if state.pair_rows:
        kept = "snapshots" if store is None else store.place
        raise UserError(
            "the run gossips: what pairs have committed since its last full merge cannot be taken back",
            place="strategy.name",
            remedy=f"atoll stop, atoll export --snapshot v{version} --out DIR (one of those in {kept}), and a new run "
            "with model.init_from = DIR",
        )
    known = targets(snapshots, state, store)
    for target in known:
        if max(target.versions) == version:
            if store is None:
                check_snapshot(target.path)
            else:
                store.check(target.path.name, dict(store.complete())[target.path.name])
            return target
    numbers = ", ".join(str(max(target.versions)) for target in known) or "none yet"
    raise UserError(
        f"there is no snapshot of version {version} to go back to",
        place=str(snapshots) if store is None else f"{store.place} (run.snapshots)",
        remedy=f"one of these: {numbers} (run.keep_anchors of them are kept, one every run.snapshot_every_s)",
    )


def pin(snapshots: Path, target: Target, store: SnapshotStore | None = None) -> None:
    """Keep a target under a name that is not cleared away while newer snapshots are written.

    In a folder by hard links; in a store by a copy, as not every one of them knows links. Raises SnapshotError.
    """
    if target.path.name == PINNED:
        return
    if store is not None:
        store.copy(target.path.name, PINNED)
        return
    pinned, fresh = snapshots / PINNED, snapshots / f".{PINNED}.tmp"
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(target.path, fresh, copy_function=os.link)
    shutil.rmtree(pinned, ignore_errors=True)
    fresh.rename(pinned)


def set_aside_later(snapshots: Path, versions: Sequence[int], store: SnapshotStore | None = None) -> None:
    """After a rollback: what was saved later goes to `rolled-back`, where it stays until the next rollback.

    Left where they are they would pass for the run's newest model. Raises SnapshotError for a store.
    """
    if store is not None:
        store.set_aside(ASIDE, lambda manifest: _is_later(manifest, versions))
        return
    later = [path for path in complete_snapshots(snapshots) if _is_later(read_manifest(path), versions)]
    aside = snapshots / ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    if later:
        aside.mkdir()
    for path in later:
        path.rename(aside / path.name)


def _is_later(manifest: Mapping[str, Any], versions: Sequence[int]) -> bool:
    return any(n > to for n, to in zip(manifest["versions"], versions, strict=True))


def store_of(uri: str | None, run_id: str) -> SnapshotStore | None:
    """Where a run keeps its snapshots, if not in its directory. Raises SnapshotError for a URI that means nothing."""
    if uri is None:
        return None
    from workers.snapshot_store import open_store

    return open_store(uri, run_id)
