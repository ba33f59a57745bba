"""What a journal says about a pipeline: where it is, and that every microbatch counted once in every stage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.pipeline.commands import Sealed
from orchestrator.rundir import write_atomically
from workers.pipeline.records import PipelineGenesisRecord, ServeRecord, StageCommitRecord, StepFenceRecord, StepRecord
from workers.records import FenceRecord, JoinRecord, Record, StopRecord

MANIFEST = "pipeline.json"


@dataclass(kw_only=True)
class PipelineHistory:
    """The journal's replay; `findings` are violations of "once per step, microbatch and stage"."""

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

    @property
    def version(self) -> int:
        """Steps that are committed in every stage."""
        step = 0
        while step in self.commits and len(self.commits[step]) == self.num_stages > 0:
            step += 1
        return step

    @property
    def digests(self) -> tuple[str, ...]:
        """Of each stage's newest version; empty before the first commit."""
        last = self.commits.get(self.version - 1, {})
        return tuple(last[stage].digest for stage in sorted(last))

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
            case ServeRecord(process=process, peer=peer, stage=stage, why=why):
                self.incarnations[process] = max(self.incarnations.get(process, 0), int(peer.rpartition(".")[2]))
                self.serving[process] = (peer, stage)
                if why.startswith("moved"):
                    self.moves.append(f"{peer} to stage {stage}, {why.removeprefix('moved ')}")
            case FenceRecord(member=member):
                self.serving.pop(member, None)
                self.members.discard(member)
            case StepRecord():
                self._open(record)
            case StepFenceRecord(step=step, round=round_, peer=peer):
                self.fenced.add((step, round_, peer))
            case StageCommitRecord():
                self._commit(record)
            case StopRecord():
                self.stopped = record
            case _:
                pass

    def _begin(self, record: PipelineGenesisRecord) -> None:
        self.num_stages, self.num_params = len(record.digests), record.num_params
        self.num_microbatches, self.samples_per_step = record.num_microbatches, record.samples_per_step
        if record.version > self.version:
            self.findings.append(f"version {record.version} is gone on from, and {self.version} is the last committed")
        self.stopped = None
        for step in [step for step in self.commits if step >= record.version]:
            del self.commits[step]
            self.num_taken_back += 1

    def _open(self, record: StepRecord) -> None:
        self.max_round[record.step] = max(self.max_round.get(record.step, 0), record.round)
        self.num_begun_again += record.round > 0
        if record.step != self.version:
            self.findings.append(f"step {record.step} was opened at version {self.version}")
        first = record.step * self.samples_per_step
        if record.ranges != ((first, first + self.samples_per_step),):
            self.findings.append(f"step {record.step} was given samples {record.ranges}, its own are from {first} on")
        # Rows of a commit that a crash cut short: nobody was told of them.
        self.commits.pop(record.step, None)
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
        counted: list[int] = []
        for entry in record.counted:
            peer, _, ids = entry.partition(":")
            counted += [int(number) for number in ids.split(",")]
            if (record.step, record.round, peer) in self.fenced:
                self.findings.append(f"{where}: {peer} is in the commit, and was fenced for the step")
        if sorted(counted) != list(range(self.num_microbatches)):
            self.findings.append(
                f"{where}: microbatches {sorted(counted)} were counted, {self.num_microbatches} are in a step"
            )


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


def newest_snapshot(snapshots: Path, *, at_most: int) -> Saved | None:
    """The newest complete snapshot that is not newer than what is committed."""
    found = [saved for saved in saved_snapshots(snapshots) if saved.version <= at_most]
    return max(found, key=lambda saved: saved.version, default=None)
