"""Injects the faults of a run's plan, and those that are asked for while it runs: the controller's side.

Each fault is journalled before it happens. What concerns a member is handed to its actor (`faults.chaos`), what
concerns the controller or the head is done here. A cut link outlives the processes at its ends: new ones are told.
Links of a lab are the network's, below all members: the controller changes them from where it runs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from faults.lab.errors import LabError
from faults.lab.schedule import LinkChange, LinkSchedule
from faults.plan import CONTROLLER, PlannedFault, parse_fault
from faults.process import FullDisk, JumpClock, die
from faults.schedule import Past, Schedule
from orchestrator.cluster.state import ClusterState, known_clusters
from orchestrator.errors import UserError
from orchestrator.events import FaultInjected, FaultNoticed
from orchestrator.fault_plan import check_island_fault
from workers.records import FaultRecord, Record

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from orchestrator.host import Host

HEAD_BACK = "head_restarted"
LINK_FAILED = "link_change_failed"
LOOK_S = 0.5
PAUSE_S = 2.0  # between two faults of a storm at the same member

log = logging.getLogger("atoll.controller")


class Site(Protocol):
    """What an injector has to know of a run."""

    def check(self, fault: PlannedFault) -> None:
        """Raise FaultPlanError or UserError for a fault that this run does not have."""

    def is_blocked(self) -> bool:
        """Whether the journal can take no row now."""

    def records(self) -> Sequence[Record]:
        """The journal so far."""

    def members(self) -> set[str]:
        """Names that the run has, or had."""

    def version(self) -> int | None:
        """What a fault's `round` is compared with; None: the run has not begun."""

    def seconds(self) -> float:
        """Since the start of the run."""

    def fit(self) -> Sequence[str]:
        """Whom a storm may hit."""

    def handle(self, event: FaultInjected | FaultNoticed) -> None:
        """Put it on the record."""


class IslandSite:
    """A run of islands."""

    def __init__(self, host: Host, own_code: str = "") -> None:
        """`own_code`: the setting that names what islands train with, if that is not ours."""
        self._host, self._own_code = host, own_code

    def check(self, fault: PlannedFault) -> None:
        """See `Site`: islands have all but what needs to know what they train with."""
        check_island_fault(fault, self._own_code)

    def is_blocked(self) -> bool:
        """See `Site`."""
        return bool(self._host.blocked)

    def records(self) -> Sequence[Record]:
        """See `Site`."""
        return [row.record for row in self._host.journal.rows]

    def members(self) -> set[str]:
        """See `Site`."""
        return {*self._host.plan.islands, *self._host.coordinator.state.last_incarnation}

    def version(self) -> int | None:
        """See `Site`: of the first fragment."""
        heads = self._host.coordinator.state.heads
        return heads[0].version.n if heads else None

    def seconds(self) -> float:
        """See `Site`."""
        return self._host.coordinator.seconds()

    def fit(self) -> Sequence[str]:
        """See `Site`: those that train and are well.

        Not in their first steps, which may take long (a compiler): nobody could tell that they hang.
        """
        processes = self._host.coordinator.roll.processes
        return [m.name for m, p in processes.items() if p.status == "healthy" and p.is_steady]

    def handle(self, event: FaultInjected | FaultNoticed) -> None:
        """See `Site`."""
        self._host.handle(event)


