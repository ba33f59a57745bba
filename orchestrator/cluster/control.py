"""The line between a supervisor and the commands of its user: one JSON line in, JSON lines out, over a Unix socket.

`{"do": "status"}` is answered with one line; `{"do": "leave", "now": false}` with `{"say": TEXT}` for every step until
the supervisor ends and hangs up.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

MAX_LINE_BYTES = 4096
REQUEST_S = 5.0
POLL_S = 0.25
NAME = "control.sock"

Answer = Callable[[Mapping[str, Any]], Mapping[str, object] | None]


class Control:
    """Listens in a folder.

    Args:
        answer: called with each request, on another thread; what it returns is sent. None keeps the line open for
            what `tell` says.
    """

    def __init__(self, folder: Path, answer: Answer) -> None:
        self.folder, self.answer = folder, answer
        self._listener: socket.socket | None = None
        self._lock = threading.Lock()
        self._listeners: list[socket.socket] = []

    def start(self) -> None:
        """Listen, for this user alone."""
        listener = socket.socket(socket.AF_UNIX)
        with _short(self.folder) as path:
            listener.bind(path)
            os.chmod(path, 0o600)
        listener.listen(8)
        self._listener = listener
        threading.Thread(target=self._serve, args=(listener,), name="control", daemon=True).start()

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                line, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._hear, args=(line,), name="control-line", daemon=True).start()

    def _hear(self, line: socket.socket) -> None:
        line.settimeout(REQUEST_S)
        try:
            request = json.loads(line.makefile("rb").readline(MAX_LINE_BYTES))
            reply = self.answer(request if isinstance(request, dict) else {})
        except (OSError, ValueError) as error:
            reply = {"error": f"a request is one line of JSON: {error}"}
        if reply is None:
            with self._lock:
                self._listeners.append(line)
            return
        with suppress(OSError):
            line.sendall(_line(reply))
        line.close()

    def tell(self, text: str) -> int:
        """Say something to everybody who waits, and return how many there are; who does not listen is dropped."""
        with self._lock:
            for line in list(self._listeners):
                try:
                    line.sendall(_line({"say": text}))
                except OSError:
                    self._listeners.remove(line)
                    line.close()
            return len(self._listeners)

    def close(self) -> None:
        """Hang up."""
        if self._listener is not None:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        with self._lock:
            for line in self._listeners:
                line.close()
            self._listeners.clear()


def ask(folder: Path, request: Mapping[str, object], timeout_s: float | None = None) -> Iterator[dict[str, Any]]:
    """Send a request to the supervisor of a folder and yield its lines until it hangs up.

    Raises:
        OSError: nobody listens there.
    """
    with socket.socket(socket.AF_UNIX) as line, _short(folder) as path:
        line.settimeout(timeout_s)
        line.connect(path)
        line.sendall(_line(request))
        with suppress(ConnectionResetError):
            for answer in line.makefile("rb"):
                yield json.loads(answer)


class _short:
    """A path of the socket in a folder that is short enough for one, however deep the folder lies."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> str:
        self._fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        return f"/proc/self/fd/{self._fd}/{NAME}"

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _line(values: Mapping[str, object]) -> bytes:
    return json.dumps(values).encode() + b"\n"
