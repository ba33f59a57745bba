"""The directory of a run: where each file is, who may write, and which runs there are."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from orchestrator.errors import UserError
from orchestrator.segments import segment_name

RUNS = Path("runs")
LATEST = "latest"
LOCK_ATTEMPTS = 10
LOCK_RETRY_S = 0.02
RECORDED_PACKAGES = (
    "atoll ray torch numpy pyarrow pydantic click rich safetensors tokenizers blake3 transformers".split()
)


class RunDirInUse(UserError):
    """Another process writes into the run directory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LockHolder:
    """The process that holds the lock of a run directory."""

    pid: int
    host: str


@dataclass(frozen=True, slots=True)
class RunDir:
    """The files of one run; a path and nothing else, so that it can be made anywhere.

    Attributes:
        path: the directory.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.toml"

    @property
    def versions(self) -> Path:
        """Versions of Python and of the packages that the run started with."""
        return self.path / "versions.json"

    @property
    def journal(self) -> Path:
        """Everything that was decided."""
        return self.path / "journal.jsonl"

    def journal_segment(self, term: int) -> Path:
        """The journal of one controller's term, until it is merged into `journal`."""
        return self.path / segment_name(term)

    @property
    def metrics(self) -> Path:
        """Rows of measurements."""
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """What came out, written at the end."""
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        """The report of the run."""
        return self.path / "report.html"

    @property
    def snapshots(self) -> Path:
        """Durable copies of the anchor and of the members' state."""
        return self.path / "snapshots"

    @property
    def logs(self) -> Path:
        """One log of each incarnation of each member."""
        return self.path / "logs"

    def log(self, member: str, incarnation: int) -> Path:
        """The log of one incarnation of one member."""
        return self.logs / f"{member}-{incarnation}.log"

    @property
    def cluster_file(self) -> Path:
        """Where the Ray cluster is that the run is on, while it is: for `atoll pause`, `stop` and so on."""
        return self.path / "cluster.json"

    @property
    def controller_lock(self) -> Path:
        """The file that the run's controller keeps locked: the run goes on, though who started it may be gone."""
        return self.path / "LOCK.controller"

    @property
    def lock_file(self) -> Path:
        """The file that the writer keeps locked; it stays when the lock is released."""
        return self.path / "LOCK"

    def record(self, config_toml: str) -> None:
        """Write the resolved configuration and the versions: at the start, when a value was filled in, on resume.

        The versions of the start stay; others that a resumed run has are added under "resumed".
        """
        write_atomically(self.config, config_toml)
        now, before = collect_versions(), dict(read_json(self.versions))
        later = before.pop("resumed", [])
        if now == ([before, *later])[-1]:
            return
        versions = {**before, "resumed": [*later, now]} if before else now
        write_atomically(self.versions, json.dumps(versions, indent=2) + "\n")

    @contextlib.contextmanager
    def lock(self, file: Path | None = None) -> Iterator[None]:
        """Hold the lock of the directory (or another `file`), which ends with the process whatever happens to it.

        Raises:
            RunDirInUse: another process (or another caller in this one) holds it.
        """
        file = file or self.lock_file
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if not _take(descriptor):
                raise self._in_use(_read_holder(file))
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def holder(self, file: Path | None = None) -> LockHolder | None:
        """Who holds the lock (or that of another `file`) now, or None."""
        file = file or self.lock_file
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            # Shared, so that two who look at the same time do not see each other.
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _read_holder(file)
        else:
            return None
        finally:
            os.close(descriptor)

    def check_free(self) -> None:
        """Complain if somebody writes into the directory.

        Raises:
            RunDirInUse: the lock is held.
        """
        holder = self.holder()
        if holder is not None:
            raise self._in_use(holder)

    def state(self) -> str:
        """ "running", "interrupted" (not running, no summary), or the reason of its end in the summary."""
        if self.holder() is not None or self.holder(self.controller_lock) is not None:
            return "running"
        reason = read_json(self.summary).get("exit_reason")
        return str(reason) if reason is not None else "interrupted"

    def _in_use(self, holder: LockHolder) -> RunDirInUse:
        message = f"run directory {self.path} is in use by process {holder.pid} on {holder.host}"
        return RunDirInUse(message, place=str(self.lock_file), remedy="wait until it ends, or take another directory")


