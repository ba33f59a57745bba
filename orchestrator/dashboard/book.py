"""Everything that a dashboard knows of one run: rows of metrics and of the journal in, questions answered elsewhere.

Pure: no clock, no files. `orchestrator/dashboard/sources.py` fills it, `figures.py` and `series.py` read it.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from faults.recovery import GIVEN_UP, KINDS
from orchestrator.dashboard.columns import Spans, Steps
from orchestrator.metrics import (
    PHASES,
    EvalRow,
    ExchangeRow,
    FaultEvent,
    LinkRow,
    RowError,
    SilenceRow,
    SpanRow,
    row_from_dict,
)
from orchestrator.run_state import JournalContradiction, RunState
from workers import ranges
from workers.records import CommitRecord, FaultRecord, FenceRecord, JoinRecord, OperatorRecord, Row, StopRecord

ALL_STAGES = "all stages"
STAGE_FIELDS = ("stage", "params", "bytes", "peers", "buddies", "moving_here")


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """The ledger's totals, in samples, behind some commit."""

    committed: int = 0
    leased: int = 0
    lost: int = 0
    reissued: int = 0
    dropped: int = 0
    partial: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Happening:
    """Something to be read in the list of what broke, and of what people did."""

    t_s: float | None  # None: at the end of what is known
    kind: str
    member: str
    text: str
    tone: str = "warn"


@dataclass(frozen=True, kw_only=True, slots=True)
class StageStep:
    """A pipeline's step: its moment, how many there are by then, what all peers had sent, the table of its stages."""

    t_s: float
    num_steps: int
    bytes_sent: int
    table: list[dict[str, Any]]


@dataclass(kw_only=True, slots=True)
class About:
    """What the run is: from its configuration and its directory."""

    run_id: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    state: str = "running"
    summary: Mapping[str, Any] | None = None

    def setting(self, section: str, key: str) -> Any:
        """A value of the configuration, None where it is not there."""
        values = self.config.get(section)
        return values.get(key) if isinstance(values, Mapping) else None


