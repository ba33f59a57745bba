"""Random legal journals, and what each sample came to, kept sample by sample (slow, and obviously right)."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from orchestrator.ledger_model import chain_of
from workers.records import (
    GENESIS_HASH,
    CommitRecord,
    DropRecord,
    EvaluationRecord,
    FaultRecord,
    FenceRecord,
    GenesisRecord,
    JoinRecord,
    LeaseRecord,
    PauseRecord,
    Record,
    RevokeRecord,
    RollbackRecord,
    RosterEntry,
    Row,
    SettingRecord,
    SettleRecord,
    SharesRecord,
    SnapshotRecord,
    TermRecord,
    make_row,
    roster_digest,
)

SEQ_LEN = 16


def chain_rows(records: list[Record]) -> list[Row]:
    rows: list[Row] = []
    for seq, record in enumerate(records):
        rows.append(make_row(seq, rows[-1].hash if rows else GENESIS_HASH, record))
    return rows


def to_ranges(samples: list[int]) -> tuple[tuple[int, int], ...]:
    out: list[tuple[int, int]] = []
    for sample in samples:
        if out and out[-1][1] == sample:
            out[-1] = (out[-1][0], sample + 1)
        else:
            out.append((sample, sample + 1))
    return tuple(out)


def sealed_commit(**values: object) -> CommitRecord:
    """A commit with the digest of its roster and the chain of its content."""
    record = CommitRecord(**{**values, "chain": "", "roster_digest": roster_digest(values["roster"])})  # type: ignore[arg-type]
    fields = {name: getattr(record, name) for name in CommitRecord.__slots__}
    return CommitRecord(**{**fields, "chain": chain_of(record)})


@dataclass
class Life:
    """One incarnation, its samples in the order of consumption."""

    name: str
    incarnation: int
    marks: list[int]
    leases: list[int] = field(default_factory=list)
    live: bool = True
    settled: bool = False
    refused: bool = False
    floor: int = 0
    may_commit: set[int] = field(default_factory=set)


class Story:
    """Makes a legal journal by random steps; `records` is the journal, `fates()` the truth about every sample."""

    def __init__(
        self,
        seed: int,
        *,
        num_fragments: int = 1,
        num_members: int = 3,
        revoke_dropped: bool = True,
        operations: bool = False,
    ) -> None:
        """`revoke_dropped`: commits may be taken back although a member of the roster dropped that work since.

        `operations`: there is a user who changes settings, pauses, and goes back to older versions.
        """
        self.operations = operations
        self.rng = random.Random(seed)
        self.num_fragments = num_fragments
        self.revoke_dropped = revoke_dropped
        self.records: list[Record] = []
        self.lives: list[Life] = []
        self.names = [f"island-{i}" for i in range(num_members)]
        self.committed: list[set[int]] = [set() for _ in range(num_fragments)]
        self.commits: list[list[CommitRecord]] = [[] for _ in range(num_fragments)]
        self.highest = [0] * num_fragments
        self.serials = [0] * num_fragments
        self.holder: dict[int, Life] = {}
        self.free: set[int] = set()
        self.dropped: set[int] = set()
        self.tainted: set[int] = set()
        self.cursor = 0
        self.reissued = 0
        self.revoked = 0
        self.most_full = 0
        self.lineage, self.number = 0, 0
        self.nonce = 0

    # ------------------------------------------------------------ the truth

    def fates(self) -> dict[int, str]:
        out: dict[int, str] = {}
        for sample in range(self.cursor):
            k = sum(sample in samples for samples in self.committed)
            if k == self.num_fragments:
                out[sample] = "full"
            elif sample in self.holder:
                out[sample] = "in_progress"
            elif sample in self.dropped:
                out[sample] = "dropped"
            elif sample in self.free:
                out[sample] = "free"
            else:
                assert k > 0
                out[sample] = f"partial({k})"
        return out

    def num_full(self) -> int:
        return len(set.intersection(*self.committed))

    # ------------------------------------------------------------ steps

    def run(self, num_records: int) -> Story:
        self.term()
        for name in self.names:
            self.join(name)
        digests = tuple(f"{f:032x}" for f in range(self.num_fragments))
        self.records.append(GenesisRecord(maker="island-0.1", digests=digests, num_params=100))
        steps = [self.lease] * 6 + [self.commit] * 8 + [self.fence, self.settle, self.settle, self.revoke, self.drop]
        steps += [self.come_back] * 2 + [self.observe, self.term]
        if self.operations:
            steps += [self.operate, self.roll_back]
        while len(self.records) < num_records:
            self.rng.choice(steps)()
        return self

    def live(self) -> list[Life]:
        return [life for life in self.lives if life.live]

    def term(self) -> None:
        rebuilt = bool(self.records) and self.rng.random() < 0.2
        self.lineage += rebuilt
        self.number += 1
        controller = f"controller-{self.number}"
        self.records.append(TermRecord(lineage=self.lineage, number=self.number, controller=controller))
        self.serials = [0] * self.num_fragments
        for life in self.lives:
            life.may_commit.clear()
        if rebuilt:
            for life in self.live():
                self.end(life, refused=False)
                life.may_commit.clear()

    def join(self, name: str) -> None:
        self.nonce += 1
        incarnation = 1 + max((life.incarnation for life in self.lives if life.name == name), default=0)
        self.lives.append(Life(name=name, incarnation=incarnation, marks=[0] * self.num_fragments))
        self.records.append(
            JoinRecord(member=name, incarnation=incarnation, nonce=f"nonce-{self.nonce}", node="node-0")
        )

    def come_back(self) -> None:
        absent = sorted(set(self.names) - {life.name for life in self.live()})
        if absent:
            self.join(self.rng.choice(absent))

    def lease(self) -> None:
        if not self.live():
            return
        life = self.rng.choice(self.live())
        again = sorted(self.rng.sample(sorted(self.free), min(len(self.free), self.rng.randrange(8))))
        num = self.rng.randrange(0 if again else 1, 12)
        fresh = list(range(self.cursor, self.cursor + num))
        ranges = to_ranges(again) + to_ranges(fresh)
        self.records.append(
            LeaseRecord(member=life.name, incarnation=life.incarnation, index=len(life.leases), ranges=ranges)
        )
        self.free -= set(again)
        self.reissued += len(again)
        self.cursor += num
        for sample in again + fresh:
            life.leases.append(sample)
            self.holder[sample] = life

    def commit(self) -> None:
        fragment = self.rng.randrange(self.num_fragments)
        able = [
            life
            for life in self.lives
            if len(life.leases) > life.marks[fragment] and (life.live or fragment in life.may_commit)
        ]
        chosen = self.rng.sample(able, self.rng.randint(1, len(able))) if able else []
        if not chosen:
            return
        entries = []
        for life in sorted(chosen, key=lambda life: (life.name, life.incarnation)):
            since = life.marks[fragment]
            upto = self.rng.randint(since + 1, len(life.leases))
            samples = life.leases[since:upto]
            self.committed[fragment].update(samples)
            life.marks[fragment] = upto
            life.may_commit.discard(fragment)
            entries.append(
                RosterEntry(
                    member=life.name, incarnation=life.incarnation, seq=len(self.records), since=since, upto=upto,
                    ranges=to_ranges(samples), num_steps=1, coefficient=1.0 / len(chosen),
                )
            )  # fmt: skip
        self._finish(life for life in chosen)
        past = self.commits[fragment]
        self.serials[fragment] += self.rng.randint(1, 3)
        record = sealed_commit(
            fragment=fragment, n=len(past) + 1, prev_chain=past[-1].chain if past else "genesis",
            serial=self.serials[fragment], attempt=1, roster=tuple(entries),
            chunk_digests=(f"{len(self.records):032x}",), digest=f"{len(self.records) + 7:032x}",
            base_samples=self.rng.randint(0, self.most_full),
        )  # fmt: skip
        past.append(record)
        self.records.append(record)
        self.highest[fragment] = max(self.highest[fragment], record.n)
        self.most_full = max(self.most_full, self.num_full())

    def _finish(self, lives: object) -> None:
        for life in lives:  # type: ignore[attr-defined]
            for sample in life.leases[: min(life.marks)]:
                self.holder.pop(sample, None) if self.holder.get(sample) is life else None

    def end(self, life: Life, *, refused: bool) -> None:
        life.live, life.refused = False, refused
        life.may_commit = {f for f in range(self.num_fragments) if self.rng.random() < 0.5}
        self.records.append(FenceRecord(member=life.name, incarnation=life.incarnation, why="test", refused=refused))

    def fence(self) -> None:
        if len(self.live()) > 1:
            self.end(self.rng.choice(self.live()), refused=self.rng.random() < 0.5)

    def settle(self) -> None:
        waiting = [life for life in self.lives if not life.live and not life.settled]
        if not waiting:
            return
        life = self.rng.choice(waiting)
        life.settled = True
        life.may_commit.clear()
        lost = self.rng.randint(0, len(life.leases) - max(life.marks))
        self.records.append(SettleRecord(member=life.name, incarnation=life.incarnation, lost=lost))
        for sample in life.leases[min(life.marks) :]:
            self.holder.pop(sample, None)
        for sample in life.leases[max(life.marks) :]:
            if life.refused and sample in self.tainted:
                self.dropped.add(sample)
            else:
                self.free.add(sample)
                if life.refused:
                    self.tainted.add(sample)

    def drop(self) -> None:
        able = [life for life in self.live() if life.leases]
        if not able:
            return
        life = self.rng.choice(able)
        high = max(life.marks)
        upto = self.rng.randint(high, len(life.leases))
        self.records.append(DropRecord(member=life.name, incarnation=life.incarnation, upto=upto, why="stale"))
        self.dropped.update(life.leases[high:upto])
        for sample in life.leases[:upto]:
            if self.holder.get(sample) is life:
                del self.holder[sample]
        life.marks = [upto] * self.num_fragments
        life.floor = upto

    def revoke(self) -> None:
        fragment = self.rng.randrange(self.num_fragments)
        if not self.commits[fragment] or self.rng.random() < 0.3:
            return
        lives = [(self.life(entry), entry) for entry in self.commits[fragment][-1].roster]
        if not self.revoke_dropped and any(entry.since < life.floor for life, entry in lives):
            return
        commit = self.commits[fragment].pop()
        self.revoked += 1
        self.records.append(RevokeRecord(fragment=fragment, n=commit.n, chain=commit.chain))
        for life, entry in lives:
            for position in range(entry.since, entry.upto):
                sample = life.leases[position]
                self.committed[fragment].discard(sample)
                left = any(sample in samples for samples in self.committed)
                if position < life.floor:
                    if not left:
                        self.dropped.add(sample)
                elif not life.settled:
                    life.marks[fragment] = entry.since
                    self.holder[sample] = life
                elif not left:
                    self.free.add(sample)

    def operate(self) -> None:
        since = tuple(len(past) + 1 for past in self.commits)
        self.records.append(SettingRecord(key="strategy.outer_lr", value=self.rng.random(), since=since))
        self.records.append(PauseRecord(paused=self.rng.random() < 0.5, why="somebody asked"))

    def roll_back(self) -> None:
        """Everybody is ended and settled, then every fragment goes back by some versions."""
        if not any(self.commits):
            return
        for life in self.live():
            self.end(life, refused=False)
        while any(not life.settled for life in self.lives):
            self.settle()
        versions = tuple(self.rng.randint(max(len(past) - 3, 0), len(past)) for past in self.commits)
        chains = tuple(past[n - 1].chain if n else "genesis" for past, n in zip(self.commits, versions, strict=True))
        self.records.append(RollbackRecord(name=f"v{max(versions)}", versions=versions, chains=chains))
        counted = set().union(*self.committed)
        for fragment, n in enumerate(versions):
            for commit in self.commits[fragment][n:]:
                for entry in commit.roster:
                    self.committed[fragment] -= set(self.life(entry).leases[entry.since : entry.upto])
            del self.commits[fragment][n:]
        self.free |= counted - set().union(*self.committed)

    def life(self, entry: RosterEntry) -> Life:
        return next(x for x in self.lives if (x.name, x.incarnation) == (entry.member, entry.incarnation))

    def shares(self) -> SharesRecord:
        names = tuple(f"{life.name}.{life.incarnation}" for life in self.lives)
        ones = (1,) * len(names)
        return SharesRecord(inner_steps=3, members=names, steps=ones, batch_sizes=ones, why="measured")

    def observe(self) -> None:
        versions = tuple(self.highest)
        self.records += [
            EvaluationRecord(member="island-0.1", versions=versions, samples=self.most_full, val_loss=1.5),
            SnapshotRecord(name=f"v{len(self.records)}", versions=versions),
            FaultRecord(fault="suspect", member="island-0", injected=False, t_s=1.25),
            self.shares(),
        ]
