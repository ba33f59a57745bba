"""What people ask of a pipeline's controller, from any machine: what `orchestrator.controls` is for islands.

Each call is journalled before it is answered. A mistake of the caller's is raised as `UserError`, and changes nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.actor import ActorHandle

from faults.plan import FaultPlanError
from orchestrator.caretaker import Caretaker, Running
from orchestrator.config import RunConfig
from orchestrator.dashboard.controls import carry_out, pipeline_part
from orchestrator.dashboard.feed import FeedPart
from orchestrator.errors import UserError
from orchestrator.events import Operated, RollbackRequested, SaveRequested, SettingsRequested
from orchestrator.injector import Injector
from orchestrator.journal import FileJournal
from orchestrator.names import nearest
from orchestrator.pipeline.brain import PipelineBrain
from orchestrator.pipeline.commands import Finish
from orchestrator.pipeline.plan import LIVE
from orchestrator.pipeline.replay import MANIFEST, PipelineHistory, Saved, replay, saved_snapshots
from orchestrator.pipeline.views import read_pipeline_status
from workers.records import Scalar, dump_row


class PipelineControls(Caretaker):
    """Mixed into the pipeline's controller, which provides the brain and guards what is done with it."""

    config: RunConfig
    brain: PipelineBrain
    journal: FileJournal
    injector: Injector
    handles: dict[str, tuple[str, ActorHandle[Any]]]
    labels: dict[str, str]  # process -> name and number of its log
    pids: dict[str, int]
    nodes: dict[str, str]
    failure: str
    finished: Finish | None

    # ------------------------------------------------------------ hooks of Caretaker

    async def _ready(self) -> None:
        await self.begin()
        if self.failure:
            raise UserError(
                f"the run {self.run_id} has failed: {self.failure}", remedy="its log is logs/controller.log"
            )
        if self.is_over():
            raise UserError(f"the run {self.run_id} is over", remedy="atoll status shows how it ended")

    def _said(self) -> dict[str, Any]:
        return {"run": self.run_id, "paused": self.brain.paused, "journalled": True}

    def _running(self, member: str) -> Running | None:
        process = member.partition(".")[0]
        if process not in self.handles or process not in self.pids:
            return None
        label = self.labels.get(process, process)
        return Running(label=label, pid=self.pids[process], node=self.nodes[process])

    def _names(self) -> Sequence[str]:
        return tuple(self.handles)

    def _is_there(self, nonce: str) -> bool:
        return any(nonce == known for known, _ in self.handles.values())

    # ------------------------------------------------------------ hooks of the dashboard

    def is_over(self) -> bool:
        """See `orchestrator.dashboard.controls.carry_out`."""
        return self.finished is not None

    def names_here(self) -> Sequence[str]:
        """See `orchestrator.dashboard.controls.carry_out`."""
        return self._names()

    def put_on_record(self, event: Operated) -> None:
        """See `orchestrator.dashboard.controls.carry_out`."""
        self._do(event)

    async def feed(self, metrics_at: int, journal_at: int) -> FeedPart:
        """See `orchestrator.dashboard.controls.pipeline_part`."""
        await self.begin()
        return await pipeline_part(self, metrics_at, journal_at)

    async def act(self, action: str, member: str, by: str) -> str:
        """See `orchestrator.dashboard.controls.carry_out`."""
        await self.begin()
        return await carry_out(self, action, member, by)

    # ------------------------------------------------------------ requests

    async def save(self) -> dict[str, Any]:
        """Write a snapshot of what is committed now. Returns before it is on disk: a row of the journal says when."""
        await self._ready()
        if not self.brain.begun:
            raise UserError("the run has not begun: there is nothing to save", remedy="wait for the first step")
        name = self.brain.snapshot_name
        self._do(SaveRequested())
        return {**self._said(), "snapshot": name}

    async def set(self, values: dict[str, Any]) -> dict[str, Any]:
        """Change settings by which nobody but the controller decides; they hold at once."""
        await self._ready()
        already = replay(row.record for row in self.journal.rows).settings
        changes = check_pipeline_changes(self.config, already, values)
        if not self.brain.begun:
            raise UserError("the run has not begun: no setting can change yet", remedy="wait for the first step")
        self._do(SettingsRequested(values=changes))
        since = [self.brain.held_version] * self.brain.layout.num_stages
        return {**self._said(), "since": since, "set": dict(changes)}

    async def rollback(self, version: int) -> dict[str, Any]:
        """Go on from an older snapshot, with new processes; what was committed since is trained on again."""
        await self._ready()
        if self.brain.stopping is not None:
            raise UserError("the run is stopping", remedy="atoll train --resume, and then the rollback")
        history = replay(row.record for row in self.journal.rows)
        target = find_snapshot(self.run_dir / "snapshots", history, version)
        stages = self.brain.layout.num_stages
        before = history.num_samples
        digests = tuple(json.loads((target.folder / MANIFEST).read_text())["digests"])
        event = RollbackRequested(
            name=target.folder.name, versions=(version,) * stages, chains=digests or ("",) * stages, why="asked to"
        )
        self._do(event)
        again = before - replay(row.record for row in self.journal.rows).num_samples
        return {**self._said(), "versions": [version] * stages, "samples_taken_back": again}

    async def chaos(self, faults: list[str]) -> dict[str, Any]:
        """Cause faults now; returns `done`, as they were journalled, or `error` and nothing was caused."""
        await self.begin()
        if self.is_over():
            return {"done": [], "error": "the run is over"}
        try:
            return {"done": self.injector.now(faults), "error": None}
        except (FaultPlanError, UserError) as error:
            return {"done": [], "error": str(error)}

    async def rows(self, since: int, max_rows: int = 200) -> list[str]:
        """Rows of the journal from number `since` on, as their JSON lines: every event of the run, in order."""
        await self.begin()
        return [dump_row(row).decode() for row in self.journal.rows[since : since + max_rows]]

    async def full_status(self) -> dict[str, Any]:
        """`orchestrator.pipeline.views.PipelineStatus` of the run, as JSON values."""
        await self.begin()
        status = await asyncio.get_running_loop().run_in_executor(None, read_pipeline_status, self.run_dir)
        values: dict[str, Any] = status.model_dump(mode="json")
        return values


