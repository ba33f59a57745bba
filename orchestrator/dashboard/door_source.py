"""A run of a cluster that this machine has no part in: its controller is asked through the cluster's door."""

from __future__ import annotations

from typing import Any

from orchestrator.client import DoorRuns
from orchestrator.cluster.join_string import JoinString
from orchestrator.dashboard.controller_source import ControllerSource, NoAnswer, pick_run
from orchestrator.dashboard.feed import FeedPart, part_from_json
from orchestrator.errors import UserError

# A question takes two connections and passes through one more process: half as often as of a neighbour.
POLL_S = 1.4


class DoorSource(ControllerSource):
    """Asks at `place`, with the cluster's token; neither Ray nor a place in the cluster is needed here."""

    def __init__(self, place: JoinString, run: str | None, *, chaos: bool = False) -> None:
        """`run`: which one, where several go on. Raises ClusterUnreachable, or UserError where it is not there."""
        self._runs = DoorRuns(place)
        super().__init__(pick_run([known["run"] for known in self._runs.ask("runs")], run), chaos=chaos)

    def _ask(self, what: str, **args: Any) -> Any:
        try:
            return self._runs.ask(what, self.run_id, **args)
        except UserError as error:  # the run, the cluster or the way there is gone
            raise NoAnswer(error.message) from error

    def _feed(self, metrics_at: int, journal_at: int) -> FeedPart:
        return part_from_json(self._ask("feed", metrics_at=metrics_at, journal_at=journal_at))

    def _carry_out(self, action: str, member: str, by: str) -> str:
        return str(self._ask("act", action=action, member=member, by=by))
