"""What the journal says: the pure replay of its records (protocol 1.2, 1.8).

The controller's durable state is this and nothing else. Open exchanges, reports, suspicion and timers are not here:
they are lost at a restart, harmlessly. Every record is checked as it is applied; `JournalContradiction` means a bug or
an altered journal, never a user's mistake.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from orchestrator.bans import STANDINGS, Bans, Standing, StandingChange
from workers import ranges
from workers.live_settings import LiveSettings, holds_at_once
from workers.messages import Version
from workers.pair_records import PairCommitRecord, PairRosterRecord
from workers.ranges import Range
from workers.records import (
    AbandonRecord,
    CommitRecord,
    DropRecord,
    EvaluationRecord,
    FenceRecord,
    GenesisRecord,
    JoinRecord,
    LeaseRecord,
    MemberId,
    PauseRecord,
    Record,
    RefusalRecord,
    RevokeRecord,
    RollbackRecord,
    ScopeRecord,
    SettingRecord,
    SettleRecord,
    SharesRecord,
    StandingRecord,
    StopRecord,
    Term,
    TermRecord,
)
from workers.scopes import ALL_SHARED, Scopes

GENESIS_CHAIN = "genesis"
COMMITS_NOTHING = {
    JoinRecord, FenceRecord, ScopeRecord, AbandonRecord, LeaseRecord, SharesRecord, SettingRecord, EvaluationRecord,
}  # fmt: skip
"""Records after which as many samples are committed as before."""


class JournalContradiction(AssertionError):
    """A record that cannot follow the ones before it."""


@dataclass(kw_only=True, slots=True)
class Dropped:
    """Work that a rule made final: positions `since` to `upto`, and what each fragment had of them."""

    since: int
    upto: int
    watermarks: list[int]


@dataclass(kw_only=True, slots=True)
class Membership:
    """One incarnation as the journal knows it. `watermarks[f]`: samples of its leases that fragment f has settled.

    `num_leased`: samples in `leases`; `offsets[i]`: those before its i-th range.
    """

    id: MemberId
    nonce: str
    node: str
    watermarks: list[int]
    live: bool = True
    settled: bool = False
    refused: bool = False
    drops: list[Dropped] = field(default_factory=list)
    leases: list[Range] = field(default_factory=list)
    num_leased: int = 0
    offsets: list[int] = field(default_factory=list)

    def lease(self, given: Sequence[Range]) -> None:
        """Append what it is given."""
        for span in given:
            before = len(self.leases)
            ranges.append(self.leases, (span,))
            if len(self.leases) > before:
                self.offsets.append(self.num_leased)
            self.num_leased += span[1] - span[0]

    def cut(self, since: int, upto: int) -> tuple[Range, ...]:
        """The samples at positions `since` to `upto`; of a long life only the spans that matter are looked at."""
        if not 0 <= since < upto or upto > self.num_leased:
            return ranges.cut(self.leases, since, upto)  # nothing, or a complaint
        first = bisect_right(self.offsets, since) - 1
        offset = self.offsets[first]
        start, stop = self.leases[first]
        begin, end = start + since - offset, start + upto - offset
        if end <= stop:  # mostly in one piece
            return ((begin, end),)
        last = bisect_left(self.offsets, upto)
        return ranges.cut(self.leases[first:last], since - offset, upto - offset)


@dataclass(kw_only=True, slots=True)
class Head:
    """Newest committed version of a fragment."""

    version: Version
    digest: str


class RunState:
    """Replay of a journal; `apply` is the only way to change it."""

    def __init__(self) -> None:
        """An empty journal: no term, no genesis, no members."""
        self.term: Term | None = None
        self.num_params = 0
        self.num_chunks: tuple[int, ...] = ()
        self.heads: list[Head] = []
        self.history: list[list[CommitRecord]] = []
        self.digests: list[dict[int, str]] = []
        self.members: dict[MemberId, Membership] = {}
        self.current: dict[str, MemberId] = {}
        self.unsettled: dict[MemberId, Membership] = {}  # fenced, fates of their samples still open
        self.last_incarnation: dict[str, int] = {}
        self.nonces: dict[str, MemberId] = {}
        self.scopes = ALL_SHARED
        self.next_position = 0  # of what is shared
        self.own_next: dict[str, int] = {}  # of what is one member's alone
        self.free: tuple[Range, ...] = ()
        self.tainted: tuple[Range, ...] = ()
        self.partial: tuple[Range, ...] = ()
        self.dropped: tuple[Range, ...] = ()
        self.committed: list[int] = []
        self.settled_full = 0
        self.reissued = 0
        self.lost = 0
        self.evaluations: list[EvaluationRecord] = []
        self.stopped: StopRecord | None = None
        self.settings = LiveSettings()
        self.paused = False
        self.rollbacks: list[RollbackRecord] = []
        self.shares: SharesRecord | None = None
        self._live: list[MemberId] = []
        self._num_committed: int | None = None
        self.bans = Bans()
        self.pair_rows: list[PairRosterRecord | PairCommitRecord] = []
        self.refusals: list[RefusalRecord] = []
        self.refused_since: dict[str, str] = {}  # the last commit: who, and why
        self.num_commits = 0

    # ------------------------------------------------------------ questions

    @property
    def num_fragments(self) -> int:
        """Fragments of the run; 0 before genesis."""
        return len(self.heads)

    def live(self) -> list[MemberId]:
        """Live incarnations in the order that rosters use; another list after each change."""
        return self._live

    def samples_committed(self) -> int:
        """Samples that every fragment has committed."""
        if self._num_committed is None:
            open_ = (min(m.watermarks) for m in self.members.values() if not m.settled and m.watermarks)
            self._num_committed = self.settled_full + sum(open_)
        return self._num_committed

    @property
    def has_issued(self) -> bool:
        """Whether any sample was ever leased."""
        return self.next_position > 0 or any(at > self.scopes.own[name][0] for name, at in self.own_next.items())

    def samples_accounted(self) -> int:
        """Samples with a final fate: full, partial or dropped."""
        return self.samples_committed() + ranges.count(self.partial) + ranges.count(self.dropped)

    def chain(self, fragment: int, n: int) -> str | None:
        """Chain id of version `n`; None if the history has none."""
        if n == 0:
            return GENESIS_CHAIN if self.heads else None
        return self.history[fragment][n - 1].chain if 0 < n <= len(self.history[fragment]) else None

    def offered_ranges(self, member: MemberId, since: int, upto: int) -> tuple[Range, ...]:
        """What `member` was leased between two consumption counts."""
        return self.members[member].cut(since, upto)

    # ------------------------------------------------------------ replay

    def apply(self, record: Record) -> None:
        """Replay one record."""
        handler = self._HANDLERS.get(type(record))
        if handler is not None:
            handler(self, record)
            if type(record) not in COMMITS_NOTHING:
                self._num_committed = None

    def _term(self, r: TermRecord) -> None:
        term = Term(lineage=r.lineage, number=r.number, controller=r.controller)
        _must(self.term is None or term.rank > self.term.rank, f"term {term} does not rise above {self.term}")
        self.term, self.stopped = term, None

    def _genesis(self, r: GenesisRecord) -> None:
        _must(not self.heads, "a second genesis")
        self.heads = [Head(version=Version(n=0, chain=GENESIS_CHAIN), digest=digest) for digest in r.digests]
        self.history = [[] for _ in r.digests]
        self.digests = [{0: digest} for digest in r.digests]
        self.committed = [0 for _ in r.digests]
        self.num_params, self.num_chunks = r.num_params, r.num_chunks
        for member in self.members.values():
            member.watermarks = [0] * len(r.digests)

    def _join(self, r: JoinRecord) -> None:
        member = MemberId(name=r.member, incarnation=r.incarnation)
        _must(r.member not in self.current, f"{member} joins while {self.current.get(r.member)} lives")
        _must(r.incarnation == self.last_incarnation.get(r.member, 0) + 1, f"{member} skips an incarnation")
        _must(r.nonce not in self.nonces, f"nonce of {member} was used before")
        self.members[member] = Membership(id=member, nonce=r.nonce, node=r.node, watermarks=[0] * self.num_fragments)
        self.current[r.member] = member
        self._live = self._live.copy()
        insort(self._live, member)
        self.last_incarnation[r.member] = r.incarnation
        self.nonces[r.nonce] = member

    def _fence(self, r: FenceRecord) -> None:
        member = self.members[MemberId(name=r.member, incarnation=r.incarnation)]
        _must(member.live, f"{member.id} is fenced twice")
        member.live, member.refused = False, r.refused
        self.unsettled[member.id] = member
        del self.current[r.member]
        self._live = [other for other in self._live if other != member.id]

    def _lease(self, r: LeaseRecord) -> None:
        member = self.members[MemberId(name=r.member, incarnation=r.incarnation)]
        _must(member.live, f"lease to {member.id}, which is fenced")
        _must(r.index == member.num_leased, f"lease {r.index} of {member.id} leaves a gap")
        shared, old = self._lease_own(r) if self.scopes.own else (r.ranges, [])
        old += [(a, b) for a, b in shared if a < self.next_position]
        if old:
            _must(ranges.subtract(old, self.free) == (), f"lease of {member.id} takes samples that are not free")
            self.free = ranges.subtract(self.free, old)
            self.reissued += ranges.count(old)
        for start, stop in shared:
            if start >= self.next_position:
                _must(start == self.next_position, f"lease of {member.id} skips samples at {self.next_position}")
                self.next_position = stop
        member.lease(r.ranges)

    def _lease_own(self, r: LeaseRecord) -> tuple[list[Range], list[Range]]:
        """What of a lease is shared, and what of the member's own is leased again; the rest of that is new."""
        _must(self.scopes.may_have(r.member, r.ranges), f"lease of {r.member} takes samples of another's own")
        low, high = self.scopes.own.get(r.member, (0, 0))
        mine = [(a, b) for a, b in r.ranges if low <= a < high]
        old = [(a, b) for a, b in mine if a < self.own_next[r.member]]
        for start, stop in mine[len(old) :]:
            _must(start == self.own_next[r.member], f"lease of {r.member} skips samples of its own")
            self.own_next[r.member] = stop
        return [span for span in r.ranges if span not in mine], old

    def _scope(self, r: ScopeRecord) -> None:
        _must(not self.scopes.own and not self.has_issued, "samples get their owners after the first lease")
        self.scopes = Scopes(own=dict(zip(r.members, r.ranges, strict=True)))
        self.own_next = {name: start for name, (start, _) in self.scopes.own.items()}

    def _abandon(self, r: AbandonRecord) -> None:
        _must(r.member in self.scopes.own and r.member not in self.current, f"{r.member} lives, or has nothing alone")
        issued, stop = self.own_next[r.member], self.scopes.own[r.member][1]
        old = [(a, b) for a, b in r.ranges if b <= issued]
        _must(r.ranges[len(old) :] in ((), ((issued, stop),)), f"{r.ranges} is not the rest of what is {r.member}'s")
        _must(ranges.subtract(old, self.free) == (), f"samples of {r.member} are dropped that are not free")
        if len(old) < len(r.ranges):
            self.own_next[r.member] = stop
        self.free = ranges.subtract(self.free, old)
        self.dropped = ranges.union(self.dropped, r.ranges)

    def _commit(self, r: CommitRecord) -> None:
        head = self.heads[r.fragment]
        _must(
            r.n == head.version.n + 1 and r.prev_chain == head.version.chain,
            f"commit {r.n} of fragment {r.fragment} does not extend the head {head.version.n}",
        )
        for entry in r.roster:  # thousands: what would be said of each is not written out before it is wrong
            member = self.members[entry.member_id]
            if member.settled:
                raise JournalContradiction(f"commit names {member.id}, which is settled")
            if member.watermarks[r.fragment] != entry.since:
                raise JournalContradiction(f"gap or overlap in the coverage of {member.id}")
            if entry.ranges != member.cut(entry.since, entry.upto):
                raise JournalContradiction(f"{member.id} was not leased that")
            member.watermarks[r.fragment] = entry.upto
            self.committed[r.fragment] += entry.upto - entry.since
        self.heads[r.fragment] = Head(version=Version(n=r.n, chain=r.chain), digest=r.digest)
        self.history[r.fragment].append(r)
        self.num_commits += 1
        if self.bans.entries or self.refused_since:
            self.bans.count(self.num_commits, {**{entry.member: "" for entry in r.roster}, **self.refused_since})
            self.refused_since = {}
        self.digests[r.fragment][r.n] = r.digest

    def _settle(self, r: SettleRecord) -> None:
        member = self.members[MemberId(name=r.member, incarnation=r.incarnation)]
        _must(not member.live and not member.settled, f"{member.id} cannot be settled")
        member.settled = True
        del self.unsettled[member.id]
        self.lost += r.lost
        low, high = (min(member.watermarks), max(member.watermarks)) if member.watermarks else (0, 0)
        self.settled_full += low
        self.partial = ranges.union(self.partial, member.cut(low, high))
        since = first_returned(member.watermarks)
        self._give_back(member.cut(since, member.num_leased), refused=member.refused)

    def _give_back(self, returned: tuple[Range, ...], *, refused: bool) -> None:
        if refused:
            again = ranges.intersect(returned, self.tainted)
            self.dropped = ranges.union(self.dropped, again)
            returned = ranges.subtract(returned, again)
            self.tainted = ranges.union(self.tainted, returned)
        self.free = ranges.union(self.free, returned)

    def _drop(self, r: DropRecord) -> None:
        member = self.members[MemberId(name=r.member, incarnation=r.incarnation)]
        low, high = min(member.watermarks), max(member.watermarks)
        _must(
            member.live and high <= r.upto <= member.num_leased, f"drop of {member.id} up to {r.upto} is out of range"
        )
        self.partial = ranges.union(self.partial, member.cut(low, high))
        self.dropped = ranges.union(self.dropped, member.cut(high, r.upto))
        self.lost += r.upto - high
        self.settled_full -= r.upto - low
        since = member.drops[-1].upto if member.drops else 0
        member.drops.append(Dropped(since=since, upto=r.upto, watermarks=member.watermarks))
        member.watermarks = [r.upto] * self.num_fragments

    def _revoke(self, r: RevokeRecord) -> None:
        head = self.heads[r.fragment].version
        _must((head.n, head.chain) == (r.n, r.chain), "revoke of something else than the head")
        self._undo(r.fragment, again=False)

    def _rollback(self, r: RollbackRecord) -> None:
        _must(not self.current and not self.unsettled, "a rollback while samples of members have no fate")
        _must(len(r.versions) == len(r.chains) == self.num_fragments, "a rollback of another number of fragments")
        for fragment, (n, chain) in enumerate(zip(r.versions, r.chains, strict=True)):
            _must(self.chain(fragment, n) == chain, f"version {n} of fragment {fragment} is not in the history")
            while self.heads[fragment].version.n > n:
                self._undo(fragment, again=True)
        self.evaluations = [
            e for e in self.evaluations if all(n <= to for n, to in zip(e.versions, r.versions, strict=True))
        ]
        self.settings.roll_back(r.versions)
        self.rollbacks.append(r)

    def _undo(self, fragment: int, *, again: bool) -> None:
        """Take the newest commit back; `again`: what dropped work had in it is free again as well."""
        commit = self.history[fragment].pop()
        del self.digests[fragment][commit.n]
        previous = Version(n=commit.n - 1, chain=commit.prev_chain)
        self.heads[fragment] = Head(version=previous, digest=self.digests[fragment][commit.n - 1])
        for entry in commit.roster:
            self.committed[fragment] -= entry.upto - entry.since
            self._take_back(self.members[entry.member_id], fragment, entry.since, entry.upto, again=again)

    def _take_back(self, member: Membership, fragment: int, since: int, upto: int, *, again: bool) -> None:
        """A fragment lost what it had of positions `since` to `upto`. If those were final, their fates change."""
        drop = next((drop for drop in member.drops if drop.since <= since < drop.upto), None)
        marks = drop.watermarks if drop is not None else member.watermarks
        _must(marks[fragment] == upto, f"fragment {fragment} has the work of {member.id} up to {marks[fragment]}")
        before_low, before_high = min(marks), max(marks)
        marks[fragment] = since
        if drop is None and not member.settled:
            return
        low, high = min(marks), max(marks)
        self.settled_full -= before_low - low
        self.partial = ranges.union(self.partial, member.cut(low, before_low))
        left = member.cut(high, before_high)
        self.partial = ranges.subtract(self.partial, left)
        if drop is not None and not again:  # its process kept nothing of that work: it cannot be offered again
            self.dropped = ranges.union(self.dropped, left)
        else:
            self.free = ranges.union(self.free, left)
        self.lost += ranges.count(left)

    def _evaluation(self, r: EvaluationRecord) -> None:
        self.evaluations.append(r)

    def _shares(self, r: SharesRecord) -> None:
        self.shares = r

    def _pair_roster(self, r: PairRosterRecord) -> None:
        self.pair_rows.append(r)

    def _pair_commit(self, r: PairCommitRecord) -> None:
        _must(self.num_fragments == 1, "a pair in a run of several fragments")
        for name, incarnation, since, upto in zip(r.members, r.incarnations, r.since, r.upto, strict=True):
            member = self.members[MemberId(name=name, incarnation=incarnation)]
            _must(not member.settled, f"a pair commit names {member.id}, which is settled")
            _must(member.watermarks[0] == since, f"gap or overlap in what {member.id} has in pairs")
            _must(since <= upto <= member.num_leased, f"{member.id} was not leased that")
            member.watermarks[0] = upto
            self.committed[0] += upto - since
        self.pair_rows.append(r)

    def _refusal(self, r: RefusalRecord) -> None:
        self.refusals.append(r)
        self.refused_since[r.member] = r.why

    def _standing(self, r: StandingRecord) -> None:
        _must(r.standing in STANDINGS, f"{r.member} is to be {r.standing!r}, which is nothing")
        self.bans.replay(
            StandingChange(member=r.member, standing=cast(Standing, r.standing), serial=r.serial, why=r.why)
        )

    def _stop(self, r: StopRecord) -> None:
        self.stopped, self.paused = r, False

    def _setting(self, r: SettingRecord) -> None:
        least = 0 if holds_at_once(r.key) else 1
        ahead = len(r.since) == self.num_fragments > 0 and all(
            since >= head.version.n + least for since, head in zip(r.since, self.heads, strict=True)
        )
        _must(ahead, f"{r.key} is to hold from version {r.since} on, which may have been computed already")
        self.settings.add(r)

    def _pause(self, r: PauseRecord) -> None:
        self.paused = r.paused

    _HANDLERS: ClassVar[dict[type[Record], Callable[[RunState, Any], None]]] = {
        TermRecord: _term,
        GenesisRecord: _genesis,
        JoinRecord: _join,
        FenceRecord: _fence,
        ScopeRecord: _scope,
        AbandonRecord: _abandon,
        LeaseRecord: _lease,
        CommitRecord: _commit,
        SettleRecord: _settle,
        DropRecord: _drop,
        RevokeRecord: _revoke,
        RollbackRecord: _rollback,
        SettingRecord: _setting,
        PauseRecord: _pause,
        EvaluationRecord: _evaluation,
        SharesRecord: _shares,
        PairRosterRecord: _pair_roster,
        PairCommitRecord: _pair_commit,
        RefusalRecord: _refusal,
        StandingRecord: _standing,
        StopRecord: _stop,
    }


def first_returned(watermarks: list[int]) -> int:
    """From where on the samples of an ended incarnation are issued again: no fragment has counted any of them (C7)."""
    return max(watermarks, default=0)


def _must(condition: bool, story: str) -> None:
    if not condition:
        raise JournalContradiction(story)
