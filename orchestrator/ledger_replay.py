"""The replay behind the ledger: one row after the other, each checked against the rules in `orchestrator/ledger.py`.

A violation becomes a finding and the replay goes on with what the row says, so that one bad row is named once and not
by all that follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from orchestrator.intervals import IntervalSet
from orchestrator.ledger_model import Deviation, DeviationKind, Finding, Head, Incarnation, chain_of
from orchestrator.ledger_owned import OwnSamples
from orchestrator.segments import link_problem
from workers import ranges as spans
from workers.live_settings import holds_at_once
from workers.pair_records import PairCommitRecord
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
    Record,
    RevokeRecord,
    RollbackRecord,
    RosterEntry,
    Row,
    ScopeRecord,
    SettingRecord,
    SettleRecord,
    SharesRecord,
    SnapshotRecord,
    TermRecord,
    roster_digest,
)

MAX_FINDINGS = 200
COEFFICIENT_SLACK = 1e-5  # coefficients are rounded to fp32 one by one


class Replay:
    """State of the replay; `apply` every row in order, then read the attributes."""

    def __init__(self, place: Callable[[int], str] | None = None) -> None:
        """`place` tells file and line of a row number."""
        self.findings: list[Finding] = []
        self.num_findings = 0
        self.deviations: list[Deviation] = []
        self.maybe_partial: list[tuple[int, str, tuple[Range, ...]]] = []
        self.heads: list[Head] = []
        self.committed: list[IntervalSet] = []
        self.issued = IntervalSet()
        self.free = IntervalSet()
        self.dropped = IntervalSet()
        self.tainted = IntervalSet()
        self.incarnations: dict[MemberId, Incarnation] = {}
        self.num_full = 0
        self.num_revoked = 0
        self.num_rolled_back = 0
        self.num_reissued = 0
        self.num_lost = 0
        self.num_params = 0
        self._evaluations: list[tuple[tuple[int, ...], float | None]] = []
        self._most_full = 0
        self.own = OwnSamples(self.fail)
        self._place = place
        self._row: Row | None = None
        self._rank: tuple[int, int] | None = None
        self._num_terms = 0
        self._last: dict[str, int] = {}
        self._nonces: set[str] = set()
        self._handlers: dict[type[Record], Callable[..., None]] = {
            TermRecord: self._term,
            GenesisRecord: self._genesis,
            JoinRecord: self._join,
            FenceRecord: self._fence,
            ScopeRecord: self._scope,
            AbandonRecord: self._abandon,
            LeaseRecord: self._lease,
            CommitRecord: self._commit,
            SettleRecord: self._settle,
            DropRecord: self._drop,
            RevokeRecord: self._revoke,
            RollbackRecord: self._rollback,
            SettingRecord: self._setting,
            EvaluationRecord: self._evaluation,
            SnapshotRecord: self._snapshot,
            SharesRecord: self._shares,
            PairCommitRecord: self._pair_commit,
        }

    @property
    def val_losses(self) -> list[float | None]:
        """Of the versions that were not rolled back, in order."""
        return [loss for _, loss in self._evaluations]

    @property
    def num_fragments(self) -> int:
        """P; 0 before genesis."""
        return len(self.heads)

    def apply(self, row: Row) -> None:
        """Check and replay one row."""
        last, self._row = self._row, row
        problem = link_problem(last, row)
        if last is None and row.seq != 0:
            problem = f"the journal begins with row {row.seq}"
        if problem is not None:
            self.fail("chain", problem)
        if last is None and not isinstance(row.record, TermRecord):
            self.fail("term", f"the journal begins with a {row.record.kind}, not with a term")
        handler = self._handlers.get(type(row.record))
        if handler is not None:
            try:
                handler(row.record)
            except (TypeError, ValueError, AttributeError, IndexError) as error:  # hostile types that parse as JSON
                self.fail(row.record.kind, f"the row cannot be applied: {error}")

    def fail(self, rule: str, text: str) -> None:
        """Record a finding at the present row."""
        self.num_findings += 1
        if len(self.findings) < MAX_FINDINGS:
            seq = self._row.seq if self._row else 0
            place = self._place(seq) if self._place else ""
            self.findings.append(Finding(seq=seq, place=place, rule=rule, text=text))

    def in_progress(self) -> IntervalSet:
        """Samples leased above the lowest watermark of every incarnation that is not settled."""
        out = IntervalSet()
        for inc in self.incarnations.values():
            if not inc.settled:
                out.add(inc.cut(inc.low, inc.num_leased))
        return out

    def _deviate(self, kind: DeviationKind, member: str, ranges: Sequence[Range], detail: str) -> None:
        if ranges and self._row:
            row = self._row.seq
            self.deviations.append(Deviation(seq=row, kind=kind, member=member, ranges=tuple(ranges), detail=detail))

    def _find(self, rule: str, member: str, incarnation: int) -> Incarnation | None:
        inc = self.incarnations.get(MemberId(name=member, incarnation=incarnation))
        if inc is None:
            self.fail(rule, f"{member}.{incarnation} never joined")
        return inc

    # ------------------------------------------------------------ terms and members

    def _term(self, r: TermRecord) -> None:
        rank = (r.lineage, r.number)
        if self._rank is not None and rank <= self._rank:
            self.fail("term", f"term {rank[0]}.{rank[1]} does not rise above {self._rank[0]}.{self._rank[1]}")
        self._rank = rank
        self._num_terms += 1
        for head in self.heads:
            head.serial = 0

    def _lineage(self) -> int:
        return self._rank[0] if self._rank else 0

    def _genesis(self, r: GenesisRecord) -> None:
        if self.heads:
            self.fail("genesis", "there is a genesis already")
            return
        if not r.digests:
            self.fail("genesis", "it names no fragment")
        self.heads = [Head(genesis=digest) for digest in r.digests]
        self.num_params = r.num_params
        self.committed = [IntervalSet() for _ in r.digests]
        for inc in self.incarnations.values():
            inc.watermarks = [0] * len(r.digests)

    def _join(self, r: JoinRecord) -> None:
        id_ = MemberId(name=r.member, incarnation=r.incarnation)
        last = self._last.get(r.member, 0)
        if r.incarnation != last + 1:
            self.fail("join", f"{id_} joins, expected incarnation {last + 1}")
        previous = self.incarnations.get(MemberId(name=r.member, incarnation=last))
        if previous is not None and previous.live:
            self.fail("join", f"{id_} joins while {previous.id} lives")
        if r.nonce in self._nonces:
            self.fail("join", f"{id_} joins with a nonce that was used before")
        self._nonces.add(r.nonce)
        if id_ not in self.incarnations:
            marks = [0] * self.num_fragments
            self.incarnations[id_] = Incarnation(id=id_, lineage=self._lineage(), watermarks=marks)
        self._last[r.member] = max(last, r.incarnation)

    def _fence(self, r: FenceRecord) -> None:
        inc = self._find("fence", r.member, r.incarnation)
        if inc is None:
            return
        if not inc.live:
            self.fail("fence", f"{inc.id} was fenced before")
            return
        inc.live, inc.refused, inc.fenced_in = False, r.refused, self._num_terms

    def _settle(self, r: SettleRecord) -> None:
        inc = self._find("settle", r.member, r.incarnation)
        if inc is None:
            return
        if inc.live:
            self.fail("settle", f"{inc.id} is not fenced")
        if inc.settled:
            self.fail("settle", f"{inc.id} was settled before")
            return
        inc.settled, inc.live = True, False
        name = str(inc.id)
        self._note_partial(name, inc.cut(inc.low, inc.high))
        returned: Sequence[Range] = inc.cut(inc.high, inc.num_leased)
        if not 0 <= r.lost <= spans.count(returned):
            self.fail("settle", f"{inc.id} lost {r.lost} samples of the {spans.count(returned)} that return")
        self.num_lost += r.lost
        if inc.refused:
            again = self.tainted.common(returned)
            self.dropped.add(again)
            self._deviate("dropped", name, again, "refused twice")
            returned = self.tainted.missing(returned)
            self.tainted.add(returned)
        self.free.add(returned)
        self._deviate("returned", name, returned, "refused" if inc.refused else "not committed when it was fenced")

    def _drop(self, r: DropRecord) -> None:
        inc = self._find("drop", r.member, r.incarnation)
        if inc is None:
            return
        if not inc.live:
            self.fail("drop", f"{inc.id} does not live")
        if not inc.high <= r.upto <= inc.num_leased:
            self.fail("drop", f"upto {r.upto} of {inc.id} is not in {inc.high}:{inc.num_leased}")
            return
        name = str(inc.id)
        self._note_partial(name, inc.cut(inc.low, inc.high))
        lost = inc.cut(inc.high, r.upto)
        self.dropped.add(lost)
        self.num_lost += spans.count(lost)
        self._deviate("dropped", name, lost, r.why)
        inc.watermarks = [r.upto] * self.num_fragments
        inc.floor = r.upto

    def _note_partial(self, member: str, ranges: tuple[Range, ...]) -> None:
        if ranges and self._row:
            self.maybe_partial.append((self._row.seq, member, ranges))

    # ------------------------------------------------------------ leases

    def _scope(self, r: ScopeRecord) -> None:
        self.own.set(r, has_issued=self.issued.num > 0)

    def _abandon(self, r: AbandonRecord) -> None:
        if self.own.abandon(r, self.free, self.live_names()):
            self.issued.add(r.ranges)
            self.free.remove(r.ranges)
            self.dropped.add(r.ranges)
            self._deviate("dropped", r.member, r.ranges, r.why)

    def live_names(self) -> set[str]:
        """Members that live."""
        return {inc.id.name for inc in self.incarnations.values() if inc.live}

    def _lease(self, r: LeaseRecord) -> None:
        inc = self._find("lease", r.member, r.incarnation)
        if inc is None:
            return
        if not inc.live:
            self.fail("lease", f"{inc.id} was fenced")
        if inc.lineage != self._lineage():
            self.fail("lease", f"{inc.id} joined in lineage {inc.lineage}, the run is in {self._lineage()}")
        if r.index != inc.num_leased:
            self.fail("lease", f"index {r.index}, but {inc.id} was leased {inc.num_leased} samples before")
        if not r.ranges:
            self.fail("lease", "it gives no samples")
        again: list[Range] = []
        for start, stop in r.ranges:
            if not 0 <= start < stop:
                self.fail("lease", f"{start}:{stop} is no range of samples")
                continue
            owner = self.own.owner(r.member, start, stop)
            cursor = self.own.cursors[owner]
            old = (start, min(stop, cursor))
            if old[0] < old[1]:
                for low, high in self.free.missing([old]):
                    self.fail("lease", f"samples {low}:{high} are leased again but were not returned")
                again.append(old)
                self.free.remove([old])
            if stop > cursor:
                if start > cursor:
                    self.fail("lease", f"samples {cursor}:{start} are skipped")
                self.own.cursors[owner] = stop
            self.issued.add([(start, stop)])
            inc.lease((start, stop))
        self.num_reissued += spans.count(again)
        self._deviate("reissued", str(inc.id), again, "leased again")

    # ------------------------------------------------------------ commits

    def _commit(self, r: CommitRecord) -> None:
        if not 0 <= r.fragment < self.num_fragments:
            self.fail("commit", f"fragment {r.fragment} of {self.num_fragments}")
            return
        head = self.heads[r.fragment]
        if (r.n, r.prev_chain) != (head.n + 1, head.chain):
            found, wanted = f"{r.n} ({r.prev_chain[:8]} before it)", f"{head.n} ({head.chain[:8]})"
            self.fail("commit", f"version {found} of fragment {r.fragment} does not extend the head {wanted}")
        if r.roster_digest != roster_digest(r.roster):
            self.fail("commit", "roster_digest is not that of the roster")
        if r.chain != chain_of(r):
            self.fail("commit", "chain is not that of the content")
        if r.serial <= head.serial:
            self.fail("commit", f"serial {r.serial} of fragment {r.fragment} came after {head.serial} in this term")
        if not 0 <= r.base_samples <= self._most_full:
            self.fail("commit", f"base_samples {r.base_samples}, but at most {self._most_full} were ever committed")
        self._check_roster(r.roster)
        head.n, head.chain, head.highest, head.serial = r.n, r.chain, max(head.highest, r.n), r.serial
        head.commits.append(r)
        for entry in r.roster:
            self._commit_entry(r.fragment, entry)
        self._most_full = max(self._most_full, self.num_full)

    def _pair_commit(self, r: PairCommitRecord) -> None:
        """A group's samples are in; what a roster's entry must fulfil, each of its spans must."""
        if self.num_fragments != 1:
            self.fail("pair_commit", f"a pair in a run of {self.num_fragments} fragments")
            return
        spans = zip(r.members, r.incarnations, r.since, r.upto, strict=True)
        for name, incarnation, since, upto in sorted(spans):
            inc = self._find("pair_commit", name, incarnation)
            if inc is None or since == upto:
                continue
            ranges = inc.cut(since, upto) if 0 <= since < upto <= inc.num_leased else ()
            entry = RosterEntry(
                member=name, incarnation=incarnation, seq=0, since=since, upto=upto, ranges=ranges, num_steps=1,
                coefficient=1.0,
            )  # fmt: skip
            again = set(inc.after_fence)  # one that is fenced may have been in a pair, and in the roster of a merge
            inc.after_fence.clear()
            self._commit_entry(0, entry)
            inc.after_fence |= again
        self._most_full = max(self._most_full, self.num_full)

    def _check_roster(self, roster: Sequence[RosterEntry]) -> None:
        if not roster:
            self.fail("commit", "the roster is empty")
        names = [(entry.member, entry.incarnation) for entry in roster]
        if any(first >= second for first, second in pairwise(names)):
            self.fail("commit", "the roster is not ascending by member and incarnation")
        shares = [entry.coefficient for entry in roster]
        # 0: a robust rule heard a contribution and did not choose it. All 0 would be a commit of nothing.
        sound = all(math.isfinite(share) and share >= 0 for share in shares)
        if not sound or not 0 < sum(shares) <= 1 + COEFFICIENT_SLACK:
            self.fail("commit", f"coefficients {shares} are not 0 or more with a sum above 0 and of at most 1")

    def _commit_entry(self, fragment: int, entry: RosterEntry) -> None:
        inc = self._find("commit", entry.member, entry.incarnation)
        if inc is None:
            return
        if inc.settled:
            self.fail("commit", f"{inc.id} was settled")
        elif not inc.live:
            self._check_fenced(fragment, inc)
        if inc.lineage != self._lineage():
            self.fail("commit", f"{inc.id} joined in lineage {inc.lineage}, the run is in {self._lineage()}")
        mark = inc.watermarks[fragment]
        if entry.since != mark:
            self.fail("commit", f"{inc.id} since {entry.since}, but fragment {fragment} has its work up to {mark}")
        if entry.num_steps <= 0:
            self.fail("commit", f"{inc.id} contributes {entry.num_steps} steps")
        if not 0 <= entry.since < entry.upto <= inc.num_leased:
            text = f"{inc.id} {entry.since}:{entry.upto} is no slice of the {inc.num_leased} samples it was leased"
            self.fail("commit", text)
            return
        if entry.ranges != inc.cut(entry.since, entry.upto):
            self.fail("commit", f"{inc.id} was not leased {list(entry.ranges)} at {entry.since}:{entry.upto}")
        for start, stop in self.committed[fragment].common(entry.ranges):
            self.fail("commit", f"samples {start}:{stop} are counted twice in fragment {fragment}")
        self.committed[fragment].add(entry.ranges)
        low = inc.low
        inc.watermarks[fragment] = entry.upto
        self.num_full += inc.low - low

    def _check_fenced(self, fragment: int, inc: Incarnation) -> None:
        """A fenced incarnation is in no roster but those that were fixed before its fence."""
        if self._num_terms > inc.fenced_in:
            self.fail("commit", f"{inc.id} was fenced in an earlier term; the exchanges of then are gone")
        if fragment in inc.after_fence:
            self.fail("commit", f"{inc.id} was fenced; a second commit of fragment {fragment} cannot name it")
        inc.after_fence.add(fragment)

    def _revoke(self, r: RevokeRecord) -> None:
        head = self.heads[r.fragment] if 0 <= r.fragment < self.num_fragments else None
        if head is None or not head.commits or (r.n, r.chain) != (head.n, head.chain):
            self.fail("revoke", f"version {r.n} of fragment {r.fragment} is not the head")
            return
        self._undo(r.fragment, "revoked")

    def _rollback(self, r: RollbackRecord) -> None:
        """Every commit after the snapshot is taken back; all that had it was settled before, and is free again."""
        open_ = [str(inc.id) for inc in self.incarnations.values() if not inc.settled]
        if open_:
            self.fail("rollback", f"{open_[0]} has samples without a fate")
        if not len(r.versions) == len(r.chains) == self.num_fragments:
            self.fail("rollback", f"it names {len(r.versions)} fragments of {self.num_fragments}")
            return
        for fragment, (n, chain) in enumerate(zip(r.versions, r.chains, strict=True)):
            head = self.heads[fragment]
            while head.n > n and head.commits:
                self._undo(fragment, "rolled back")
            if (head.n, head.chain) != (n, chain):
                self.fail("rollback", f"version {n} of fragment {fragment} is not in the history")
        self._evaluations = [
            (versions, loss)
            for versions, loss in self._evaluations
            if all(n <= to for n, to in zip(versions, r.versions, strict=False))
        ]

    def _undo(self, fragment: int, why: DeviationKind) -> None:
        head = self.heads[fragment]
        commit = head.commits.pop()
        head.n, head.chain = commit.n - 1, commit.prev_chain
        if why == "revoked":
            self.num_revoked += 1
        else:
            self.num_rolled_back += 1
        for entry in commit.roster:
            inc = self.incarnations.get(entry.member_id)
            if inc is not None:
                self._take_back(fragment, entry, inc, why)

    def _setting(self, r: SettingRecord) -> None:
        least = 0 if holds_at_once(r.key) else 1
        if len(r.since) != self.num_fragments or any(
            since < head.n + least for since, head in zip(r.since, self.heads, strict=False)
        ):
            self.fail("setting", f"{r.key} is to hold from versions {list(r.since)} on, which are there already")

    def _take_back(self, fragment: int, entry: RosterEntry, inc: Incarnation, why: DeviationKind) -> None:
        name = str(inc.id)
        self._deviate(why, name, entry.ranges, f"fragment {fragment}")
        full: Sequence[Range] = entry.ranges
        for samples in self.committed:
            full = samples.common(full)
        self.num_full -= spans.count(full)
        self.committed[fragment].remove(entry.ranges)
        final = inc.settled or entry.since < inc.floor
        if not final:
            if inc.watermarks[fragment] != entry.upto:
                self.fail("revoke", f"fragment {fragment} has the work of {inc.id} up to {inc.watermarks[fragment]}")
            inc.watermarks[fragment] = entry.since
            return
        left: Sequence[Range] = entry.ranges
        for samples in self.committed:
            left = samples.missing(left)
        self.num_lost += spans.count(left)
        if entry.since < inc.floor and why == "revoked":
            self.dropped.add(left)
            self._deviate("dropped", name, left, "revoked after its process had dropped it")
        else:
            self.free.add(left)
            self._deviate("returned", name, left, why)
        self._note_partial(name, entry.ranges)

    # ------------------------------------------------------------ observations

    def _evaluation(self, r: EvaluationRecord) -> None:
        self._evaluations.append((r.versions, r.val_loss))
        self._check_versions("evaluation", r.versions)
        if not 0 <= r.samples <= self._most_full:
            self.fail("evaluation", f"samples {r.samples}, but at most {self._most_full} were ever committed")

    def _snapshot(self, r: SnapshotRecord) -> None:
        self._check_versions("snapshot", r.versions)

    def _shares(self, r: SharesRecord) -> None:
        """Shares decide how many steps are made, not what counts: only what cannot have been meant is a finding."""
        if not len(r.members) == len(r.steps) == len(r.batch_sizes) == len(set(r.members)):
            self.fail("shares", "members, steps and batch_sizes are not one for each member")
        known = {str(member) for member in self.incarnations}
        for member, steps in zip(r.members, r.steps, strict=False):
            if member not in known or not 1 <= steps <= r.inner_steps:
                self.fail("shares", f"{steps} steps for {member}; a round has {r.inner_steps}")

    def _check_versions(self, rule: str, versions: tuple[int, ...]) -> None:
        highest = [head.highest for head in self.heads]
        if len(versions) != len(highest) or not all(0 <= n <= top for n, top in zip(versions, highest, strict=True)):
            self.fail(rule, f"versions {list(versions)}, but the highest that were committed are {highest}")
