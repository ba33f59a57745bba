"""What the ledger keeps while it replays, and what it says: findings, deviations, incarnations, heads."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from typing import Literal

from orchestrator.run_state import GENESIS_CHAIN
from workers import ranges as spans
from workers.ranges import Range
from workers.records import CommitRecord, MemberId, version_chain

DeviationKind = Literal["partial", "dropped", "returned", "reissued", "revoked", "rolled back"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A violated rule: row number, `file:line` if known, the rule's name, what is wrong."""

    seq: int
    place: str
    rule: str
    text: str

    def __str__(self) -> str:
        where = f" ({self.place})" if self.place else ""
        return f"row {self.seq}{where}: {self.rule}: {self.text}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Deviation:
    """Samples that were not simply leased once and committed once. `member`: incarnation, or "" for many."""

    seq: int
    kind: DeviationKind
    member: str
    ranges: tuple[Range, ...]
    detail: str


@dataclass(kw_only=True, slots=True)
class Incarnation:
    """One life of a member. `floor`: positions below it were made final by a Drop."""

    id: MemberId
    lineage: int
    watermarks: list[int]
    live: bool = True
    settled: bool = False
    refused: bool = False
    fenced_in: int = 0
    floor: int = 0
    num_leased: int = 0
    leases: list[Range] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    after_fence: set[int] = field(default_factory=set)

    @property
    def low(self) -> int:
        """Position below which all fragments have committed (or a Drop decided)."""
        return min(self.watermarks, default=0)

    @property
    def high(self) -> int:
        """Position up to which some fragment has committed (or a Drop decided)."""
        return max(self.watermarks, default=0)

    def lease(self, given: Range) -> None:
        """Append one range."""
        before = len(self.leases)
        spans.append(self.leases, [given])
        if len(self.leases) > before:
            self.offsets.append(self.num_leased)
        self.num_leased += given[1] - given[0]

    def cut(self, since: int, upto: int) -> tuple[Range, ...]:
        """The samples at positions `since` to `upto`; only the spans that matter are looked at."""
        if since >= upto:
            return ()
        first, last = bisect_right(self.offsets, since) - 1, bisect_left(self.offsets, upto)
        offset = self.offsets[first]
        return spans.cut(self.leases[first:last], since - offset, upto - offset)


@dataclass(kw_only=True, slots=True)
class Head:
    """Head of a fragment, the highest version it ever had, its commits, and the digest of its version 0."""

    genesis: str = ""
    n: int = 0
    chain: str = GENESIS_CHAIN
    highest: int = 0
    serial: int = 0
    commits: list[CommitRecord] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """Of the newest version."""
        return self.commits[-1].digest if self.commits else self.genesis


def chain_of(r: CommitRecord) -> str:
    """Chain id of the version that a commit makes, from its content."""
    content = {
        "f": r.fragment,
        "n": r.n,
        "roster": r.roster_digest,
        "chunks": r.chunk_digests,
        "digest": r.digest,
    }
    return version_chain(r.prev_chain, content)