def check_pipeline_changes(
    config: RunConfig, already: Mapping[str, Scalar], wanted: Mapping[str, Any]
) -> tuple[tuple[str, Scalar], ...]:
    """`(key, value)` of what `atoll set` is to change in a pipeline.

    Raises:
        UserError: a key cannot change, has no effect in this run, or a value does not fit.
    """
    if not wanted:
        raise UserError("no setting was given", remedy=f"KEY=VALUE with one of {', '.join(LIVE)}")
    for key in wanted:
        if key not in LIVE:
            near = nearest(key, LIVE)
            raise UserError(
                f"{key} cannot change while a pipeline goes on: its peers and trainers compute with it",
                place=key,
                remedy=f"{near}? " if near else f"these can: {', '.join(LIVE)}",
            )
    if "strategy.inner_steps" in wanted and config.strategy.name == "ddp":
        place = f"strategy.name = {config.strategy.name!r}"
        raise UserError("strategy.inner_steps has no effect in this run", place=place, remedy="leave it out")
    changed = config.with_values({**already, **wanted})
    return tuple((key, _value(changed, key)) for key in wanted)


def _value(config: RunConfig, key: str) -> Scalar:
    section, _, name = key.partition(".")
    value = getattr(getattr(config, section), name)
    assert isinstance(value, int | float), f"{key} is no number"
    return value


def find_snapshot(snapshots: Path, history: PipelineHistory, version: int) -> Saved:
    """The snapshot of a version that the run can go back to. Raises UserError; names those that there are."""
    known = sorted(
        (one for one in saved_snapshots(snapshots) if one.version < history.version), key=lambda s: s.version
    )
    for saved in known:
        if saved.version == version:
            return saved
    if version == history.version:
        raise UserError(f"the run is at version {version}", place="--to", remedy="an older one, or nothing")
    numbers = ", ".join(str(one.version) for one in known) or "none yet"
    raise UserError(
        f"there is no snapshot of version {version} to go back to",
        place=str(snapshots),
        remedy=f"one of these: {numbers} (run.keep_anchors of them are kept, one every run.snapshot_every_s)",
    )
