"""A run as an object: what `atoll.start` and `atoll.attach` return, for a script, a notebook, or a Ray program."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from orchestrator.client import Runs
from orchestrator.errors import RunFailed, UserError
from orchestrator.pipeline.views import PipelineStatus, read_answer
from orchestrator.status import Status
from orchestrator.summary import Summary, load_summary
from workers.records import Row, load_row

POLL_S = 0.3


class Run:
    """One run that goes on. As a context manager it ends what `start` began; an attached run is left alone."""

    def __init__(self, runs: Runs, name: str, *, stack: ExitStack, run_dir: Path | None, owned: bool) -> None:
        """See `atoll.start` and `atoll.attach`; `stack` has what is to be closed."""
        self.name, self.run_dir = name, run_dir
        self._runs, self._stack, self._owned = runs, stack, owned

    def __enter__(self) -> Self:
        """Nothing more is started."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the run if it was started here and goes on, and let go of Ray."""
        try:
            if self._owned and not self._standing()["over"]:
                self.stop()
        finally:
            self.close()

    def close(self) -> None:
        """Let go of it: what was started here ends at once, an attached run goes on."""
        self._stack.close()

    def _ask(self, what: str, **args: Any) -> Any:
        return self._runs.ask(what, self.name, **args)

    def _standing(self) -> dict[str, Any]:
        standing: dict[str, Any] = self._ask("standing")
        return standing

    def status(self) -> Status | PipelineStatus:
        """How it stands now; of a run with stages, those."""
        return read_answer(self._ask("status"))

    def events(self, *, since: int = 0, follow: bool = True) -> Iterator[Row]:
        """Everything that is decided, as rows of the journal (`row.record` says what), until the run is over.

        Args:
            since: number of the first row that is wanted.
            follow: wait for further ones; else only those that are there.
        """
        while True:
            over = self._standing()["over"]
            lines = self._ask("rows", since=since)
            for line in lines:
                yield load_row(line.encode())
            since += len(lines)
            if not lines and (over or not follow):
                return
            if not lines:
                time.sleep(POLL_S)

    def wait(self, timeout_s: float | None = None) -> Summary:
        """Wait for the end and return the summary.

        Raises:
            TimeoutError: it goes on after `timeout_s`.
            RunFailed: it failed.
            UserError: its directory is not here (of a run elsewhere there is `status`).
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while not (standing := self._standing())["over"]:
            if deadline_s is not None and time.monotonic() > deadline_s:
                raise TimeoutError(f"run {self.name} goes on after {timeout_s:g} s")
            time.sleep(POLL_S)
        if standing["reason"] == "failed":
            raise RunFailed(
                f"the run failed: {standing['detail']}",
                place=str(self.run_dir),
                remedy=f"atoll why {self.run_dir or self.name}, and the logs in its directory",
            )
        if self.run_dir is None or not (self.run_dir / "summary.json").exists():
            raise UserError(f"the directory of {self.name} is not on this machine", remedy="status()")
        return load_summary(self.run_dir)

    def stop(self, *, save: bool = True, timeout_s: float = 300.0) -> None:
        """Stop it so that it can be resumed, and wait for it. Without `save`: at once. Raises TimeoutError."""
        self._ask("stop", save=save)
        deadline_s = time.monotonic() + timeout_s
        while not self._standing()["over"]:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"run {self.name} did not stop within {timeout_s:g} s")
            time.sleep(POLL_S)

    def pause(self) -> None:
        """No further samples are trained on until `resume`."""
        self._ask("pause")

    def resume(self) -> None:
        """Go on after `pause`."""
        self._ask("resume")

    def save(self) -> str | None:
        """Write a snapshot of the anchor; returns its name."""
        name: str | None = self._ask("save")["snapshot"]
        return name

    def set(self, values: Mapping[str, int | float | str]) -> int:
        """Change settings (`{"strategy.outer_lr": 0.5}`); the version from which they hold. Raises UserError."""
        return int(min(self._ask("set", values=dict(values))["since"]))

    def rollback(self, version: int) -> None:
        """Go on from the snapshot of an older version. Raises UserError."""
        self._ask("rollback", version=version)
