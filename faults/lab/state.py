"""What is known of every lab on this machine: a directory each, written before anything else is made.

So whatever dies when, the next lab finds what was left behind and removes it. A lab is *stale* when the process that
owns it is gone; one that `atoll lab up` left running belongs to nobody and is stale when its switch is gone.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from faults.lab import namespaces
from faults.lab.errors import LabError
from faults.lab.processes import ProcessId, end_all, processes_in
from faults.lab.tap import NETNS_DIR

STATE_ROOT = Path("/run/atoll-lab")
RECORD = "lab.json"
END_TIMEOUT_S = 60.0
REMOVE_ATTEMPTS, REMOVE_PAUSE_S = 20, 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class LabRecord:
    """One lab.

    Attributes:
        name: what its user calls it.
        namespaces: node -> network namespace.
        topology: as `Topology` dumps it.
        owner: the process that ends it, or None.
        switch: the process that is its wires, or None before there is one.
        scratch: the folder of what its nodes write.
    """

    name: str
    namespaces: dict[str, str]
    network: str
    topology: dict[str, Any]
    owner: ProcessId | None
    switch: ProcessId | None
    scratch: str

    @property
    def is_stale(self) -> bool:
        """Whether nobody needs it any more."""
        holder = self.switch if self.owner is None else self.owner
        return holder is None or not holder.is_alive

    @property
    def namespace_paths(self) -> list[Path]:
        """Where its namespaces can be opened."""
        return [NETNS_DIR / name for name in self.namespaces.values()]


class LabStates:
    """The directories of all labs under one root; `lock` keeps two processes from making or removing at once."""

    def __init__(self, root: Path = STATE_ROOT) -> None:
        self.root = root

    def path(self, name: str) -> Path:
        """The directory of a lab."""
        return self.root / name

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold all labs, and leave no empty root behind."""
        fd = self._open_locked()
        try:
            yield
        finally:
            with suppress(OSError):
                self.root.rmdir()
            os.close(fd)

    def _open_locked(self) -> int:
        while True:
            try:
                self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
                fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                continue
            except PermissionError as error:
                raise self._not_root() from error
            fcntl.flock(fd, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                # Whoever held it before may have removed the directory.
                if os.stat(self.root).st_ino == os.fstat(fd).st_ino:
                    return fd
            os.close(fd)

    def write(self, record: LabRecord) -> None:
        """Write a record; a reader sees the old one or the new one."""
        path = self.path(record.name)
        path.mkdir(mode=0o700, exist_ok=True)
        (path / f"{RECORD}.new").write_text(json.dumps(asdict(record)), encoding="utf-8")
        (path / f"{RECORD}.new").replace(path / RECORD)

    def read(self, name: str) -> LabRecord | None:
        """The record of a lab, or None if there is no such lab."""
        try:
            values = json.loads((self.path(name) / RECORD).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        for key in ("owner", "switch"):
            values[key] = ProcessId(**values[key]) if values[key] else None
        return LabRecord(**values)

    def names(self) -> list[str]:
        """The labs that are recorded."""
        try:
            return sorted(path.name for path in self.root.iterdir() if path.is_dir()) if self.root.is_dir() else []
        except PermissionError as error:
            raise self._not_root() from error

    def _not_root(self) -> LabError:
        return LabError("labs belong to root", place=str(self.root), remedy="sudo")

    def records(self) -> list[LabRecord]:
        """All records that can be read."""
        return [record for name in self.names() if (record := self.read(name)) is not None]

    def sweep(self) -> list[str]:
        """Remove all stale labs; return their names. Call it with the lock held."""
        swept = []
        for name in self.names():
            record = self.read(name)
            if record is None or record.is_stale:
                self.remove(name, record)
                swept.append(name)
        return swept

    def remove(self, name: str, record: LabRecord | None) -> None:
        """End everything that belongs to a lab, its record last.

        Raises:
            LabError: a process does not end, or its files cannot be removed.
        """
        if record is not None:
            paths = record.namespace_paths
            end_all(lambda: processes_in(paths), what=f"what runs in lab {name!r}", timeout_s=END_TIMEOUT_S)
            switch = [record.switch] if record.switch else []
            end_all(lambda: [p for p in switch if p.is_alive], what=f"the switch of {name!r}", timeout_s=END_TIMEOUT_S)
            namespaces.delete(record.namespaces.values())
            remove_folder(record.scratch)
        shutil.rmtree(self.path(name), ignore_errors=True)

    def only(self, name: str | None) -> LabRecord:
        """The lab of that name, or the only one.

        Raises:
            LabError: there is none, or there are several and no name is given.
        """
        records = [record for record in self.records() if name is None or record.name == name]
        if len(records) == 1:
            return records[0]
        others = ", ".join(record.name for record in self.records())
        if records:
            remedy = "name one: --lab NAME; atoll lab down NAME, or --all"
            raise LabError(f"there are several labs: {others}", remedy=remedy)
        if name is None:
            raise LabError("there is no lab", remedy="atoll lab up two-regions")
        raise LabError(f"there is no lab {name!r}", remedy=f"one of {others}" if others else "atoll lab up")


def remove_folder(path: str) -> None:
    """Remove a folder and what is in it; a file that comes while it is emptied is removed with the next attempt.

    Raises:
        LabError: it is still there after some attempts.
    """
    attempts = 0
    while os.path.lexists(path):  # the empty name of a lab that had none is not
        if attempts == REMOVE_ATTEMPTS:
            raise LabError(f"{path} cannot be removed", remedy=f"what uses it: fuser {path}; then atoll lab down")
        if attempts:
            time.sleep(REMOVE_PAUSE_S)
        attempts += 1
        shutil.rmtree(path, ignore_errors=True)


def overlapping(network: Any, used: dict[Any, str], records: Sequence[LabRecord]) -> str | None:
    """Who uses an IPv4 network already, or None."""
    labs = {type(network)(record.network): f"lab {record.name!r}" for record in records}
    return next((user for other, user in {**used, **labs}.items() if network.overlaps(other)), None)
