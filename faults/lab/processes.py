"""Processes by identity: a process id is used again, together with its start time it is not."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from faults.lab.errors import LabError

_PROC = Path("/proc")
_POLL_S = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessId:
    """A process: its id, and when it started (clock ticks since boot)."""

    pid: int
    started: int

    @property
    def is_alive(self) -> bool:
        """Whether it still runs (a zombie does not)."""
        return _started(self.pid) == self.started

    def kill(self) -> None:
        """Send SIGKILL, to this very process or to nobody."""
        with suppress(ProcessLookupError):
            fd = os.pidfd_open(self.pid)
            try:
                # The descriptor holds on to one process; only now is it sure which.
                if self.is_alive:
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
            finally:
                os.close(fd)


def identify(pid: int) -> ProcessId | None:
    """The identity of a process id, or None if it does not run."""
    started = _started(pid)
    return None if started is None else ProcessId(pid=pid, started=started)


def myself() -> ProcessId:
    """The identity of this process."""
    found = identify(os.getpid())
    assert found is not None
    return found


def processes_in(namespaces: Collection[Path]) -> list[ProcessId]:
    """All living processes inside some named network namespaces, whoever started them; never those of our own."""
    ours = os.stat("/proc/self/ns/net")
    stats = [path.stat() for path in namespaces if path.exists()]
    # A name without its mount is an ordinary file: its inode says nothing.
    wanted = {f"net:[{stat.st_ino}]" for stat in stats if stat.st_dev == ours.st_dev and stat.st_ino != ours.st_ino}
    return [process for process in _all() if _network(process.pid) in wanted]


def end_all(find: Callable[[], Collection[ProcessId]], *, what: str, timeout_s: float) -> None:
    """Kill the processes that `find` finds until it finds none.

    Raises:
        LabError: some are left after `timeout_s`.
    """
    deadline_s = time.monotonic() + timeout_s
    while left := find():
        if time.monotonic() > deadline_s:
            pids = ", ".join(str(process.pid) for process in left)
            raise LabError(f"{what} did not end within {timeout_s:g} s of SIGKILL: processes {pids}")
        for process in left:
            process.kill()
        time.sleep(_POLL_S)


def _all() -> Iterator[ProcessId]:
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and (process := identify(int(entry.name))) is not None:
            yield process


def _network(pid: int) -> str | None:
    try:
        return os.readlink(_PROC / str(pid) / "ns" / "net")
    except OSError:
        return None


def _started(pid: int) -> int | None:
    try:
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
