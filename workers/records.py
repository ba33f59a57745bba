"""Journal records: everything that was ever decided in a run, as frozen values with a hash chain.

The controller writes them, members keep copies, `atoll ledger` recomputes the run from them. A row of the journal is
one JSON object `{"seq", "prev", "hash", "kind", ...fields}`; `hash` covers `prev` and the fields, so that a row that
was deleted, doubled, swapped or edited breaks the chain at its place.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, get_type_hints

from blake3 import blake3

from strategies.robust import Recipe
from workers.identities import MemberId as MemberId
from workers.identities import OfferId as OfferId
from workers.identities import RosterEntry as RosterEntry
from workers.identities import Term as Term
from workers.pair_records import PairCommitRecord, PairRosterRecord
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
from workers.ranges import Range
from workers.record_base import Record as Record
from workers.roster_text import RosterTexts

GENESIS_HASH = "0" * 32


@dataclass(frozen=True, kw_only=True, slots=True)
class TermRecord(Record):
    """A controller took over; `continues` is the hash of the row before."""

    kind: ClassVar[str] = "term"
    lineage: int
    number: int
    controller: str


@dataclass(frozen=True, kw_only=True, slots=True)
class GenesisRecord(Record):
    """Version 0 of every fragment: made once by `maker`, shipped to the others, never derived again."""

    kind: ClassVar[str] = "genesis"
    maker: str
    digests: tuple[str, ...]
    num_params: int
    num_chunks: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinRecord(Record):
    """A process became the live incarnation of a member."""

    kind: ClassVar[str] = "join"
    member: str
    incarnation: int
    nonce: str
    node: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FenceRecord(Record):
    """Final verdict on an incarnation: nothing it does from now on counts."""

    kind: ClassVar[str] = "fence"
    member: str
    incarnation: int
    why: str
    refused: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ScopeRecord(Record):
    """Samples that one member alone may have: `ranges[i]` are those of `members[i]`, whose data stay on its machine.

    It comes before the first lease, and holds for the whole run.
    """

    kind: ClassVar[str] = "scope"
    members: tuple[str, ...]
    ranges: tuple[Range, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class AbandonRecord(Record):
    """What is left of `member`'s own samples, which nobody else may have: they are dropped, for it did not come back.

    `ranges`: first those that were leased and given back, then those that never were.
    """

    kind: ClassVar[str] = "abandon"
    member: str
    ranges: tuple[Range, ...]
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseRecord(Record):
    """Samples given to an incarnation; `index` = samples it had been given before."""

    kind: ClassVar[str] = "lease"
    member: str
    incarnation: int
    index: int
    ranges: tuple[Range, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SharesRecord(Record):
    """Load by speed, in force until the next one: `members[i]` makes `steps[i]` of the `inner_steps` of a round.

    `batch_sizes[i]`: samples of one of its steps. Who is not named makes all of them.
    """

    kind: ClassVar[str] = "shares"
    inner_steps: int
    members: tuple[str, ...]
    steps: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CommitRecord(Record):
    """Fragment `fragment` moved from version `n - 1` to `n`; the roster alone decides who was in."""

    kind: ClassVar[str] = "commit"
    fragment: int
    n: int
    prev_chain: str
    chain: str
    serial: int
    attempt: int
    roster: tuple[RosterEntry, ...]
    roster_digest: str
    chunk_digests: tuple[str, ...]
    digest: str
    base_samples: int


LEFT = "it left"
"""Why an incarnation is fenced that was asked to leave and has handed over everything."""


HUNG = "it hangs: "
"""Begins why an incarnation is fenced that made no step any more: its process lives, and has to be ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SettleRecord(Record):
    """The samples of a fenced incarnation got their fates: full, partial, or free again.

    `lost`: how many of those that are free again it had trained on, as far as it was heard.
    """

    kind: ClassVar[str] = "settle"
    member: str
    incarnation: int
    lost: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class DropRecord(Record):
    """Work of a living incarnation up to consumption count `upto` was dropped by rule `why`: back to the anchor."""

    kind: ClassVar[str] = "drop"
    member: str
    incarnation: int
    upto: int
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RevokeRecord(Record):
    """Version `n` of a fragment is held by nobody and is taken back."""

    kind: ClassVar[str] = "revoke"
    fragment: int
    n: int
    chain: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultRecord(Record):
    """Something went wrong or was made to go wrong; times in seconds since the run's start."""

    kind: ClassVar[str] = "fault"
    fault: str
    member: str
    injected: bool
    t_s: float
    detail: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RefusalRecord(Record):
    """A contribution of a member did not count, or (`as_owner`) what it reduced for others was wrong: why."""

    kind: ClassVar[str] = "refusal"
    member: str
    incarnation: int
    why: str
    as_owner: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class StandingRecord(Record):
    """What a member is from now on, `member`, `banned` or `probation`, after `serial` commits; and why."""

    kind: ClassVar[str] = "standing"
    member: str
    standing: str
    serial: int
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRecord(Record):
    """Validation loss of the anchor at `versions` (one number per fragment), nats per token.

    None: it was not finite, or an own loop brought nothing to evaluate with.
    """

    kind: ClassVar[str] = "evaluation"
    member: str
    versions: tuple[int, ...]
    samples: int
    val_loss: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotRecord(Record):
    """A durable snapshot of the anchor is complete."""

    kind: ClassVar[str] = "snapshot"
    name: str
    versions: tuple[int, ...]


