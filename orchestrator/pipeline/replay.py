"""What a journal says about a pipeline: where it is, and that every microbatch counted once in every stage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.pipeline.commands import Sealed
from orchestrator.pipeline.work import Work
from orchestrator.rundir import write_atomically
from workers.pipeline.records import (
    LeftRecord,
    PipelineGenesisRecord,
    ServeRecord,
    StageCommitRecord,
    StageCountRecord,
    StageSyncRecord,
    StepFenceRecord,
    StepRecord,
    WorkLostRecord,
)
from workers.records import (
    EvaluationRecord,
    FenceRecord,
    JoinRecord,
    PauseRecord,
    Record,
    RollbackRecord,
    Scalar,
    SettingRecord,
    StopRecord,
)

MANIFEST = "pipeline.json"
TAKEN_BACK = "pipeline.taken-back.json"
"""Manifest of a snapshot that a rollback has overtaken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Accounts:
    """How things stood at a synchronisation."""

    committed: dict[int, int]
    partial: dict[int, int]
    lost: dict[int, int]
    own: dict[str, Work]
    next_fragment: int
    outer_rounds: tuple[int, ...]


def turn_after(fragments: Sequence[int], num_fragments: int) -> int:
    """Whose turn it is after these were synchronised: the next one's; the first one's after all at once."""
    return 0 if len(fragments) == num_fragments else (fragments[-1] + 1) % num_fragments


