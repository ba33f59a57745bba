"""What the controller's actor keeps for people: the run's directory, its islands' logs and stacks, notifications."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from ray.actor import ActorHandle

from orchestrator.actor_tools import must_not_fail, through_cuts
from orchestrator.caretaker import Running
from orchestrator.controls import Controls
from orchestrator.dashboard.controls import carry_out, feed_part
from orchestrator.dashboard.feed import FeedPart
from orchestrator.events import Operated
from orchestrator.notify import notifying
from orchestrator.rollback import set_aside_later, store_of
from orchestrator.rundir import RunDirInUse
from workers.saved import SnapshotError

log = logging.getLogger("atoll.controller")


class Keeper(Controls):
    """Mixed into the controller's actor, whose processes it looks after."""

    handles: dict[str, ActorHandle[Any]]
    nonce_of: dict[str, str]
    place_of: dict[str, str]
    pids: dict[str, tuple[int, str]]  # nonce -> process id and node

    async def _look_after(self, name: str, nonce: str, handle: ActorHandle[Any], node: str) -> None:
        """A process has begun: its id is kept, for when it hangs, and its log is copied where that is needed."""
        self.pids[nonce] = await through_cuts(handle.pid.remote, node, name), node
        if nonce in self.log_of:
            self._task(self._collect_log(nonce, handle))

    def _own_directory(self) -> None:
        """From now on the directory says that the run goes on, whatever becomes of who started it."""
        try:
            self.own.enter_context(self.host.run_dir.lock(self.host.run_dir.controller_lock))
        except RunDirInUse as error:  # the life before is not quite gone; the journal's segments decide who writes
            log.warning("%s", error)
        if self.config.run.snapshots is not None:
            self.host.rolled_back = self._clear_store
        num_islands = len(self.host.plan.islands) if not self.config.run.elastic else 0
        self.own.enter_context(notifying(self.host, self.config.notify, run_id=self.run_id, num_islands=num_islands))

    def _clear_store(self, versions: Sequence[int]) -> None:
        self._task(self._set_aside(versions))

    async def _set_aside(self, versions: Sequence[int]) -> None:
        """Snapshots away from here that a rollback has overtaken: beside the loop, which members wait for."""
        store = store_of(self.config.run.snapshots, self.host.plan.run_id)
        in_thread = asyncio.get_running_loop().run_in_executor
        try:
            await in_thread(None, set_aside_later, self.host.run_dir.snapshots, versions, store)
        except SnapshotError as error:
            log.warning("newer snapshots stay beside those of the run as it is now: %s", error)

    def _running(self, member: str) -> Running | None:
        name = member.partition(".")[0]
        nonce = self.nonce_of.get(name)
        if nonce is None or nonce not in self.pids:
            return None
        pid, node = self.pids[nonce]
        current = self.host.coordinator.state.current.get(name)
        return Running(label=str(current or name), pid=pid, node=node)

    def _names(self) -> Sequence[str]:
        return tuple(self.nonce_of)

    def _is_there(self, nonce: str) -> bool:
        return nonce in self.handles

    # ------------------------------------------------------------ dashboards

    async def feed(self, metrics_at: int, journal_at: int) -> FeedPart:
        """See `orchestrator.dashboard.controls.feed_part`."""
        await self.begin()
        return await feed_part(self, metrics_at, journal_at, must_not_fail)

    async def act(self, action: str, member: str, by: str) -> str:
        """See `orchestrator.dashboard.controls.carry_out`."""
        await self.begin()
        return await carry_out(self, action, member, by)

    def is_over(self) -> bool:
        """See `orchestrator.dashboard.controls.carry_out`."""
        return self.host.finished is not None or self.host.died is not None

    def names_here(self) -> tuple[str, ...]:
        """See `orchestrator.dashboard.controls.carry_out`."""
        return tuple(self.nonce_of)

    def put_on_record(self, event: Operated) -> None:
        """See `orchestrator.dashboard.controls.carry_out`."""
        self._do(event)
