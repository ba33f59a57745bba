"""Durable snapshots anywhere that `pyarrow.fs` reaches: a bucket, a mounted disk, a file server. No torch here.

    <uri>/<run id>/v12/manifest.json               written last, in one piece: without it there is no snapshot
    <uri>/<run id>/v12/anchor-<digest>.safetensors
    <uri>/<run id>/v12/states-<digest>.safetensors

Files are named by their content and a manifest names its files, so that a snapshot that is written again under its
name (`final`, `stop`) is the old one or the new one at any moment, whoever is killed; and two who write it at the same
time do not touch each other's files.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
from blake3 import blake3
from pyarrow import fs

from workers.digest import DIGEST_BYTES, file_digest
from workers.saved import MANIFEST, SNAPSHOT_FILES, SnapshotError, numbered, parse_manifest

PIECE_BYTES = 8 << 20
URI_REMEDY = "a URI such as s3://bucket/folder, gs://bucket/folder or file:///folder"


class SnapshotStore:
    """The snapshots of one run in one folder of a filesystem. Raises SnapshotError for whatever goes wrong there."""

    def __init__(self, filesystem: fs.FileSystem, folder: str, *, place: str) -> None:
        """`folder`: in the filesystem's own form; `place`: what messages call it. Nothing is looked at yet."""
        self.filesystem, self.folder, self.place = filesystem, folder.rstrip("/"), place

    # ------------------------------------------------------------ reading

    def complete(self) -> list[tuple[str, dict[str, Any]]]:
        """Name and manifest of each snapshot that has one, newest first."""
        found = []
        for name in self._names():
            text = self._read(f"{name}/{MANIFEST}")
            if text is not None:
                found.append((name, parse_manifest(text, f"{self.place}/{name}/{MANIFEST}")))
        return sorted(found, key=lambda entry: sum(entry[1]["versions"]), reverse=True)

    def check(self, name: str, manifest: Mapping[str, Any]) -> None:
        """Read a snapshot whole and compare it with its manifest."""
        for file in SNAPSHOT_FILES:
            stored, wanted = stored_name(file, manifest), manifest["files"].get(file)
            hasher = blake3()
            try:
                with self.filesystem.open_input_stream(f"{self.folder}/{name}/{stored}") as source:
                    while piece := source.read(PIECE_BYTES):
                        hasher.update(piece)
            except FileNotFoundError:
                raise self._altered(name, stored) from None
            except (OSError, pa.ArrowException) as error:
                raise self._failed(f"{name}/{stored} cannot be read", error) from error
            if hasher.hexdigest(length=DIGEST_BYTES) != wanted:
                raise self._altered(name, stored)

    def fetch(self, name: str, manifest: Mapping[str, Any], into: Path) -> Path:
        """A copy of a snapshot on this machine, as `into/<name>`, checked; one that is there already is used."""
        target = into / name
        text = json.dumps(manifest)
        if (target / MANIFEST).is_file() and (target / MANIFEST).read_text() == text:
            return target
        temporary = into / f".{name}.{secrets.token_hex(4)}"
        try:
            temporary.mkdir(parents=True)
            for file in SNAPSHOT_FILES:
                self._download(name, stored_name(file, manifest), temporary / file)
                if file_digest(temporary / file) != manifest["files"].get(file):
                    raise self._altered(name, stored_name(file, manifest))
            (temporary / MANIFEST).write_text(text)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
        except OSError as error:
            if not (target / MANIFEST).is_file():  # else another island of this machine was quicker
                raise self._failed(f"{name} cannot be copied to {into}", error) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return target

    def _download(self, name: str, stored: str, target: Path) -> None:
        try:
            with (
                self.filesystem.open_input_stream(f"{self.folder}/{name}/{stored}") as source,
                target.open("wb") as out,
            ):
                while piece := source.read(PIECE_BYTES):
                    out.write(piece)
        except FileNotFoundError:
            raise self._altered(name, stored) from None
        except (OSError, pa.ArrowException) as error:
            raise self._failed(f"{name}/{stored} cannot be read", error) from error

    def _names(self) -> list[str]:
        try:
            entries = self.filesystem.get_file_info(fs.FileSelector(self.folder, allow_not_found=True))
        except (OSError, pa.ArrowException) as error:
            raise self._failed("cannot be listed", error) from error
        return [PurePosixPath(entry.path).name for entry in entries if entry.type == fs.FileType.Directory]

    def _read(self, path: str) -> bytes | None:
        try:
            with self.filesystem.open_input_stream(f"{self.folder}/{path}") as source:
                return bytes(source.read())
        except FileNotFoundError:
            return None
        except (OSError, pa.ArrowException) as error:
            raise self._failed(f"{path} cannot be read", error) from error

    # ------------------------------------------------------------ writing

    def publish(self, source: Path, *, keep: int) -> None:
        """Copy the complete snapshot in the folder `source` here, under its name; numbered ones beyond `keep` go."""
        name, text = source.name, (source / MANIFEST).read_bytes()
        manifest = parse_manifest(text, str(source / MANIFEST))
        try:
            before = self._read(f"{name}/{MANIFEST}")
            self.filesystem.create_dir(f"{self.folder}/{name}", recursive=True)
            for file in SNAPSHOT_FILES:
                self._upload(source / file, f"{name}/{stored_name(file, manifest)}")
            # A file system's own rename, or an object store's put: a reader never sees a part of it.
            temporary = f"{self.folder}/{name}/.{MANIFEST}-{secrets.token_hex(4)}"
            self._write(temporary, text)
            self.filesystem.move(temporary, f"{self.folder}/{name}/{MANIFEST}")
            if before is not None:
                self._drop_files_of(name, parse_manifest(before, f"{self.place}/{name}/{MANIFEST}"), manifest)
            self._retain(keep)
        except (OSError, pa.ArrowException) as error:
            raise self._failed(f"{name} cannot be written", error) from error

    def copy(self, name: str, other: str) -> None:
        """Have a snapshot under another name as well, complete or not at all."""
        text = self._read(f"{name}/{MANIFEST}")
        if text is None:
            raise SnapshotError(f"{self.place}/{name} is no complete snapshot any more: it has no {MANIFEST}")
        manifest = parse_manifest(text, f"{self.place}/{name}/{MANIFEST}")
        try:
            before = self._read(f"{other}/{MANIFEST}")
            self.filesystem.create_dir(f"{self.folder}/{other}", recursive=True)
            for file in SNAPSHOT_FILES:
                stored = stored_name(file, manifest)
                self.filesystem.copy_file(f"{self.folder}/{name}/{stored}", f"{self.folder}/{other}/{stored}")
            temporary = f"{self.folder}/{other}/.{MANIFEST}-{secrets.token_hex(4)}"
            self._write(temporary, text)
            self.filesystem.move(temporary, f"{self.folder}/{other}/{MANIFEST}")
            if before is not None:
                self._drop_files_of(other, parse_manifest(before, f"{self.place}/{other}/{MANIFEST}"), manifest)
        except (OSError, pa.ArrowException) as error:
            raise self._failed(f"{name} cannot be kept as {other}", error) from error

    def set_aside(self, folder: str, unwanted: Callable[[Mapping[str, Any]], bool]) -> None:
        """Snapshots that are `unwanted` go into `folder`, where they are none of the run's; what was there goes."""
        try:
            if self.filesystem.get_file_info(f"{self.folder}/{folder}").type == fs.FileType.Directory:
                self.filesystem.delete_dir(f"{self.folder}/{folder}")
            for name, manifest in self.complete():
                if unwanted(manifest):
                    self._move_into(folder, name, manifest)
        except (OSError, pa.ArrowException) as error:
            raise self._failed(f"{folder} cannot be written", error) from error

    def _move_into(self, folder: str, name: str, manifest: Mapping[str, Any]) -> None:
        """Manifest first: a snapshot is whole in its place, or is none. Stores without folders move file by file."""
        self.filesystem.create_dir(f"{self.folder}/{folder}/{name}", recursive=True)
        for file in (MANIFEST, *(stored_name(file, manifest) for file in SNAPSHOT_FILES)):
            self.filesystem.move(f"{self.folder}/{name}/{file}", f"{self.folder}/{folder}/{name}/{file}")
        self.filesystem.delete_dir(f"{self.folder}/{name}")

    def _upload(self, file: Path, path: str) -> None:
        target = f"{self.folder}/{path}"
        with file.open("rb") as source, self.filesystem.open_output_stream(target) as out:
            while piece := source.read(PIECE_BYTES):
                out.write(piece)
        written = self.filesystem.get_file_info(target).size
        if written != file.stat().st_size:
            raise OSError(f"{target} has {written} bytes after writing {file.stat().st_size}")

    def _write(self, path: str, text: bytes) -> None:
        with self.filesystem.open_output_stream(path) as out:
            out.write(text)

    def _drop_files_of(self, name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        kept = {stored_name(file, new) for file in SNAPSHOT_FILES}
        for stored in {stored_name(file, old) for file in SNAPSHOT_FILES} - kept:
            self.filesystem.delete_file(f"{self.folder}/{name}/{stored}")

    def _retain(self, keep: int) -> None:
        """Older numbered snapshots go, manifest first: what is left of one that is half gone is no snapshot."""
        names = numbered(self._names())
        paths = [f"{self.folder}/{name}/{MANIFEST}" for name in names]
        infos = self.filesystem.get_file_info(paths) if paths else []
        written = [(info.mtime_ns or 0, name) for info, name in zip(infos, names, strict=True) if info.is_file]
        written.sort(key=lambda entry: (entry[0], int(entry[1][1:])))  # after a rollback newer ones have lower numbers
        for _, name in written[:-keep]:
            self.filesystem.delete_file(f"{self.folder}/{name}/{MANIFEST}")
            self.filesystem.delete_dir(f"{self.folder}/{name}")

    # ------------------------------------------------------------ errors

    def _failed(self, what: str, error: Exception) -> SnapshotError:
        why = " ".join(str(error).split())[:300]
        return SnapshotError(f"run.snapshots: {self.place}: {what} ({why})")

    def _altered(self, name: str, file: str) -> SnapshotError:
        place = f"{self.place}/{name}"
        return SnapshotError(f"{place}/{file} is missing or altered; remove {place} to use the snapshot before it")


def open_store(uri: str, run_id: str) -> SnapshotStore:
    """The snapshots of a run below `uri`; raises SnapshotError for a URI that means nothing."""
    place = f"{uri.rstrip('/')}/{run_id}"
    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
    except (OSError, ValueError, pa.ArrowException) as error:
        why = " ".join(str(error).split())[:300]
        raise SnapshotError(f"run.snapshots = {uri!r} cannot be used ({why}); {URI_REMEDY}") from error
    return SnapshotStore(filesystem, f"{path.rstrip('/')}/{run_id}", place=place)


def stored_name(file: str, manifest: Mapping[str, Any]) -> str:
    """What a file of a snapshot is called in a store."""
    stem, _, ending = file.partition(".")
    return f"{stem}-{manifest['files'].get(file)}.{ending}"
