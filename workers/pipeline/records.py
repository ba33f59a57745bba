"""Rows of the journal of a pipeline; `orchestrator/pipeline/replay.py` says what they add up to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from workers.ranges import Range
from workers.record_base import Record


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineGenesisRecord(Record):
    """Version 0 of every stage of a pipeline, or with `version` above 0 the snapshot that it goes on from.

    `sync_steps`: steps that peers make of their own before their stage synchronises; 0: none. `num_fragments`: parts of
    each stage that are synchronised one after the other. `delayed`: a step may be opened while the one before it is
    not committed yet.
    """

    kind: ClassVar[str] = "pipeline_genesis"
    digests: tuple[str, ...]
    num_params: int
    num_microbatches: int
    samples_per_step: int
    version: int = 0
    sync_steps: int = 0
    delayed: bool = False
    num_fragments: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeRecord(Record):
    """A process serves this stage from now on, under this name, and no other one."""

    kind: ClassVar[str] = "serve"
    process: str
    peer: str
    stage: int
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord(Record):
    """A step of a pipeline begins (or begins anew, in a higher round) with these samples, dealt to the trainers."""

    kind: ClassVar[str] = "step"
    step: int
    round: int
    ranges: tuple[Range, ...]
    trainers: tuple[str, ...]
    why: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFenceRecord(Record):
    """Nothing that this peer counted in the step is in its commit."""

    kind: ClassVar[str] = "step_fence"
    peer: str
    step: int
    round: int
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCommitRecord(Record):
    """A stage moved from version `step` to the next: who counted which microbatches (`peer:0,3`), who holds it."""

    kind: ClassVar[str] = "stage_commit"
    step: int
    round: int
    stage: int
    digest: str
    counted: tuple[str, ...]
    holders: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCountRecord(Record):
    """A step is counted in a stage, and each peer steps on its own with what it counted (`peer:0,3`)."""

    kind: ClassVar[str] = "stage_count"
    step: int
    round: int
    stage: int
    counted: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSyncRecord(Record):
    """A stage's anchor moved from `base` to `version`, by what these peers had made of their own since they were in.

    `fragments` of it moved; they hold the steps before `version` now, the others fewer.
    """

    kind: ClassVar[str] = "stage_sync"
    base: int
    version: int
    stage: int
    digest: str
    contributors: tuple[str, ...]
    holders: tuple[str, ...]
    fragments: tuple[int, ...] = (0,)


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftRecord(Record):
    """A process was asked to go and has handed over: it is not started again in this life of the run."""

    kind: ClassVar[str] = "left"
    process: str
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkLostRecord(Record):
    """What a peer had made of its own and not every fragment has committed is void: these steps are partial here."""

    kind: ClassVar[str] = "work_lost"
    peer: str
    stage: int
    why: str
