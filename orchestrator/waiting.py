"""What a person sees while a command takes longer than a moment: a bar, or that it still works.

On standard error, and only where that is a terminal: what a machine reads stays as it is.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

SHOWN_AFTER_S = 1.0
DRAWN_EVERY_S = 0.25

Advance = Callable[[float], None]
_one_bar = threading.Lock()


@contextmanager
def waiting(
    text: str,
    total: float | None = None,
    *,
    timed: bool = False,
    stream: IO[str] | None = None,
    after_s: float | None = None,
) -> Iterator[Advance]:
    """Show `text` while the block runs, once it has run for `after_s` (`SHOWN_AFTER_S`).

    Gives a function that says how much is done in all, of `total`; without a total only the time is shown. `timed`: the
    total is in seconds, and what is done is what has passed of them. Inside another one it shows nothing: the outer one
    goes on.
    """
    out = sys.stderr if stream is None else stream
    if not out.isatty() or not _one_bar.acquire(blocking=False):
        yield lambda done: None
        return
    shown = _Shown(text, total, out, SHOWN_AFTER_S if after_s is None else after_s, timed)
    shown.start()
    try:
        yield shown.advance
    finally:
        shown.end()
        _one_bar.release()


class _Shown:
    """A bar that a thread of its own begins to draw; short work never imports what draws."""

    def __init__(self, text: str, total: float | None, stream: IO[str], after_s: float, timed: bool) -> None:
        self._text, self._total, self._stream, self._after_s = text, total, stream, after_s
        self._done, self._began_s = 0.0, time.monotonic() if timed else None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._draw, name="waiting", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def advance(self, done: float) -> None:
        self._done = done

    def end(self) -> None:
        self._over.set()
        self._thread.join()

    def _draw(self) -> None:
        if self._over.wait(self._after_s):
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        known = (BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeRemainingColumn())
        columns = (SpinnerColumn(), TextColumn("{task.description}"), *(known if self._total else ()))
        console = Console(file=self._stream, force_terminal=True)
        how: dict[str, Any] = {"console": console, "transient": True, "refresh_per_second": 4}
        # What is printed meanwhile goes above the bar, unless it goes elsewhere: there it has to arrive.
        how |= {"redirect_stdout": sys.stdout.isatty(), "redirect_stderr": self._stream is sys.stderr}
        with Progress(*columns, TimeElapsedColumn(), **how) as bar:
            task = bar.add_task(self._text, total=self._total)
            while True:
                passed_s = None if self._began_s is None else time.monotonic() - self._began_s
                bar.update(task, completed=self._done if passed_s is None else passed_s)
                if self._over.wait(DRAWN_EVERY_S):
                    return
