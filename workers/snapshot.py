"""Durable snapshots of the anchor: one folder, tensors first, manifest last.

A snapshot holds anchor and outer states of every fragment with their versions and sealed digests, under parameter
names, so that `export` and `sample` read it without the run's code. A folder without a manifest is not a snapshot.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from strategies.fragments import FragmentSpec, gather
from workers.record_log import RecordLog
from workers.replica import Replica, StateChunk
from workers.saved import MANIFEST, SNAPSHOT_FILES, complete_snapshots, read_manifest, snapshot_file
from workers.tensor_file import save_tensors

KEEP = 8


def write_snapshot(
    folder: Path, name: str | None, replica: Replica, *, keep: int = KEEP
) -> tuple[str, tuple[int, ...]]:
    """Write the present anchor as `folder/name`, None: `v<n>`; returns the name and the versions that are in it.

    Of the numbered snapshots the `keep` that were written last stay.
    A kill at any moment leaves the old folder of that name or the new one.
    """
    with replica.lock:  # the training thread writes, and it alone moves anchors: nothing needs to be copied
        tensors = {f"anchor/{key}": value for key, value in replica.anchor_tensors().items()}
        states = {
            f"state/{f}/{place}": state
            for f, part in enumerate(replica.parts)
            for place, state in enumerate(part.states)
        }
        versions = tuple(part.n for part in replica.parts)
        chains = [part.chain for part in replica.parts]
        digests = [replica.digest(f) for f in range(len(replica.parts))]
    name = name if name is not None else f"v{max(versions)}"
    target, temporary, old = folder / name, folder / f".{name}.tmp", folder / f".{name}.old"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    files = {
        file: save_tensors(temporary / file, content)
        for file, content in zip(SNAPSHOT_FILES, (tensors, states), strict=True)
    }
    manifest = {
        "schema": 1,
        "versions": versions,
        "chains": chains,
        "digests": digests,
        "files": files,
    }
    with (temporary / MANIFEST).open("w") as out:
        json.dump(manifest, out)
        out.flush()
        os.fsync(out.fileno())
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    _retain(folder, keep)
    return name, versions


def _retain(folder: Path, keep: int) -> None:
    """By the time of writing: after a rollback newer snapshots have lower numbers."""
    numbered = [path for path in folder.glob("v*") if path.name[1:].isdigit() and (path / MANIFEST).is_file()]
    numbered.sort(key=lambda path: ((path / MANIFEST).stat().st_mtime_ns, int(path.name[1:])))
    for old in numbered[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def load_anchor(path: Path) -> dict[str, Tensor]:
    """The anchor's tensors by parameter name, checked against the manifest."""
    manifest = read_manifest(path)
    return {name[7:]: value for name, value in _load(path, manifest, "anchor.safetensors").items()}


def load_states(path: Path) -> dict[str, Tensor]:
    """Outer states as `state/<fragment>/<place>`, checked against the manifest."""
    return _load(path, read_manifest(path), "states.safetensors")


def _load(path: Path, manifest: dict[str, Any], file: str) -> dict[str, Tensor]:
    return load_file(snapshot_file(path, manifest, file))


def newest_on_path(folder: Path, log: RecordLog) -> Path | None:
    """The newest complete snapshot whose versions are part of the journal's history, or None."""
    return next((path for path in complete_snapshots(folder) if _is_on_path(read_manifest(path), log)), None)


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
