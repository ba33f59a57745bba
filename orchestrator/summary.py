"""`summary.json`: what a run came to, and the formulas of its derived figures (pure functions).

Words: a *member* is an island through all its incarnations; a *round* is one commit of every fragment; *payload* is
what carries tensors between members, as opposed to control messages.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, Protocol

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from orchestrator.errors import UserError
from orchestrator.metrics import FaultEvent, Row, SpanRow, StepRow, latest_faults

SCHEMA_VERSION: Final = 1
FILE_NAME = "summary.json"


class SummaryError(UserError):
    """summary.json is unreadable or of another schema; names the file, the field and what to do."""


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# A diverged run must still get its summary, so a figure that is not finite is kept as "not known".
FiniteOrNone = Annotated[float | None, BeforeValidator(_finite_or_none)]


class FaultRow(BaseModel):
    """One fault of the run. Every `_after_s` is seconds after the fault happened; None: it never came to that."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    kind: str = Field(description="What happened: kill, hang, cut, ...")
    member: str = Field(description="The member that it happened to.")
    detected_after_s: FiniteOrNone = Field(None, description="Seconds until the controller noticed.")
    next_commit_after_s: FiniteOrNone = Field(None, description="Seconds until the next commit of the others.")
    back_after_s: FiniteOrNone = Field(
        None, description="Seconds until the first inner step of the next incarnation from a committed anchor."
    )
    contributed_after_s: FiniteOrNone = Field(
        None, description="Seconds until the first commit that holds work of the next incarnation."
    )
    estimated: bool = Field(
        False, description="The moment of the fault is not known exactly: the last sign of life stands for it."
    )


