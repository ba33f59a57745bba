"""Watching a run from the terminal: progress, Ctrl-C, and a controller that comes back after it died."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from orchestrator.errors import ClusterUnreachable, RunFailed
from orchestrator.progress import Progress

if TYPE_CHECKING:
    from ray.actor import ActorHandle

POLL_S = 1.0
ANSWER_S = 30.0
LOST_S = 60.0
STOPPING = "stopping: islands finish their step and save; Ctrl-C again stops at once and loses what was not offered"
STOPPING_NOW = "stopping now"


class Interrupts:
    """Counts Ctrl-C (and SIGTERM, as the first one) instead of raising somewhere; the third raises after all."""

    def __init__(self) -> None:
        """Nothing is caught before it is entered."""
        self.count = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Catch the signals; on another thread than the main one nothing can be caught, and nothing is."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._caught)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Leave the signals as they were."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _caught(self, number: int, _: FrameType | None) -> None:
        self.count = max(self.count, 1) if number == signal.SIGTERM else self.count + 1
        if self.count > 2:
            raise KeyboardInterrupt


def watch(controller: ActorHandle[Any], progress: Progress) -> dict[str, Any]:
    """Show the run until it is over; returns the last status.

    The first Ctrl-C asks for a resumable stop, the second stops at once. Raises RunFailed if the controller failed
    before there was a run, or for good; ClusterUnreachable if it does not answer for `LOST_S` seconds.
    """
    import ray

    told, lost_since = 0, None
    with Interrupts() as interrupts:
        while True:
            if interrupts.count > told:
                told = interrupts.count
                progress.say(STOPPING if told == 1 else STOPPING_NOW)
            if told:  # said again and again: a controller that is just coming back would not have heard it
                controller.stop.remote(told == 1)
            try:
                status: dict[str, Any] = ray.get(controller.wait.remote(POLL_S), timeout=ANSWER_S)  # type: ignore[assignment]
            except ray.exceptions.ActorDiedError as error:
                raise RunFailed(
                    f"the controller has died for good: {error}", remedy="its log is logs/controller.log"
                ) from error
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
                # Ray restarts a dead controller; it answers again once it has replayed its journal.
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > LOST_S:
                    raise ClusterUnreachable(f"the controller does not answer any more: {error}") from error
                time.sleep(POLL_S)
                continue
            lost_since = None
            if status["over"] and "members" not in status:
                raise RunFailed(status["detail"])
            progress.show(status)
            if status["over"]:
                for fault in status.get("unfired", ()):
                    progress.say(f"warning: {fault} did not happen: the run was over before")
                return status
