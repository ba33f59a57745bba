"""Find the processes that this test session started, directly or not."""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

MARK = "ATOLL_TEST_SESSION"
SESSION = secrets.token_hex(8)
LEAK_TIMEOUT_S = 10.0
POLL_S = 0.05
PROC = Path("/proc")
# Python starts it once for a process and ends it with that process.
OUTLIVE_MODULES = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """A process that this session started, directly or not."""

    pid: int
    started: int
    command: str


def our_processes() -> set[Process]:
    """The living processes that descend from this one: by the mark in their environment, or by their parents.

    The mark finds those whose parent died; the parents find those that were forked and never changed their image.
    """
    if not PROC.is_dir():
        return set()
    parents: dict[int, int] = {}
    alive: dict[int, Process] = {}
    marked: set[int] = set()
    for entry in PROC.iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue  # it ended while we looked, or belongs to somebody else
        if fields[0] in "ZX":
            continue
        pid = int(entry.name)
        parents[pid] = int(fields[1])
        alive[pid] = Process(pid=pid, started=int(fields[19]), command=command)
        if f"{MARK}={SESSION}".encode() in environment:
            marked.add(pid)
    ours = {pid for pid in alive if pid in marked or _descends(pid, parents)}
    return {alive[pid] for pid in ours if not any(name in alive[pid].command for name in OUTLIVE_MODULES)}


def wait_until_gone(before: set[Process]) -> set[Process]:
    """The processes that are still there after `LEAK_TIMEOUT_S` and were not before."""
    deadline = time.monotonic() + LEAK_TIMEOUT_S
    while (leaked := our_processes() - before) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return leaked


def _descends(pid: int, parents: dict[int, int]) -> bool:
    seen: set[int] = set()
    while pid in parents and pid not in seen:
        seen.add(pid)
        pid = parents[pid]
        if pid == os.getpid():
            return True
    return False