def create_run_dir(name: str, *, base: Path = RUNS, path: Path | None = None) -> RunDir:
    """Make the directory of a new run: `path`, or `<base>/<name>-<date>-<4 hex>` to which `<base>/latest` then links.

    Raises:
        UserError: the directory has files in it, is in use, or cannot be made.
    """
    try:
        if path is not None:
            run_dir = RunDir(path)
            path.mkdir(parents=True, exist_ok=True)
            run_dir.check_free()
            _check_empty(path)
        else:
            run_dir = RunDir(_make_fresh(base, f"{name}-{date.today().isoformat()}"))
            link_latest(run_dir.path)
        run_dir.logs.mkdir(exist_ok=True)
        run_dir.snapshots.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the run directory: {error}", remedy="--run-dir with a folder you own") from error
    return run_dir


def make_run_folder(name: str, *, base: Path = RUNS) -> Path:
    """Make `<base>/<name>-<date>-<4 hex>`, for what is no run itself but holds some."""
    return _make_fresh(base, f"{name}-{date.today().isoformat()}")


def open_run_dir(path: Path | None = None, *, base: Path = RUNS) -> RunDir:
    """The directory of a run that was started before.

    Args:
        path: the directory, or the name of one in `base`; None for `<base>/latest`.
        base: where runs are kept.

    Raises:
        UserError: there is none; names the latest run.
    """
    wanted = base / LATEST if path is None else path
    for candidate in (wanted, base / wanted):
        if (candidate / "config.toml").is_file() or (candidate / "journal.jsonl").is_file():
            return RunDir(candidate.resolve() if candidate.is_symlink() else candidate)
    known = [run.path for run in list_runs(base)]
    none = f"there is no run in {Path.cwd() / base}: call it where runs/ is, or name a directory; atoll demo makes one"
    remedy = f"{known[-1]} is the newest one; `atoll runs` lists them" if known else none
    raise UserError(f"{wanted} is not a run directory", remedy=remedy)


def list_runs(base: Path = RUNS) -> list[RunDir]:
    """The runs below a folder, oldest first; folders of others, into which this user cannot look, are none."""
    try:
        found = [RunDir(path) for path in base.iterdir() if not path.is_symlink()]
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []
    runs = [run for run in found if os.access(run.config, os.R_OK)]
    return sorted(runs, key=lambda run: (run.config.stat().st_mtime, run.path.name))


def link_latest(path: Path) -> None:
    """Let `latest` beside a run directory point to it, at once or not at all."""
    link = path.parent / LATEST
    if link.exists() and not link.is_symlink():
        raise UserError(f"{link} is not a link, it is left alone", remedy=f"rename {link}")
    temporary = path.parent / f".{LATEST}-{secrets.token_hex(4)}"
    temporary.symlink_to(path.name)
    os.replace(temporary, link)


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file; empty where there is no such file, or something else in it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def collect_versions() -> dict[str, Any]:
    """Python, the machine's kind, and the packages that are installed; nothing is imported for it."""
    packages: dict[str, str | None] = {}
    for name in RECORDED_PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    return {"python": platform.python_version(), "platform": platform.platform(), "packages": packages}


def _make_fresh(base: Path, stem: str) -> Path:
    base.mkdir(parents=True, exist_ok=True)
    while True:
        path = base / f"{stem}-{secrets.token_hex(2)}"
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path


def _check_empty(path: Path) -> None:
    others = sorted(entry.name for entry in path.iterdir() if entry.name != "LOCK")
    if others:
        message = f"run directory {path} is not empty, it has {others[0]!r} in it"
        raise UserError(message, place="--run-dir", remedy=f"another folder, or --resume {path} to go on with its run")


def _take(descriptor: int) -> bool:
    """Lock at once, but outlast somebody who only looks (`holder` locks for an instant)."""
    for attempt in range(LOCK_ATTEMPTS):
        if attempt:
            time.sleep(LOCK_RETRY_S)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    return False


def _read_holder(path: Path) -> LockHolder:
    value = read_json(path)
    return LockHolder(pid=int(value.get("pid", -1)), host=str(value.get("host", "an unknown host")))
