"""What a simulated run of pairs is like, what comes of it, and the samples that its journal accounts for."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean

from faults.virtual import LinkQuality
from orchestrator.pairing import PairBook, PairRecord, Settled, Topology
from orchestrator.simulation.symbols import must
from strategies.topology import random_groups
from workers import pair as p
from workers.records import MemberId

FAULTS = ("kill", "cut", "cut_pair", "cut_head", "crash", "crash_at_row", "away")
LOSSY = LinkQuality(loss=0.05, duplicate=0.05, straggle=0.05)


@dataclass(frozen=True, kw_only=True, slots=True)
class PairScenario:
    """What a simulated run of pairs depends on. Times in virtual seconds; `fault_gap_s` None: no faults but the link's.

    `line_bytes_per_s`: of each member, both ways. `service_s`: what the controller spends on a message, one at a time.
    `told_s`: until Ray tells it of a death.
    """

    seed: int
    num_members: int = 6
    group_size: int = 2
    rounds: int = 12
    drain_rounds: int = 8
    inner_s: float = 8.0
    jitter_s: float = 0.3
    timeout_s: float = p.PAIR_TIMEOUT_S
    payload_bytes: float = 1e6
    line_bytes_per_s: float = 6.25e6
    service_s: float = 1e-4
    told_s: float = 0.05
    link: LinkQuality = LOSSY
    fault_gap_s: float | None = 6.0
    faults: tuple[str, ...] = FAULTS
    machine: type[p.PairMachine] = p.PairMachine
    book: type[PairBook] = PairBook
    kills: tuple[tuple[float, str], ...] = ()

    def topology(self) -> Topology:
        """Random groups, drawn from the seed."""
        return lambda names, round_: (
            random_groups(names, seed=self.seed, round_=round_, size=self.group_size)
            if len(names) >= self.group_size
            else ()
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """One member's view of an exchange: how long it took from its send point on, and what came of it."""

    round_: int
    member: str
    partners: tuple[str, ...]
    seconds: float
    committed: bool
    doubted: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class PairResult:
    """What came of a seed; `problem` is empty if all invariants held."""

    seed: int
    problem: str
    invariant: int
    num_events: int
    num_faults: int
    counts: dict[str, int]
    exchanges: tuple[Exchange, ...]

    @property
    def ok(self) -> bool:
        """Whether all invariants held."""
        return not self.problem

    def sync_s(self) -> float:
        """Mean seconds of the exchanges that were committed."""
        return fmean(e.seconds for e in self.exchanges if e.committed)


@dataclass(kw_only=True, slots=True)
class Ledger:
    """Samples by number: who was leased which, in which order, and what became of them."""

    next_id: int = 0
    free: list[int] = field(default_factory=list)
    held: dict[MemberId, list[int]] = field(default_factory=dict)
    marks: dict[MemberId, int] = field(default_factory=dict)
    committed: dict[int, p.PairId] = field(default_factory=dict)
    settled: set[MemberId] = field(default_factory=set)

    def lease(self, member: MemberId, num: int) -> None:
        """Lease the lowest free ones, then fresh ones."""
        ids = [self.free.pop(0) for _ in range(min(num, len(self.free)))]
        fresh = num - len(ids)
        self.held.setdefault(member, []).extend([*ids, *range(self.next_id, self.next_id + fresh)])
        self.next_id += fresh

    def commit(self, record: PairRecord) -> None:
        """A row of the journal."""
        for span in record.spans:
            member = span.member
            must(member not in self.settled, 2, f"{record.pair}: the samples of {member} had been given back")
            must(span.since == self.marks.get(member, 0), 2, f"{record.pair}: a gap or an overlap of {member}")
            for sample in self.held.get(member, [])[span.since : span.upto]:
                must(sample not in self.committed, 2, f"sample {sample} is committed twice, in {record.pair}")
                self.committed[sample] = record.pair
            self.marks[member] = span.upto

    def settle(self, row: Settled) -> None:
        """A row of the journal: give back what is not committed."""
        must(row.watermark == self.marks.get(row.member, 0), 2, f"{row}: committed up to {self.marks}")
        self.free += self.held.pop(row.member, [])[row.watermark :]
        self.settled.add(row.member)

    def check(self) -> None:
        """Every sample that was issued has one place."""
        open_ = [i for member, ids in self.held.items() for i in ids[self.marks.get(member, 0) :]]
        places = [*self.committed, *self.free, *open_]
        must(len(places) == len(set(places)) == self.next_id, 2, "a sample is nowhere, or in two places")
