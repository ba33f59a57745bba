"""A member's copy of the journal, with the questions that it asks of it (protocol 1.2 rule 4)."""

from __future__ import annotations

from collections.abc import Sequence

from workers.live_settings import LiveSettings
from workers.records import (
    GENESIS_HASH,
    CommitRecord,
    FenceRecord,
    GenesisRecord,
    JoinRecord,
    LeaseRecord,
    PauseRecord,
    RevokeRecord,
    RollbackRecord,
    Row,
    SettingRecord,
    SettleRecord,
    SharesRecord,
    StopRecord,
)

GENESIS_CHAIN = "genesis"


class RecordLog:
    """Rows 0..n-1 of the journal, as far as this member has been told."""

    def __init__(self) -> None:
        """An empty copy."""
        self.rows: list[Row] = []
        self.genesis: GenesisRecord | None = None
        self._clear()

    def _clear(self) -> None:
        self.genesis = None
        self.shares: SharesRecord | None = None
        self._by_prev: dict[tuple[int, str], CommitRecord] = {}
        self._on_path: dict[tuple[int, str], int] = {}
        self._commits: list[dict[int, CommitRecord]] = []
        self.fenced: set[tuple[str, int]] = set()
        self.live: set[tuple[str, int]] = set()
        self.refused: set[tuple[str, int]] = set()
        self.settled: set[tuple[str, int]] = set()
        self.settings = LiveSettings()
        self.paused = False

    def __len__(self) -> int:
        """Rows held."""
        return len(self.rows)

    def extend(self, rows_from: int, rows: Sequence[Row], *, rewrite: bool) -> list[Row] | None:
        """Add what is new; returns it, or None when there is a gap or a contradiction.

        `rewrite`: a controller of a new lineage may replace rows that only the lost journal had.
        """
        if rows_from > len(self.rows):
            return None
        overlap = self.rows[rows_from : rows_from + len(rows)]
        if any(mine.hash != theirs.hash for mine, theirs in zip(overlap, rows, strict=False)):
            if not rewrite:
                return None
            kept = self.rows[:rows_from]
            self.rows = []
            self._clear()
            for row in kept:
                self._add(row)
        new = list(rows[len(self.rows) - rows_from :])
        last = self.rows[-1].hash if self.rows else GENESIS_HASH
        for seq, row in enumerate(new, start=len(self.rows)):
            if row.prev != last or row.seq != seq:
                return None
            last = row.hash
        for row in new:
            self._add(row)
        return new

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        if type(row.record) is not LeaseRecord:  # most rows are leases; it is told of its own in time
            self._heed(row)

    def _heed(self, row: Row) -> None:
        match row.record:
            case GenesisRecord() as genesis:
                self.genesis = genesis
                self._commits = [{} for _ in genesis.digests]
                for fragment in range(len(genesis.digests)):
                    self._on_path[fragment, GENESIS_CHAIN] = 0
            case CommitRecord() as commit:
                self._by_prev[commit.fragment, commit.prev_chain] = commit
                self._on_path[commit.fragment, commit.chain] = commit.n
                self._commits[commit.fragment][commit.n] = commit
            case RevokeRecord() as revoke:
                self._undo(revoke.fragment, revoke.n)
            case RollbackRecord() as rollback:
                for fragment, n in enumerate(rollback.versions):
                    while self.head(fragment) > n:
                        self._undo(fragment, self.head(fragment))
                self.settings.roll_back(rollback.versions)
            case SettingRecord() as setting:
                self.settings.add(setting)
            case PauseRecord(paused=paused):
                self.paused = paused
            case StopRecord():
                self.paused = False
            case FenceRecord() as fence:
                self.fenced.add((fence.member, fence.incarnation))
                self.live.discard((fence.member, fence.incarnation))
                if fence.refused:
                    self.refused.add((fence.member, fence.incarnation))
            case SettleRecord() as settle:
                self.settled.add((settle.member, settle.incarnation))
            case JoinRecord() as join:
                self.live.add((join.member, join.incarnation))
            case SharesRecord() as shares:
                self.shares = shares
            case _:
                pass

    def _undo(self, fragment: int, n: int) -> None:
        commit = self._commits[fragment].pop(n)
        del self._by_prev[fragment, commit.prev_chain]
        del self._on_path[fragment, commit.chain]

    def next(self, fragment: int, chain: str) -> CommitRecord | None:
        """The commit that extends version `chain` of a fragment."""
        return self._by_prev.get((fragment, chain))

    def on_path(self, fragment: int, chain: str) -> bool:
        """Whether a version is part of the journal's history."""
        return (fragment, chain) in self._on_path

    def commit(self, fragment: int, n: int) -> CommitRecord | None:
        """The commit that made version `n`."""
        return self._commits[fragment].get(n) if self._commits else None

    def head(self, fragment: int) -> int:
        """Newest version known; 0 is genesis, -1 nothing yet."""
        if not self._commits:
            return -1
        return max(self._commits[fragment], default=0)

    def chain(self, fragment: int, n: int) -> str | None:
        """Chain id of version `n`, or None if it is not on the path."""
        if n == 0:
            return GENESIS_CHAIN if self.genesis else None
        commit = self.commit(fragment, n)
        return commit.chain if commit else None

    def digest(self, fragment: int, n: int) -> str | None:
        """Sealed digest of version `n`: anchor and outer state."""
        if n == 0:
            return self.genesis.digests[fragment] if self.genesis else None
        commit = self.commit(fragment, n)
        return commit.digest if commit else None
