"""What people ask of a running controller, from any machine: behind `atoll pause`, `set`, `rollback` and so on.

Each call is journalled before it is answered. A mistake of the caller's is raised as `UserError`, and changes nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.events import (
    Event,
    PauseRequested,
    RollbackRequested,
    SaveRequested,
    SettingsRequested,
    UnbanRequested,
)
from orchestrator.live import check_changes
from orchestrator.rollback import find_target, pin, store_of
from orchestrator.status import read_status
from workers.live_settings import holds_at_once
from workers.records import dump_row

if TYPE_CHECKING:
    from orchestrator.host import Host

MAX_LOG_BYTES = 32 * 1024


class Controls:
    """Mixed into the controller's actor, which provides the host and guards what is done with it."""

    host: Host
    config: RunConfig
    run_dir: Path
    run_id: str
    lost_journal: bool

    async def begin(self) -> None:
        """See `ControllerActor.begin`."""
        raise NotImplementedError

    def _do(self, event: Event) -> None:
        """Hand an event to the host; whatever goes wrong with it ends this process."""
        raise NotImplementedError

    async def _ready(self) -> None:
        await self.begin()
        if self.lost_journal:
            raise UserError(
                f"the run {self.run_id} has lost its journal, and rests",
                remedy=f"atoll up --recover-from-members {self.run_id}",
            )
        if self.host.finished is not None or self.host.died is not None:
            raise UserError(f"the run {self.run_id} is over", remedy="atoll status shows how it ended")

    async def pause(self) -> dict[str, Any]:
        """No samples are trained on any more, until `resume`; the open exchange is finished."""
        await self._ready()
        self._do(PauseRequested(paused=True, why="asked to"))
        return self._said()

    async def resume(self) -> dict[str, Any]:
        """Training goes on after `pause`."""
        await self._ready()
        self._do(PauseRequested(paused=False, why="asked to"))
        return self._said()

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

    async def logs(self, member: str | None = None, max_bytes: int = MAX_LOG_BYTES) -> dict[str, Any]:
        """The end of a log: of the newest incarnation of `member` (or of `island-1.2`), None: of the controller."""
        await self.begin()
        return await asyncio.get_running_loop().run_in_executor(None, tail_of, self.run_dir, member, max_bytes)

    def _said(self) -> dict[str, Any]:
        return {
            "run": self.run_id,
            "paused": self.host.coordinator.state.paused,
            "journalled": not self.host.blocked,  # not while the journal's disk is full
        }


def log_files(run_dir: Path) -> dict[str, Path]:
    """Name to file of all logs: `controller`, `island-0.1`, `island-0.1.stack`, in their order."""
    out: dict[str, Path] = {}
    for path in sorted((run_dir / "logs").glob("*")):
        if path.is_file() and path.suffix in (".log", ".txt"):
            name, _, life = path.stem.rpartition("-")
            out[f"{name}.{life}" if life.partition(".")[0].isdigit() and name else path.stem] = path
    return out


def tail_of(run_dir: Path, member: str | None, max_bytes: int = MAX_LOG_BYTES) -> dict[str, Any]:
    """The end of a member's newest log, whole lines; None: the controller's.

    Raises:
        UserError: it has no log; names those that there are.
    """
    files = log_files(run_dir)
    wanted = member or "controller"
    fitting = [name for name in files if name == wanted or (name.rpartition(".")[0] == wanted and _life(name))]
    if not fitting:
        known = ", ".join(files) or "none yet"
        raise UserError(f"there is no log of {wanted!r}", place=str(run_dir / "logs"), remedy=f"one of these: {known}")
    name = max(fitting, key=_life)
    path = files[name]
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - max_bytes, 0))
        data = file.read(max_bytes)
    if size > max_bytes:
        data = data.partition(b"\n")[2]
    return {"name": name, "files": list(files), "size_bytes": size, "text": data.decode(errors="replace")}


def _life(name: str) -> int:
    life = name.rpartition(".")[2]
    return int(life) if life.isdigit() else 0


def write_cluster_file(path: Path, values: Mapping[str, object]) -> None:
    """Say where the run's Ray is; for this user alone."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as out:
        json.dump(values, out)
    temporary.replace(path)