class Summary(BaseModel):
    """What a run came to: the content of summary.json, written once at the end (and by `atoll report` never)."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    schema_version: Literal[1] = Field(SCHEMA_VERSION, description="Version of this file's layout.")
    run_id: str = Field(description="Name of the run, that of its directory.")
    exit_reason: Literal["done", "failed", "stopped"] = Field(
        description="done: all tokens are committed; failed: see error; stopped: by the user, can be resumed."
    )
    error: str | None = Field(
        None, description="Why the run failed, in one sentence; null unless exit_reason is failed."
    )
    seconds: float = Field(ge=0, description="Seconds from the start of the run to its end, on the controller's clock.")
    params: int = Field(ge=0, description="Parameters of the model (values, not bytes).")
    initial_val_loss: FiniteOrNone = Field(
        None, description="Validation loss of the first anchor, nats per token; null: not evaluated or not finite."
    )
    final_val_loss: FiniteOrNone = Field(
        None,
        description="Last validation loss, nats per token: of the last anchor if the run is done, else of the last one "
        "that was evaluated; null: not evaluated or not finite.",
    )
    tokens_committed: int = Field(ge=0, description="Tokens of the leases that commits carry.")
    tokens_lost: int = Field(0, ge=0, description="Tokens that were trained on but are in no commit.")
    tokens_dropped: int = Field(
        0,
        ge=0,
        description="Tokens that a rule left out for good, such as those of an own pack that did not come back.",
    )
    tokens_reissued: int = Field(0, ge=0, description="Tokens that were leased again after their first lease was lost.")
    exchanges_committed: int = Field(0, ge=0, description="Exchanges that were committed (each of one fragment).")
    exchanges_discarded: int = Field(0, ge=0, description="Exchanges that were given up without a commit.")
    bytes_sent: int = Field(0, ge=0, description="Payload bytes sent by all members.")
    control_bytes_sent: int = Field(0, ge=0, description="Bytes of control messages sent by members and controller.")
    bytes_sent_per_param_per_round: float = Field(
        0.0,
        ge=0,
        description="All payload bytes (pieces, results, and states fetched by joiners and late ones) per parameter, "
        "committed contribution and round: in a long run without faults what an exchange alone costs a member.",
    )
    tokens_per_s: float = Field(0.0, ge=0, description="Committed tokens per second, from the first join to the end.")
    compute_utilization: float = Field(
        0.0, ge=0, description="Seconds inside inner steps over seconds from join to end, summed over members (0 to 1)."
    )
    goodput: float = Field(
        0.0,
        ge=0,
        description="Tokens committed over what the members would have made from their first join to the end, dead "
        "time included, at their own median fault-free speed (0 to 1).",
    )
    codec_backend: str = Field("", description="Implementation of the codec that ran, e.g. torch.")
    peak_memory_bytes: int | None = Field(None, ge=0, description="Largest peak memory of any island, bytes.")
    anchor_digest: str | None = Field(None, description="BLAKE3 digest (hex) of the last committed anchor.")
    faults: tuple[FaultRow, ...] = Field((), description="Every fault of the run, in order.")
    journal_rows: int | None = Field(None, ge=0, description="Rows of the journal: a truncated one is noticed.")
    journal_hash: str | None = Field(None, description="Hash of the journal's last row.")
    seq_len: int | None = Field(None, ge=1, description="Tokens of one training sample, the unit of the journal.")


def save_summary(summary: Summary, run_dir: Path) -> Path:
    """Write summary.json into `run_dir` atomically (a reader sees the old file or the new one). Raises OSError."""
    target = run_dir / FILE_NAME
    scratch = run_dir / f".{FILE_NAME}.{os.getpid()}"
    try:
        with open(scratch, "w", encoding="utf-8") as out:
            out.write(summary.model_dump_json(indent=2) + "\n")
            out.flush()
            os.fsync(out.fileno())
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)
    return target


def load_summary(run_dir: Path) -> Summary:
    """Read summary.json of `run_dir`. Raises FileNotFoundError, or SummaryError naming the field that is wrong."""
    path = run_dir / FILE_NAME
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        version = json.loads(text).get("schema_version")
    except (ValueError, AttributeError) as error:
        raise SummaryError(
            f"the summary is not a JSON object: {error}",
            place=str(path),
            remedy="atoll report and atoll ledger work from the journal; remove the file if it is damaged",
        ) from None
    if version != SCHEMA_VERSION:
        raise SummaryError(
            f"schema_version = {version!r}, but this atoll reads {SCHEMA_VERSION}",
            place=str(path),
            remedy="the version of atoll in versions.json beside it",
        )
    try:
        return Summary.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise SummaryError(
            f"{where} = {first['input']!r}: {first['msg']}",
            place=str(path),
            remedy="the version of atoll in versions.json beside it; atoll ledger works from the journal",
        ) from None


# --- derived figures ---------------------------------------------------------------------------------------------


def tokens_per_s(tokens_committed: int, seconds: float) -> float:
    """`tokens_committed / seconds`; 0 where no time has passed."""
    return tokens_committed / seconds if seconds > 0 else 0.0


def compute_utilization(compute_s: Mapping[str, float], member_s: Mapping[str, float]) -> float:
    """`sum_m compute_s[m] / sum_m member_s[m]` over the members of `member_s`; 0 where nobody joined.

    compute_s: seconds inside inner steps; member_s: seconds from first join to end, dead time included.
    """
    available_s = sum(member_s.values())
    return sum(compute_s.get(member, 0.0) for member in member_s) / available_s if available_s > 0 else 0.0


def goodput(tokens_committed: int, speed_tokens_per_s: Mapping[str, float], member_s: Mapping[str, float]) -> float:
    """`tokens_committed / sum_m speed[m] * member_s[m]`; 0 where nobody has a speed.

    speed_tokens_per_s: each member's own median fault-free speed (`fault_free_speed`); a member that never made a
    step has none and is counted at the median of the others, else its absence would look like good use.
    member_s: seconds from first join to end, dead time included.
    """
    if not speed_tokens_per_s:
        return 0.0
    typical = statistics.median(speed_tokens_per_s.values())
    possible = sum(speed_tokens_per_s.get(member, typical) * seconds for member, seconds in member_s.items())
    return tokens_committed / possible if possible > 0 else 0.0


def bytes_sent_per_param_per_round(
    bytes_sent: int, *, params: int, num_contributions: int, num_fragments: int = 1
) -> float:
    """`bytes_sent / (params * num_contributions / num_fragments)`: what one member sends per parameter and round.

    num_contributions: the sizes of all committed rosters, added up. A round commits each of the `num_fragments`
    fragments once, so a member that is in all of them makes `num_fragments` contributions. 0 without any.
    """
    contributed_values = params * num_contributions / num_fragments if num_fragments > 0 else 0.0
    return bytes_sent / contributed_values if contributed_values > 0 else 0.0


def data_parallel_bytes(*, params: int, num_member_steps: int, num_members: int) -> int:
    """Bytes that data parallel would have sent: `4 * params * 2 (n - 1) / n` per member and step.

    That is fp32 gradients in a ring all-reduce, the usual baseline. num_member_steps: inner steps of all members,
    added up; num_members: n.
    """
    if num_members < 2:
        return 0
    return round(4 * params * 2 * (num_members - 1) / num_members * num_member_steps)


class SpeedSample(Protocol):
    """What `fault_free_speed` needs of a step; StepRow has it."""

    @property
    def member(self) -> str:
        """The member that made the step."""

    @property
    def t_s(self) -> float:
        """End of the step, seconds since the start of the run."""

    @property
    def tokens_per_s(self) -> float:
        """Tokens of the step over its seconds, waits excluded."""


def fault_free_speed(steps: Iterable[SpeedSample], faults: Iterable[FaultEvent] = ()) -> dict[str, float]:
    """Median `tokens_per_s` of each member over its steps outside of every fault, of whichever member.

    A fault lasts from its moment to the first contribution of the next incarnation (or its first step, or for good):
    survivors that share a machine with the victim run faster meanwhile. A member with no step outside keeps them all.
    """
    windows = [_fault_window(event) for event in faults]
    inside: dict[str, list[float]] = defaultdict(list)
    outside: dict[str, list[float]] = defaultdict(list)
    for step in steps:
        in_fault = any(start <= step.t_s <= end for start, end in windows)
        (inside if in_fault else outside)[step.member].append(step.tokens_per_s)
    return {member: statistics.median(outside.get(member) or inside[member]) for member in {**inside, **outside}}


def _fault_window(event: FaultEvent) -> tuple[float, float]:
    start = event.injected_s if event.injected_s is not None else event.detected_s
    end = event.contributed_s if event.contributed_s is not None else event.back_s
    return (start if start is not None else event.t_s, end if end is not None else math.inf)


def first_joins(spans: Iterable[SpanRow]) -> dict[str, float]:
    """When each member first joined: the end of its first `start` span, else the start of its first span."""
    earliest: dict[str, SpanRow] = {}
    for span in spans:
        if span.member not in earliest or span.start_s < earliest[span.member].start_s:
            earliest[span.member] = span
    return {member: span.end_s if span.phase == "start" else span.start_s for member, span in earliest.items()}


def seconds_there(joins_s: Mapping[str, float], spans: Iterable[SpanRow], *, end_s: float) -> dict[str, float]:
    """Seconds of each member from its first join to the end, dead time included, without those after it had left."""
    there = {member: end_s - joined_s for member, joined_s in joins_s.items()}
    for span in spans:
        if span.phase == "away" and span.member in there:
            there[span.member] -= span.end_s - span.start_s
    return {member: max(0.0, seconds) for member, seconds in there.items()}


def fault_rows(events: Iterable[FaultEvent]) -> tuple[FaultRow, ...]:
    """Summary rows of the faults; a fault of unknown moment is counted from its detection and marked estimated."""
    return tuple(_fault_row(event) for event in latest_faults(events))


def _fault_row(event: FaultEvent) -> FaultRow:
    known = event.injected_s is not None
    moment_s = event.injected_s if known else event.detected_s
    return FaultRow(
        kind=event.fault,
        member=event.member,
        detected_after_s=_elapsed(moment_s, event.detected_s) if known else None,
        next_commit_after_s=_elapsed(moment_s, event.next_commit_s),
        back_after_s=_elapsed(moment_s, event.back_s),
        contributed_after_s=_elapsed(moment_s, event.contributed_s),
        estimated=event.estimated or not known,
    )


def _elapsed(start_s: float | None, end_s: float | None) -> float | None:
    return end_s - start_s if start_s is not None and end_s is not None else None


class _Speed(NamedTuple):
    member: str
    t_s: float
    tokens_per_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """The derived figures of a run (or of the part of it that the rows cover)."""

    tokens_per_s: float
    compute_utilization: float
    goodput: float
    faults: tuple[FaultRow, ...]


def derive_figures(
    rows: Iterable[Row], *, tokens_committed: int, end_s: float, joins_s: Mapping[str, float] | None = None
) -> Figures:
    """Every figure that the metrics rows of a run determine; reads `rows` once (`metrics.read_rows` will do).

    end_s: end of the run; joins_s: each member's first join from the journal, else guessed by `first_joins`.
    """
    speeds: list[_Speed] = []  # a long run has millions of steps: keep three values of each
    compute_s: dict[str, float] = defaultdict(float)
    spans: list[SpanRow] = []
    events: list[FaultEvent] = []
    for row in rows:
        if isinstance(row, StepRow):
            speeds.append(_Speed(row.member, row.t_s, row.tokens_per_s))
            compute_s[row.member] += row.compute_s
        elif isinstance(row, SpanRow):
            spans.append(row)
        elif isinstance(row, FaultEvent):
            events.append(row)
    joins_s = joins_s if joins_s is not None else first_joins(spans)
    member_s = seconds_there(joins_s, spans, end_s=end_s)
    return Figures(
        tokens_per_s=tokens_per_s(tokens_committed, max(member_s.values(), default=0.0)),
        compute_utilization=compute_utilization(compute_s, member_s),
        goodput=goodput(tokens_committed, fault_free_speed(speeds, latest_faults(events)), member_s),
        faults=fault_rows(events),
    )
