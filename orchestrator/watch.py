"""Watching a run from the terminal: progress, Ctrl-C, and a controller that comes back after it died."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from orchestrator.errors import ClusterUnreachable, RunFailed
from orchestrator.progress import Progress

if TYPE_CHECKING:
    from ray.actor import ActorHandle

POLL_S = 1.0
FIRST_POLL_S = 0.2  # until the first loss is there, for which somebody waits
ANSWER_S = 30.0
LOST_S = 120.0
FIND_AGAIN_S = 5.0
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


@contextmanager
def interrupts_afterwards() -> Iterator[None]:
    """A Ctrl-C or SIGTERM within the block takes effect at its end, a second one at once.

    For the start of Ray, which leaves processes and waits behind where it is interrupted half-way.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        caught.append(number)
        if len(caught) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        raise KeyboardInterrupt


def watch(
    controller: ActorHandle[Any],
    progress: Progress,
    find_again: Callable[[], ActorHandle[Any] | None] | None = None,
) -> dict[str, Any]:
    """Show the run until it is over; returns the last status.

    The first Ctrl-C asks for a resumable stop, the second stops at once. A controller that does not answer is looked
    for with `find_again`, which gives up the connection. Raises RunFailed if the controller failed before there was a
    run, or for good; ClusterUnreachable if it does not answer for `LOST_S` seconds.
    """
    import ray

    told, told_lost, poll_s = 0, False, FIRST_POLL_S
    with Interrupts() as interrupts:
        while True:
            if interrupts.count > told:
                told = interrupts.count
                progress.say(STOPPING if told == 1 else STOPPING_NOW)
            try:
                if told:  # said again and again: a controller that is just coming back would not have heard it
                    controller.stop.remote(told == 1)
                status: dict[str, Any] = ray.get(controller.wait.remote(poll_s), timeout=ANSWER_S)  # type: ignore[assignment]
            except ray.exceptions.ActorDiedError as error:
                raise RunFailed(
                    f"the controller has died for good: {error}", remedy="its log is logs/controller.log"
                ) from error
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
                controller = _wait_for(controller, find_again, progress, error)
                continue
            if status["over"] and "members" not in status:
                raise RunFailed(
                    status["detail"], remedy="set right what it names; the rest is in logs/controller.log of the run"
                )
            if "lost" in status:
                if not told_lost:
                    progress.say(f"warning: {status['lost']}")
                told_lost = True
                continue
            progress.show(status)
            if status.get("evaluations") or status["rounds"]:
                poll_s = POLL_S
            if status["over"]:
                for fault in status.get("unfired", ()):
                    progress.say(f"warning: {fault} did not happen: the run was over before")
                return status


def _wait_for(
    controller: ActorHandle[Any],
    find_again: Callable[[], ActorHandle[Any] | None] | None,
    progress: Progress,
    why: Exception,
) -> ActorHandle[Any]:
    """Ray restarts a dead controller, and it answers once it has replayed its journal; the way to it may be another."""
    import ray

    lost_s = time.monotonic()
    while time.monotonic() - lost_s < FIND_AGAIN_S or find_again is None:
        time.sleep(POLL_S)
        try:
            ray.get(controller.wait.remote(0.0), timeout=ANSWER_S)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            if time.monotonic() - lost_s > LOST_S:
                raise _out_of_sight(error) from error
        else:
            return controller
    progress.say(f"the controller has not answered for {FIND_AGAIN_S:g} s: looking for it")
    while time.monotonic() - lost_s < LOST_S:
        found = find_again()
        if found is not None:
            progress.say("the controller is there again")
            return found
        time.sleep(POLL_S)
    raise _out_of_sight(why) from why


def _out_of_sight(error: Exception) -> ClusterUnreachable:
    return ClusterUnreachable(
        f"the controller has not answered for {LOST_S:g} s: {_first_line(error)}",
        remedy="on a cluster of yours the run goes on without this command, or when the head is back; "
        "atoll train --resume watches it again",
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
