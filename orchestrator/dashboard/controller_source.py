"""A run read from its controller, wherever that is: no shared disk, and next to no work for the controller."""

from __future__ import annotations

from abc import ABC, abstractmethod

from orchestrator.dashboard.book import About, RunBook
from orchestrator.dashboard.feed import FeedPart
from orchestrator.errors import UserError


class NoAnswer(Exception):
    """The controller was asked and has not answered; the message says why."""


class ControllerSource(ABC):
    """Asks the controller of `run_id` for what is new; how, its subclasses say."""

    def __init__(self, run_id: str, *, chaos: bool = False) -> None:
        """`chaos`: members may be killed from the dashboard."""
        self.run_id, self.chaos = run_id, chaos
        self.book = RunBook()
        self.book.about = About(run_id=run_id)
        self._metrics_at = 0
        self._able: tuple[str, ...] = ()

    @abstractmethod
    def _feed(self, metrics_at: int, journal_at: int) -> FeedPart:
        """See `ControllerActor.feed`; raises NoAnswer."""

    @abstractmethod
    def _carry_out(self, action: str, member: str, by: str) -> str:
        """See `ControllerActor.act`; raises NoAnswer."""

    def able(self) -> tuple[str, ...]:
        """What the controller knows; killing only where it was allowed."""
        going_on = self.book.about.state == "running"
        return tuple(name for name in self._able if self.chaos or name != "kill") if going_on else ()

    def refresh(self) -> bool:
        """See `Source`. A controller that does not answer is asked again with the next call."""
        try:
            part = self._feed(self._metrics_at, self.book.num_rows)
        except NoAnswer as error:
            self._lose_sight(str(error))
            return False
        if self.book.about.state == "no answer":
            self.book.problem = ""
        self._able = part.able
        self.book.about.config = part.config or self.book.about.config
        self.book.about.state = part.ended or "running"
        self.book.view = part.view
        self.book.add_records(part.rows)
        if part.pipeline:
            self.book.add_pipeline(part.metrics)
        else:
            self.book.add_metrics(part.metrics)
        self._metrics_at += len(part.metrics)
        return part.is_full

    def _lose_sight(self, why: str) -> None:
        if self.book.about.state == "running":
            self.book.about.state = "no answer"
            self.book.problem = f"the controller does not answer: {why}"
            self.book.view = None
            self.book.version += 1

    def close(self) -> None:
        """See `Source`: nothing is held that outlasts a question."""
        self._able = ()

    def act(self, action: str, member: str, by: str) -> str:
        """See `Source`."""
        if action not in self.able():
            return f"refused: {action} is not available in this run"
        try:
            return self._carry_out(action, member, by)
        except NoAnswer as error:
            return f"not done: the controller does not answer ({error})"


def pick_run(found: list[str], wanted: str | None) -> str:
    """The run that is meant, or UserError."""
    if wanted is None and len(found) == 1:
        return found[0]
    if wanted in found:
        return wanted
    there = f"there are {', '.join(found)}" if found else "no run goes on there"
    raise UserError(
        f"run {wanted!r} is not in this cluster: {there}" if wanted else f"which run? {there}",
        place="--run",
        remedy="--run NAME" if found else "atoll dashboard RUN_DIR shows a run from its files",
    )