Scalar = int | float | str | None
"""What a setting that changes while the run goes on can be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingRecord(Record):
    """A setting was changed: in fragment f it holds for transitions from version `since[f]` on, for every member."""

    kind: ClassVar[str] = "setting"
    key: str
    value: Scalar
    since: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PauseRecord(Record):
    """Members take no further samples (`paused`), or take them again."""

    kind: ClassVar[str] = "pause"
    paused: bool
    why: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RollbackRecord(Record):
    """All fragments went back to the versions of snapshot `name`; every member was fenced and settled before.

    What later versions had committed is free again.
    """

    kind: ClassVar[str] = "rollback"
    name: str
    versions: tuple[int, ...]
    chains: tuple[str, ...]
    why: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class StopRecord(Record):
    """The run stopped: `reason` is done, stopped or failed."""

    kind: ClassVar[str] = "stop"
    reason: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class OperatorRecord(Record):
    """Somebody asked for something while the run went on: what, of which member, by which way, and what came of it."""

    kind: ClassVar[str] = "operator"
    action: str
    member: str
    by: str
    outcome: str
    t_s: float


KINDS: dict[str, type[Record]] = {
    cls.kind: cls
    for cls in (
        TermRecord, GenesisRecord, JoinRecord, FenceRecord, ScopeRecord, AbandonRecord, LeaseRecord, CommitRecord,
        SettleRecord,
        DropRecord,
        RevokeRecord, FaultRecord, EvaluationRecord, SnapshotRecord, SettingRecord, PauseRecord, RollbackRecord,
        SharesRecord, StopRecord, OperatorRecord, PipelineGenesisRecord, ServeRecord, StepRecord, StepFenceRecord,
        StageCommitRecord, StageCountRecord, StageSyncRecord, WorkLostRecord, LeftRecord, RefusalRecord, StandingRecord,
        PairRosterRecord, PairCommitRecord,
    )
}  # fmt: skip
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)
_LINE = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_ENTRY_HINTS: dict[str, Any] = get_type_hints(RosterEntry)
_FIELDS: dict[type[Record], tuple[str, ...]] = {
    cls: tuple(field.name for field in fields(cls)) for cls in KINDS.values()
}
_HINTS: dict[str, dict[str, Any]] = {kind: get_type_hints(cls) for kind, cls in KINDS.items()}


class RecordError(ValueError):
    """A journal row that cannot be read; says which field and why."""


_ROSTERS = RosterTexts()


def _row_payload(seq: int, record: Record) -> bytes:
    """What the hash of a row is taken of: the canonical form of its number and fields."""
    body = {"seq": seq, **to_body(record, with_roster=not isinstance(record, CommitRecord))}
    text = _CANONICAL.encode(body)
    if isinstance(record, CommitRecord):  # the body's keys are in order: this one comes before "roster_digest"
        before, key, after = text.partition('"roster_digest":')
        text = f'{before}"roster":{_ROSTERS.text(record.roster)},{key}{after}'
    return text.encode()


def to_body(record: Record, *, with_roster: bool = True) -> dict[str, Any]:
    """JSON-ready fields of a record, `kind` first. (`asdict` copies every range of every roster, one by one.)"""
    body: dict[str, Any] = {"kind": record.kind}
    for name in _FIELDS[type(record)]:
        body[name] = getattr(record, name)
    if not with_roster:
        del body["roster"]
    elif isinstance(record, CommitRecord):
        body["roster"] = tuple(_entry_body(entry) for entry in record.roster)
    return body


def _entry_body(entry: RosterEntry) -> dict[str, Any]:
    return {
        "member": entry.member, "incarnation": entry.incarnation, "seq": entry.seq, "since": entry.since,
        "upto": entry.upto, "ranges": entry.ranges, "num_steps": entry.num_steps, "coefficient": entry.coefficient,
    }  # fmt: skip


def canonical(body: dict[str, Any]) -> bytes:
    """The one byte form of a body that hashes are taken of."""
    return _CANONICAL.encode(body).encode()


def chain_hash(prev: str, payload: bytes) -> str:
    """BLAKE3 (128 bit, hex) of the previous hash and a payload."""
    return blake3(prev.encode() + payload).hexdigest(length=16)


def roster_digest(roster: tuple[RosterEntry, ...]) -> str:
    """Digest of a roster with its coefficients: names what a reduced part was made of."""
    return chain_hash("roster", f'{{"roster":{_ROSTERS.text(roster)}}}'.encode())


def work_digest(of_roster: str, recipe: Recipe | None) -> str:
    """What owners are asked to do: named by the digest of the roster, and of the recipe where there is one."""
    return of_roster if recipe is None else chain_hash(of_roster, canonical(asdict(recipe)))


def version_chain(prev_chain: str, record_fields: dict[str, Any]) -> str:
    """Chain id of the version that a commit makes: hash of the previous chain and the commit's content."""
    return chain_hash(prev_chain, canonical(record_fields))


