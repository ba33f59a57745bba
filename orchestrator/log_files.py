"""The logs of a run, and where its Ray is: files that commands read and a controller's actor writes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.errors import UserError

MAX_LOG_BYTES = 32 * 1024


def log_files(run_dir: Path) -> dict[str, Path]:
    """Name to file of all logs: `controller`, `island-0.1`, `island-0.1.stack`, in their order."""
    out: dict[str, Path] = {}
    for path in sorted((run_dir / "logs").glob("*")):
        if path.is_file() and path.suffix in (".log", ".txt"):
            name, _, life = path.stem.rpartition("-")
            out[f"{name}.{life}" if life.partition(".")[0].isdigit() and name else path.stem] = path
    return out


def tail_of(run_dir: Path, member: str | None, max_bytes: int = MAX_LOG_BYTES) -> dict[str, Any]:
    """The end of a member's newest log, whole lines; None: the controller's.

    Raises:
        UserError: it has no log; names those that there are.
    """
    files = log_files(run_dir)
    wanted = member or "controller"
    fitting = [name for name in files if name == wanted or (name.rpartition(".")[0] == wanted and _life(name))]
    if not fitting:
        known = ", ".join(files) or "none yet"
        raise UserError(f"there is no log of {wanted!r}", place=str(run_dir / "logs"), remedy=f"one of these: {known}")
    name = max(fitting, key=_life)
    path = files[name]
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - max_bytes, 0))
        data = file.read(max_bytes)
    if size > max_bytes:
        data = data.partition(b"\n")[2]
    return {"name": name, "files": list(files), "size_bytes": size, "text": data.decode(errors="replace")}


def _life(name: str) -> int:
    life = name.rpartition(".")[2]
    return int(life) if life.isdigit() else 0


def write_cluster_file(path: Path, values: Mapping[str, object]) -> None:
    """Say where the run's Ray is; for this user alone."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as out:
        json.dump(values, out)
    temporary.replace(path)
