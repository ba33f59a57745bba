"""Reads a run directory for the report: config.toml, summary.json, metrics.jsonl, each of which may be missing."""

from __future__ import annotations

import re
import tomllib
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from orchestrator.errors import UserError
from orchestrator.metrics import (
    EvalRow,
    ExchangeRow,
    FaultEvent,
    ReadProblems,
    SpanRow,
    StepRow,
    latest_faults,
    read_rows,
)
from orchestrator.pipeline.figures import FILE_NAME as PIPELINE
from orchestrator.pipeline.figures import step_lines
from orchestrator.segments import JournalError, read_run
from orchestrator.summary import Summary, SummaryError, load_summary
from workers.records import FaultRecord

_FILES = ("config.toml", "summary.json", "metrics.jsonl")
ALL_STAGES = "all stages"


class ReportError(UserError):
    """A report cannot be made: there is no run, or no room for the file."""


class SpeedPoint(NamedTuple):
    """One step as `summary.fault_free_speed` needs it."""

    member: str
    t_s: float
    tokens_per_s: float


@dataclass(kw_only=True, slots=True)
class StepColumns:
    """Steps of one incarnation, by column (a long run has millions of them). An unknown loss is NaN."""

    step: array[int] = field(default_factory=lambda: array("q"))
    t_s: array[float] = field(default_factory=lambda: array("d"))
    progress: array[float] = field(default_factory=lambda: array("d"))
    loss: array[float] = field(default_factory=lambda: array("d"))
    tokens_per_s: array[float] = field(default_factory=lambda: array("d"))
    compute_s: float = 0.0

    def add(self, row: StepRow) -> None:
        """Append one step."""
        self.step.append(row.step)
        self.t_s.append(row.t_s)
        self.progress.append(row.progress)
        self.loss.append(row.loss if row.loss is not None else float("nan"))
        self.tokens_per_s.append(row.tokens_per_s)
        self.compute_s += row.compute_s


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """Everything the report knows of one run. `notes` are sentences on what is missing."""

    run_dir: Path
    name: str
    config: Mapping[str, Any]
    config_text: str
    summary: Summary | None
    members: tuple[str, ...]
    steps: Mapping[tuple[str, int], StepColumns]
    evals: tuple[EvalRow, ...]
    spans: tuple[SpanRow, ...]
    exchanges: tuple[ExchangeRow, ...]
    faults: tuple[FaultEvent, ...]
    notes: tuple[str, ...]
    stages: tuple[Mapping[str, Any], ...] = ()

    @property
    def end_s(self) -> float:
        """Last moment that the run directory knows of, seconds since the start."""
        last = [columns.t_s[-1] for columns in self.steps.values()]
        last += [span.end_s for span in self.spans]
        last += [rows[-1].t_s for rows in (self.evals, self.exchanges) if rows]
        return max([*last, self.summary.seconds if self.summary else 0.0])

    @property
    def tokens_committed(self) -> int:
        """Committed tokens, from the summary or else from the last exchange."""
        if self.summary:
            return self.summary.tokens_committed
        return max((row.tokens_committed for row in self.exchanges), default=0)

    @property
    def tokens_target(self) -> int | None:
        """`train.tokens` of the configuration."""
        value = self.setting("train", "tokens")
        return value if isinstance(value, int) and value > 0 else None

    @property
    def bytes_sent(self) -> int:
        """Payload bytes of all members, from the summary or else from the exchanges."""
        return self.summary.bytes_sent if self.summary else sum(row.bytes for row in self.exchanges)

    def setting(self, section: str, key: str) -> Any:
        """A value of the configuration, None where it is not there."""
        values = self.config.get(section)
        return values.get(key) if isinstance(values, Mapping) else None

    def num_member_steps(self) -> int:
        """Inner steps of all members, whether an incarnation goes on counting or starts at one again."""
        total = 0
        for member in self.members:
            previous = 0
            for (name, _), columns in sorted(self.steps.items()):
                if name == member:
                    first, last = columns.step[0], columns.step[-1]
                    total += last - previous if first > previous else last
                    previous = last
        return total

    def compute_seconds(self) -> dict[str, float]:
        """Seconds that each member spent inside inner steps."""
        seconds = dict.fromkeys(self.members, 0.0)
        for (member, _), columns in self.steps.items():
            seconds[member] += columns.compute_s
        return seconds

    def speed_points(self) -> Iterator[SpeedPoint]:
        """All steps, for the fault-free speed."""
        for (member, _), columns in self.steps.items():
            for t_s, speed in zip(columns.t_s, columns.tokens_per_s, strict=True):
                yield SpeedPoint(member, t_s, speed)


def is_pipeline_dir(run_dir: Path) -> bool:
    """Whether the run in a directory has stages and has committed a step."""
    return (run_dir / PIPELINE).is_file()


