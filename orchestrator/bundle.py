"""Everything that tells how a run went, in one archive, and nothing that is secret."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from orchestrator.errors import UserError
from orchestrator.rundir import RunDir, collect_versions

MAX_FILE_BYTES = 64 * 1024 * 1024
HIDDEN = "(left out)"
# A join string, Ray's and the transport's tokens, and values of settings that are named like secrets.
JOIN = re.compile(rb"atoll://[0-9A-Za-z]{16,}@")
LONG_HEX = re.compile(rb"\b[0-9a-f]{64}\b")
NAMED = re.compile(rb"(?im)^(\s*[\w.-]*(?:token|password|passwd|secret|api_?key|credential)[\w.-]*\s*[=:]\s*)\S.*$")
# In addresses: user and password, and parameters; in commands (notify.command): what a header carries.
USER = re.compile(rb"://[^/\s:@\"']*:[^/\s@\"']+@")
PARAMETER = re.compile(rb"(?i)([?&][\w.-]*(?:token|password|passwd|secret|key|credential|signature)[\w.-]*=)[^&\s\"']+")
BEARER = re.compile(rb"(?i)\b(bearer|basic)(\s+)[A-Za-z0-9._~+/=-]{6,}")


def without_secrets(data: bytes) -> bytes:
    """The text with what looks like a secret replaced."""
    data = JOIN.sub(b"atoll://" + HIDDEN.encode() + b"@", data)
    data = LONG_HEX.sub(HIDDEN.encode(), data)
    hidden = HIDDEN.encode()
    data = USER.sub(b"://" + hidden + b"@", data)
    data = PARAMETER.sub(rb"\1" + hidden, data)
    data = BEARER.sub(rb"\1\2" + hidden, data)
    return NAMED.sub(rb"\1" + hidden, data)


def write_bundle(directory: RunDir, out: Path | None = None) -> tuple[Path, list[str]]:
    """Write the archive and return its path and the names in it. Of a long file the end is taken.

    Raises:
        UserError: the archive cannot be written.
    """
    out = out if out is not None else Path(f"{directory.path.name}.bundle.tar.gz")
    names: list[str] = []
    try:
        with tarfile.open(out, "w:gz") as archive:
            for name, data, mtime in _files(directory):
                info = tarfile.TarInfo(f"{directory.path.name}/{name}")
                info.size, info.mtime, info.mode = len(data), int(mtime), 0o644
                archive.addfile(info, io.BytesIO(data))
                names.append(name)
    except OSError as error:
        raise UserError(
            f"the archive cannot be written: {error}",
            place=str(out),
            remedy="--out FILE, in a folder that exists and has space",
        ) from error
    return out, names


def _files(directory: RunDir) -> Iterator[tuple[str, bytes, float]]:
    root = directory.path
    found = [directory.config, directory.versions, directory.metrics, directory.summary, directory.report]
    found += sorted(root.glob("journal*")) + sorted(root.glob("pipeline.jsonl"))
    found += sorted(root.glob("*.before-resume.json")) + sorted(root.glob("snapshots/*/manifest.json"))
    found += sorted(path for path in directory.logs.glob("*") if not path.name.startswith("."))
    for path in found:
        if path.is_file() and not path.is_symlink():
            yield str(path.relative_to(root)), _contents(path), path.stat().st_mtime
    here = {"state": directory.state(), "now": collect_versions(), "snapshots": _listing(directory.snapshots)}
    yield "bundle.json", json.dumps(here, indent=2).encode(), directory.config.stat().st_mtime


def _contents(path: Path) -> bytes:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - MAX_FILE_BYTES, 0))
        data = file.read(MAX_FILE_BYTES)
    # Journal, metrics and manifests are hash chains and digests, of 128 bits or named as such: they stay as they are.
    told = data if path.suffix in (".jsonl", ".json") else without_secrets(data)
    cut = f"(the first {size - MAX_FILE_BYTES} bytes are left out)\n".encode() if size > MAX_FILE_BYTES else b""
    return cut + told


def _listing(folder: Path) -> dict[str, int]:
    if not folder.is_dir():
        return {}
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
