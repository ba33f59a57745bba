"""Durable snapshots of the anchor: one folder, tensors first, manifest last.

A snapshot holds anchor and outer states of every fragment with their versions and sealed digests, under parameter
names, so that `export` and `sample` read it without the run's code. A folder without a manifest is not a snapshot.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from strategies.fragments import FragmentSpec, gather
from workers.record_log import RecordLog
from workers.replica import Replica, StateChunk
from workers.saved import MANIFEST, SNAPSHOT_FILES, complete_snapshots, numbered, read_manifest, snapshot_file
from workers.snapshot_store import SnapshotStore
from workers.tensor_file import save_tensors

KEEP = 8
FETCHED, OUTBOX, STAGED = ".fetched", ".outbox", ".staged"


@dataclass(frozen=True, kw_only=True, slots=True)
class Staged:
    """A copy of the anchor and its outer states at one moment, in files that are not flushed and have no name yet."""

    folder: Path
    files: Mapping[str, str]
    versions: tuple[int, ...]
    chains: tuple[str, ...]
    digests: tuple[str, ...]


def stage(replica: Replica, folder: Path) -> Staged:
    """Copy what a snapshot is made of; on the training thread, which alone moves anchors.

    Into the system's cache of the disk and not into memory of its own: an island has no room for a second anchor, and
    the disk is not waited for.
    """
    with replica.lock:
        anchor = {f"anchor/{key}": value for key, value in replica.anchor_tensors().items()}
        states = {
            f"state/{f}/{place}": state
            for f, part in enumerate(replica.parts)
            for place, state in enumerate(part.states)
        }
        versions = tuple(part.n for part in replica.parts)
        chains = tuple(part.chain for part in replica.parts)
        digests = tuple(replica.digest(f) for f in range(len(replica.parts)))
    return stage_tensors(folder, anchor, states, versions=versions, chains=chains, digests=digests)


def stage_tensors(
    folder: Path,
    anchor: Mapping[str, Tensor],
    states: Mapping[str, Tensor],
    *,
    versions: tuple[int, ...],
    chains: tuple[str, ...],
    digests: tuple[str, ...],
) -> Staged:
    """Write these tensors into a new folder inside `folder`."""
    temporary = folder / f".{secrets.token_hex(6)}{STAGED}"
    temporary.mkdir(parents=True)
    contents = zip(SNAPSHOT_FILES, (anchor, states), strict=True)
    try:
        files = {file: save_tensors(temporary / file, content, flush=False) for file, content in contents}
    except OSError:  # half a copy would only keep a full disk full
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Staged(folder=temporary, files=files, versions=versions, chains=chains, digests=digests)


def seal_snapshot(folder: Path, name: str | None, staged: Staged, *, keep: int = KEEP) -> str:
    """Make a staged anchor durable as `folder/name`, None: `v<n>`; returns the name. On any thread.

    Of the numbered ones the `keep` that were written last stay. A kill at any moment leaves the old folder of that name
    or the new one.
    """
    name = name if name is not None else f"v{max(staged.versions)}"
    target, old = folder / name, folder / f".{name}.old"
    for file in staged.files:
        _flush(staged.folder / file)
    manifest = {
        "schema": 1,
        "versions": staged.versions,
        "chains": staged.chains,
        "digests": staged.digests,
        "files": staged.files,
    }
    with (staged.folder / MANIFEST).open("w") as out:
        json.dump(manifest, out)
        out.flush()
        os.fsync(out.fileno())
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    staged.folder.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    _retain(folder, keep)
    return name


def _retain(folder: Path, keep: int) -> None:
    """By the time of writing: after a rollback newer snapshots have lower numbers."""
    found = [folder / name for name in numbered(path.name for path in folder.iterdir())]
    found = [path for path in found if (path / MANIFEST).is_file()]
    found.sort(key=lambda path: ((path / MANIFEST).stat().st_mtime_ns, int(path.name[1:])))
    for old in found[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def _flush(file: Path) -> None:
    with file.open("rb") as source:
        os.fsync(source.fileno())


def load_anchor(path: Path) -> dict[str, Tensor]:
    """The anchor's tensors by parameter name, checked against the manifest."""
    manifest = read_manifest(path)
    return {name[7:]: value for name, value in _load(path, manifest, "anchor.safetensors").items()}


def load_states(path: Path) -> dict[str, Tensor]:
    """Outer states as `state/<fragment>/<place>`, checked against the manifest."""
    return _load(path, read_manifest(path), "states.safetensors")


def _load(path: Path, manifest: dict[str, Any], file: str) -> dict[str, Tensor]:
    return load_file(snapshot_file(path, manifest, file))


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotPlace:
    """Where the snapshots of a run are: a folder, or a store, of which the folder then holds copies."""

    folder: Path
    store: SnapshotStore | None = None

    def outbox(self, island: str) -> Path:
        """Where an island writes its snapshots first."""
        return self.folder if self.store is None else self.folder / OUTBOX / island

    def __str__(self) -> str:
        return str(self.folder) if self.store is None else self.store.place


def newest_on_path(place: SnapshotPlace, log: RecordLog) -> Path | None:
    """The newest complete snapshot whose versions are part of the journal's history, or None.

    One in a store is copied to this machine. Raises SnapshotError.
    """
    if place.store is None:
        return next((path for path in complete_snapshots(place.folder) if _is_on_path(read_manifest(path), log)), None)
    usable = ((name, manifest) for name, manifest in place.store.complete() if _is_on_path(manifest, log))
    found = next(usable, None)
    return None if found is None else place.store.fetch(*found, place.folder / FETCHED)


def load_chunks(path: Path, fragment: int, spec: FragmentSpec) -> list[StateChunk]:
    """One fragment of a snapshot as a donor would have served it. Raises SnapshotError."""
    manifest = read_manifest(path)
    n, chain = int(manifest["versions"][fragment]), str(manifest["chains"][fragment])
    anchor_N, states = gather(spec, load_anchor(path)), load_states(path)
    places = sorted(int(key.split("/")[2]) for key in states if key.split("/")[1] == str(fragment))
    mine = [states[f"state/{fragment}/{place}"] for place in places]
    return [
        StateChunk(n=n, chain=chain, values=tuple(values[spec.chunk_slice(chunk)] for values in (anchor_N, *mine)))
        for chunk in range(spec.num_chunks)
    ]


def _is_on_path(manifest: dict[str, Any], log: RecordLog) -> bool:
    return all(log.on_path(fragment, chain) for fragment, chain in enumerate(manifest["chains"]))