class Injector:
    """The faults of one controller's life.

    Args:
        plan: faults, and changes of links of the lab that this process runs in.
        clock: that of the controller, which can be made to jump. actors: by member, those that have begun.
        gcs_address: of the Ray cluster, to find its head.
    """

    def __init__(
        self,
        plan: Sequence[PlannedFault | LinkChange],
        site: Site,
        clock: JumpClock,
        actors: Callable[[], Mapping[str, ActorHandle[Any]]],
        gcs_address: Callable[[], str],
    ) -> None:
        self._plan = [fault for fault in plan if isinstance(fault, PlannedFault)]
        self._site, self._clock = site, clock
        self._actors, self._gcs_address = actors, gcs_address
        self._disk = FullDisk()
        self._links: list[tuple[PlannedFault, float]] = []  # cut, and until when on this process's clock
        self._dead_head: tuple[str, float] | None = None  # its node, and when it was killed
        self._looked_s = float("-inf")
        self._struck: dict[str, float] = {}  # until when a member has a fault that lasts
        self.schedule = Schedule(self._plan)
        self.wires = LinkSchedule([change for change in plan if isinstance(change, LinkChange)])

    def resume(self) -> None:
        """What earlier controllers have injected is not injected again."""
        records = self._site.records()
        injected = [record for record in records if isinstance(record, FaultRecord) and record.injected]
        past = [Past(text=record.detail, t_s=record.t_s) for record in injected]
        # A storm that was asked for while the run went on is in no plan.
        members, planned = self._site.members(), set(map(str, self._plan))
        storms = [r.detail for r in injected if r.fault == "storm" and r.detail not in planned]
        heads = [r.fault for r in records if isinstance(r, FaultRecord) and r.fault in ("head_kill", HEAD_BACK)]
        if heads[-1:] == ["head_kill"]:  # it died with its head, which has started it again
            self._say_head_is_back("it has started this controller again")
        plan = [*self._plan, *(parse_fault(text, members, place=repr(text)) for text in storms)]
        self.schedule = Schedule(plan, past)
        self.wires.forget([one.text for one in past])

    def unfired(self) -> list[str]:
        """What has not happened, as it was written."""
        return [*self.schedule.unfired(), *map(str, self.wires.waiting)]

    def tick(self) -> None:
        """Inject what is due."""
        if self._site.is_blocked():
            return  # with a full journal nothing can be written down before it happens
        for change in self.wires.due(self._site.seconds()):
            self._rewire(change)
        version = self._site.version()
        if version is None:
            return
        if self._dead_head is not None and time.monotonic() - self._looked_s >= LOOK_S:
            self._look_for_head(*self._dead_head)
        here = {*self._actors(), CONTROLLER}
        for fault, text in self.schedule.due(version, self._site.seconds(), here, self._fit()):
            self._inject(fault, text)

    def now(self, texts: Sequence[str]) -> list[str]:
        """Inject these at once; returns them as they are journalled.

        Raises:
            FaultPlanError: one that cannot be understood or names nobody. UserError: its member has no process now.
        """
        if self._site.is_blocked():
            raise UserError("the journal's disk is full", remedy="again once there is space")
        members = self._site.members()
        faults = [parse_fault(text, members, place=repr(text)) for text in texts]
        for fault in faults:
            self._site.check(fault)
            if fault.round is not None or fault.at_s is not None:
                raise UserError(f"{fault} has a time", remedy=f"atoll chaos {fault.what}, which means at once")
            gone = [name for name in fault.targets if name not in {*self._actors(), CONTROLLER}]
            if gone:
                raise UserError(f"{fault}: {gone[0]} has no process now", remedy="again once it is back")
            if fault.kind == "head_kill":
                self._head()
        for fault in faults:
            if fault.kind == "storm":
                began = replace(fault, at_s=round(self._site.seconds(), 3))
                self.schedule.waiting.append(began)
            else:
                self._inject(fault, str(fault))
        return [str(fault) for fault in faults]

    def greet(self, name: str) -> None:
        """A process has begun: it is told of the links that are cut."""
        now = time.monotonic()
        self._links = [(fault, until_s) for fault, until_s in self._links if until_s > now]
        for fault, until_s in self._links:
            left_s = None if fault.for_s is None else until_s - now
            self._afflict(name, replace(fault, for_s=left_s))

    def _fit(self) -> list[str]:
        """Whom a storm may hit: one fault at a time."""
        now = time.monotonic()
        here = {name for name in self._actors() if self._struck.get(name, now) <= now}
        return [name for name in self._site.fit() if name in here]

    def _inject(self, fault: PlannedFault, text: str) -> None:
        log.warning("injecting %s", text)
        self._site.handle(FaultInjected(fault=fault.kind, member=fault.target, detail=text))
        self._struck |= dict.fromkeys(fault.targets, time.monotonic() + (fault.for_s or 0.0) + PAUSE_S)
        match fault.kind:
            case "storm":
                pass
            case "controller_kill":
                logging.shutdown()
                die()
            case "head_kill":
                self._kill_head()
            case _ if fault.targets == (CONTROLLER,):
                self._afflict_controller(fault)
            case "cut" | "heal":
                self._cut(fault)
            case _:
                self._afflict(fault.targets[0], fault)

    def _rewire(self, change: LinkChange) -> None:
        """Change a link of the lab around this process."""
        from faults.lab.lab import Lab

        log.warning("link change: %s", change)
        self._site.handle(FaultInjected(fault=change.fault, member=change.target, detail=str(change)))
        try:
            Lab.around().apply(change)
        except LabError as error:
            log.error("%s: %s", change, error)
            self._site.handle(FaultNoticed(fault=LINK_FAILED, member=change.target, detail=f"{change}: {error}"))

    def _cut(self, fault: PlannedFault) -> None:
        """A link has two ends: of one member, all others are the other end."""
        if fault.kind == "cut":
            until_s = time.monotonic() + (float("inf") if fault.for_s is None else fault.for_s)
            self._links.append((fault, until_s))
        else:
            healed = set(fault.targets)
            self._links = [(cut, until_s) for cut, until_s in self._links if not healed <= set(cut.targets)]
        for name in self._actors() if len(fault.targets) == 1 else fault.targets:
            self._afflict(name, fault)

    def _afflict(self, name: str, fault: PlannedFault) -> None:
        actor = self._actors().get(name)
        if actor is not None:
            actor.afflict.remote(fault)

    def _afflict_controller(self, fault: PlannedFault) -> None:
        if fault.kind == "clock_jump":
            assert fault.by_s is not None
            self._clock.jump(fault.by_s)
        else:
            assert fault.kind == "disk_full" and fault.for_s is not None
            self._disk.fill()
            asyncio.get_running_loop().call_later(fault.for_s, self._disk.free)

    # ------------------------------------------------------------ the head

    def _head(self) -> ClusterState:
        """What this machine knows of the head, whose Ray runs. Raises UserError where it does not run here."""
        address = self._gcs_address()
        for state in known_clusters():
            if state.role == "head" and state.gcs_address == address and state.ray is not None and state.node_id:
                return state
        raise UserError(
            f"head_kill: the controller's machine does not run the head of {address}",
            remedy="a cluster that was started with atoll up, with the controller on its first machine",
        )

    def _kill_head(self) -> None:
        """All of its processes at once; its supervisor starts it again."""
        try:
            head = self._head()
            assert head.ray is not None
            self._dead_head = (head.node_id, time.monotonic())
            os.killpg(head.ray.pid, signal.SIGKILL)
        except (UserError, ProcessLookupError) as error:
            self._dead_head = None
            log.error("%s", error)

    def _look_for_head(self, node: str, killed_s: float) -> None:
        self._looked_s = time.monotonic()
        with suppress(UserError):
            now = self._head().node_id
            if now != node:
                self._dead_head = None
                self._say_head_is_back(f"it runs again as node {now[:8]} after {self._looked_s - killed_s:.1f} s")

    def _say_head_is_back(self, detail: str) -> None:
        self._site.handle(FaultNoticed(fault=HEAD_BACK, member="head", detail=detail))
