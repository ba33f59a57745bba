"""What people ask of a running controller, from any machine: behind `atoll pause`, `set`, `rollback` and so on.

Each call is journalled before it is answered. A mistake of the caller's is raised as `UserError`, and changes nothing.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from orchestrator.caretaker import Caretaker
from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.events import RollbackRequested, SaveRequested, SettingsRequested, UnbanRequested
from orchestrator.live import check_changes
from orchestrator.rollback import find_target, pin, store_of
from orchestrator.status import read_status
from workers.live_settings import holds_at_once
from workers.records import dump_row

if TYPE_CHECKING:
    from orchestrator.host import Host


class Controls(Caretaker):
    """Mixed into the controller's actor, which provides the host and guards what is done with it."""

    host: Host
    config: RunConfig
    lost_journal: bool

    async def _ready(self) -> None:
        await self.begin()
        if self.lost_journal:
            raise UserError(
                f"the run {self.run_id} has lost its journal, and rests",
                remedy=f"atoll up --recover-from-members {self.run_id}",
            )
        if self.host.finished is not None or self.host.died is not None:
            raise UserError(f"the run {self.run_id} is over", remedy="atoll status shows how it ended")

    async def save(self) -> dict[str, Any]:
        """Write a snapshot of the anchor now. Returns before it is on disk: a row of the journal says when it is."""
        await self._ready()
        if not self.host.coordinator.started:
            raise UserError("the run has not begun: there is nothing to save", remedy="wait for the first round")
        self._do(SaveRequested())
        asked = self.host.coordinator.save_asked
        return {**self._said(), "snapshot": asked[1] if asked is not None else None}

    async def set(self, values: dict[str, Any]) -> dict[str, Any]:
        """Change settings that can change while the run goes on, from the next version on for every member.

        Those of `[exchange]` hold at once.
        """
        await self._ready()
        state = self.host.coordinator.state
        changes = check_changes(self.config, state.settings.newest(), values)
        if not state.heads:
            raise UserError("the run has not begun: no setting can change yet", remedy="wait for the first round")
        self._do(SettingsRequested(values=changes))
        ahead = 0 if all(holds_at_once(key) for key, _ in changes) else 1
        return {**self._said(), "since": [head.version.n + ahead for head in state.heads], "set": dict(changes)}

    async def rollback(self, version: int) -> dict[str, Any]:
        """Go on from an older snapshot; what was committed since is trained on again."""
        await self._ready()
        state = self.host.coordinator.state
        snapshots = self.run_dir / "snapshots"
        # Read and hashed beside the loop: heartbeats go on meanwhile.
        in_thread = asyncio.get_running_loop().run_in_executor
        store = store_of(self.config.run.snapshots, self.run_id)
        target = await in_thread(None, find_target, snapshots, state, version, store)
        await in_thread(None, pin, snapshots, target, store)
        before = state.samples_committed()
        event = RollbackRequested(name=target.name, versions=target.versions, chains=target.chains, why="asked to")
        self._do(event)
        if not state.rollbacks or state.rollbacks[-1].chains != target.chains:
            raise UserError(f"the run does not go back to version {version}", remedy="its log says why")
        return {
            **self._said(),
            "versions": list(target.versions),
            "samples_taken_back": before - state.samples_committed(),
        }

    async def unban(self, member: str) -> dict[str, Any]:
        """A banned member's contributions count again, with a small weight for a while."""
        await self._ready()
        state = self.host.coordinator.state
        if member not in state.last_incarnation:
            raise UserError(f"the run has no member {member!r}", remedy=", ".join(sorted(state.last_incarnation)))
        standing = state.bans.standing(member)
        if standing != "banned":
            raise UserError(f"{member} is not banned", remedy="atoll status shows who is")
        self._do(UnbanRequested(member=member))
        return {**self._said(), "member": member, "standing": state.bans.standing(member)}

    async def rows(self, since: int, max_rows: int = 200) -> list[str]:
        """Durable rows of the journal from number `since` on, as their JSON lines: every event of the run, in order."""
        await self.begin()
        if self.lost_journal:
            return []
        coordinator = self.host.coordinator
        upto = min(coordinator.flushed + 1, since + max_rows)
        return [dump_row(row).decode() for row in coordinator.rows[since:upto]]

    async def full_status(self) -> dict[str, Any]:
        """`orchestrator.status.Status` of the run, as JSON values."""
        await self.begin()
        status = await asyncio.get_running_loop().run_in_executor(None, read_status, self.run_dir)
        values: dict[str, Any] = status.model_dump(mode="json")
        return values

    def _said(self) -> dict[str, Any]:
        return {
            "run": self.run_id,
            "paused": self.host.coordinator.state.paused,
            "journalled": not self.host.blocked,  # not while the journal's disk is full
        }
