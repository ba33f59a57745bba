"""One copy of the journal for all members of a large run without faults, of which each knows a beginning.

Ten thousand members with copies of their own would need 20 GB, most of it for the sets of who lives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from orchestrator.simulation.symbols import must
from workers.record_log import RecordLog
from workers.records import JoinRecord, LeaseRecord, Row


@dataclass(kw_only=True, slots=True)
class OneJournal:
    """The rows that any member has heard of, and who lives by them."""

    rows: list[Row] = field(default_factory=list)
    live: set[tuple[str, int]] = field(default_factory=set)


class SharedLog(RecordLog):
    """A beginning of the one journal. Who lives is what the best informed member knows; nothing else runs ahead."""

    def __init__(self, journal: OneJournal) -> None:
        """`journal`: of all members of the run."""
        super().__init__()
        self.journal, self.num_rows = journal, 0
        self.live = journal.live

    def __len__(self) -> int:
        """Rows known."""
        return self.num_rows

    def extend(self, rows_from: int, rows: Sequence[Row], *, rewrite: bool) -> list[Row] | None:
        """See `RecordLog.extend`. Nothing is ever rewritten where nothing fails."""
        if rows_from > self.num_rows:
            return None
        known, new = self.journal.rows, list(rows[self.num_rows - rows_from :])
        for seq, row in enumerate(new, start=self.num_rows):
            if seq == len(known):
                known.append(row)
                if isinstance(row.record, JoinRecord):
                    self._heed(row)
            must(known[seq] is row, 2, f"two rows {seq} in a run without faults")
            if not isinstance(row.record, JoinRecord | LeaseRecord):
                self._heed(row)
        self.num_rows += len(new)
        return new
