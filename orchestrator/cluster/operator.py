"""The supervisor's child that knows Ray: it answers what visitors of the door ask about the runs of the cluster."""

from __future__ import annotations

import json
import select
import subprocess
import threading
import time
from collections.abc import Callable

ANSWER_S = 60.0
IDLE_S = 120.0

Launch = Callable[[], tuple[list[str], dict[str, str]] | None]


class Operator:
    """Started with the first question, ended when nobody asks for a while. One question after the other."""

    def __init__(self, command: Launch, *, answer_s: float = ANSWER_S, idle_s: float = IDLE_S) -> None:
        """`command`: arguments and environment of the process, None while it cannot run."""
        self._command, self._answer_s, self._idle_s = command, answer_s, idle_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._timer: threading.Timer | None = None
        self._rest = b""

    def answer(self, request: str) -> str:
        """One line of JSON for another one; what goes wrong here is said in it."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            try:
                return self._ask(request.replace("\n", " "))
            except TimeoutError:
                self._end()
                return _failed(f"no answer about the runs within {self._answer_s:g} s")
            except (OSError, EOFError) as error:
                self._end()
                return _failed(f"what answers about the runs has ended: {error}")
            finally:
                self._timer = threading.Timer(self._idle_s, self._forget)
                self._timer.daemon = True
                self._timer.start()

    def close(self) -> None:
        """End it."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            self._end()

    def _forget(self) -> None:
        with self._lock:
            self._end()

    def _ask(self, request: str) -> str:
        if self._process is None or self._process.poll() is not None:
            self._end()
            launch = self._command()
            if launch is None:
                return _failed("Ray does not run here yet")
            arguments, environment = launch
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
                bufsize=0,
            )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(request.encode() + b"\n")
        deadline_s = time.monotonic() + self._answer_s
        while b"\n" not in self._rest:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not select.select([process.stdout], [], [], left_s)[0]:
                raise TimeoutError
            data = process.stdout.read(65536)
            if not data:
                raise EOFError(f"exit code {process.wait(timeout=5)}")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    def _end(self) -> None:
        process, self._process, self._rest = self._process, None, b""
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def _failed(why: str) -> str:
    return json.dumps({"error": {"message": why, "place": None, "remedy": "see supervisor.log there", "code": 4}})
