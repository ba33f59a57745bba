"""`atoll why` of a pipeline: who serves what, who was left out of a step, and how a step came about (pure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.why import Line, NothingKnown, decision, seconds_of
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
from workers.records import FenceRecord, JoinRecord, Record, Row, SnapshotRecord


def why_run(rows: Sequence[Row], times: Mapping[int, float]) -> list[Line]:
    """Every decision with its reason; steps are summed up between two of them. `times`: of steps' commits."""
    out: list[Line] = []
    first: int | None = None
    last: tuple[int, int] | None = None  # row, step

    def close() -> None:
        nonlocal first, last
        if first is not None and last is not None:
            seq, step = last
            text = f"step {step} was" if step == first else f"steps {first} to {step} were"
            out.append(Line(seq=seq, at_s=times.get(step), text=f"{text} counted once in every stage"))
        first = last = None

    for row in rows:
        record = row.record
        if isinstance(record, StageCommitRecord | StageCountRecord):
            if last is not None and record.step < last[1]:
                close()  # it was taken back
            first, last = record.step if first is None else first, (row.seq, record.step)
        elif (text := _decision(record)) is not None and not isinstance(record, SnapshotRecord):
            close()
            out.append(Line(seq=row.seq, at_s=seconds_of(record), text=text))
    close()
    return out


def why_member(rows: Sequence[Row], times: Mapping[int, float], who: str) -> list[Line]:
    """What was decided about a process (`peer-1`), or about one name that it served under (`peer-1.3`).

    Raises NothingKnown for one that never joined.
    """
    process, _, life = who.partition(".")
    known = sorted({row.record.member for row in rows if isinstance(row.record, JoinRecord)})
    if process not in known:
        raise NothingKnown(f"the journal knows no process {who!r}; it has {', '.join(known) or 'none'}")
    out: list[Line] = []
    for row in rows:
        record, names = row.record, _concerns(row.record)
        if who in names or (not life and any(name.partition(".")[0] == process for name in names)):
            text = _decision(record)
            if text is not None:
                step = record.step if isinstance(record, StepFenceRecord) else None
                at_s = seconds_of(record) if step is None else times.get(step)
                out.append(Line(seq=row.seq, at_s=at_s, text=text))
    return out


def why_step(rows: Sequence[Row], times: Mapping[int, float], step: int) -> list[Line]:
    """How a step came about: its rounds with their reasons, who was left out, who counted what in each stage.

    Raises NothingKnown for a step that was never opened.
    """
    out: list[Line] = []
    newest, num_fragments = -1, 1
    for row in rows:
        record = row.record
        text: str | None = None
        match record:
            case PipelineGenesisRecord():
                num_fragments = record.num_fragments
            case StepRecord():
                newest = max(newest, record.step)
                if record.step == step:
                    [(first, end)] = record.ranges
                    why = f": {record.why}" if record.why else ""
                    text = f"step {step} was opened with samples {first} to {end - 1}, round {record.round}{why}"
            case StepFenceRecord() if record.step == step:
                text = _decision(record)
            case StageCommitRecord() | StageCountRecord() if record.step == step:
                counted = ", ".join(entry.replace(":", " counted ") for entry in record.counted)
                text = f"stage {record.stage}: {counted}"
                if isinstance(record, StageCommitRecord):
                    text += f"; {', '.join(record.holders)} held the next state"
            case StageSyncRecord() if record.base < step + 1 == record.version:
                made = ", ".join(record.contributors) or "nobody"
                part = f" (fragments {', '.join(map(str, record.fragments))})" if num_fragments > 1 else ""
                text = f"stage {record.stage}{part} moved from version {record.base} to {record.version} by {made}"
        if text is not None:
            out.append(Line(seq=row.seq, at_s=times.get(step), text=text))
    if not out:
        raise NothingKnown(f"step {step} was never opened; the newest is {newest}")
    return out


def _concerns(record: Record) -> tuple[str, ...]:
    """Names in a record: of a process, and of what it serves as."""
    match record:
        case ServeRecord():
            return (record.process, record.peer)
        case StepFenceRecord() | WorkLostRecord():
            return (record.peer,)
        case LeftRecord():
            return (record.process,)
        case _:
            return tuple(str(getattr(record, "member", "")).split("+"))


def _decision(record: Record) -> str | None:
    match record:
        case PipelineGenesisRecord():
            stages = len(record.digests)
            return f"{stages} stages ({record.num_params:,} parameters) go on from version {record.version}"
        case ServeRecord():
            return f"{record.process} serves stage {record.stage} as {record.peer}: {record.why}"
        case StepRecord() if record.why:
            return f"step {record.step} was begun anew, in round {record.round}: {record.why}"
        case StepFenceRecord():
            return f"nothing that {record.peer} counted in step {record.step} is in its commit: {record.why}"
        case WorkLostRecord():
            return f"what {record.peer} had made in stage {record.stage} went with it: {record.why}"
        case LeftRecord():
            return f"{record.process} has handed over and is not started again: {record.why}"
        case JoinRecord():
            return f"{record.member} joined on node {record.node[:8]}"
        case FenceRecord():
            return f"{record.member} is gone: {record.why}"
        case _:
            return decision(record)
