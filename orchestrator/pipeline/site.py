"""What an injector has to know of a pipeline, and which faults there are in one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from faults.plan import FaultPlanError, PlannedFault
from orchestrator.events import FaultInjected, FaultNoticed
from orchestrator.injector import Injector
from orchestrator.journal import FileJournal
from orchestrator.pipeline.brain import PipelineBrain
from workers.records import Record

KINDS = (
    "kill", "oom", "stop", "hang", "slow", "nan", "cut", "heal", "delay", "controller_kill", "head_kill", "storm"
)  # fmt: skip
"""Of those of islands: what islands send each other is not what stage peers do."""
OF_PEERS = frozenset({"hang", "slow", "nan"})
"""What happens in computing, which a trainer does not do."""


def check_pipeline_fault(fault: PlannedFault, *, place: str) -> None:
    """Raise FaultPlanError for a fault that pipelines do not have."""
    for kind in (fault.kind, *fault.kinds):
        if kind not in KINDS:
            where = "a storm with " if kind != fault.kind else ""
            raise FaultPlanError(f"{place}: {where}{kind} is no fault of a pipeline; known: {', '.join(KINDS)}")
    for target in fault.targets:
        if fault.kind in OF_PEERS and not target.startswith("peer-"):
            raise FaultPlanError(f"{place}: {fault.kind} is of stage peers, and {target} computes nothing")


class PipelineSite:
    """See `orchestrator.injector.Site`. `brain` is asked for each time: after a rollback it is another one."""

    def __init__(self, brain: Callable[[], PipelineBrain], journal: FileJournal, seconds: Callable[[], float],
                 handle: Callable[[FaultInjected | FaultNoticed], None]) -> None:  # fmt: skip
        self._brain, self._journal = brain, journal
        self._seconds, self._handle = seconds, handle

    def check(self, fault: PlannedFault) -> None:
        """See `Site`."""
        check_pipeline_fault(fault, place=str(fault))

    def is_blocked(self) -> bool:
        """See `Site`: a journal that cannot be written ends the controller."""
        return False

    def records(self) -> Sequence[Record]:
        """See `Site`."""
        return [row.record for row in self._journal.rows]

    def members(self) -> set[str]:
        """See `Site`."""
        plan = self._brain().plan
        return {*plan.peers, *plan.trainers}

    def version(self) -> int | None:
        """See `Site`: steps that are committed, or counted where peers make steps of their own."""
        brain = self._brain()
        return brain.version if brain.begun else None

    def seconds(self) -> float:
        """See `Site`."""
        return self._seconds()

    def fit(self) -> Sequence[str]:
        """See `Site`: peers that serve, of stages with more than one of them."""
        brain = self._brain()
        stages = (brain.roster.serving(stage) for stage in range(brain.layout.num_stages))
        return [peer.process for serving in stages if len(serving) > 1 for peer in serving]

    def handle(self, event: FaultInjected | FaultNoticed) -> None:
        """See `Site`."""
        self._handle(event)


class PipelineInjector(Injector):
    """Also tells processes whose links are cut where the others are: islands hear it in their messages."""

    def __init__(self, *of_any_run: Any, addresses: Callable[[], Mapping[str, str]]) -> None:
        """`addresses`: transport address -> process, of all that are there."""
        super().__init__(*of_any_run)
        self._addresses = addresses

    def greet(self, name: str) -> None:
        """See `Injector.greet`; the others learn where the new process is."""
        super().greet(name)
        if self._links:
            for actor in self._actors().values():
                actor.meet.remote(dict(self._addresses()))

    def _afflict(self, name: str, fault: PlannedFault) -> None:
        if fault.kind == "cut" and (actor := self._actors().get(name)) is not None:
            actor.meet.remote(dict(self._addresses()))
        super()._afflict(name, fault)
