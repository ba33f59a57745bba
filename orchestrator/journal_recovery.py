"""The journal out of the members' copies, after the controller's own was lost (protocol 1.2 rule 5)."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.segments import JournalError, verify_chain
from workers.records import Row, TermRecord

CONTRADICTION = "leave out the members of one of the two and recover again; their work since then is lost"


def recover(copies: Sequence[Sequence[Row]], *, num_members: int | None = None, force: bool = False) -> list[Row]:
    """The journal out of members' copies, after the controller's own was lost (protocol 1.2 rule 5).

    The longest valid copy, if more than half of the members agree with it: their copies are prefixes of it (or it is
    one of theirs). A valid copy that contradicts it is passed over only if it is of a lower lineage: its member slept
    through an earlier recovery. Broken copies do not count as agreeing.

    Args:
        copies: what the members handed in, after each had promised to obey the new term.
        num_members: live members, those included that handed in nothing; default `len(copies)`.
        force: accept the agreement of fewer members than more than half; contradictions are never accepted.

    Raises:
        JournalError: too few copies agree, or two contradict each other; names the row where they part.
    """
    total = len(copies) if num_members is None else num_members
    valid: list[Sequence[Row]] = []
    problems: list[str] = []
    for index, copy in enumerate(copies):
        try:
            verify_chain(copy)
            valid.append(copy)
        except JournalError as error:
            problems.append(f"copy {index}: {error.reason}")
    best = max(valid, key=lambda copy: (_lineage(copy), len(copy)), default=())
    agreeing = 0
    for copy in valid:
        parted = _parting(copy, best)
        if parted is None:
            agreeing += 1
        elif _lineage(copy) == _lineage(best):
            raise JournalError(
                f"two members' copies of the journal differ from row {parted} on",
                seq=parted,
                remedy=CONTRADICTION,
            )
        else:
            problems.append(f"a copy of lineage {_lineage(copy)} differs from row {parted} on")
    if 2 * agreeing <= total and not (force and agreeing):
        notes = f" ({'; '.join(problems)})" if problems else ""
        raise JournalError(
            f"{agreeing} of {total} members agree on {len(best)} rows of the journal, more than half are needed{notes}",
            remedy="wait until more members answer, or force the recovery with those that did",
        )
    return list(best)


def _lineage(rows: Sequence[Row]) -> int:
    return max((row.record.lineage for row in rows if isinstance(row.record, TermRecord)), default=-1)


def _parting(first: Sequence[Row], second: Sequence[Row]) -> int | None:
    """Number of the first row that differs, or None if one is a prefix of the other."""
    common = min(len(first), len(second))
    if not common or first[common - 1].hash == second[common - 1].hash:
        return None
    return next(i for i in range(common) if first[i].hash != second[i].hash)
