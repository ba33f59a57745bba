"""A training thread that hangs, in a process that is otherwise well; and one that is stopped before it has joined."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass

from faults.inject import Injection, faults_dir
from orchestrator.island_actor import ContextWrapper
from workers.context import IslandContext


@dataclass(frozen=True, kw_only=True, slots=True)
class Hang:
    """Stops the training thread in the middle of a step once `<member>.hang` is among the faults of the run."""

    inner: Injection

    def __call__(self, context: IslandContext) -> IslandContext:
        """The context with an end of steps that does not come."""
        tapped = self.inner(context)
        on_step = tapped.on_step
        armed = faults_dir(context.spec.run_dir) / f"{context.spec.name}.hang"

        def hanging() -> None:
            if armed.exists():
                armed.rename(armed.with_suffix(".hung"))
                wait_for_godot(threading.Event())
            if on_step is not None:
                on_step()

        tapped.on_step = hanging
        return tapped


@dataclass(frozen=True, kw_only=True, slots=True)
class StopOnTheWay:
    """SIGSTOP to the next process that begins as a member of which `<member>.stop` is among the faults of the run."""

    inner: ContextWrapper

    def __call__(self, context: IslandContext) -> IslandContext:
        """The context, in a process that has said nothing yet; its id is in `<member>.stopped`."""
        armed = faults_dir(context.spec.run_dir) / f"{context.spec.name}.stop"
        if armed.exists():
            armed.write_text(str(os.getpid()))
            armed.rename(armed.with_suffix(".stopped"))
            os.kill(os.getpid(), signal.SIGSTOP)
        return self.inner(context)


def wait_for_godot(event: threading.Event) -> None:
    """What the saved stack must show."""
    event.wait()
