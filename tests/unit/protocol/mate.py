"""A member's machine and a journal to tell it: traces are written as rows and bodies."""

from __future__ import annotations

from typing import TypeVar

from workers import member_events as ev
from workers import messages as msg
from workers.member import MemberMachine
from workers.record_log import GENESIS_CHAIN
from workers.records import (
    GENESIS_HASH,
    CommitRecord,
    GenesisRecord,
    JoinRecord,
    MemberId,
    OfferId,
    Record,
    RosterEntry,
    Row,
    Term,
    TermRecord,
    make_row,
    roster_digest,
    version_chain,
)

NAME = "island-0"
BODY = TypeVar("BODY")


def member_id(name: str, incarnation: int = 1) -> MemberId:
    return MemberId(name=name, incarnation=incarnation)


def entry(name: str, since: int, upto: int, *, seq: int = 1, incarnation: int = 1) -> RosterEntry:
    return RosterEntry(
        member=name,
        incarnation=incarnation,
        seq=seq,
        since=since,
        upto=upto,
        ranges=((since, upto),),
        num_steps=upto - since,
        coefficient=0.5,
    )


class Mate:
    """The machine of `island-0` in a run with one or more fragments of two chunks."""

    def __init__(self, *, fragments: int = 1) -> None:
        self.now = 0.0
        self.term = Term(lineage=0, number=1, controller="c")
        self.rows: list[Row] = []
        self.told = 0
        self.batches = 0
        self.commands: list[ev.Command] = []
        info = msg.ProcessInfo(address="here", node="n", weight=16, batch_size=2)
        self.machine = MemberMachine(run_id="run", name=NAME, nonce="p", info=info, num_chunks=(2,) * fragments)
        self.record(TermRecord(lineage=0, number=1, controller="c"))
        self.commands += self.machine.join_now(self.now)

    # ------------------------------------------------------------ the journal

    def record(self, *records: Record) -> None:
        for record in records:
            last = self.rows[-1].hash if self.rows else GENESIS_HASH
            self.rows.append(make_row(len(self.rows), last, record))

    def commit(self, *roster: RosterEntry, fragment: int = 0, result: str = "r") -> CommitRecord:
        """The next commit of a fragment."""
        done = [r.record for r in self.rows if isinstance(r.record, CommitRecord) and r.record.fragment == fragment]
        n, chain = len(done) + 1, done[-1].chain if done else GENESIS_CHAIN
        roster = roster or (entry("island-1", 0, 4),)
        digests = (f"{result}{n}-0", f"{result}{n}-1")
        record = CommitRecord(
            fragment=fragment,
            n=n,
            prev_chain=chain,
            chain=version_chain(chain, {"n": n, "result": result, "f": fragment}),
            serial=n,
            attempt=1,
            roster=roster,
            roster_digest=roster_digest(roster),
            chunk_digests=digests,
            digest=f"anchor{n}",
            base_samples=0,
        )
        self.record(record)
        return record

    # ------------------------------------------------------------ events

    def happen(self, event: ev.Event) -> list[ev.Command]:
        out = self.machine.handle(event, self.now)
        self.commands += out
        return out

    def batch(self, *bodies: msg.ControllerBody, **changes: object) -> msg.Batch:
        self.batches += 1
        rows = tuple(self.rows[self.told :])
        values: dict[str, object] = {
            "run_id": "run", "term": self.term, "name": NAME, "incarnation": self.machine.incarnation,
            "nonce": self.machine.nonce, "rows_from": self.told, "rows": rows, "bodies": bodies, "number": self.batches,
        }  # fmt: skip
        return msg.Batch(**{**values, **changes})  # type: ignore[arg-type]

    def tell(self, *bodies: msg.ControllerBody, **changes: object) -> list[ev.Command]:
        """Deliver bodies with all rows that it was not told yet."""
        batch = self.batch(*bodies, **changes)
        self.told = len(self.rows)
        return self.happen(ev.Delivered(batch=batch))

    def tick(self, seconds: float = 0.0) -> list[ev.Command]:
        self.now += seconds
        return self.happen(ev.Tick())

    def found(self, kind: type[BODY]) -> list[BODY]:
        """Commands of a kind, or posted bodies of a kind, oldest first."""
        bodies = [c.body if isinstance(c, ev.Post) else c for c in self.commands]
        return [body for body in bodies if isinstance(body, kind)]

    # ------------------------------------------------------------ a member in full swing

    def start(self) -> Mate:
        """Welcomed, holds version 0 of every fragment, has leases and two peers."""
        num = len(self.machine.fragments)
        self.record(
            JoinRecord(member=NAME, incarnation=1, nonce="p", node="n"),
            GenesisRecord(maker="island-1.1", digests=tuple(f"g{f}" for f in range(num)), num_params=1),
        )
        self.tell(msg.Welcome(incarnation=1), incarnation=None)
        held = (0,) * num
        self.tell(msg.Peers(peers=tuple((f"island-{i}.1", f"at-{i}", held) for i in range(3))))
        for fragment in range(num):
            self.happen(ev.StateStaged(fragment=fragment, n=0, chain=GENESIS_CHAIN))
            self.commands += self.machine.installed(fragment, self.now)
        self.tell(msg.LeaseGrant(index=0, ranges=((0, 32),)))
        self.commands.clear()
        return self

    def offer(self, upto: int, *, fragment: int = 0) -> msg.Offer:
        """Train to `upto` and offer."""
        state = self.machine.fragments[fragment]
        self.machine.consumed_to(max(upto, self.machine.consumed), upto)
        offer = msg.Offer(
            fragment=fragment,
            base=state.version,
            seq=state.seq + 1,
            born=state.n,
            since=state.watermark,
            upto=upto,
            ranges=((state.watermark, upto),),
            num_steps=2,
            weight=16,
            chunk_digests=("a", "b"),
            sumsq=(1.0, 1.0),
            num_bytes=1,
        )
        self.commands += self.machine.offered(offer, self.now)
        return offer

    def assign(
        self, *roster: RosterEntry, owners: tuple[str, str], attempt: int = 1, serial: int = 1, fragment: int = 0
    ) -> msg.Assign:
        """An assignment whose offers are all to be had at `at-<i>`."""
        state = self.machine.fragments[fragment]
        offers = []
        for e in roster:
            offer = msg.Offer(
                fragment=fragment, base=state.version, seq=e.seq, born=0, since=e.since, upto=e.upto, ranges=e.ranges,
                num_steps=1, weight=1, chunk_digests=("x", "y"), sumsq=(1.0, 1.0), num_bytes=1,
            )  # fmt: skip
            offers.append((e.offer.member, f"at-{e.member[-1]}", offer))
        return msg.Assign(
            fragment=fragment,
            exchange=msg.ExchangeId(term=self.term, serial=serial),
            attempt=attempt,
            base=state.version,
            base_samples=0,
            roster=roster,
            roster_digest=roster_digest(roster),
            owners=tuple(member_id(owner) for owner in owners),
            owner_addresses=tuple((str(member_id(owner)), f"at-{owner[-1]}") for owner in sorted(set(owners))),
            offers=tuple(offers),
        )

    def spread(self, assign: msg.Assign, digests: tuple[str, ...]) -> msg.Spread:
        return msg.Spread(
            fragment=assign.fragment, exchange=assign.exchange, attempt=assign.attempt, chunk_digests=digests
        )


def offer_id(name: str, seq: int = 1) -> OfferId:
    return OfferId(member=member_id(name), seq=seq)
