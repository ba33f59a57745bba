"""Where the threads of a process are: by py-spy, which sees threads that never come back to Python.

It needs nothing of the process but its memory, and so works on one that hangs, from another one of the same machine.
Where py-spy is not installed, or is not allowed to look, Python's own fault handler says what it can of this process.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import shutil
import subprocess
import sys
from pathlib import Path

TIMEOUT_S = 10.0
PR_SET_PTRACER = 0x59616D61  # "Yama": whom a kernel that restricts ptrace lets look at this process
PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)


def allow_dumps() -> None:
    """Let other processes of this user look at this one's stack, where the system would let parents only (Yama)."""
    if sys.platform == "linux":
        # Fails where there is no Yama: then nothing is in the way.
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0)


def dump_stack(pid: int, timeout_s: float = TIMEOUT_S) -> str:
    """The stacks of a process of this machine, or why there is none."""
    found, why = _spy(pid, timeout_s)
    return found or f"no stack: {why}"


def write_stack(path: Path) -> str:
    """Write the stacks of all threads of this process to `path`; returns how it was done: py-spy or faulthandler."""
    path.parent.mkdir(parents=True, exist_ok=True)
    allow_dumps()
    found, why = _spy(os.getpid(), TIMEOUT_S)
    with path.open("w", encoding="utf-8") as file:
        file.write(f"process {os.getpid()}, by {'py-spy' if found else 'faulthandler, for ' + why}\n\n{found}")
        file.flush()
        if not found:
            faulthandler.dump_traceback(file, all_threads=True)
    return "py-spy" if found else "faulthandler"


def add_stack(logs: Path, member: str, text: str) -> Path:
    """Add a stack to `<member>.stack.txt` in a run's logs; `member` is a name and an incarnation: `island-1.2`."""
    logs.mkdir(parents=True, exist_ok=True)
    path = logs / f"{member}.stack.txt"
    with path.open("a", encoding="utf-8") as file:
        file.write(text.rstrip() + "\n\n")
    return path


def _spy(pid: int, timeout_s: float) -> tuple[str, str]:
    """What py-spy says, or why it says nothing."""
    beside = Path(sys.executable).with_name("py-spy")
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    if program is None:
        return "", "py-spy is not installed (pip install py-spy)"
    command = [program, "dump", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return "", f"py-spy did not end within {timeout_s:g} s"
    except OSError as error:
        return "", f"py-spy failed: {error}"
    text = done.stdout if done.returncode == 0 else ""
    return text, f"py-spy failed: {done.stderr.strip()[-300:] or f'it ended with {done.returncode}'}"
