"""The figures of a storm: rates of the run with faults beside the one without (pure).

Both are looked at between their first commit with everybody in it and their last one, the second while its storm
lasts. A member is *alive* while it
can train: from a kill to the first step of the next incarnation it is not, nor while a fault stops or hangs it.
*Throughput* is committed tokens over the sum of (seconds alive x the tokens per second of that member in the
fault-free run), as a share of the same figure of the fault-free run, which is 1 by definition.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from orchestrator.metrics import ExchangeRow, Row
from orchestrator.storm.follow import MISMATCHES, Followed, away, follow, storm_time
from workers.records import CommitRecord, FaultRecord, Record

SCHEMA_VERSION: Final = 1


class Times(BaseModel):
    """Seconds after the injection, over the faults that came to that."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num: int = Field(description="How many of the faults came to that.")
    median_s: float | None = Field(description="Median.")
    p95_s: float | None = Field(description="95th percentile (the next larger value).")
    max_s: float | None = Field(description="Largest.")


class KindFigures(BaseModel):
    """All faults of one kind."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    injected: int
    detected: int
    detected_as: dict[str, int] = Field(description="By which verdict, how often.")
    detection: Times
    next_commit: Times
    back: Times
    contributed: Times


class StormFigures(BaseModel):
    """What a storm came to: the content of `atoll storm --json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = SCHEMA_VERSION
    islands: int
    seconds: float = Field(description="Of the run with faults, from the first commit with everybody to the last one.")
    fault_free_seconds: float = Field(description="The same of the run without.")
    rate_per_hour: float = Field(description="Faults an hour that were asked for.")
    seed: int
    kinds: dict[str, KindFigures]
    undetected: list[str] = Field(description="Injected faults that nobody noticed, as `kind member@seconds`.")
    participation: float = Field(description="Mean share of the living, connected members in a commit's roster.")
    participation_low: float = Field(description="Share of commits with fewer than 90 % of them.")
    throughput: float = Field(description="Committed tokens over what the living would have made without faults.")
    tokens_per_s: float = Field(description="Committed tokens a second.")
    fault_free_tokens_per_s: float
    tokens_lost: int = Field(description="Trained on and in no commit.")
    tokens_reissued: int = Field(description="Leased again.")
    commits: int
    digest_mismatches: int = Field(description="Noticed by members or controller, in both runs.")
    ledger_findings: int = Field(description="Contradictions in the journals of both runs; 0: they add up.")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """What one run wrote. `seq_len`: tokens of a sample; `islands`: members that it is to have."""

    records: Sequence[Record]
    rows: Sequence[Row]
    seq_len: int
    islands: int
    tokens_lost: int
    tokens_reissued: int
    ledger_findings: int


def window(data: RunData) -> tuple[float, float]:
    """From the first commit with everybody in it to the last one, of the time of the storm if there was one.

    What comes after the storm, when the last faults are followed to their end, is calm and counts for nothing.
    """
    exchanges, storm = _exchanges(data), storm_time(data.records)
    start = next((e.t_s for e in exchanges if len(e.roster) >= data.islands and e.t_s >= storm[0]), math.inf)
    return start, max((e.t_s for e in exchanges if e.t_s <= storm[1]), default=-math.inf)


def tokens_by_member(data: RunData, span: tuple[float, float]) -> dict[str, int]:
    """Tokens of each member in the commits after the first of a window, up to its end."""
    times = {(e.fragment, e.version): e.t_s for e in data.rows if isinstance(e, ExchangeRow)}
    out: dict[str, int] = defaultdict(int)
    for record in data.records:
        if isinstance(record, CommitRecord) and record.fragment == 0:
            if span[0] < times.get((0, record.n), -math.inf) <= span[1]:
                for entry in record.roster:
                    out[entry.member] += (entry.upto - entry.since) * data.seq_len
    return dict(out)


def alive_s(faults: Sequence[Followed], member: str, span: tuple[float, float]) -> float:
    """Seconds of a window in which a member could train."""
    gone = sum(max(0.0, min(end, span[1]) - max(start, span[0])) for start, end in away(faults, member, span[1]))
    return max(span[1] - span[0] - gone, 0.0)


def participation(faults: Sequence[Followed], exchanges: Sequence[ExchangeRow], members: Sequence[str]) -> list[float]:
    """Of each commit: the share of the members that were alive and connected then that are in its roster."""
    end_s = max((e.t_s for e in exchanges), default=0.0)
    gone = {member: away(faults, member, end_s, linked=True) for member in members}
    out = []
    for exchange in exchanges:
        there = {m for m in members if not any(start <= exchange.t_s <= end for start, end in gone[m])}
        if there:
            out.append(len(there & set(exchange.roster)) / len(there))
    return out


def times(values: Iterable[float | None]) -> Times:
    """Median, 95th percentile (nearest rank) and largest of what is known."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return Times(num=0, median_s=None, p95_s=None, max_s=None)
    rank = math.ceil(0.95 * len(known)) - 1
    return Times(num=len(known), median_s=statistics.median(known), p95_s=known[rank], max_s=known[-1])


def of_kind(faults: Sequence[Followed]) -> KindFigures:
    """The figures of some faults."""
    verdicts: dict[str, int] = defaultdict(int)
    for fault in faults:
        if fault.detected_s is not None:
            verdicts[fault.detected_as] += 1

    def after(name: str) -> Times:
        moments = ((getattr(fault, name), fault.injected_s) for fault in faults)
        return times(None if moment is None else moment - began for moment, began in moments)

    return KindFigures(
        injected=len(faults),
        detected=sum(verdicts.values()),
        detected_as=dict(verdicts),
        detection=after("detected_s"),
        next_commit=after("next_commit_s"),
        back=after("back_s"),
        contributed=after("contributed_s"),
    )


def storm_figures(calm: RunData, stormy: RunData, *, rate: float, seed: int) -> StormFigures:
    """The figures of both runs."""
    faults = follow(stormy.records, stormy.rows)
    rough = _exchanges(stormy)
    calm_span, span = window(calm), window(stormy)
    calm_s, seconds = max(calm_span[1] - calm_span[0], 0.0), max(span[1] - span[0], 0.0)
    calm_tokens, tokens = tokens_by_member(calm, calm_span), tokens_by_member(stormy, span)
    speed = {member: num / calm_s for member, num in calm_tokens.items()} if calm_s else {}
    shares = participation(faults, [e for e in rough if span[0] <= e.t_s <= span[1]], sorted(speed))
    by_kind: dict[str, list[Followed]] = defaultdict(list)
    for fault in faults:
        by_kind[fault.kind].append(fault)
    mismatches = [
        r for data in (calm, stormy) for r in data.records if isinstance(r, FaultRecord) and r.fault in MISMATCHES
    ]
    return StormFigures(
        islands=stormy.islands,
        seconds=seconds,
        fault_free_seconds=calm_s,
        rate_per_hour=rate,
        seed=seed,
        kinds={kind: of_kind(found) for kind, found in sorted(by_kind.items())},
        undetected=[f"{f.kind} {f.member}@{f.injected_s:.1f}" for f in faults if f.detected_s is None],
        participation=statistics.fmean(shares) if shares else 0.0,
        participation_low=sum(share < 0.9 for share in shares) / len(shares) if shares else 0.0,
        throughput=_throughput(tokens, speed, {m: alive_s(faults, m, span) for m in speed}),
        tokens_per_s=sum(tokens.values()) / seconds if seconds else 0.0,
        fault_free_tokens_per_s=sum(speed.values()),
        tokens_lost=stormy.tokens_lost,
        tokens_reissued=stormy.tokens_reissued,
        commits=len(rough),
        digest_mismatches=len(mismatches),
        ledger_findings=calm.ledger_findings + stormy.ledger_findings,
    )


def _throughput(tokens: Mapping[str, int], speed: Mapping[str, float], alive: Mapping[str, float]) -> float:
    possible = sum(speed[member] * alive[member] for member in speed)
    return sum(tokens.values()) / possible if possible else 0.0


def _exchanges(data: RunData) -> list[ExchangeRow]:
    return [row for row in data.rows if isinstance(row, ExchangeRow) and row.fragment == 0]
