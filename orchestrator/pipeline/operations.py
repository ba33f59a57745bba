"""What people ask of a pipeline while it goes on: a pause, a snapshot, other settings, the way back (pure).

Between validating and leading steps. Every request is a row of the journal, so that the next life of the controller
knows of it. The events are those of runs with islands (`orchestrator.events`).
"""

from __future__ import annotations

from orchestrator.events import (
    FaultInjected,
    FaultNoticed,
    Operated,
    PauseRequested,
    RollbackRequested,
    SaveRequested,
    SettingsRequested,
)
from orchestrator.pipeline.commands import Asked, GoBack, Sealed
from orchestrator.pipeline.plan import PipelinePlan, with_settings
from orchestrator.pipeline.validation import Validation
from workers.pipeline.messages import SaveStage
from workers.records import (
    FaultRecord,
    FenceRecord,
    OperatorRecord,
    PauseRecord,
    RollbackRecord,
    SettingRecord,
    SnapshotRecord,
)


class Operations(Validation):
    """See the module. `paused`: no step is opened; the one that is open, and a synchronisation, are finished."""

    def __init__(self, plan: PipelinePlan, *, first_incarnations: dict[str, int] | None = None) -> None:
        super().__init__(plan, first_incarnations=first_incarnations)
        self.paused = plan.paused
        self.went_back = False  # to a snapshot: another brain goes on from there
        self._saved_version = -1

    def _operate(self, event: Asked) -> None:
        match event:
            case PauseRequested(paused=paused, why=why):
                if paused != self.paused:
                    self.paused = paused
                    self._write(PauseRecord(paused=paused, why=why))
            case SaveRequested():
                if self.begun and self._saving is None and self._saved_version != self.held_version:
                    self._save()
            case SettingsRequested(values=values):
                since = (self.held_version,) * self.layout.num_stages
                self._write(*(SettingRecord(key=key, value=value, since=since) for key, value in values))
                self.plan = with_settings(self.plan, dict(values))
            case RollbackRequested():
                self._go_back(event)
            case FaultInjected(fault=fault, member=member, detail=detail):
                self._fault(fault, member, detail, injected=True)
            case FaultNoticed(fault=fault, member=member, detail=detail):
                self._fault(fault, member, detail, injected=False)
            case Operated(action=action, member=member, by=by, outcome=outcome):
                t_s = round(self._now_s, 6)
                self._write(OperatorRecord(action=action, member=member, by=by, outcome=outcome, t_s=t_s))

    def _fault(self, fault: str, member: str, detail: str, *, injected: bool) -> None:
        t_s = round(self._now_s, 6)
        self._write(FaultRecord(fault=fault, member=member, injected=injected, t_s=t_s, detail=detail))

    def _go_back(self, event: RollbackRequested) -> None:
        """Every process ends, for what it holds is of versions that are no more; the run begins anew at the snapshot.

        The rows are written first: who dies in between goes on from the snapshot as well.
        """
        why = f"the run goes back to {event.name}"
        names = (*sorted(self.roster.peers), *sorted(self.roster.trainers))
        fences = [
            FenceRecord(member=name, incarnation=self.roster.incarnations.get(name, 0), why=why) for name in names
        ]
        row = RollbackRecord(name=event.name, versions=event.versions, chains=event.chains, why=event.why)
        self._write(*fences, row)
        self.went_back = True
        self._out.append(GoBack(name=event.name, version=event.versions[0]))

    # ------------------------------------------------------------ snapshots

    @property
    def snapshot_name(self) -> str:
        """The folder in which the present version is, or would be, saved."""
        return self.plan.snapshot_folder(self.held_version).rpartition("/")[2]

    def _save(self) -> None:
        """Every stage into one folder, by one of its holders; the manifest when all are there."""
        version = self.held_version
        folder = self.plan.snapshot_folder(version)
        self._saving = (folder, version, set())
        self._saved_s = self._now_s
        for stage in range(self.layout.num_stages):
            holders = self.roster.holders(stage, version)
            if not holders:
                self._saving = None
                return
            order = SaveStage(stage=stage, version=version, folder=folder)
            self._order((holders[0].process, order, ("saved", stage, folder)))

    def _saved(self, stage: int, folder: str) -> None:
        if self._saving is None or self._saving[0] != folder:
            return
        _, version, done = self._saving
        done.add(stage)
        if len(done) < self.layout.num_stages:
            return
        self._saving, self._saved_version = None, version
        digests = self.digests if version == self.held_version else ()
        self._out.append(Sealed(folder=folder, version=version, digests=digests))
        name = folder.rstrip("/").rpartition("/")[2]
        self._write(SnapshotRecord(name=name, versions=(version,) * self.layout.num_stages))
