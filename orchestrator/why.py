"""Why something was decided: the chain of journal rows that led to it, in words (pure functions over records).

The journal has every decision and its reason, but no time of its own; the rows of `metrics.jsonl` tell when a version
was committed, and faults carry their seconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from faults.lab.schedule import LINK_FAULT
from orchestrator.metrics import ExchangeRow
from workers.ranges import count
from workers.records import (
    LEFT,
    AbandonRecord,
    CommitRecord,
    DropRecord,
    EvaluationRecord,
    FaultRecord,
    FenceRecord,
    GenesisRecord,
    JoinRecord,
    LeaseRecord,
    MemberId,
    OperatorRecord,
    PauseRecord,
    Record,
    RevokeRecord,
    RollbackRecord,
    Row,
    SettingRecord,
    SettleRecord,
    SnapshotRecord,
    StopRecord,
    TermRecord,
)

_MEMBER = re.compile(r"(?P<name>.*?)(?:\.(?P<incarnation>[0-9]+))?")


class NothingKnown(ValueError):
    """The journal has nothing of the member or exchange that was asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One decision. `seq`: its row of the journal; `at_s`: seconds into the run, as far as that is known."""

    seq: int
    at_s: float | None
    text: str


@dataclass(kw_only=True, slots=True)
class _Lives:
    """Who was alive, row by row, and since when a run of commits has left somebody out."""

    alive: dict[str, int] = field(default_factory=dict)

    def apply(self, record: Record) -> None:
        if isinstance(record, JoinRecord):
            self.alive[record.member] = record.incarnation
        elif isinstance(record, FenceRecord) and self.alive.get(record.member) == record.incarnation:
            del self.alive[record.member]


def commit_times(rows: Sequence[ExchangeRow]) -> dict[tuple[int, int], float]:
    """When each version of each fragment was committed."""
    return {(row.fragment, row.version): row.t_s for row in rows}


def why_run(rows: Sequence[Row], times: Mapping[tuple[int, int], float]) -> list[Line]:
    """Every decision on who takes part, with its reason; commits are summed up between two of them."""
    out: list[Line] = []
    first: CommitRecord | None = None
    last: tuple[Row, CommitRecord] | None = None

    def close() -> None:
        nonlocal first, last
        if first is not None and last is not None:
            row, commit = last
            text = f"version {commit.n}" if commit.n == first.n else f"versions {first.n} to {commit.n}"
            plural = "s" if len(commit.roster) != 1 else ""
            text += f" committed, the last one from {len(commit.roster)} member{plural}"
            out.append(Line(seq=row.seq, at_s=times.get((commit.fragment, commit.n)), text=text))
        first = last = None

    for row in rows:
        if isinstance(row.record, CommitRecord):
            if row.record.fragment == 0:
                first, last = first or row.record, (row, row.record)
        elif (text := decision(row.record)) is not None and not isinstance(row.record, SnapshotRecord):
            close()
            out.append(Line(seq=row.seq, at_s=seconds_of(row.record), text=text))
    close()
    return out


def why_member(rows: Sequence[Row], times: Mapping[tuple[int, int], float], who: str) -> list[Line]:
    """What was decided about a member (`island-1`), or one incarnation of it (`island-1.2`), and why.

    Raises NothingKnown for a name that never joined.
    """
    match = _MEMBER.fullmatch(who)
    assert match is not None
    name, only = match["name"], int(match["incarnation"]) if match["incarnation"] else None
    lives = _Lives()
    lived = sorted({(r.record.member, r.record.incarnation) for r in rows if isinstance(r.record, JoinRecord)})
    if not any(name == member and only in (None, incarnation) for member, incarnation in lived):
        known = ", ".join(f"{member}.{incarnation}" for member, incarnation in lived)
        raise NothingKnown(f"the journal knows no member {who!r}; it has {known or 'none'}")
    out: list[Line] = []
    was_in: bool | None = None
    for row in rows:
        record = row.record
        lives.apply(record)
        text = _about(record, name)
        if isinstance(record, CommitRecord) and record.fragment == 0:
            inside = any(entry.member == name for entry in record.roster)
            if inside != was_in and (inside or name in lives.alive):
                was_in = inside
                text = _in_or_out(record, name, inside)
        elif isinstance(record, FenceRecord) and record.member == name:
            was_in = None
        if text is not None and _fits(record, only, lives.alive.get(name)):
            at_s = seconds_of(record)
            if isinstance(record, CommitRecord):
                at_s = times.get((record.fragment, record.n))
            out.append(Line(seq=row.seq, at_s=at_s, text=text))
    return out


def why_exchange(rows: Sequence[Row], times: Mapping[tuple[int, int], float], fragment: int, n: int) -> list[Line]:
    """How version `n` of a fragment came about: who was in, with what weight, who was not, and why.

    Raises NothingKnown for a version that was never committed.
    """
    lives, out = _Lives(), list[Line]()
    since: list[Row] = []
    newest = 0
    for row in rows:
        record = row.record
        lives.apply(record)
        if isinstance(record, RevokeRecord) and (record.fragment, record.n) == (fragment, n):
            out.append(Line(seq=row.seq, at_s=None, text=f"version {n} was revoked: no living member held it"))
        if not isinstance(record, CommitRecord) or record.fragment != fragment:
            since.append(row)
            continue
        newest = max(newest, record.n)
        if record.n != n:
            since = []
            continue
        for before in since:
            text = decision(before.record)
            if text is not None:
                out.append(Line(seq=before.seq, at_s=seconds_of(before.record), text=text))
        since = []
        out += _commit_lines(row, record, lives, rows, times.get((fragment, n)))
    if not out:
        made = next((len(row.record.digests) for row in rows if isinstance(row.record, GenesisRecord)), 0)
        if fragment >= made > 0:
            raise NothingKnown(f"there is no fragment {fragment}: the run has {made}, and the first is 0")
        raise NothingKnown(f"version {n} of fragment {fragment} was never committed; the newest is {newest}")
    return out


def _commit_lines(row: Row, record: CommitRecord, lives: _Lives, rows: Sequence[Row], at_s: float | None) -> list[Line]:
    serial = f"exchange {record.serial}" + (f", attempt {record.attempt}" if record.attempt else "")
    text = f"version {record.n} of fragment {record.fragment} was committed ({serial})"
    out = [Line(seq=row.seq, at_s=at_s, text=text)]
    for entry in record.roster:
        text = (
            f"{entry.offer.member} was in with coefficient {entry.coefficient:.4f}: {entry.num_steps} steps, "
            f"{count(entry.ranges)} samples"
        )
        out.append(Line(seq=row.seq, at_s=at_s, text=text))
    inside = {entry.member for entry in record.roster}
    for name, incarnation in sorted(lives.alive.items()):
        if name not in inside:
            why = _absence(rows[: row.seq], name, incarnation, record.n)
            out.append(Line(seq=row.seq, at_s=at_s, text=f"{name}.{incarnation} was not in: {why}"))
    return out


def _absence(rows: Sequence[Row], name: str, incarnation: int, n: int) -> str:
    """What the journal last said of a living member that a commit is without."""
    commits = 0
    for row in reversed(rows):
        record = row.record
        if isinstance(record, CommitRecord) and record.fragment == 0:
            commits += 1
            if any(entry.member == name and entry.incarnation == incarnation for entry in record.roster):
                break
        if isinstance(record, FaultRecord) and record.member == name:
            return f"{_fault(record)}; it catches up and offers its work later"
        if isinstance(record, JoinRecord) and (record.member, record.incarnation) == (name, incarnation):
            return "it had joined and had nothing to offer yet"
        if isinstance(record, DropRecord) and record.member == name:
            return f"its work was dropped: {record.why}"
    return "its offer came after the roster was fixed; it keeps its work and offers it for a later version"


def _fits(record: Record, only: int | None, current: int | None) -> bool:
    if only is None:
        return True
    incarnation = getattr(record, "incarnation", None)
    return (incarnation if incarnation is not None else current) == only


def _in_or_out(record: CommitRecord, name: str, inside: bool) -> str:
    entry = next((e for e in record.roster if e.member == name), None)
    if inside and entry is not None:
        return (
            f"{entry.offer.member} is in version {record.n} (coefficient {entry.coefficient:.4f}, {entry.num_steps} "
            "steps), and in those after it until said otherwise"
        )
    return f"version {record.n} was committed without it: its offer was not there when the roster was fixed"


def _about(record: Record, name: str) -> str | None:
    """A record in words, if it concerns a member; the links of a lab may concern everybody."""
    if isinstance(record, FaultRecord) and record.injected and record.fault.startswith(LINK_FAULT):
        return _fault(record)
    if name not in str(getattr(record, "member", "")).split("+"):
        return None
    if isinstance(record, LeaseRecord):
        if record.index:
            return None  # one after each commit
        return f"{name}.{record.incarnation} was leased its first {count(record.ranges)} samples"
    return None if isinstance(record, EvaluationRecord) else decision(record)


def decision(record: Record) -> str | None:
    """A decision in words, None for what happens all the time, and for what only pipelines write."""
    match record:
        case TermRecord():
            return f"controller {record.controller} took over as term {record.lineage}.{record.number}"
        case GenesisRecord():
            return f"{record.maker} made version 0 ({record.num_params:,} parameters)"
        case JoinRecord():
            return f"{MemberId(name=record.member, incarnation=record.incarnation)} joined"
        case FenceRecord():
            who = MemberId(name=record.member, incarnation=record.incarnation)
            return f"{who} left" if record.why == LEFT else f"{who} was fenced: {record.why}"
        case SettleRecord():
            who = MemberId(name=record.member, incarnation=record.incarnation)
            lost = f", {record.lost} of them trained on for nothing" if record.lost else ""
            return f"what {who} held and had not committed went back to be leased again{lost}"
        case DropRecord():
            who = MemberId(name=record.member, incarnation=record.incarnation)
            return f"work of {who} up to its sample {record.upto} was dropped: {record.why}"
        case AbandonRecord():
            return f"{count(record.ranges)} samples of {record.member}'s own pack were dropped: {record.why}"
        case RevokeRecord():
            return f"version {record.n} of fragment {record.fragment} was revoked: nobody held it"
        case FaultRecord():
            return _fault(record)
        case SnapshotRecord():
            return f"snapshot {record.name} was complete"
        case PauseRecord():
            return "the run was paused" if record.paused else "the run went on"
        case SettingRecord():
            return f"{record.key} = {record.value!r} from version {min(record.since)} on"
        case RollbackRecord():
            return f"the run went back to version {max(record.versions)}, of snapshot {record.name}: {record.why}"
        case OperatorRecord():
            whom = f" of {record.member}" if record.member else ""
            return f"{record.by} asked for {record.action}{whom}: {record.outcome}"
        case StopRecord():
            return f"the run ended: {record.reason}{f', {record.detail}' if record.detail else ''}"
    return None


def _fault(record: FaultRecord) -> str:
    whom = f" {record.member}" if record.member else ""
    how = "injected" if record.injected else "noticed"
    return f"{how}: {record.fault}{whom}" + (f" ({record.detail})" if record.detail else "")


def seconds_of(record: Record) -> float | None:
    """The time that a record carries, None for most."""
    return record.t_s if isinstance(record, FaultRecord | OperatorRecord) else None