def load_pipeline(
    run_dir: Path, config: Mapping[str, Any], config_text: str, summary: Summary | None, notes: list[str]
) -> RunData:
    """The same of a run with stages: all of them together train one model, and are shown as one member.

    Faults are those of the journal, which has their times.
    """
    total = int(config.get("train", {}).get("tokens", 0)) or 1
    pipeline, data = config.get("pipeline", {}), config.get("data", {})
    seq_len = (summary.seq_len if summary else None) or int(data.get("seq_len", 1))
    step_tokens = int(pipeline.get("microbatches", 1)) * int(pipeline.get("microbatch_size", 1)) * seq_len
    columns, evals = StepColumns(), list[EvalRow]()
    val_loss: float | None = None
    row: dict[str, Any] = {}
    for row in step_lines(run_dir):
        tokens = (row["step"] + 1) * step_tokens
        progress = min(tokens / total, 1.0)
        step = StepRow(
            t_s=row["t_s"], member=ALL_STAGES, incarnation=1, step=row["step"] + 1, progress=progress, loss=row["loss"],
            tokens_per_s=step_tokens / row["seconds"] if row["seconds"] else 0.0, step_ms=1000 * row["seconds"],
            compute_s=row["seconds"],
        )  # fmt: skip
        columns.add(step)
        if row.get("val_loss") not in (None, val_loss):
            val_loss = row["val_loss"]
            evals.append(
                EvalRow(
                    t_s=row["t_s"], member=ALL_STAGES, version=row["step"], progress=progress, val_loss=val_loss,
                    tokens_committed=tokens,
                )
            )  # fmt: skip
    try:
        faults = tuple(_faults_of(run_dir, columns))
    except JournalError as error:
        notes.append(f"The journal could not be read, so faults are missing: {error}")
        faults = ()
    return RunData(
        run_dir=run_dir,
        name=summary.run_id if summary else run_dir.resolve().name,
        config=config,
        config_text=config_text,
        summary=summary,
        members=(ALL_STAGES,) if columns.step else (),
        steps={(ALL_STAGES, 1): columns} if columns.step else {},
        evals=tuple(evals),
        spans=(),
        exchanges=(),
        faults=faults,
        notes=tuple(notes),
        stages=tuple(row.get("stages", ())),
    )


def _faults_of(run_dir: Path, columns: StepColumns) -> Iterator[FaultEvent]:
    """Faults that were noticed, each with what was injected into its process before, and the step after it."""
    injected: dict[str, FaultRecord] = {}
    for row in read_run(run_dir).rows:
        record = row.record
        if not isinstance(record, FaultRecord):
            continue
        if record.injected:
            injected[record.member] = record
            continue
        cause = injected.pop(record.member, None)
        after = next((t_s for t_s in columns.t_s if t_s > record.t_s), None)
        yield FaultEvent(
            t_s=record.t_s,
            fault=cause.fault if cause else record.fault,
            member=record.member,
            injected_s=cause.t_s if cause else record.t_s,
            detected_s=record.t_s,
            next_commit_s=after,
            estimated=cause is None,
        )


def load_run(run_dir: Path) -> RunData:
    """Read what there is of a run. Raises ReportError where `run_dir` holds no run at all."""
    if not any((run_dir / name).is_file() for name in _FILES):
        raise ReportError(
            f"{run_dir} is not a run directory: it has none of {', '.join(_FILES)}",
            remedy="the directory that `atoll train` named in its last line; `atoll runs` lists them",
        )
    notes: list[str] = []
    config, config_text = _load_config(run_dir, notes)
    summary = _load_summary(run_dir, notes)
    if is_pipeline_dir(run_dir):
        return load_pipeline(run_dir, config, config_text, summary, notes)
    rows = _load_metrics(run_dir, notes)
    name = summary.run_id if summary else run_dir.resolve().name
    return RunData(
        run_dir=run_dir, name=name, config=config, config_text=config_text, summary=summary, notes=tuple(notes), **rows
    )


def _load_config(run_dir: Path, notes: list[str]) -> tuple[dict[str, Any], str]:
    try:
        text = (run_dir / "config.toml").read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        notes.append(f"The configuration is missing (config.toml: {error.strerror}).")
        return {}, ""
    try:
        return tomllib.loads(text), text
    except tomllib.TOMLDecodeError as error:
        notes.append(f"The configuration could not be read (config.toml: {error}).")
        return {}, text


def _load_summary(run_dir: Path, notes: list[str]) -> Summary | None:
    try:
        return load_summary(run_dir)
    except FileNotFoundError:
        notes.append(
            "There is no summary: the run is still going on, or it was cut off before its end. "
            "Figures below are computed from the metrics so far."
        )
    except (OSError, SummaryError) as error:
        notes.append(f"The summary could not be read: {error}")
    return None


def _load_metrics(run_dir: Path, notes: list[str]) -> dict[str, Any]:
    steps: dict[tuple[str, int], StepColumns] = {}
    by_kind: dict[type, list[Any]] = {kind: [] for kind in (EvalRow, SpanRow, ExchangeRow, FaultEvent)}
    members: set[str] = set()
    problems = ReadProblems()
    try:
        for row in read_rows(run_dir / "metrics.jsonl", problems):
            if isinstance(row, StepRow):
                steps.setdefault((row.member, row.incarnation), StepColumns()).add(row)
            elif type(row) in by_kind:
                by_kind[type(row)].append(row)
            if isinstance(row, (StepRow, SpanRow)):
                members.add(row.member)
    except OSError as error:
        notes.append(f"The metrics are missing (metrics.jsonl: {error.strerror}): there is nothing to plot.")
    notes.extend(problems.sentences())
    return {
        "steps": steps,
        "members": tuple(sorted(members, key=_natural)),
        "evals": tuple(sorted(by_kind[EvalRow], key=lambda row: (row.progress, row.t_s))),
        "spans": tuple(sorted(by_kind[SpanRow], key=lambda row: row.start_s)),
        "exchanges": tuple(by_kind[ExchangeRow]),
        "faults": tuple(latest_faults(by_kind[FaultEvent])),
    }


def _natural(name: str) -> list[str | int]:
    """island-2 before island-10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]
