"""`atoll status`: how a run stands, read from its directory alone (no Ray, no torch), live or finished."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from orchestrator.errors import UserError
from orchestrator.leases import waiting
from orchestrator.metrics import (
    CopyRow,
    EvalRow,
    ExchangeRow,
    FaultEvent,
    MemberRow,
    QuorumRow,
    SpanRow,
    StepRow,
    latest_faults,
    newest_rows,
)
from orchestrator.run_state import RunState
from orchestrator.rundir import RunDir
from orchestrator.segments import read_run
from orchestrator.waiting import waiting as while_waiting
from workers.records import Scalar

REFRESH_S = 1.0
SHOWN_REFUSALS = 10


class MemberStatus(BaseModel):
    """One member as its newest rows show it."""

    model_config = ConfigDict(frozen=True)

    incarnation: int = Field(description="Its live incarnation; the last one if it is gone.")
    live: bool = Field(description="Whether the journal has it as a live member.")
    status: str = Field(
        description="How it is judged: joining, healthy, slow, suspect, draining, fenced; empty if nothing is known."
    )
    reason: str = Field(description="Why it has that status.")
    doing: str = Field(
        description="Phase of its newest span: compute, sync, evaluate, start; 'gone' if it is fenced, 'ended' after "
        "the run."
    )
    step: int = Field(description="Inner steps of this incarnation.")
    loss: float | None = Field(description="Newest training loss, nats per token.")
    tokens_per_s: float | None = Field(description="Tokens per second inside its steps.")
    seen_before_s: float | None = Field(description="Age of its newest row, seconds before the run's newest row.")
    local_state: str = Field(
        description="Who keeps a copy of its local state, of which version (run.redundancy); else empty."
    )
    standing: str = Field(
        "member", description="member, banned (nothing it sends counts), or probation (it counts little)."
    )
    refusals: list[str] = Field(
        default_factory=list, description="Why contributions of it, or what it reduced, were refused: the last ten."
    )


class Status(BaseModel):
    """How a run stands."""

    model_config = ConfigDict(frozen=True)

    schema_version: int = 1
    run_dir: str
    state: str = Field(description="running, interrupted, done, stopped or failed.")
    paused: bool = Field(False, description="Whether the run is paused: members take no samples.")
    settings: dict[str, Scalar] = Field(default_factory=dict, description="What `atoll set` changed since the start.")
    rollbacks: int = Field(0, description="How often the run went back to an older version.")
    seconds: float = Field(description="Run time of the newest row, seconds.")
    progress: float = Field(description="Committed share of train.tokens, 0 to 1.")
    tokens_committed: int
    rounds: int = Field(description="Newest committed version of the first fragment.")
    val_loss: float | None = Field(description="Newest validation loss of the anchor, nats per token.")
    tokens_per_s: float | None = Field(description="Committed tokens per second over the last exchanges.")
    eta_s: float | None = Field(description="Seconds left at that speed.")
    members: dict[str, MemberStatus]
    waiting: dict[str, int] = Field(
        default_factory=dict,
        description="Member to samples of its own pack: it is not here, and nobody else may have them.",
    )
    quorum: str = Field(
        description="Who is missing for a commit, and what to set; empty while enough members are there."
    )
    faults: list[dict[str, Any]]


def read_status(run_dir: Path) -> Status:
    """Status of the run in `run_dir`. Raises UserError if it is none, JournalError if its journal is damaged."""
    from orchestrator.config import load_config

    directory = RunDir(run_dir)
    if not directory.config.exists():
        raise UserError(
            f"{run_dir} is no run directory: it has no config.toml", place=str(run_dir), remedy="atoll runs"
        )
    config = load_config(directory.config).config
    state = _replay(directory)
    newest = _newest(directory)
    steps, exchanges, evals, faults = newest.steps, newest.exchanges, newest.evals, newest.faults
    seq_len = _seq_len(exchanges, state)
    tokens = state.samples_committed() * seq_len
    rows: list[StepRow | ExchangeRow | EvalRow] = [*steps.values(), *exchanges[-1:], *evals[-1:]]
    now = max((row.t_s for row in rows), default=0.0)
    speed = _speed(exchanges)
    left = max(config.train.tokens - tokens, 0)
    standing = directory.state()
    return Status(
        run_dir=str(run_dir),
        state=standing,
        paused=state.paused,
        settings=state.settings.newest(),
        rollbacks=len(state.rollbacks),
        seconds=now,
        progress=min(tokens / config.train.tokens, 1.0),
        tokens_committed=tokens,
        rounds=state.heads[0].version.n if state.heads else 0,
        val_loss=evals[-1].val_loss if evals else None,
        tokens_per_s=speed,
        eta_s=left / speed if speed and left else None,
        members=_members(state, newest, now, running=standing == "running"),
        waiting=waiting(state) if standing != "done" else {},
        quorum=newest.quorum if standing == "running" else "",
        faults=[
            {"fault": f.fault, "member": f.member, "t_s": f.t_s, "back_s": f.back_s, "contributed_s": f.contributed_s}
            for f in latest_faults(faults)
        ],
    )


def _replay(directory: RunDir) -> RunState:
    state = RunState()
    if directory.journal.exists():
        for row in read_run(directory.path).rows:
            state.apply(row.record)
    return state


@dataclass(kw_only=True, slots=True)
class _Newest:
    """The newest rows of each kind."""

    steps: dict[str, StepRow] = field(default_factory=dict)
    spans: dict[str, SpanRow] = field(default_factory=dict)
    judged: dict[str, MemberRow] = field(default_factory=dict)
    copies: dict[str, CopyRow] = field(default_factory=dict)
    exchanges: list[ExchangeRow] = field(default_factory=list)
    evals: list[EvalRow] = field(default_factory=list)
    faults: list[FaultEvent] = field(default_factory=list)
    quorum: str = ""


def _newest(directory: RunDir) -> _Newest:
    found = _Newest()
    rows: Iterator[Any] = newest_rows(directory.metrics) if directory.metrics.exists() else iter(())
    for row in rows:
        match row:
            case StepRow():
                found.steps[row.member] = row
            case SpanRow():
                found.spans[row.member] = row
            case MemberRow():
                found.judged[row.member] = row
            case ExchangeRow():
                found.exchanges.append(row)
            case EvalRow():
                found.evals.append(row)
            case FaultEvent():
                found.faults.append(row)
            case CopyRow():
                found.copies[row.member] = row
            case QuorumRow():
                found.quorum = row.detail
    return found


def _seq_len(exchanges: list[ExchangeRow], state: RunState) -> int:
    """Tokens of one sample: the metrics count tokens, the journal counts samples."""
    for row in reversed(exchanges):  # after a rollback older ones are of versions that are no more
        # The metrics were read after the journal: they may know of more.
        history = state.history[row.fragment] if row.fragment < state.num_fragments else []
        record = history[row.version - 1] if len(history) >= row.version else None
        if record is not None and row.tokens_committed:
            samples = record.base_samples + sum(entry.upto - entry.since for entry in record.roster)
            if samples and row.tokens_committed % samples == 0:
                return row.tokens_committed // samples
    return 1


def _speed(exchanges: list[ExchangeRow]) -> float | None:
    recent = exchanges[-10:]
    if len(recent) < 2 or recent[-1].t_s <= recent[0].t_s:
        return None
    return (recent[-1].tokens_committed - recent[0].tokens_committed) / (recent[-1].t_s - recent[0].t_s)


def _members(state: RunState, newest: _Newest, now: float, *, running: bool) -> dict[str, MemberStatus]:
    out: dict[str, MemberStatus] = {}
    for name, incarnation in sorted(state.last_incarnation.items()):
        live, step, span = name in state.current, newest.steps.get(name), newest.spans.get(name)
        judged = newest.judged.get(name)
        known = judged if judged is not None and judged.incarnation == incarnation else None
        fresh = step is not None and step.incarnation == incarnation
        phase = span.phase if span and span.incarnation == incarnation else "start"
        out[name] = MemberStatus(
            incarnation=incarnation,
            live=live,
            status=known.status if known else "" if live else "fenced",
            reason=known.reason if known else "",
            doing="gone" if not live else phase if running else "ended",
            step=step.step if step and fresh else 0,
            loss=step.loss if step and fresh else None,
            tokens_per_s=step.tokens_per_s if step and fresh else None,
            seen_before_s=now - step.t_s if step and fresh else None,
            local_state=_kept(newest.copies.get(name), state) if running else "",
            standing=state.bans.standing(name),
            refusals=[r.why for r in state.refusals if r.member == name][-SHOWN_REFUSALS:],
        )
    return out


def _kept(row: CopyRow | None, state: RunState) -> str:
    """Who keeps the local state of a member, while that one lives."""
    if row is None:
        return ""
    if row.what == "restored":
        return f"begun as {row.other} left off, kept by nobody yet"
    alive = row.other in {str(member) for member in state.live()}
    whose = f"{row.member}.{row.incarnation} after version {row.version} ({row.num_bytes:,} bytes)"
    return f"{row.other} keeps {whose}" if alive else f"nobody yet: {row.other}, which kept {whose}, is gone"


def status_command(
    read: Callable[[], Any], as_json: bool, watch: bool, show: Callable[[Any], Any] | None = None
) -> int:
    """Print what `read` gives once, or (`watch`) again and again until the run is over; returns the exit code.

    `show` makes a table of it: of a `Status` unless another one is given.
    """
    show = show or render
    with while_waiting("reading where the run is"):
        status = read()
    if as_json:
        while True:
            print(status.model_dump_json(), flush=True)
            if not watch or status.state != "running":
                return 0
            time.sleep(REFRESH_S)
            status = read()
    from rich.console import Console
    from rich.live import Live

    console = Console()
    if not watch:
        console.print(show(status))
        return 0
    with Live(show(status), console=console, auto_refresh=False) as live:
        while status.state == "running":
            time.sleep(REFRESH_S)
            status = read()
            live.update(show(status), refresh=True)
    return 0


def render(status: Status) -> Any:
    """A table for the terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    running, path = status.state == "running", _as_typed(status.run_dir)
    head = f"{path}: {status.state}" + (", paused" if status.paused else "")
    where = f"{100 * status.progress:.1f} % of the tokens, round {status.rounds}, {status.seconds:.0f} s"
    loss = "not evaluated yet" if status.val_loss is None else f"{status.val_loss:.4f} nats per token"
    speed = "" if status.tokens_per_s is None else f", {status.tokens_per_s:,.0f} tokens/s"
    eta = "" if status.eta_s is None or not running else f", {status.eta_s:.0f} s left"
    table = Table("member", "status", "doing", "step", "loss", "tokens/s", *(["last row"] if running else []))
    for name, member in status.members.items():
        table.add_row(
            f"{name}.{member.incarnation}",
            member.status or "-",
            member.doing,
            str(member.step),
            _figure(member.loss, ".4f"),
            _figure(member.tokens_per_s, ",.0f"),
            *([_figure(member.seen_before_s, ".1f", " s ago")] if running else []),
        )
    parts: list[Any] = [Text(head), Text(where), Text(f"validation loss {loss}{speed}{eta}"), table]
    if status.settings:
        parts.append(Text("set since: " + ", ".join(f"{key} = {value}" for key, value in status.settings.items())))
    for name, member in status.members.items():
        if member.status in ("slow", "suspect", "draining"):
            parts.append(Text(f"{name}.{member.incarnation} is {member.status}: {member.reason}"))
        if member.standing != "member":
            remedy = f"; atoll unban {name} ends it" if member.standing == "banned" else ""
            parts.append(Text(f"{name} is {member.standing}{remedy}"))
        if member.refusals:
            parts.append(Text(f"{name}: {len(member.refusals)} refused, last because {member.refusals[-1]}"))
    parts += [Text(f"{name}: {member.local_state}") for name, member in status.members.items() if member.local_state]
    for name, num in status.waiting.items():
        parts.append(Text(f"{num:,} samples wait for {name}, which is not here: nobody else may have its own pack"))
    if status.quorum:
        parts.append(Text(status.quorum))
    for fault in status.faults:
        back = "not back yet" if fault["back_s"] is None else f"back {fault['back_s'] - fault['t_s']:.1f} s later"
        parts.append(Text(f"fault at {fault['t_s']:.1f} s: {fault['fault']} {fault['member']}, {back}"))
    if status.state in ("stopped", "interrupted"):
        parts.append(Text(f"go on: atoll train --resume {path}"))
    return Group(*parts)


def _as_typed(run_dir: str) -> str:
    """The directory as a person would type it here."""
    path, here = Path(run_dir), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else run_dir


def _figure(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def dump_schema() -> str:
    """JSON schema of `atoll status --json`."""
    return json.dumps(Status.model_json_schema(), indent=2)
