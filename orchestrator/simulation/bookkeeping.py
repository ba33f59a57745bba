"""The journal told once more, sample by sample, as bit sets: slow, obviously right, nothing shared with `run_state`.

It is fed with rows in the moment in which they are decided for good (flushed on the path), and knows of every sample
whose it is and which fragments have counted it. Rules as in `orchestrator/ledger.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.run_state import RunState
from orchestrator.simulation.symbols import bits_of, must
from workers.ranges import Range
from workers.records import (
    AbandonRecord,
    CommitRecord,
    DropRecord,
    FenceRecord,
    GenesisRecord,
    JoinRecord,
    LeaseRecord,
    MemberId,
    RevokeRecord,
    RollbackRecord,
    Row,
    ScopeRecord,
    SettleRecord,
    StopRecord,
    TermRecord,
)


@dataclass(kw_only=True, slots=True)
class Life:
    """One incarnation: its samples in the order of consumption, and how many each fragment has counted."""

    marks: list[int]
    nonce: str
    samples: list[int] = field(default_factory=list)
    live: bool = True
    settled: bool = False
    refused: bool = False
    floor: int = 0
    fenced_in: int = 0
    running_at: tuple[int, int] = (0, 0)
    running: int = 0

    def in_progress(self) -> int:
        """Bit set of what it was leased above its lowest mark; kept until one of the two moves."""
        at = (min(self.marks, default=0), len(self.samples))
        if at != self.running_at:
            self.running_at, self.running = at, self.bits(*at)
        return self.running

    def bits(self, since: int, upto: int) -> int:
        """Bit set of the samples at positions `since` to `upto`."""
        out = 0
        for sample in self.samples[since:upto]:
            out |= 1 << sample
        return out


class Bookkeeping:
    """Fates of all samples, from the rows alone."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.last_hash = ""
        self.term_rank = (-1, -1)
        self.num_terms = 0
        self.stopped = False
        self.lives: dict[MemberId, Life] = {}
        self.by_nonce: dict[str, MemberId] = {}
        self.chains: list[list[str]] = []
        self.commits: list[list[CommitRecord]] = []
        self.digests: list[dict[str, str]] = []
        self.committed: list[int] = []
        self.cursors: dict[str, list[int]] = {"": [0, 0]}  # from where to where samples were issued; of all, and own
        self.owner_of: dict[int, str] = {}
        self.free = self.dropped = self.tainted = 0

    def apply(self, row: Row) -> None:
        """One more row of the path."""
        must(
            row.seq == self.num_rows and (not self.num_rows or row.prev == self.last_hash),
            2,
            f"row {row.seq} does not follow",
        )
        self.num_rows, self.last_hash = row.seq + 1, row.hash
        match row.record:
            case TermRecord() as r:
                must((r.lineage, r.number) > self.term_rank, 2, f"term {r.number} does not rise")
                self.term_rank = (r.lineage, r.number)
                self.num_terms += 1
                self.stopped = False
            case StopRecord():
                self.stopped = True
            case GenesisRecord() as r:
                must(not self.chains, 2, "two geneses")
                self.chains = [["genesis"] for _ in r.digests]
                self.commits = [[] for _ in r.digests]
                self.digests = [{"genesis": digest} for digest in r.digests]
                self.committed = [0 for _ in r.digests]
                for life in self.lives.values():
                    life.marks = [0 for _ in r.digests]
            case JoinRecord() as r:
                member = MemberId(name=r.member, incarnation=r.incarnation)
                must(member not in self.lives and r.nonce not in self.by_nonce, 2, f"{member} joins twice")
                self.lives[member] = Life(marks=[0 for _ in self.chains], nonce=r.nonce)
                self.by_nonce[r.nonce] = member
            case FenceRecord() as r:
                life = self._life(r.member, r.incarnation)
                must(life.live, 2, f"{r.member}.{r.incarnation} is fenced twice")
                life.live, life.refused, life.fenced_in = False, r.refused, self.num_terms
            case ScopeRecord() as r:
                for name, (start, stop) in zip(r.members, r.ranges, strict=True):
                    self.cursors[name] = [start, start]
                    self.owner_of |= dict.fromkeys(range(start, stop), name)
            case AbandonRecord() as r:
                self._abandon(r)
            case LeaseRecord() as r:
                self._lease(r)
            case CommitRecord() as r:
                self._commit(r)
            case SettleRecord() as r:
                self._settle(r)
            case DropRecord() as r:
                self._drop(r)
            case RevokeRecord() as r:
                self._revoke(r)
            case RollbackRecord() as r:
                self._rollback(r)
            case _:
                pass

    def _life(self, member: str, incarnation: int) -> Life:
        return self.lives[MemberId(name=member, incarnation=incarnation)]

    def _lease(self, r: LeaseRecord) -> None:
        life = self._life(r.member, r.incarnation)
        must(life.live and r.index == len(life.samples), 5, f"lease {r.index} of {r.member}.{r.incarnation}")
        for start, stop in r.ranges:
            for sample in range(start, stop):
                bit, owner = 1 << sample, self.owner_of.get(sample, "")
                must(owner in ("", r.member), 8, f"sample {sample} is {owner}'s alone, and {r.member} is leased it")
                issued = self.cursors[owner]
                must(bit & self.free or sample == issued[1], 8, f"sample {sample} is leased but somebody has it")
                self.free &= ~bit
                issued[1] = max(issued[1], sample + 1)
                life.samples.append(sample)

    def _abandon(self, r: AbandonRecord) -> None:
        must(not any(life.live for m, life in self.lives.items() if m.name == r.member), 8, f"{r.member} lives")
        issued = self.cursors[r.member]
        for start, stop in r.ranges:
            for sample in range(start, stop):
                bit, fresh = 1 << sample, sample == issued[1]
                must(self.owner_of.get(sample) == r.member, 8, f"sample {sample} is not {r.member}'s own")
                must(bit & self.free or fresh, 8, f"sample {sample} is given up but somebody has it")
                issued[1] += fresh
                self.free &= ~bit
                self.dropped |= bit

    def _commit(self, r: CommitRecord) -> None:
        path = self.chains[r.fragment]
        must(r.prev_chain == path[-1] and r.n == len(path), 2, f"commit {r.n} of fragment {r.fragment} is no extension")
        must(r.chain not in path, 1, f"chain {r.chain} comes twice")
        path.append(r.chain)
        self.commits[r.fragment].append(r)
        self.digests[r.fragment][r.chain] = r.digest
        must(sum(entry.coefficient for entry in r.roster) <= 1 + 1e-5, 3, "coefficients exceed 1")
        for entry in r.roster:
            life = self._life(entry.member, entry.incarnation)
            must(not life.settled, 8, f"commit {r.n} names {entry.member_id}, which is settled")
            must(life.live or life.fenced_in == self.num_terms, 8, f"{entry.member_id} was fenced in an older term")
            must(life.marks[r.fragment] == entry.since < entry.upto, 4, f"coverage of {entry.member_id} has a gap")
            bits = bits_of(entry.ranges)
            must(bits == life.bits(entry.since, entry.upto), 4, f"{entry.offer} covers what was not leased to it")
            must(not bits & self.committed[r.fragment], 4, f"a sample of {entry.offer} is committed twice")
            self.committed[r.fragment] |= bits
            life.marks[r.fragment] = entry.upto

    def _settle(self, r: SettleRecord) -> None:
        life = self._life(r.member, r.incarnation)
        must(not life.live and not life.settled, 5, f"{r.member}.{r.incarnation} is settled")
        life.settled = True
        returned = life.bits(max(life.marks, default=0), len(life.samples))
        for bits in self.committed:
            must(not returned & bits, 5, f"{r.member}.{r.incarnation} returns samples that are committed")
        if life.refused:
            self.dropped |= returned & self.tainted
            returned &= ~self.tainted
            self.tainted |= returned
        self.free |= returned

    def _drop(self, r: DropRecord) -> None:
        life = self._life(r.member, r.incarnation)
        must(life.live and max(life.marks) <= r.upto <= len(life.samples), 5, f"drop of {r.member} to {r.upto}")
        self.dropped |= life.bits(max(life.marks), r.upto)
        life.marks = [r.upto for _ in life.marks]
        life.floor = r.upto

    def _revoke(self, r: RevokeRecord) -> None:
        commit = self.commits[r.fragment].pop()
        must((commit.n, commit.chain) == (r.n, r.chain), 2, "revoke of something else than the head")
        self.chains[r.fragment].pop()
        for entry in commit.roster:
            life = self._life(entry.member, entry.incarnation)
            bits = bits_of(entry.ranges)
            self.committed[r.fragment] &= ~bits
            left = bits & ~self.some()
            if entry.since < life.floor:
                self.dropped |= left
            else:
                life.marks[r.fragment] = entry.since
                if life.settled:
                    self.free |= left

    def _rollback(self, r: RollbackRecord) -> None:
        """Whatever a fragment counted after the snapshot it never counted; who had it is gone, so it is free."""
        must(all(life.settled for life in self.lives.values()), 8, "a rollback under members that live")
        before = self.some()
        for fragment, (n, chain) in enumerate(zip(r.versions, r.chains, strict=True)):
            must(self.chains[fragment][n] == chain, 2, f"a rollback to {chain}, which is not on the path")
            for commit in self.commits[fragment][n:]:
                for entry in commit.roster:
                    self.committed[fragment] &= ~bits_of(entry.ranges)
            del self.chains[fragment][n + 1 :], self.commits[fragment][n:]
        self.free |= before & ~self.some()

    # ------------------------------------------------------------ sums

    def some(self) -> int:
        """Samples that at least one fragment has counted."""
        out = 0
        for bits in self.committed:
            out |= bits
        return out

    def full(self) -> int:
        """Samples that all fragments have counted."""
        out = -1 if self.committed else 0
        for bits in self.committed:
            out &= bits
        return out

    def in_progress(self) -> int:
        """Leased to an incarnation that is not settled, above its lowest mark."""
        out = 0
        for life in self.lives.values():
            if not life.settled:
                out |= life.in_progress()
        return out

    def check(self, state: RunState) -> None:
        """Invariant 5: every sample has one fate, and the controller's replay says the same."""
        full, running = self.full(), self.in_progress()
        partial = self.some() & ~full & ~running
        together = 0
        for bits in (full, partial, self.free, self.dropped, running):
            must(not together & bits, 5, "a sample has two fates")
            together |= bits
        must(together == bits_of([(a, b) for a, b in self.cursors.values()]), 5, "a sample has no fate")
        for what, theirs, mine in (
            ("free", state.free, self.free),
            ("partial", state.partial, partial),
            ("dropped", state.dropped, self.dropped),
        ):
            if bits_of(theirs) != mine:
                must(False, 5, f"{what} samples differ: by the controller {theirs}, here {spans_of(mine)}")
        num = full.bit_count()
        must(state.samples_committed() == num, 5, f"{state.samples_committed()} samples are committed, {num} here")
        must([h.version.n for h in state.heads] == [len(p) - 1 for p in self.chains], 2, "heads differ")


def spans_of(bits: int) -> list[Range]:
    """Ranges of a bit set."""
    out: list[Range] = []
    position = 0
    while bits:
        if bits & 1:
            start = position
            while bits & 1:
                bits >>= 1
                position += 1
            out.append((start, position))
        else:
            bits >>= 1
            position += 1
    return out
