"""What an island spends its time on, as spans: computing, synchronising, evaluating, starting, waiting."""

from __future__ import annotations

from collections.abc import Callable

MAX_SPAN_S = 2.0
WAITING_IN = {"exchange": "sync", "state": "start", "local state": "start"}
"""The phase in which an island waits, by what it waits for; otherwise it waits for leave to go on: `wait`."""


class Timeline:
    """Collects spans of phases; short neighbours of one phase become one span."""

    def __init__(self, *, clock: Callable[[], float]) -> None:
        """`clock`: seconds, monotonic."""
        self._clock = clock
        self._phase: str | None = None
        self._since = 0.0
        self._done: list[tuple[float, dict[str, object]]] = []

    def enter(self, phase: str | None) -> None:
        """From now on it is `phase`; None ends the timeline."""
        now = self._clock()
        same = phase == self._phase
        if same and now - self._since < MAX_SPAN_S:
            return
        if self._phase is not None and now > self._since:
            self._done.append((now, {"kind": "span", "phase": self._phase, "seconds": now - self._since}))
        self._phase, self._since = phase, now

    def take(self) -> list[tuple[float, dict[str, object]]]:
        """Finished spans as `(end, row)`, once."""
        done, self._done = self._done, []
        return done
