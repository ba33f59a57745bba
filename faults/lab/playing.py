"""A schedule of link changes that goes on beside something else, a training run for example."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Self

from faults.lab.errors import LabError
from faults.lab.lab import Lab
from faults.lab.schedule import LinkChange, check_changes

END_TIMEOUT_S = 30.0


class Playing:
    """Plays a schedule from the start of a `with` block to its end.

    Args:
        lab: whose links change.
        changes: the schedule; may be empty.
        say: is told of a change that failed, and at the end of those whose time did not come.
    """

    def __init__(self, lab: Lab, changes: Sequence[LinkChange], *, say: Callable[[str], None]) -> None:
        self._lab, self._changes, self._say = lab, changes, say
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._play, name="link-changes", daemon=True)

    def __enter__(self) -> Self:
        """Begin; raises `LabError` for a change that names nobody, and then none is done."""
        check_changes(self._changes, self._lab.topology)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End, however far it is."""
        self._over.set()
        self._thread.join(END_TIMEOUT_S)

    def _play(self) -> None:
        try:
            missed = self._lab.play(self._changes, over=self._over)
        except LabError as error:
            self._say(f"the schedule of link changes ended: {error}")
            return
        if missed:
            self._say(f"link changes that did not come, as it was over before: {', '.join(map(str, missed))}")