@dataclass(kw_only=True)
class PipelineHistory:
    """The journal's replay; `findings` are violations of "once per step, microbatch and stage".

    Where peers make steps of their own: `own` is what each has made in its stage and not every fragment has committed.
    By stage, in microbatches: `committed`, by all fragments; `lost`, went with its peer, and no fragment has it;
    `partial`, the same of what some fragments have.
    """

    num_stages: int = 0
    num_microbatches: int = 0
    samples_per_step: int = 0
    num_params: int = 0
    commits: dict[int, dict[int, StageCommitRecord]] = field(default_factory=dict)  # step -> stage -> its commit
    opened: dict[int, StepRecord] = field(default_factory=dict)
    incarnations: dict[str, int] = field(default_factory=dict)
    serving: dict[str, tuple[str, int]] = field(default_factory=dict)  # process -> peer, stage
    moves: list[str] = field(default_factory=list)
    fenced: set[tuple[int, int, str]] = field(default_factory=set)
    num_begun_again: int = 0
    num_taken_back: int = 0
    max_round: dict[int, int] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    stopped: StopRecord | None = None
    members: set[str] = field(default_factory=set)
    left: set[str] = field(default_factory=set)
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    sync_steps: int = 0
    num_lives: int = 0
    counts: dict[int, dict[int, StageCountRecord]] = field(default_factory=dict)  # step -> stage -> who counted it
    synced: int = 0
    syncs: dict[int, StageSyncRecord] = field(default_factory=dict)  # stage -> its newest
    own: dict[str, Work] = field(default_factory=dict)
    committed: dict[int, int] = field(default_factory=dict)
    partial: dict[int, int] = field(default_factory=dict)
    lost: dict[int, int] = field(default_factory=dict)
    num_syncs: int = 0
    num_fragments: int = 1
    next_fragment: int = 0
    outer_rounds: tuple[int, ...] = ()
    delayed: bool = False
    paused: bool = False
    settings: dict[str, Scalar] = field(default_factory=dict)
    goes_back_to: str | None = None
    rollbacks: list[RollbackRecord] = field(default_factory=list)
    _accounts: dict[int, _Accounts] = field(default_factory=dict)  # version -> how things stood there

    @property
    def version(self) -> int:
        """Steps that are committed in every stage."""
        if self.sync_steps:
            return self.synced
        step = 0
        while step in self.commits and len(self.commits[step]) == self.num_stages > 0:
            step += 1
        return step

    @property
    def digests(self) -> tuple[str, ...]:
        """Of each stage's newest version; empty before the first commit."""
        if self.sync_steps:
            whole = len(self.syncs) == self.num_stages
            return tuple(self.syncs[stage].digest for stage in sorted(self.syncs)) if whole else ()
        last = self.commits.get(self.version - 1, {})
        return tuple(last[stage].digest for stage in sorted(last))

    @property
    def num_commits(self) -> int:
        """Commits of stages that stand."""
        return self.num_syncs if self.sync_steps else self.version * self.num_stages

    @property
    def evaluated(self) -> int | None:
        """The version that was evaluated last."""
        return self.evaluations[-1].versions[0] if self.evaluations else None

    @property
    def next_step(self) -> int:
        """The step that is to be opened: after those that are counted, committed or not."""
        step = self.version
        while self.sync_steps and len(self.counts.get(step, {})) == self.num_stages:
            step += 1
        return step

    @property
    def next_round(self) -> int:
        """The round in which a new life of the controller goes on; no step had it before."""
        if self.sync_steps or self.delayed:
            return max(self.max_round.values(), default=-1) + 1
        return self.max_round.get(self.version, -1) + 1

    @property
    def num_samples(self) -> int:
        """Samples that are committed in every stage."""
        return self.version * self.samples_per_step

    def apply(self, record: Record) -> None:
        """One row."""
        match record:
            case PipelineGenesisRecord():
                self._begin(record)
            case JoinRecord(member=member, incarnation=incarnation):
                self.incarnations[member] = max(self.incarnations.get(member, 0), incarnation)
                self.members.add(member)
                self.left.discard(member)
            case ServeRecord(process=process, peer=peer, stage=stage, why=why):
                self.incarnations[process] = max(self.incarnations.get(process, 0), int(peer.rpartition(".")[2]))
                self.serving[process] = (peer, stage)
                if why.startswith("moved"):
                    self.moves.append(f"{peer} to stage {stage}, {why.removeprefix('moved ')}")
            case FenceRecord(member=member):
                self.serving.pop(member, None)
                self.members.discard(member)
            case LeftRecord(process=process):
                self.left.add(process)
            case StepRecord():
                self._open(record)
            case StepFenceRecord(step=step, round=round_, peer=peer):
                self.fenced.add((step, round_, peer))
            case StageCommitRecord():
                self._commit(record)
            case StageCountRecord():
                self._count(record)
            case StageSyncRecord():
                self._sync(record)
            case WorkLostRecord(peer=peer):
                self._lose(peer)
            case EvaluationRecord():
                self.evaluations.append(record)
            case StopRecord():
                self.stopped = record
            case PauseRecord(paused=paused):
                self.paused = paused
            case SettingRecord(key=key, value=value):
                self.settings[key] = value
            case RollbackRecord(name=name, versions=versions):
                self._go_back(versions[0])
                self.goes_back_to = name
                self.rollbacks.append(record)
            case _:
                pass

    def _begin(self, record: PipelineGenesisRecord) -> None:
        self.num_stages, self.num_params = len(record.digests), record.num_params
        self.num_microbatches, self.samples_per_step = record.num_microbatches, record.samples_per_step
        if record.version > self.version:
            self.findings.append(f"version {record.version} is gone on from, and {self.version} is the last committed")
        self.stopped = self.goes_back_to = None
        self.sync_steps, self.num_lives = record.sync_steps, self.num_lives + 1
        self.delayed, self.num_fragments = record.delayed, record.num_fragments
        self._go_back(record.version)

    def _go_back(self, version: int) -> None:
        """What was committed since a version is free again."""
        self.evaluations = [one for one in self.evaluations if one.versions[0] <= version]
        if self.sync_steps:
            self._take_back(version)
        for step in [step for step in self.commits if step >= version]:
            del self.commits[step]
            self.opened.pop(step, None)
            self.num_taken_back += 1

    def _open(self, record: StepRecord) -> None:
        self.max_round[record.step] = max(self.max_round.get(record.step, 0), record.round)
        self.num_begun_again += record.step in self.opened
        # With delayed updates the step before may be on its way to its commit; one that is opened anew voids it.
        ahead = self.delayed and record.step == self.next_step + 1 and self.next_step in self.opened
        for later in [step for step in self.opened if step > record.step]:
            del self.opened[later]
        if record.step != self.next_step and not ahead:
            self.findings.append(f"step {record.step} was opened at version {self.next_step}")
        first = record.step * self.samples_per_step
        if record.ranges != ((first, first + self.samples_per_step),):
            self.findings.append(f"step {record.step} was given samples {record.ranges}, its own are from {first} on")
        # Rows of a commit that a crash cut short: nobody was told of them.
        self.commits.pop(record.step, None)
        self.counts.pop(record.step, None)
        self.opened[record.step] = record

    def _commit(self, record: StageCommitRecord) -> None:
        where = f"step {record.step}, stage {record.stage}"
        opened = self.opened.get(record.step)
        if opened is None or opened.round != record.round:
            self.findings.append(f"{where}: committed in round {record.round}, which was not open")
        stages = self.commits.setdefault(record.step, {})
        if record.stage in stages:
            self.findings.append(f"{where}: committed twice")
        stages[record.stage] = record
        self._cover(record, where)

    def _cover(self, record: StageCommitRecord | StageCountRecord, where: str) -> dict[str, int]:
        """How many microbatches each peer counted; together they must be those of a step, each once."""
        counted: list[int] = []
        numbers: dict[str, int] = {}
        for entry in record.counted:
            peer, _, ids = entry.partition(":")
            counted += [int(number) for number in ids.split(",")]
            numbers[peer] = len(ids.split(","))
            if (record.step, record.round, peer) in self.fenced:
                self.findings.append(f"{where}: {peer} is in the commit, and was fenced for the step")
        if sorted(counted) != list(range(self.num_microbatches)):
            self.findings.append(
                f"{where}: microbatches {sorted(counted)} were counted, {self.num_microbatches} are in a step"
            )
        return numbers

    # ------------------------------------------------------------ peers that step on their own

    def turn_at(self, version: int) -> tuple[int, tuple[int, ...]]:
        """Whose turn it was at a version, and how many outer steps each fragment had made."""
        if (known := self._accounts.get(version)) is None:
            return 0, (0,) * self.num_fragments
        return known.next_fragment, known.outer_rounds

    def _take_back(self, version: int) -> None:
        for step in [step for step in self.counts if step >= version]:
            del self.counts[step]
            self.opened.pop(step, None)
            self.num_taken_back += 1
        # The accounts of then; what somebody carried along at that time is nobody's now.
        nothing = _Accounts(committed={}, partial={}, lost={}, own={}, next_fragment=0, outer_rounds=())
        then = self._accounts.get(version, nothing)
        self.committed, self.partial, self.lost = dict(then.committed), dict(then.partial), dict(then.lost)
        self.own = {}
        for work in then.own.values():
            self._add_lost(work.without(version))
        self.next_fragment, self.outer_rounds = self.turn_at(version)
        self.num_taken_back += max(self.synced - version, 0)
        self.synced, self.syncs = version, {}

    def _add_lost(self, work: Work) -> None:
        lost, partial = work.lose()
        if lost:
            self.lost[work.stage] = self.lost.get(work.stage, 0) + lost
        if partial:
            self.partial[work.stage] = self.partial.get(work.stage, 0) + partial

    def _count(self, record: StageCountRecord) -> None:
        where = f"step {record.step}, stage {record.stage}"
        opened = self.opened.get(record.step)
        if opened is None or opened.round != record.round:
            self.findings.append(f"{where}: counted in round {record.round}, which was not open")
        stages = self.counts.setdefault(record.step, {})
        if record.stage in stages:
            self.findings.append(f"{where}: counted twice")
        stages[record.stage] = record
        for peer, number in self._cover(record, where).items():
            own = self.own.setdefault(peer, Work.begin(record.stage, record.step, self.num_fragments))
            if own.stage != record.stage:
                self.findings.append(f"{where}: {peer} serves stage {own.stage}")
            own.count(record.step, number)

    def _sync(self, record: StageSyncRecord) -> None:
        where = f"version {record.version}, stage {record.stage}"
        known = self.syncs.get(record.stage)
        if record.stage == 0 and not (record.base == self.version < record.version <= self.next_step):
            self.findings.append(f"{where}: from {record.base}, at {self.version} with {self.next_step} steps counted")
        if known is not None and known.version == record.version and known.base == record.base:
            self.findings.append(f"{where}: committed twice")
        for peer in record.contributors:
            own = self.own.get(peer)
            if own is None or own.stage != record.stage:
                self.findings.append(f"{where}: {peer} is in the commit, and has counted nothing there")
                continue
            done = own.commit(record.fragments, record.version)
            self.committed[record.stage] = self.committed.get(record.stage, 0) + done
            if not own.counted:
                del self.own[peer]
        self.syncs[record.stage] = record
        self.num_syncs += 1
        if len(self.syncs) == self.num_stages and all(one.version == record.version for one in self.syncs.values()):
            self._synced(record)

    def _synced(self, record: StageSyncRecord) -> None:
        """All stages are at this version."""
        self.synced = record.version
        before = self.outer_rounds or (0,) * self.num_fragments
        self.outer_rounds = tuple(num + (at in record.fragments) for at, num in enumerate(before))
        self.next_fragment = turn_after(record.fragments, self.num_fragments)
        self._accounts[self.synced] = _Accounts(
            committed=dict(self.committed),
            partial=dict(self.partial),
            lost=dict(self.lost),
            own={peer: work.copy() for peer, work in self.own.items()},
            next_fragment=self.next_fragment,
            outer_rounds=self.outer_rounds,
        )
        self.counts = {step: stages for step, stages in self.counts.items() if step >= self.synced}

    def _lose(self, peer: str) -> None:
        if peer not in self.own:
            self.findings.append(f"{peer} lost work that it did not have")
            return
        self._add_lost(self.own.pop(peer))

    @property
    def own_by_stage(self) -> dict[int, int]:
        """Microbatches that peers have stepped on and not every fragment has committed yet."""
        found: dict[int, int] = {}
        for work in self.own.values():
            found[work.stage] = found.get(work.stage, 0) + work.num_microbatches
        return found