class RunBook:
    """One run, as far as it was heard."""

    def __init__(self) -> None:
        """Nothing is known."""
        self.version = 0
        self.about = About()
        self.steps, self.spans = Steps(), Spans()
        self.members: list[str] = []
        self.evals: list[EvalRow] = []
        self.exchanges: list[ExchangeRow] = []
        self.faults: dict[tuple[str, str, float | None], FaultEvent] = {}
        self.silences: list[SilenceRow] = []
        self.links: dict[tuple[str, str], list[LinkRow]] = {}
        self.stages: list[StageStep] = []
        self.noted_s: list[float] = []  # of each fault in the journal, which is where a pipeline has them
        self.state = RunState()
        self.happenings: list[Happening] = []
        self.totals: dict[tuple[int, int], Totals] = {}
        self.fences: dict[tuple[str, int], str] = {}
        self.nodes: dict[str, str] = {}
        self.num_rows = 0
        self.num_bad = 0
        self.problem = ""
        self.view: Mapping[str, Any] | None = None  # of the controller, see `orchestrator/dashboard/live.py`
        self.end_s = 0.0
        self._place: dict[str, int] = {}
        self._last_step: dict[int, tuple[int, int]] = {}
        self._injected: set[str] = set()

    # ------------------------------------------------------------ in

    def add_metrics(self, data: bytes) -> None:
        """Whole lines of a metrics file; what cannot be read is counted."""
        for line in data.splitlines():
            try:
                values = json.loads(line)
                if not isinstance(values, dict):
                    raise RowError("not a JSON object")
                self._metric(values)
            except (ValueError, TypeError, KeyError):
                self.num_bad += bool(line.strip())
        self.version += 1

    def add_pipeline(self, data: bytes) -> None:
        """Whole lines of `pipeline.jsonl`: a step of all stages each, with the table of the stages."""
        for line in data.splitlines():
            try:
                row = json.loads(line)
                t_s, loss, num_steps, seconds = (
                    float(row["t_s"]),
                    row["loss"],
                    int(row["step"]) + 1,
                    float(row["seconds"]),
                )
                sent = int(row.get("bytes_sent", 0))  # of an earlier version: not counted
                table = [{key: stage[key] for key in STAGE_FIELDS} for stage in row["stages"]]
            except (ValueError, TypeError, KeyError):
                self.num_bad += bool(line.strip())
                continue
            self.stages.append(StageStep(t_s=t_s, num_steps=num_steps, bytes_sent=sent, table=table))
            self.steps.append(
                t_s=t_s,
                member=self.place(ALL_STAGES),
                loss=float("nan") if loss is None else float(loss),
                tokens_per_s=self.tokens_of_step() / seconds if seconds > 0 else 0.0,
                compute_s=0.0,
                num_steps=1,
            )
            self._validated(t_s, num_steps, row.get("val_loss"))
            self._until(t_s)
        self.version += 1

    def _validated(self, t_s: float, num_steps: int, val_loss: object) -> None:
        """A pipeline's steps repeat the newest validation loss."""
        known = self.evals[-1].val_loss if self.evals else None
        if not isinstance(val_loss, float) or val_loss == known:
            return
        tokens, target = num_steps * self.tokens_of_step(), self.about.setting("train", "tokens")
        self.evals.append(
            EvalRow(
                t_s=t_s,
                member=ALL_STAGES,
                version=num_steps,
                progress=min(tokens / target, 1.0) if isinstance(target, int) and target > 0 else 0.0,
                val_loss=val_loss,
                tokens_committed=tokens,
            )
        )

    def add_records(self, rows: Iterable[Row]) -> None:
        """Rows of the journal, in order."""
        for row in rows:
            self._record(row)
            self.num_rows += 1
        self.version += 1

    def place(self, member: str) -> int:
        """Number of a member, in order of appearance."""
        place = self._place.get(member)
        if place is None:
            place = self._place[member] = len(self.members)
            self.members.append(member)
        return place

    def in_order(self) -> list[tuple[str, int]]:
        """Members by name, island-2 before island-10, with their numbers."""
        return sorted(self._place.items(), key=lambda item: natural(item[0]))

    def _metric(self, values: dict[str, Any]) -> None:
        kind = values.get("kind")
        if kind == "step":
            self._step(values)
            return
        match row_from_dict(values):
            case SpanRow() as row:
                phase = PHASES.index(row.phase)
                self.spans.append(
                    start_s=row.start_s,
                    end_s=row.end_s,
                    member=self.place(row.member),
                    phase=phase,
                    incarnation=row.incarnation,
                )
                self._until(row.end_s)
            case EvalRow() as row:
                self.evals.append(row)
                self._until(row.t_s)
            case ExchangeRow() as row:
                self.exchanges.append(row)
                self._until(row.t_s)
            case FaultEvent() as row:
                moment = row.injected_s if row.injected_s is not None else row.detected_s
                self.faults[row.fault, row.member, moment] = row
                self._until(row.t_s)
            case LinkRow() as row:
                self.links.setdefault((row.peer, row.member), []).append(row)
            case SilenceRow() as row:
                self.silences.append(row)
                self._until(row.end_s)

    def _step(self, values: dict[str, Any]) -> None:
        """The most frequent row by far: read without a row object."""
        loss, step, incarnation = values.get("loss"), int(values["step"]), int(values["incarnation"])
        member = self.place(str(values["member"]))
        t_s = float(values["t_s"])
        before = self._last_step.get(member, (incarnation, 0))
        since = before[1] if before[0] == incarnation and before[1] <= step else 0
        self._last_step[member] = (incarnation, step)
        self.steps.append(
            t_s=t_s,
            member=member,
            loss=float("nan") if loss is None else float(loss),
            tokens_per_s=float(values["tokens_per_s"]),
            compute_s=float(values.get("compute_s") or 0.0),
            num_steps=step - since,
        )
        self._until(t_s)

    def _until(self, t_s: float) -> None:
        self.end_s = max(self.end_s, t_s)

    def _record(self, row: Row) -> None:
        record = row.record
        try:
            self.state.apply(record)
        except (JournalContradiction, KeyError, IndexError) as error:
            self.problem = self.problem or f"journal row {row.seq} cannot follow the rows before it: {error}"
            return
        match record:
            case JoinRecord():
                self.place(record.member)
                self.nodes[record.member] = record.node
            case FenceRecord():
                self.fences[record.member, record.incarnation] = record.why
            case CommitRecord():
                self.totals[record.fragment, record.n] = self.totals_now()
            case FaultRecord():
                self._until(record.t_s)  # where nothing is measured, it is news all the same
                self._note(record)
                tone = "bad" if record.fault in BAD_FAULTS else "warn"
                self._happens(record.t_s, record.fault, record.member, record.detail, tone)
            case OperatorRecord():
                self._happens(record.t_s, "operator", record.member, f"{record.action}: {record.outcome}", "plain")
            case StopRecord():
                tone = "bad" if record.reason == "failed" else "plain"
                self._happens(None, record.reason, "", record.detail, tone)

    def _note(self, record: FaultRecord) -> None:
        """A process that was ended on purpose is in the journal twice: when it was, and when that was noticed."""
        if record.injected or record.member not in self._injected:
            self.noted_s.append(record.t_s)
        if not record.injected:
            self._injected.discard(record.member)
        elif record.fault in ENDS_PROCESS:
            self._injected.add(record.member)

    def _happens(self, t_s: float | None, kind: str, member: str, text: str, tone: str) -> None:
        self.happenings.append(Happening(t_s=t_s, kind=kind, member=member, text=text, tone=tone))

    # ------------------------------------------------------------ out

    def totals_now(self) -> Totals:
        """The ledger as of the last journal row."""
        state = self.state
        return Totals(
            committed=state.samples_committed(),
            leased=state.next_position,
            lost=state.lost,
            reissued=state.reissued,
            dropped=ranges.count(state.dropped),
            partial=ranges.count(state.partial),
        )

    def exchanges_until(self, moment_s: float) -> list[ExchangeRow]:
        """Committed exchanges up to a moment."""
        return self.exchanges[: bisect_right(self.exchanges, moment_s, key=lambda row: row.t_s)]

    def totals_at(self, moment_s: float) -> Totals:
        """The ledger as of the last commit up to a moment."""
        done = self.exchanges_until(moment_s)
        return self.totals.get((done[-1].fragment, done[-1].version), Totals()) if done else Totals()

    def seq_len(self) -> int:
        """Tokens of one sample: the metrics count tokens, the journal counts samples."""
        value = self.about.setting("data", "seq_len")
        if isinstance(value, int) and value > 0:
            return value
        for row in reversed(self.exchanges):
            totals = self.totals.get((row.fragment, row.version))
            if totals is not None and totals.committed and row.tokens_committed % totals.committed == 0:
                return row.tokens_committed // totals.committed
        return 1

    def tokens_of_step(self) -> int:
        """Tokens of one step of a pipeline."""
        sizes = [self.about.setting("pipeline", key) for key in ("microbatches", "microbatch_size")]
        return math.prod(size for size in sizes if isinstance(size, int)) * self.seq_len()

    def faults_until(self, moment_s: float) -> list[FaultEvent]:
        """Faults that had been noticed at a moment, in order."""
        known = [row for row in self.faults.values() if fault_moment(row) <= moment_s]
        return sorted(known, key=fault_moment)


BAD_FAULTS = frozenset(
    {*KINDS, GIVEN_UP, "kill", "fenced", "non_finite", "diverged", "digest_mismatch", "revoked", "no_state"}
)
# Faults on purpose after which the process is gone, which is a row of its own.
ENDS_PROCESS = frozenset({"kill", "oom", "nan", "controller_kill"})


def fault_moment(row: FaultEvent) -> float:
    """When a fault happened, as far as that is known."""
    return next((t for t in (row.injected_s, row.detected_s) if t is not None), row.t_s)


def natural(name: str) -> list[str | int]:
    """Key of an order in which island-2 comes before island-10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]
