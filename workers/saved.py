"""What a run leaves on disk, looked at without torch: saved local states, and snapshots of the anchor.

`workers/local_state.py` and `workers/snapshot.py` write and load them. Both kinds are folders with a JSON that is
written last and names the digests of the files beside it: a folder without it is nothing. That of a local state has a
digest of its own as well, for nothing else seals what it says; that of a snapshot is compared with the journal.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from workers.digest import digest, file_digest

LOCAL_TENSORS, LOCAL_META = "tensors.safetensors", "member.json"
LOCAL_SCHEMA = 3
MANIFEST = "manifest.json"
SNAPSHOT_FILES = ("anchor.safetensors", "states.safetensors")


class LocalStateError(ValueError):
    """A saved local state that cannot be used; says why and what to do."""


class SnapshotError(ValueError):
    """A snapshot that is missing, incomplete or altered."""


# ------------------------------------------------------------ local states


def read_meta(folder: Path) -> dict[str, Any] | None:
    """What a saved state says of itself; None if there is no complete one. Raises LocalStateError."""
    path = folder / LOCAL_META
    if not path.exists():
        return None
    try:
        meta = json.loads(path.read_text())
    except ValueError as error:
        raise _unusable(folder, f"{path}: not readable ({error})") from error
    if not isinstance(meta, dict) or meta.get("schema") != LOCAL_SCHEMA:
        raise _unusable(folder, f"{path}: not of schema {LOCAL_SCHEMA}, which this version reads")
    if meta.get("digest") != _meta_digest(meta):
        raise _unusable(folder, f"{path}: altered, it has another digest than it says")
    return meta


def meta_text(meta: dict[str, Any]) -> str:
    """What a saved state says of itself as JSON, with a digest of all of it."""
    plain = json.loads(json.dumps(meta))
    return json.dumps({**plain, "digest": _meta_digest(plain)})


def _meta_digest(meta: dict[str, Any]) -> str:
    return digest(json.dumps({k: v for k, v in meta.items() if k != "digest"}, sort_keys=True).encode())


def check_local(folder: Path) -> bool:
    """Whether a folder holds a saved state. Raises LocalStateError if it does and cannot be used."""
    meta = read_meta(folder)
    if meta is not None:
        local_tensors(folder, meta)
    return meta is not None


def local_tensors(folder: Path, meta: dict[str, Any]) -> Path:
    """The file with the tensors of a saved state, after its digest was checked. Raises LocalStateError."""
    path = folder / LOCAL_TENSORS
    if not path.exists() or file_digest(path) != meta["tensors_digest"]:
        raise _unusable(folder, f"{path}: missing or altered")
    return path


def _unusable(folder: Path, why: str) -> LocalStateError:
    return LocalStateError(f"{why}; remove the folder {folder}: its island then starts from the committed anchor")


# ------------------------------------------------------------ snapshots


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a snapshot. Raises SnapshotError."""
    file = path / MANIFEST
    if not file.exists():
        raise SnapshotError(f"{path} is no complete snapshot: it has no {MANIFEST}; use another one of the run")
    return parse_manifest(file.read_bytes(), str(file))


def parse_manifest(text: bytes, place: str) -> dict[str, Any]:
    """The manifest that was read at `place`. Raises SnapshotError."""
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise SnapshotError(f"{place} cannot be read ({error}); remove its folder to use the one before it") from error
    if not (isinstance(manifest, dict) and _is_manifest(manifest)):
        raise SnapshotError(f"{place} is no manifest; remove its folder to use the snapshot before it")
    return manifest


def _is_manifest(given: dict[str, Any]) -> bool:
    """Whether it says of each fragment a version, a chain and a digest, and of each file a digest."""
    lists = [given.get(name) for name in ("versions", "chains", "digests")]
    files = given.get("files")
    if not isinstance(files, dict) or not all(isinstance(value, str) for value in files.values()):
        return False
    if not all(isinstance(values, list) and len(values) == len(lists[0] or ()) for values in lists):
        return False
    versions, *texts = [values or [] for values in lists]
    return all(type(n) is int for n in versions) and all(isinstance(t, str) for values in texts for t in values)


def numbered(names: Iterable[str]) -> list[str]:
    """The names of the form `v<n>`, oldest first: those that are kept for a while only."""
    return sorted((name for name in names if name[:1] == "v" and name[1:].isdigit()), key=lambda name: int(name[1:]))


def complete_snapshots(folder: Path) -> list[Path]:
    """The snapshots that have a manifest, newest first. Raises SnapshotError for one that cannot be read."""
    found = (
        [path for path in folder.iterdir() if path.name[0] != "." and (path / MANIFEST).is_file()]
        if folder.is_dir()
        else []
    )
    return sorted(found, key=lambda path: sum(read_manifest(path)["versions"]), reverse=True)


def newest(folder: Path) -> Path | None:
    """The complete snapshot with the newest versions, or None."""
    return next(iter(complete_snapshots(folder)), None)


def check_snapshot(path: Path) -> list[tuple[int, str]]:
    """Version and sealed digest of each fragment, after the files were checked. Raises SnapshotError."""
    manifest = read_manifest(path)
    for file in SNAPSHOT_FILES:
        snapshot_file(path, manifest, file)
    return list(zip(manifest["versions"], manifest["digests"], strict=True))


def snapshot_file(path: Path, manifest: dict[str, Any], file: str) -> Path:
    """One file of a snapshot, after its digest was checked. Raises SnapshotError."""
    target = path / file
    if not target.exists() or file_digest(target) != manifest["files"].get(file):
        raise SnapshotError(f"{target} is missing or altered; remove its folder to use the snapshot before it")
    return target
