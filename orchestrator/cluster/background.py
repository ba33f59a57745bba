"""A command that goes on in the background: started again without the terminal, and waited for until it is ready."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BACKGROUND = "--background"
READY_FD = "--ready-fd"


def start_in_background(arguments: Sequence[str]) -> tuple[int, dict[str, Any] | None]:
    """Run this very command in a session of its own.

    Until it is ready it says what it says on this terminal; returns its exit code and None if it ends before that,
    else 0 and what it said to be ready with.
    """
    reader, writer = os.pipe()
    command = [sys.executable, *(argument for argument in arguments[1:] if argument != BACKGROUND)]
    process = subprocess.Popen(
        [*command, READY_FD, str(writer)],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        pass_fds=[writer],
        start_new_session=True,
    )
    os.close(writer)
    try:
        with os.fdopen(reader, "rb") as pipe:
            line = pipe.readline()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    if not line:
        return process.wait(), None
    process.returncode = 0  # it goes on without us
    return 0, json.loads(line)


def say_ready(ready_fd: int, values: dict[str, Any], log_file: Path) -> None:
    """Tell whoever started this process, and go on writing into a file."""
    with os.fdopen(ready_fd, "wb") as pipe, log_file.open("ab", buffering=0) as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        pipe.write(json.dumps(values).encode() + b"\n")
