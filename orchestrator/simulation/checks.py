"""The twelve invariants of the protocol, asserted while a run is simulated (`exchange-protocol.md`, section 2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator import ledger
from orchestrator.exchange_rules import OpenExchange, copies_needed
from orchestrator.membership import process_of
from orchestrator.run_state import RunState
from orchestrator.simulation.bookkeeping import Bookkeeping
from orchestrator.simulation.symbols import bits_of, must
from workers import member_events as ev
from workers import messages as msg
from workers import ranges
from workers.fragment_state import KEEP_RESULTS
from workers.records import CommitRecord, FenceRecord, JoinRecord, MemberId, RefusalRecord, Row

if TYPE_CHECKING:
    from orchestrator.simulation.cluster import Cluster
    from orchestrator.simulation.controller import Controller
    from orchestrator.simulation.island import Island


@dataclass(kw_only=True, slots=True)
class Attempt:
    """What is known of one exchange from its assignments."""

    attempt: int
    base: msg.Version
    roster: frozenset[MemberId]
    owners: frozenset[MemberId]
    limit: int


class Checks:
    """Asserts; raises `Violation`."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.book = Bookkeeping()
        self.rows: list[Row] = []
        self.attempts: dict[tuple[int, msg.ExchangeId], Attempt] = {}
        self.truth: dict[tuple[int, str], str] = {}

    # ------------------------------------------------------------ what the others ask

    def path(self, fragment: int) -> list[str]:
        """Chain ids of the versions on the journal's path."""
        return self.book.chains[fragment] if self.book.chains else []

    def on_path(self, fragment: int, chain: str) -> bool:
        """Whether a version is on the journal's path."""
        return chain in self.path(fragment)

    def doubted(self, fragment: int) -> set[str]:
        """Versions that a controller may be about to revoke."""
        out: set[str] = set()
        for controller in self.cluster.controllers:
            if controller.coordinator is not None:
                question = controller.coordinator.revocations.open.get(fragment)
                if question is not None:
                    out.add(question.version.chain)
        return out

    # ------------------------------------------------------------ journal

    def _take(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self.book.apply(row)
            self.cluster.counts[f"row {row.record.kind}"] += 1
            self.rows.append(row)

    def began(self, rows: Sequence[Row]) -> None:
        """A controller read the journal: what was ever told is in it (invariant 2)."""
        known = len(self.rows)
        must(len(rows) >= known, 2, f"{known} rows were flushed, a new controller finds {len(rows)}")
        must(not known or rows[known - 1].hash == self.rows[-1].hash, 2, "a flushed row is another one now")
        self._take(rows[known:])

    def flushed(self, controller: Controller, rows: Sequence[Row]) -> None:
        """Rows are durable and the controller is about to say so."""
        self._take(rows)

    def appended(self, controller: Controller, rows: Sequence[Row]) -> None:
        """Rows were decided, though not flushed: what must hold in this moment (invariants 3, 7)."""
        coordinator = controller.coordinator
        assert coordinator is not None
        for row in rows:
            record = row.record
            if isinstance(record, CommitRecord):
                wrong = self.cluster.distorted & set(record.chunk_digests)
                must(not wrong, 11, f"version {record.n} has a result that one member made wrongly")
                self._commit(controller, record)
            elif isinstance(record, RefusalRecord) and record.as_owner:
                who = MemberId(name=record.member, incarnation=record.incarnation)
                must(who in self.cluster.liars, 11, f"{who} is blamed for what it reduced, and never lied")

    def _commit(self, controller: Controller, record: CommitRecord) -> None:
        coordinator = controller.coordinator
        assert coordinator is not None
        wanted = 0
        for entry in record.roster:
            wanted |= bits_of(entry.ranges)
        keys = [(record.fragment, digest) for digest in record.chunk_digests]
        holders = []
        state = coordinator.state
        live = {process_of(state.members[member].nonce) for member in state.current.values()}
        for island in self.cluster.by_address.values():
            here = [island.store.content.get(key) for key in keys]
            if None in here:
                continue
            for payload in here:
                assert payload is not None
                must(payload.hi == wanted, 3, f"a part of commit {record.n} holds other samples than its roster")
            if island.first_nonce in live:
                holders.append(island)
        if record.digest in self.cluster.names.wrong_ones:
            must(len(live) == 1, 7, f"commit {record.n} is sealed with a digest that only one member computed")
            self.cluster.give_up("the only member sealed a wrong digest")
        fleet = coordinator._fleet(record.fragment)
        need, nodes = copies_needed(coordinator.plan.exchange, fleet)
        if len(holders) < need or len({i.node for i in holders}) < nodes:
            must(False, 7, f"commit {record.n} of fragment {record.fragment} is held by {len(holders)} of {need}")

    # ------------------------------------------------------------ messages

    def sent(self, controller: Controller, batch: msg.Batch) -> None:
        """Invariants 8 to 10: what a controller tells is decided, and rosters only shrink."""
        durable = self.book
        if batch.rows:
            must(batch.rows[-1].seq < durable.num_rows, 10, f"row {batch.rows[-1].seq} is told before it is flushed")
        for body in batch.bodies:
            match body:
                case msg.LeaseGrant(index=index, ranges=granted):
                    member = MemberId(name=batch.name, incarnation=batch.incarnation or 0)
                    samples = durable.lives[member].samples if member in durable.lives else []
                    upto = index + ranges.count(granted)
                    told = upto <= len(samples) and bits_of(granted) == durable.lives[member].bits(index, upto)
                    must(told, 10, f"a lease of {member} is told before it is flushed")
                case msg.Welcome():
                    must(batch.nonce in durable.by_nonce, 10, f"{batch.nonce} is welcomed before that is flushed")
                case msg.Stop(save=False):
                    superseded = batch.incarnation is None
                    must(durable.stopped or superseded, 10, "a stop is told before it is flushed")
                case msg.Verify() | msg.Discarded() | msg.RevokeQuery() | msg.RevokeCancel() | msg.Rejoin():
                    self.cluster.counts[f"told {type(body).__name__}"] += 1
                case _:
                    pass

    def _attempt(self, state: RunState, fragment: int, open_: OpenExchange) -> None:
        """Invariants 8 and 9, in the moment in which an attempt is decided."""
        key = (fragment, open_.id)
        known = self.attempts.get(key)
        if known is not None and open_.attempt == known.attempt:
            if known.base != open_.base:
                must(False, 9, f"exchange {open_.id} comes with two bases")
            return
        roster = frozenset(entry.member_id for entry in open_.roster)
        owners = frozenset(open_.owners)
        if known is None:
            must(open_.attempt == 1, 9, f"exchange {open_.id} begins with attempt {open_.attempt}")
            for member in roster:
                must(state.members[member].live, 8, f"{member} is fenced and in a new roster")
            limit = len(roster) + len(state.current)
            self.attempts[key] = Attempt(attempt=1, base=open_.base, roster=roster, owners=owners, limit=limit)
            return
        must(known.base == open_.base, 9, f"exchange {open_.id} comes with two bases")
        must(roster <= known.roster, 9, f"the roster of {open_.id} grows")
        must(open_.attempt <= known.limit, 9, f"{open_.id} is at attempt {open_.attempt}, at most {known.limit}")
        known.attempt, known.roster, known.owners = open_.attempt, roster, owners

    # ------------------------------------------------------------ members

    def member(self, island: Island) -> None:
        """After every event of a member: what it knows of itself."""
        machine = island.machine
        for state, part in zip(machine.fragments, island.replica.parts, strict=True):
            if state.n < 0:
                continue
            if part.n != state.n or part.chain != state.chain:
                must(False, 1, f"{machine.nonce}: machine and tensors differ")

    def obedience(self, island: Island, event: ev.Event) -> object:
        """Of a batch of a lower term: what it must not change (invariant 10); None for all other events."""
        machine = island.machine
        if not isinstance(event, ev.Delivered) or machine.term is None or event.batch.term.rank >= machine.term.rank:
            return None
        attempts = [(s.assign, s.spread, s.barred, len(s.announced), s.n) for s in machine.fragments]
        return (machine.term, len(machine.log), machine.num_leased(), machine.reset_wanted, attempts)

    def displacements(self, island: Island) -> None:
        """Invariants 1 and 6, at a step boundary: nothing of a member's work is lost, nothing is there twice.

        What was looked at and has not changed since is not looked at again: most boundaries change one fragment.
        """
        machine = island.machine
        if machine.incarnation is None or machine.reset_wanted:
            return
        complete = all(s.n >= 0 for s in machine.fragments)
        for fragment, (state, part) in enumerate(zip(machine.fragments, island.replica.parts, strict=True)):
            if state.n < 0:
                continue
            if machine.built is None and (state.chain, part.trail) != island.seen_content[fragment]:
                self._content(island, fragment)
                island.seen_content[fragment] = (state.chain, part.trail.copy())
            if not complete:
                continue
            floor = island.floors[fragment]
            now = (state.watermark, machine.consumed, part.d, part.aside, floor, part.e, part.hi[0], part.lo[0])
            if now != island.seen_work[fragment]:
                island.seen_work[fragment] = now
                self._work(island, fragment)

    def _work(self, island: Island, fragment: int) -> None:
        machine, state, part = island.machine, island.machine.fragments[fragment], island.replica.parts[fragment]
        who = f"{machine.nonce} fragment {fragment} version {state.n}"
        open_ = bits_of(ranges.cut(machine.leases, state.watermark, machine.consumed))
        if part.open() != open_:
            must(False, 6, f"{who}: displacement {part.open():b}, uncommitted steps {open_:b}")
        must(not part.d & (part.aside or 0), 6, f"{who}: work under way is in the live parameters as well")
        floor = island.floors[fragment]
        if state.watermark < floor:
            return
        mine = bits_of(ranges.cut(machine.leases, floor, state.watermark))
        must(not mine & ~part.hi[0], 6, f"{who}: it takes work for included that the anchor lacks")
        if island.replica.feedback:
            must(not mine & ~(part.lo[0] | part.e), 6, f"{who}: a residual is lost")
            must(not part.lo[0] & part.e, 6, f"{who}: a residual was delivered and is still kept")

    def _content(self, island: Island, fragment: int) -> None:
        part = island.replica.parts[fragment]
        for chunk in range(1, len(part.hi)):
            must(part.hi[chunk] == part.hi[0] and part.lo[chunk] == part.lo[0], 3, "half a contribution in an anchor")
        digest = island.replica.digest(fragment)
        known = self.truth.setdefault((fragment, part.chain), digest)
        must(known == digest or island.corrupt, 1, f"two contents for version {part.n} of fragment {fragment}")

    def offer(self, island: Island, offer: msg.Offer) -> None:
        """Invariant 1: a member offers only for versions on the path as it knows it."""
        log = island.machine.log
        must(
            log.on_path(offer.fragment, offer.base.chain),
            1,
            f"{island.machine.nonce} offers for a version off the path",
        )

    # ------------------------------------------------------------ controllers, regularly, at the end

    def controller(self, controller: Controller) -> None:
        """After every event of a controller."""
        coordinator = controller.coordinator
        assert coordinator is not None
        if coordinator.flushed >= self.book.num_rows and controller.alive:
            must(False, 10, "a flush is believed that was none")
        for exchange in coordinator.exchanges:
            if exchange.open is not None and exchange.open.attempt:
                self._attempt(coordinator.state, exchange.fragment, exchange.open)

    def everything(self) -> None:
        """All invariants that look at the whole cluster."""
        for controller in self.cluster.controllers:
            coordinator = controller.coordinator
            if coordinator is None or not self.cluster.owns_journal(controller):
                continue
            if not coordinator.pending and len(coordinator.rows) == self.book.num_rows:
                self.book.check(coordinator.state)
        for island in self.cluster.processes():
            self._bounded(island)

    def _bounded(self, island: Island) -> None:
        """Invariant 12: what a process keeps is bounded."""
        machine, store = island.machine, island.store
        if not store.changed:
            return
        store.changed = False
        results = Counter(fragment for fragment, _ in store.content)
        for fragment, num_chunks in enumerate(island.replica.num_chunks):
            own = f"piece/{fragment}/{machine.name}."
            payloads = [g for g in store.groups if g.startswith(own)]
            if len(payloads) > 2:
                must(False, 12, f"{machine.nonce} keeps {payloads}")
            if results[fragment] > (KEEP_RESULTS + 6) * num_chunks * 3:
                must(False, 12, f"{machine.nonce} keeps {results[fragment]} results of fragment {fragment}")

    def end(self) -> None:
        """After the drain: the whole journal once more, by both ledgers, and the members' anchors."""
        self.everything()
        state = RunState()
        for row in self.rows:
            state.apply(row.record)
        self.book.check(state)
        total = self.cluster.scenario.plan.total_samples
        must(state.samples_accounted() == total, 5, f"{state.samples_accounted()} of {total} samples have a final fate")
        found = ledger.recompute(self.rows)
        must(found.ok, 5, f"the ledger finds {found.findings[:1]}")
        must(found.samples()["full"] == state.samples_committed(), 5, "the ledger counts another number of samples")
        for fragment, path in enumerate(self.book.chains):
            for island in self.cluster.processes():
                part = island.replica.parts[fragment]
                if part.chain == path[-1]:
                    must(part.hi[0] == self.book.committed[fragment], 4, "an anchor and the ledger differ")


def joined(rows: Sequence[Row]) -> set[tuple[str, int]]:
    """Live incarnations by the rows."""
    out: set[tuple[str, int]] = set()
    for row in rows:
        if isinstance(row.record, JoinRecord):
            out.add((row.record.member, row.record.incarnation))
        elif isinstance(row.record, FenceRecord):
            out.discard((row.record.member, row.record.incarnation))
    return out
