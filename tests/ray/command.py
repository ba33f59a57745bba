"""An `atoll` command in a process group of its own, as in a terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

WAIT_S = 100.0
POLL_S = 0.02
ROOT = Path(__file__).parents[2]


class Command:
    """The command runs in `folder`, and what it says goes into a file there."""

    def __init__(self, *arguments: str, folder: Path) -> None:
        """Starts it."""
        self._output = folder / "output.txt"
        with self._output.open("w") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator.cli.main", *arguments],
                cwd=folder,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )

    @property
    def said(self) -> str:
        """Everything it has printed so far."""
        return self._output.read_text()

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for something while the command runs."""
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert self._process.poll() is None, f"ended before {what}:\n{self.said}"
            assert time.monotonic() < deadline, f"waited {WAIT_S:g} s for {what}:\n{self.said}"
            time.sleep(POLL_S)

    def interrupt(self) -> None:
        """Ctrl-C: every process of the terminal's foreground group gets it."""
        os.killpg(self._process.pid, signal.SIGINT)

    def kill(self) -> None:
        """SIGKILL to the command itself."""
        self._process.kill()
        self.end()

    def end(self) -> int:
        """Wait for the end and return the exit code."""
        try:
            return self._process.wait(timeout=WAIT_S)
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait(timeout=WAIT_S)