def replay(records: Iterable[Record]) -> PipelineHistory:
    """The history of a run, from the rows of its journal."""
    history = PipelineHistory()
    for record in records:
        history.apply(record)
    return history


def is_pipeline(records: Iterable[Record]) -> bool:
    """Whether a journal is that of a pipeline."""
    return any(isinstance(record, PipelineGenesisRecord) for record in records)


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """A complete snapshot of all stages."""

    folder: Path
    version: int


def seal(command: Sealed, *, keep: int) -> None:
    """Write the manifest of a snapshot, all of whose stages are written; of the numbered ones `keep` stay."""
    folder = Path(command.folder)
    manifest = {"schema": 1, "version": command.version, "digests": command.digests}
    write_atomically(folder / MANIFEST, json.dumps(manifest) + "\n")
    numbered = [saved for saved in saved_snapshots(folder.parent) if saved.folder.name.startswith("v")]
    for old in sorted(numbered, key=lambda saved: saved.version)[:-keep]:
        # The manifest first: half a snapshot is none.
        (old.folder / MANIFEST).unlink()
        shutil.rmtree(old.folder)


def saved_snapshots(snapshots: Path) -> list[Saved]:
    """The complete snapshots in a folder, in no order."""
    paths = snapshots.glob(f"*/{MANIFEST}") if snapshots.is_dir() else ()
    return [Saved(folder=path.parent, version=json.loads(path.read_text())["version"]) for path in paths]


def set_aside(snapshots: Path, version: int) -> None:
    """After a rollback: snapshots of later versions are none any more, and stay for whoever looks at them."""
    for saved in saved_snapshots(snapshots):
        if saved.version > version:
            (saved.folder / MANIFEST).replace(saved.folder / TAKEN_BACK)


def newest_snapshot(snapshots: Path, *, at_most: int) -> Saved | None:
    """The newest complete snapshot that is not newer than what is committed."""
    found = [saved for saved in saved_snapshots(snapshots) if saved.version <= at_most]
    return max(found, key=lambda saved: saved.version, default=None)
