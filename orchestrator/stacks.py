"""What every thread of a process does at this moment, by py-spy, which needs nothing of that process but its memory."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

DUMP_S = 15.0
PR_SET_PTRACER = 0x59616D61
PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)


def allow_dumps() -> None:
    """Let other processes of this user look at this one's stack, where the system would let parents only (Yama)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0)  # EINVAL where there is no Yama: nothing is in the way


def dump_stack(pid: int, timeout_s: float = DUMP_S) -> str:
    """The stacks of a process of this machine, or why there is none."""
    beside = Path(sys.executable).with_name("py-spy")
    command = str(beside) if beside.exists() else shutil.which("py-spy")
    if command is None:
        return "no stack: py-spy is not installed (pip install py-spy)"
    try:
        done = subprocess.run(
            [command, "dump", "--pid", str(pid)], capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no stack: py-spy did not end within {timeout_s:g} s"
    if done.returncode:
        return f"no stack: {done.stderr.strip() or f'py-spy ended with {done.returncode}'}"
    return done.stdout


def save_stack(logs: Path, member: str, text: str) -> Path:
    """Add a stack to `<member>.stack.txt` in a run's logs; `member` is a name and an incarnation: `island-1.2`."""
    logs.mkdir(parents=True, exist_ok=True)
    path = logs / f"{member}.stack.txt"
    with path.open("a", encoding="utf-8") as file:
        file.write(text.rstrip() + "\n\n")
    return path
