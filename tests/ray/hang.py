"""A training thread that hangs, in a process that is otherwise well."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from faults.inject import Injection, faults_dir
from workers.context import IslandContext


@dataclass(frozen=True, kw_only=True, slots=True)
class Hang:
    """Stops the training thread in the middle of a step once `<member>.hang` is among the faults of the run."""

    inner: Injection

    def __call__(self, context: IslandContext) -> IslandContext:
        """The context with a clock that does not come back."""
        tapped, clock = self.inner(context), context.clock
        armed = faults_dir(context.spec.run_dir) / f"{context.spec.name}.hang"

        def hanging() -> float:
            if threading.current_thread().name == "train" and armed.exists():
                armed.rename(armed.with_suffix(".hung"))
                wait_for_godot(threading.Event())
            return clock()

        tapped.clock = hanging
        return tapped


def wait_for_godot(event: threading.Event) -> None:
    """What the saved stack must show."""
    event.wait()
