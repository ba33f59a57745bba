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
from workers.tensor_file import file_digest, save_tensors

MANIFEST = "manifest.json"
FILES = ("anchor.safetensors", "states.safetensors")
KEEP = 3


class SnapshotError(ValueError):
    """A snapshot that is missing, incomplete or altered."""


def write_snapshot(folder: Path, name: str, replica: Replica) -> tuple[int, ...]:
    """Write the present anchor as `folder/name`; returns the versions. Older numbered snapshots beyond `KEEP` go."""
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
    target, temporary = folder / name, folder / f".{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    files = {
        file: save_tensors(temporary / file, content) for file, content in zip(FILES, (tensors, states), strict=True)
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
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    _retain(folder)
    return versions


def _retain(folder: Path) -> None:
    numbered = sorted((p for p in folder.glob("v*") if p.name[1:].isdigit()), key=lambda p: int(p.name[1:]))
    for old in numbered[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a snapshot; `SnapshotError` if there is none."""
    file = path / MANIFEST
    if not file.exists():
        raise SnapshotError(f"{path} is no complete snapshot: it has no {MANIFEST}; use another one of the run")
    try:
        manifest: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise SnapshotError(f"{file} cannot be read ({error}); use another snapshot of the run") from error
    return manifest


def load_anchor(path: Path) -> dict[str, Tensor]:
    """The anchor's tensors by parameter name, checked against the manifest."""
    manifest = read_manifest(path)
    return {name[7:]: value for name, value in _load(path, manifest, "anchor.safetensors").items()}


def load_states(path: Path) -> dict[str, Tensor]:
    """Outer states as `state/<fragment>/<place>`, checked against the manifest."""
    return _load(path, read_manifest(path), "states.safetensors")


def _load(path: Path, manifest: dict[str, Any], file: str) -> dict[str, Tensor]:
    return load_file(_checked_file(path, manifest, file))


def _checked_file(path: Path, manifest: dict[str, Any], file: str) -> Path:
    target = path / file
    if not target.exists() or file_digest(target) != manifest["files"][file]:
        raise SnapshotError(f"{target} is missing or altered; remove its folder to use the snapshot before it")
    return target


def newest(folder: Path) -> Path | None:
    """The complete snapshot with the newest versions, or None."""
    return next(iter(_complete(folder)), None)


def newest_on_path(folder: Path, log: RecordLog) -> Path | None:
    """The newest complete snapshot whose versions are part of the journal's history, or None."""
    return next((path for path in _complete(folder) if _is_on_path(read_manifest(path), log)), None)


def check_snapshot(path: Path) -> list[tuple[int, str]]:
    """Version and sealed digest of each fragment, after the files were checked. Raises SnapshotError."""
    manifest = read_manifest(path)
    for file in FILES:
        _checked_file(path, manifest, file)
    return list(zip(manifest["versions"], manifest["digests"], strict=True))


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


def _complete(folder: Path) -> list[Path]:
    """The snapshots that have a manifest, newest first."""
    found = [path for path in folder.iterdir() if (path / MANIFEST).is_file()] if folder.is_dir() else []
    return sorted(found, key=lambda path: sum(read_manifest(path)["versions"]), reverse=True)


def _is_on_path(manifest: dict[str, Any], log: RecordLog) -> bool:
    return all(log.on_path(fragment, chain) for fragment, chain in enumerate(manifest["chains"]))
