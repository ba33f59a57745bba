"""The member's rules: small functions, each of which keeps the result right; a test takes each of them out.

`workers/member.py`, the tensors (`workers/replica.py`) and their symbolic counterpart all call these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from workers.messages import Assign, Version
from workers.records import CommitRecord, OfferId, Term

if TYPE_CHECKING:
    from workers.member import FragmentState
    from workers.record_log import RecordLog

T = TypeVar("T")


def included(record: CommitRecord, offer: OfferId) -> bool:
    """The record of version base+1 alone decides the fate of an offer (C2)."""
    (name, incarnation), seq = offer
    return any((e.seq, e.member, e.incarnation) == (seq, name, incarnation) for e in record.roster)


def obeys(mine: Term | None, theirs: Term) -> bool:
    """A member never obeys a lower term than it has seen (C5, C11)."""
    return mine is None or theirs.rank >= mine.rank


def supersedes(new: Assign, old: Assign | None) -> bool:
    """Only the highest (exchange, attempt) counts."""
    return old is None or (new.exchange.rank, new.attempt) > (old.exchange.rank, old.attempt)


def lacks_version(state: FragmentState, log: RecordLog, fragment: int, version: Version) -> bool:
    """Whether this member neither holds a version nor everything needed to apply it (H12)."""
    if state.version == version:
        return False
    if state.n >= version.n and log.on_path(fragment, version.chain):
        return False
    record = log.next(fragment, state.chain) if state.n >= 0 else None
    complete = record is not None and set(record.chunk_digests) <= state.content
    return not (record is not None and record.chain == version.chain and complete)


def residual_after(residual: T, next_residual: T, *, included: bool) -> T:
    """The residual once base+1 is applied: what encoding left counts only if the record lists the offer (C8)."""
    return next_residual if included else residual


def aside_after(aside: T | None, *, included: bool) -> T | None:
    """What was set aside while it was under way, once base+1 is applied: still there unless the record has it (C2)."""
    return None if included else aside
