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


def wait_for_godot(event: threading.Event) -> None:
    """What the saved stack must show."""
    event.wait()