def _ranges(value: Any) -> tuple[Range, ...]:
    return tuple((int(start), int(stop)) for start, stop in value)


def _roster_entry(entry: Any, kind: str) -> RosterEntry:
    if not isinstance(entry, dict) or set(entry) != set(_ENTRY_HINTS):
        raise RecordError(f"record {kind!r}: a roster entry has other fields than {sorted(_ENTRY_HINTS)}")
    return RosterEntry(**{name: _convert(name, _ENTRY_HINTS[name], value, kind) for name, value in entry.items()})


def _convert(name: str, hint: Any, value: Any, kind: str) -> Any:
    if name == "ranges":
        return _ranges(value)
    if name == "roster":
        return tuple(_roster_entry(entry, kind) for entry in value)
    if name == "values":
        if not isinstance(value, dict):
            raise RecordError(f"record {kind!r}: field values is {value!r}, expected a table")
        return value
    if hint == Scalar and (isinstance(value, bool) or not isinstance(value, int | float | str | None)):
        raise RecordError(f"record {kind!r}: field {name} is {value!r}, expected a number, text or null")
    if isinstance(value, list):
        return tuple(value)
    if hint == float | None:
        if value is None:
            return None
        hint = float
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise RecordError(f"record {kind!r}: field {name} is {value!r}, expected {hint.__name__}")
    return value


def from_body(body: dict[str, Any]) -> Record:
    """The record of a JSON body; `RecordError` names an unknown kind, a missing, extra or mistyped field."""
    kind = body.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise RecordError(f"unknown record kind {kind!r}; known: {', '.join(sorted(KINDS))}")
    cls, hints = KINDS[kind], _HINTS[kind]
    known = {field.name for field in fields(cls)}
    given = set(body) - {"kind"}
    if given - known:
        raise RecordError(f"record {kind!r} has unknown fields {sorted(given - known)}")
    try:
        values = {name: _convert(name, hints[name], body[name], kind) for name in given}
        return cls(**values)
    except (TypeError, ValueError, KeyError) as error:
        raise RecordError(f"record {kind!r} cannot be read: {error}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row of the journal: its number, chain hashes and record."""

    seq: int
    prev: str
    hash: str
    record: Record


def make_row(seq: int, prev: str, record: Record) -> Row:
    """Row `seq` of a journal whose last hash is `prev`."""
    return Row(seq=seq, prev=prev, hash=chain_hash(prev, _row_payload(seq, record)), record=record)


def dump_row(row: Row) -> bytes:
    """The JSON line of a row, newline included."""
    body = {"seq": row.seq, "prev": row.prev, "hash": row.hash, **to_body(row.record)}
    return _LINE.encode(body).encode() + b"\n"


def load_row(line: bytes) -> Row:
    """The row of a JSON line; `RecordError` if it is not one or its own hash is wrong."""
    try:
        body = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"not JSON: {error}") from error
    if not isinstance(body, dict) or not {"seq", "prev", "hash"} <= set(body):
        raise RecordError("not a journal row: it lacks seq, prev or hash")
    seq, prev, stated = body.pop("seq"), body.pop("prev"), body.pop("hash")
    if type(seq) is not int or not isinstance(prev, str) or not isinstance(stated, str):
        raise RecordError(f"not a journal row: seq = {seq!r}, prev = {prev!r}, hash = {stated!r}")
    try:
        row = make_row(seq, prev, from_body(body))
    except (ValueError, TypeError, RecursionError) as error:
        raise RecordError(f"row {seq}: {error}") from error
    if row.hash != stated:
        raise RecordError(f"row {seq} was altered: its hash is {stated}, its content gives {row.hash}")
    return row
