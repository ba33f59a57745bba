"""What goes wrong with a process as a whole, done to it from within: death, memory, a stop, its disk, its clock."""

from __future__ import annotations

import logging
import mmap
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from faults.lab.processes import myself
from faults.plan import PlannedFault

log = logging.getLogger("atoll.chaos")

OOM_BYTES = 256 << 20
_SCORE = Path("/proc/self/oom_score_adj")
# Waits in a process of its own, for the stopped one cannot; it continues that very process or nobody.
_PAUSE = """
import os, signal, sys, time
pid, started, seconds = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
def same():
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[19] == started
    except OSError:
        return False
if same():
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + seconds
    while same() and time.monotonic() < deadline:
        time.sleep(min(0.05, max(deadline - time.monotonic(), 0.001)))
    if same():
        os.kill(pid, signal.SIGCONT)
"""


def die() -> NoReturn:
    """SIGKILL to this process."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a process outlived its SIGKILL")


def run_out_of_memory(num_bytes: int = OOM_BYTES) -> NoReturn:
    """What a process goes through when the kernel ends it for want of memory: it grows, then dies by SIGKILL.

    Only so much is really taken, so that nobody else on the machine suffers; the kernel would name this process first.
    """
    _SCORE.write_text("1000")
    taken = mmap.mmap(-1, num_bytes)
    for page in range(0, num_bytes, mmap.PAGESIZE):
        taken[page] = 1
    die()


def pause(seconds: float) -> None:
    """SIGSTOP to this process, SIGCONT after `seconds`."""
    me = myself()
    command = [sys.executable, "-S", "-E", "-c", _PAUSE, str(me.pid), str(me.started), str(seconds)]
    helper = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=helper.wait, name="pause", daemon=True).start()


def strike_process(fault: PlannedFault) -> bool:
    """Begin a fault of a whole process; False: it is none."""
    match fault.kind:
        case "kill":
            log.warning("injected: %s", fault)
            die()
        case "oom":
            log.warning("injected: %s", fault)
            run_out_of_memory()
        case "stop":
            assert fault.for_s is not None
            log.warning("injected: %s", fault)
            pause(fault.for_s)
        case _:
            return False
    return True


class FullDisk:
    """No file of this process can grow: the kernel refuses with EFBIG, which the journal treats as any full disk."""

    def __init__(self) -> None:
        """The disk has space."""
        self._before: tuple[int, int] | None = None
        self._lock = threading.Lock()

    @property
    def is_full(self) -> bool:
        """Whether it is full now."""
        return self._before is not None

    def fill(self) -> None:
        """From now on it is full; twice is once."""
        with self._lock:
            if self._before is None:
                self._before = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, self._before[1]))

    def free(self) -> None:
        """There is space again."""
        with self._lock:
            if self._before is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, self._before)
                self._before = None


class JumpClock:
    """A clock that can be made to jump."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """It shows what `clock` shows until it jumps."""
        self._clock, self._offset_s = clock, 0.0

    def __call__(self) -> float:
        """Seconds."""
        return self._clock() + self._offset_s

    def jump(self, by_s: float) -> None:
        """From now on it shows `by_s` more (or less)."""
        self._offset_s += by_s
