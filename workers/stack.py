"""Where the threads of a process are, written to a file: by py-spy, which sees threads that never come back to Python.

Where py-spy is not installed, or is not allowed to look, Python's own fault handler says what it can.
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


def write_stack(path: Path) -> str:
    """Write the stacks of all threads of this process to `path`; returns how it was done: py-spy or faulthandler."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found, why = _spy()
    with path.open("w", encoding="utf-8") as file:
        file.write(f"process {os.getpid()}, by {'py-spy' if found else 'faulthandler, for ' + why}\n\n{found}")
        file.flush()
        if not found:
            faulthandler.dump_traceback(file, all_threads=True)
    return "py-spy" if found else "faulthandler"


def _spy() -> tuple[str, str]:
    """What py-spy says, or why it says nothing."""
    beside = Path(sys.executable).with_name("py-spy")
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    if program is None:
        return "", "py-spy is not installed"
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0)
    command = [program, "dump", "--pid", str(os.getpid())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"py-spy failed: {error}"
    text = done.stdout if done.returncode == 0 else ""
    return text, f"py-spy failed: {done.stderr.strip()[-300:]}"
