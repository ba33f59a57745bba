"""The member's side of the exchanges: pure, no tensors, no clock, no threads (protocol 1.4 to 1.9).

`handle(event, now) -> list[Command]`. The shell (`workers/sync.py`, or a simulator with symbolic tensors) carries the
commands out and reports back. What touches live parameters happens at a step boundary of the training thread, which
asks `due()` and says `applied()`, `installed()`, `was_reset()`, `offered()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from workers import member_events as ev
from workers import member_rules as rules
from workers import messages as msg
from workers import ranges
from workers.messages import Assign, Offer, Version
from workers.ranges import Range
from workers.record_log import GENESIS_CHAIN, RecordLog
from workers.records import CommitRecord, DropRecord, MemberId, OfferId, Row, Term

KEEP_RESULTS = 2
RESEND_S = 1.0


# ---------------------------------------------------------------- state


@dataclass(frozen=True, kw_only=True, slots=True)
class Pending:
    """An offer whose fate is open. `published`: its payload is in this process; that of a stopped one is gone."""

    offer: Offer
    id: OfferId
    published: bool = True


@dataclass(kw_only=True, slots=True)
class FragmentState:
    """What a member knows of one fragment."""

    n: int = -1
    chain: str = ""
    watermark: int = 0
    seq: int = 0
    late: bool = True
    pending: Pending | None = None
    posted_s: float = 0.0
    announced: dict[OfferId, msg.Announce] = field(default_factory=dict)
    pieces: set[tuple[OfferId, int]] = field(default_factory=set)
    fetching: set[tuple[OfferId, int]] = field(default_factory=set)
    assign: Assign | None = None
    reducing: set[int] = field(default_factory=set)
    reduced: dict[int, str] = field(default_factory=dict)
    results: dict[int, str] = field(default_factory=dict)
    fetching_results: set[int] = field(default_factory=set)
    spread: msg.Spread | None = None
    computing: tuple[msg.ExchangeId, int] | None = None
    have: msg.Have | None = None
    have_s: float = 0.0
    content: set[str] = field(default_factory=set)
    recent: dict[int, tuple[str, ...]] = field(default_factory=dict)
    barred: tuple[Version, int] | None = None
    catching_up: bool = False
    tries: int = 0
    fetching_state: bool = False
    staged: Version | None = None

    @property
    def version(self) -> Version:
        """Version held."""
        return Version(n=self.n, chain=self.chain)


class MemberMachine:
    """One process's view of the run."""

    def __init__(self, *, run_id: str, name: str, nonce: str, info: msg.ProcessInfo, num_chunks: Sequence[int]) -> None:
        """`nonce`: unique to this process; `num_chunks`: chunks of each fragment."""
        self.run_id, self.name, self.info = run_id, name, info
        self.first_nonce, self.lives = nonce, 0
        self.nonce = nonce
        self.incarnation: int | None = None
        self.term: Term | None = None
        self.log = RecordLog()
        self.num_chunks = tuple(num_chunks)
        self.fragments = [FragmentState() for _ in num_chunks]
        self.leases: list[Range] = []
        self.consumed = 0
        self.steps = 0
        self.tail = False
        self.told: dict[type, tuple[tuple[int, int], int]] = {}
        self.peers: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.reset_wanted = ""
        self.building = False
        self.built: msg.GenesisMade | None = None
        self.dropped_to: int | None = None
        self.drop_asked = ""
        self.may_rewrite = False  # a new lineage may replace rows that only the lost journal had
        self.waiting = ""
        self.bytes_sent = 0
        self.stale = 0
        self.out: list[ev.Command] = []
        self.now = 0.0
        self.join_s = float("-inf")

    # ------------------------------------------------------------ entry

    def handle(self, event: ev.Event, now: float) -> list[ev.Command]:
        """One event in, commands out."""
        self.now, self.out = now, []
        match event:
            case ev.Delivered(batch=batch):
                self._delivered(batch)
            case ev.Tick():
                self._tick()
            case ev.GenesisBuilt(digests=digests, num_params=num_params):
                self.building = False
                self.built = msg.GenesisMade(digests=digests, num_params=num_params, num_chunks=self.num_chunks)
                for state in self.fragments:
                    state.n, state.chain, state.late = 0, GENESIS_CHAIN, False
                self._confirm_genesis()
                if self.built is not None:
                    self._post(self.built)
            case ev.PiecesFetched(fragment=f, offer=offer, chunks=chunks):
                state = self.fragments[f]
                state.fetching -= {(offer, chunk) for chunk in chunks}
                state.pieces |= {(offer, chunk) for chunk in chunks}
                self._reduce(f)
            case ev.PiecesFailed():
                self._pieces_failed(event)
            case ev.PieceRejected():
                self._piece_rejected(event)
            case ev.ChunksReduced():
                self._chunks_reduced(event)
            case ev.ResultsFetched(fragment=f, chunks=fetched):
                state = self.fragments[f]
                state.fetching_results -= {chunk for chunk, _ in fetched}
                state.content |= {digest for _, digest in fetched}
                for chunk, digest in fetched:
                    state.results[chunk] = digest
                self._advance(f)
            case ev.ResultsFailed():
                self._results_failed(event)
            case ev.NextComputed():
                self._next_computed(event)
            case ev.AnchorVerified():
                self._anchor_verified(event)
            case ev.StateStaged(fragment=f, n=n, chain=chain):
                self.fragments[f].fetching_state = False
                if n > self.fragments[f].n and self.log.on_path(f, chain):  # else overtaken by a commit, or revoked
                    self.fragments[f].staged = Version(n=n, chain=chain)
                    self.out.append(ev.Wake())
            case ev.StateFailed(fragment=f, why=why, from_disk=from_disk, mismatch=mismatch):
                self.fragments[f].fetching_state = False
                if from_disk or mismatch:
                    self._post(msg.FaultSeen(fault="no_state" if from_disk else "unverified_state", detail=why))
        return self.out

    def attach(self, term: Term) -> tuple[Term | None, tuple[Row, ...]]:
        """Hand in the journal copy to a controller of a new lineage: first the term, then the copy (C11)."""
        if not rules.obeys(self.term, term):
            return self.term, ()
        self._rise_to(term)
        return self.term, tuple(self.log.rows)

    def envelope(self, *bodies: msg.MemberBody) -> msg.Envelope:
        """Bodies in an envelope of this process."""
        return msg.Envelope(
            run_id=self.run_id,
            term=self.term,
            name=self.name,
            incarnation=self.incarnation,
            nonce=self.nonce,
            bodies=bodies,
        )

    @property
    def id(self) -> MemberId:
        """Name and incarnation; only after `Welcome`."""
        assert self.incarnation is not None, "not a member yet"
        return MemberId(name=self.name, incarnation=self.incarnation)

    # ------------------------------------------------------------ questions of the training thread

    def holds_all(self) -> bool:
        """Whether a state of every fragment is here, so that training can go on."""
        return self.incarnation is not None and all(state.n >= 0 for state in self.fragments)

    def num_leased(self) -> int:
        """Samples leased to this incarnation."""
        return ranges.count(self.leases)

    def next_ranges(self, num_samples: int) -> tuple[Range, ...]:
        """The next samples to consume, fewer if the leases hold fewer."""
        upto = min(self.consumed + num_samples, self.num_leased())
        return ranges.cut(self.leases, self.consumed, upto)

    def due(self, fragment: int) -> ev.Apply | None:
        """The next commit of a fragment, once its whole result is here; strictly in version order."""
        state = self.fragments[fragment]
        if state.n < 0 or state.staged is not None or self.reset_wanted:
            return None
        record = self.log.next(fragment, state.chain)
        if record is None or not set(record.chunk_digests) <= state.content:
            return None
        if state.barred is not None and state.barred[0].chain == record.chain:
            return None
        return ev.Apply(record=record, included=state.pending is not None and rules.included(record, state.pending.id))

    def open_seen(self, fragment: int) -> bool:
        """Whether somebody offered for the version held here, and nothing was committed since."""
        state = self.fragments[fragment]
        return any(a.offer.base == state.version for a in state.announced.values())

    # ------------------------------------------------------------ facts from the training thread

    def offered(self, offer: Offer, now: float) -> list[ev.Command]:
        """The payload is published; the offer goes out until its fate is known."""
        self.now, self.out = now, []
        state = self.fragments[offer.fragment]
        assert state.pending is None and offer.base == state.version, (
            "an offer while one is pending, or of another base"
        )
        state.seq = offer.seq
        state.pending = Pending(offer=offer, id=OfferId(member=self.id, seq=offer.seq))
        state.posted_s = now
        state.pieces |= {(state.pending.id, chunk) for chunk in range(self.num_chunks[offer.fragment])}
        self._post(offer)
        return self.out

    def applied(self, fragment: int, record: CommitRecord, now: float) -> list[ev.Command]:
        """The training thread moved a fragment to `record`'s version."""
        self.now, self.out = now, []
        state = self.fragments[fragment]
        self._decide(fragment, record)
        state.n, state.chain = record.n, record.chain
        state.recent[record.n] = record.chunk_digests
        self.waiting = ""  # until it says so again, for the version that it has now
        self._clean(fragment)
        self._advance(fragment)
        self._hello()
        return self.out

    def installed(self, fragment: int, now: float) -> list[ev.Command]:
        """The training thread took over a fetched state."""
        self.now, self.out = now, []
        state = self.fragments[fragment]
        version = state.staged
        assert version is not None
        record = self.log.next(fragment, state.chain) if state.n >= 0 else None
        if record is not None:
            self._decide(fragment, record)
        joined = state.n < 0
        state.n, state.chain, state.staged, state.catching_up, state.tries = version.n, version.chain, None, False, 0
        if joined:  # a founder keeps to its own schedule; who joins later offers as soon as somebody has
            state.late = version.n > 0
        self.waiting = ""
        self._clean(fragment)
        self._advance(fragment)
        self._hello()
        return self.out

    def was_reset(self, now: float) -> list[ev.Command]:
        """The training thread dropped everything that was not committed: live parameters are the anchor again."""
        self.now, self.out = now, []
        if self.dropped_to is not None:
            self.consumed = self.dropped_to
            for state in self.fragments:
                state.watermark, state.pending, state.late = self.dropped_to, None, True
            self.dropped_to, self.reset_wanted = None, ""
            return self.out
        self.lives += 1
        self.nonce = f"{self.first_nonce}+{self.lives}"
        self.incarnation, self.leases, self.consumed, self.tail, self.reset_wanted = None, [], 0, False, ""
        for fragment, old in enumerate(self.fragments):
            keep = old.n >= 0 and (self.log.genesis is None or self.log.on_path(fragment, old.chain))
            new = FragmentState(n=old.n, chain=old.chain) if keep else FragmentState()
            new.seq, new.content, new.recent = 0, old.content, old.recent
            self.fragments[fragment] = new
        self._join()
        return self.out

    def request_drop(self, why: str, now: float) -> list[ev.Command]:
        """Ask that all uncommitted work be dropped by rule; training waits until the journal says so (H9)."""
        self.now, self.out, self.drop_asked = now, [], why
        self._post(msg.DropRequest(upto=self.consumed, why=why))
        return self.out

    def lost_state(self, fragment: int, fault: str, detail: str, now: float) -> list[ev.Command]:
        """The state held of a fragment is not what its record sealed: give it up, begin a new incarnation."""
        self.now, self.out = now, []
        self._lose_state(fragment, fault, detail)
        return self.out

    def _lose_state(self, fragment: int, fault: str, detail: str) -> None:
        self._post(msg.FaultSeen(fault=fault, detail=detail))
        self.fragments[fragment].n, self.fragments[fragment].chain = -1, ""
        self._want_reset(f"{fault}: {detail}")

    def consumed_to(self, consumed: int, steps: int) -> None:
        """An inner step was finished."""
        self.consumed, self.steps = consumed, steps

    def member_id(self, incarnation: int) -> MemberId:
        """This member under an incarnation."""
        return MemberId(name=self.name, incarnation=incarnation)

    def restore(
        self,
        *,
        incarnation: int,
        nonce: str,
        consumed: int,
        steps: int,
        leases: Sequence[Range],
        fragments: Sequence[FragmentState],
    ) -> None:
        """Take up the saved local state of a stopped process: same nonce, same incarnation."""
        self.first_nonce = self.nonce = nonce
        self.incarnation, self.consumed, self.steps = incarnation, consumed, steps
        self.leases, self.fragments = list(leases), list(fragments)

    def _withdraw_lost(self) -> None:
        """An offer that was open when the run stopped is made anew, unless it was committed (and not revoked since)."""
        for fragment, state in enumerate(self.fragments):
            lost = state.pending is not None and not state.pending.published
            if lost and self.log.next(fragment, state.chain) is None:
                state.pending = None

    # ------------------------------------------------------------ messages in

    def _rise_to(self, term: Term) -> None:
        """Obey a higher term: what belonged to the old one is void, promises included."""
        if self.term is not None and term.rank <= self.term.rank:
            return
        self.may_rewrite = self.may_rewrite or (self.term is not None and term.lineage > self.term.lineage)
        self.term = term
        for state in self.fragments:
            state.barred, state.assign, state.spread, state.have = None, None, None, None
            state.announced = {}

    def _delivered(self, batch: msg.Batch) -> None:
        if batch.run_id != self.run_id or batch.nonce != self.nonce or not rules.obeys(self.term, batch.term):
            self.stale += 1
            if batch.run_id == self.run_id and batch.nonce == self.nonce:
                self._hello()
            return
        self._rise_to(batch.term)
        welcome = next((body for body in batch.bodies if isinstance(body, msg.Welcome)), None)
        if welcome is not None and self.incarnation is None:
            self.incarnation = welcome.incarnation
        new = self.log.extend(batch.rows_from, batch.rows, rewrite=self.may_rewrite)
        if new is None:
            self.stale += 1
            self._hello()
        else:
            self._rows(new)
            if new:
                self._withdraw_lost()
        for body in batch.bodies:
            self._body(body, batch)
        if new:
            for fragment in range(len(self.fragments)):
                self._advance(fragment)
            self.out.append(ev.Wake())
        if welcome is not None:
            self._hello()

    def _rows(self, rows: Sequence[Row]) -> None:
        for row in rows:
            record = row.record
            if isinstance(record, DropRecord) and self.incarnation is not None:
                if (record.member, record.incarnation) == (self.name, self.incarnation):
                    self.dropped_to, self.reset_wanted, self.drop_asked = record.upto, record.why, ""
        if self.incarnation is not None and (self.name, self.incarnation) in self.log.fenced:
            self._want_reset("fenced")
        self._confirm_genesis()
        for fragment, state in enumerate(self.fragments):
            if state.n >= 0 and self.log.genesis is not None and not self.log.on_path(fragment, state.chain):
                self._want_reset(f"version {state.n} of fragment {fragment} is not in the journal's history")

    def _confirm_genesis(self) -> None:
        """Version 0 is what the journal says it is (H3); one that was made here and not journalled is nothing."""
        if self.built is None or self.log.genesis is None:
            return
        if self.log.genesis.digests != self.built.digests:
            for state in self.fragments:
                state.n, state.chain, state.late = -1, "", True
        self.built = None

    def _want_reset(self, why: str) -> None:
        self.reset_wanted, self.dropped_to, self.drop_asked = why, None, ""
        for state in self.fragments:
            state.assign, state.spread, state.have, state.announced = None, None, None, {}
        self.out.append(ev.Wake())

    def _body(self, body: msg.ControllerBody, batch: msg.Batch) -> None:
        match body:
            case msg.Rejoin():
                self._want_reset("its nonce was fenced")
            case msg.Fenced(why=why) if batch.incarnation is None or batch.incarnation == self.incarnation:
                self._want_reset(why)
            case msg.MakeGenesis() if self.log.genesis is None:
                self._make_genesis()
            case msg.LeaseGrant(index=index, ranges=granted):
                have = self.num_leased()
                if index <= have < index + ranges.count(granted):
                    ranges.append(self.leases, ranges.cut(granted, have - index, ranges.count(granted)))
                    self.out.append(ev.Wake())
            case msg.Peers(peers=peers) if self._is_news(body, batch):
                self.peers = {name: (address, held) for name, address, held in peers}
                for fragment in range(len(self.fragments)):
                    self._advance(fragment)
            case msg.Tail(active=active) if self._is_news(body, batch):
                self.tail = active
                self.out.append(ev.Wake())
            case msg.Announce():
                self._announce(body)
            case msg.Assign():
                self._assigned(body)
            case msg.Spread():
                self._spread(body)
            case msg.Verify():
                self._verify(body)
            case msg.Discarded(fragment=f, exchange=exchange):
                self._discarded(f, exchange)
            case msg.RevokeQuery() | msg.RevokeCancel():
                self._revoke(body)
            case msg.Restore():
                for fragment, state in enumerate(self.fragments):
                    if state.n < 0 and state.staged is None and not state.fetching_state:
                        state.fetching_state = True
                        self.out.append(ev.LoadState(fragment=fragment))
            case msg.Evaluate() | msg.Save() | msg.Stop():
                self.out.append(ev.Order(body=body))
                self.out.append(ev.Wake())
            case _:
                pass

    def _make_genesis(self) -> None:
        if self.built is not None:  # the answer was lost
            self._post(self.built)
        elif not self.building:
            self.building = True
            self.out.append(ev.BuildGenesis())

    def _is_news(self, body: msg.Peers | msg.Tail, batch: msg.Batch) -> bool:
        """Whether a present state is not older than what was told before: messages overtake each other."""
        at = (batch.term.rank, batch.number)
        if at < self.told.get(type(body), at):
            return False
        self.told[type(body)] = at
        return True

    # ------------------------------------------------------------ owner

    def _announce(self, body: msg.Announce) -> None:
        state = self.fragments[body.offer.fragment]
        if body.offer.base != state.version and body.offer.base.n < state.n:
            return
        offer = OfferId(member=body.offer_by, seq=body.offer.seq)
        state.announced[offer] = body
        self.out.append(ev.Wake())
        if self.incarnation is not None:
            mine = tuple(c for c, owner in enumerate(body.owners) if owner == str(self.id))
            self._fetch_pieces(body.offer.fragment, body.offer_by, body.address, body.offer, mine)

    def _fetch_pieces(self, fragment: int, by: MemberId, address: str, offer: Offer, chunks: Sequence[int]) -> None:
        state = self.fragments[fragment]
        oid = OfferId(member=by, seq=offer.seq)
        wanted = tuple(c for c in chunks if (oid, c) not in state.pieces and (oid, c) not in state.fetching)
        if wanted and not (self.incarnation is not None and by == self.id):
            state.fetching |= {(oid, c) for c in wanted}
            self.out.append(ev.FetchPieces(fragment=fragment, offer_by=by, address=address, offer=offer, chunks=wanted))

    def _assigned(self, body: Assign) -> None:
        state = self.fragments[body.fragment]
        if not rules.supersedes(body, state.assign):
            return
        if state.assign is None or state.assign.roster_digest != body.roster_digest:
            state.results, state.reduced, state.reducing = {}, {}, set()
        state.assign, state.spread, state.have, state.computing = body, None, None, None
        state.fetching_results = set()
        mine = self._own_chunks(state)
        for by, address, offer in body.offers:
            self._fetch_pieces(body.fragment, by, address, offer, mine)
        if state.reduced:
            kept = tuple((c, d) for c, d in sorted(state.reduced.items()) if c in mine)
            self._post_reduced(body, kept)
        self._reduce(body.fragment)
        self._fetch_results(body.fragment)

    def _own_chunks(self, state: FragmentState) -> tuple[int, ...]:
        if state.assign is None or self.incarnation is None:
            return ()
        return tuple(c for c, owner in enumerate(state.assign.owners) if owner == self.id)

    def _reduce(self, fragment: int) -> None:
        state = self.fragments[fragment]
        if state.assign is None:
            return
        roster = [entry.offer for entry in state.assign.roster]
        ready = tuple(
            c
            for c in self._own_chunks(state)
            if c not in state.reducing and all((oid, c) in state.pieces for oid in roster)
        )
        if ready:
            state.reducing |= set(ready)
            self.out.append(ev.Reduce(assign=state.assign, chunks=ready))

    def _pieces_failed(self, event: ev.PiecesFailed) -> None:
        state = self.fragments[event.fragment]
        state.fetching -= {(event.offer, chunk) for chunk in event.chunks}
        assign = state.assign
        if assign is None or not set(event.chunks) & set(self._own_chunks(state)):
            return
        if event.offer in {entry.offer for entry in assign.roster}:
            self._post(
                msg.Missing(
                    fragment=event.fragment,
                    exchange=assign.exchange,
                    attempt=assign.attempt,
                    offer=event.offer,
                    why=event.why,
                )
            )

    def _piece_rejected(self, event: ev.PieceRejected) -> None:
        assign = self.fragments[event.fragment].assign
        if assign is not None and event.offer in {entry.offer for entry in assign.roster}:
            self._post(
                msg.Refused(
                    fragment=event.fragment,
                    exchange=assign.exchange,
                    attempt=assign.attempt,
                    offer=event.offer,
                    why=event.why,
                )
            )

    def _chunks_reduced(self, event: ev.ChunksReduced) -> None:
        state = self.fragments[event.fragment]
        if state.assign is None or state.assign.roster_digest != event.roster_digest:
            return
        state.reduced.update(event.chunks)
        state.results.update(event.chunks)
        state.content |= {digest for _, digest in event.chunks}
        self._post_reduced(state.assign, event.chunks)
        self._advance(event.fragment)

    def _post_reduced(self, assign: Assign, chunks: tuple[tuple[int, str], ...]) -> None:
        if chunks:
            self._post(
                msg.Reduced(
                    fragment=assign.fragment, exchange=assign.exchange, attempt=assign.attempt,
                    roster_digest=assign.roster_digest, chunks=chunks,
                )
            )  # fmt: skip

    # ------------------------------------------------------------ results

    def _fetch_results(self, fragment: int) -> None:
        """Pull result chunks straight from the owners as soon as they are named; by content once `Spread` is known."""
        state = self.fragments[fragment]
        assign = state.assign
        if assign is None or state.have is not None:
            return
        addresses = dict(assign.owner_addresses)
        wanted: dict[MemberId, list[int]] = {}
        for chunk, owner in enumerate(assign.owners):
            if self.incarnation is not None and owner == self.id:
                continue
            known = state.results.get(chunk)
            right = known is not None and (state.spread is None or state.spread.chunk_digests[chunk] == known)
            if not right and chunk not in state.fetching_results:
                wanted.setdefault(owner, []).append(chunk)
        for owner, chunks in sorted(wanted.items()):
            address = addresses.get(str(owner))
            if address is None:
                continue
            state.fetching_results |= set(chunks)
            digests = tuple(state.spread.chunk_digests[c] for c in chunks) if state.spread else ()
            self.out.append(
                ev.FetchResults(
                    fragment=fragment,
                    address=address,
                    roster_digest=assign.roster_digest,
                    chunks=tuple(chunks),
                    digests=digests,
                )
            )

    def _spread(self, body: msg.Spread) -> None:
        state = self.fragments[body.fragment]
        if state.assign is None or (state.assign.exchange, state.assign.attempt) != (body.exchange, body.attempt):
            return
        state.spread = body
        self._advance(body.fragment)

    def _results_failed(self, event: ev.ResultsFailed) -> None:
        state = self.fragments[event.fragment]
        state.fetching_results -= set(event.chunks)
        state.tries += 1

    def _compute(self, fragment: int) -> None:
        state = self.fragments[fragment]
        assign, spread = state.assign, state.spread
        if assign is None or spread is None or state.version != assign.base or state.staged is not None:
            return
        if state.barred is not None and state.barred[0].n == assign.base.n + 1:
            return
        key = (assign.exchange, assign.attempt)
        complete = all(state.results.get(c) == d for c, d in enumerate(spread.chunk_digests))
        if complete and state.computing != key and state.have is None:
            state.computing = key
            self.out.append(ev.ComputeNext(assign=assign, chunk_digests=spread.chunk_digests))

    def _next_computed(self, event: ev.NextComputed) -> None:
        state = self.fragments[event.fragment]
        if state.computing != (event.exchange, event.attempt) or state.spread is None:
            return
        state.have = msg.Have(
            fragment=event.fragment, exchange=event.exchange, attempt=event.attempt,
            results=msg.results_digest(state.spread.chunk_digests), next_digest=event.digest,
        )  # fmt: skip
        state.have_s = self.now
        self._post(state.have)

    def _verify(self, body: msg.Verify) -> None:
        state = self.fragments[body.fragment]
        digest = self.log.digest(body.fragment, state.n)
        asked = body.exchange is None or (state.assign is not None and state.assign.exchange == body.exchange)
        if asked and state.n >= 0 and digest is not None:
            self.out.append(
                ev.VerifyAnchor(
                    fragment=body.fragment, chain=state.chain, digest=digest, exchange=body.exchange, attempt=body.attempt
                )
            )

    def _anchor_verified(self, event: ev.AnchorVerified) -> None:
        state = self.fragments[event.fragment]
        if not event.intact:
            story = f"fragment {event.fragment} version {state.n} has another digest than sealed"
            self._lose_state(event.fragment, "corrupt_anchor", story)
        elif state.assign is not None and state.assign.exchange == event.exchange:
            state.have, state.computing = None, None
            self._compute(event.fragment)

    # ------------------------------------------------------------ catching up

    def _advance(self, fragment: int) -> None:
        """Whatever brings this fragment forward: results of the open exchange, of the next commit, or a whole state."""
        state = self.fragments[fragment]
        if self.incarnation is None or self.reset_wanted or state.staged is not None:
            return
        if state.n < 0:
            if self.log.genesis is not None:
                self._fetch_state(fragment)
            return
        record = self.log.next(fragment, state.chain)
        if record is None:
            self._fetch_results(fragment)
            self._compute(fragment)
            return
        if set(record.chunk_digests) <= state.content:
            state.tries = 0
            self.out.append(ev.Wake())
            return
        behind = self.log.head(fragment) - state.n
        if behind > KEEP_RESULTS or state.tries > 2 * max(len(self.peers), 1):
            state.catching_up = True
            self._fetch_state(fragment)
        else:
            self._fetch_content(fragment, record)

    def _fetch_content(self, fragment: int, record: CommitRecord) -> None:
        state = self.fragments[fragment]
        if state.barred is not None and state.barred[0].chain == record.chain:
            return
        missing = tuple(c for c, d in enumerate(record.chunk_digests) if d not in state.content)
        wanted = tuple(c for c in missing if c not in state.fetching_results)
        others = sorted(name for name in self.peers if name != str(self.id))
        if not wanted or not others:
            return
        address = self.peers[others[state.tries % len(others)]][0]
        state.fetching_results |= set(wanted)
        self.out.append(
            ev.FetchResults(
                fragment=fragment, address=address, roster_digest=record.roster_digest, chunks=wanted,
                digests=tuple(record.chunk_digests[c] for c in wanted),
            )
        )  # fmt: skip

    def _fetch_state(self, fragment: int) -> None:
        state = self.fragments[fragment]
        if state.fetching_state or state.staged is not None or self.incarnation is None:
            return
        donors = tuple(
            (name, address)
            for name, (address, held) in sorted(self.peers.items())
            if name != str(self.id) and len(held) > fragment and held[fragment] >= 0
        )
        if donors:
            state.fetching_state = True
            self.out.append(ev.FetchState(fragment=fragment, donors=donors))

    def _decide(self, fragment: int, record: CommitRecord) -> None:
        """Fate of the pending offer: in (watermark moves) or out (it rebases and is offered again)."""
        state = self.fragments[fragment]
        pending = state.pending
        if pending is not None and rules.included(record, pending.id):
            state.watermark, state.late = pending.offer.upto, False
        elif self.consumed > state.watermark:
            state.late = True
        state.pending = None

    def _clean(self, fragment: int) -> None:
        """Free what the new version made useless (protocol 1.9)."""
        state = self.fragments[fragment]
        old = {oid for oid, a in state.announced.items() if a.offer.base.n < state.n}
        state.announced = {oid: a for oid, a in state.announced.items() if oid not in old}
        gone = {oid for oid, _ in state.pieces} - set(state.announced)
        if state.pending is not None:
            gone.discard(state.pending.id)
        state.pieces = {(oid, c) for oid, c in state.pieces if oid not in gone}
        if state.assign is not None and state.assign.base.n < state.n:
            state.assign = state.spread = state.have = state.computing = None
            state.results, state.reduced, state.reducing = {}, {}, set()
            state.fetching_results = set()
        for n in [n for n in state.recent if n <= state.n - KEEP_RESULTS]:
            del state.recent[n]
        following = self.log.next(fragment, state.chain)
        keep = {d for digests in state.recent.values() for d in digests} | set(state.results.values())
        keep |= set(following.chunk_digests) if following else set()
        drop = tuple(sorted(state.content - keep))
        state.content &= keep
        prefixes = tuple(sorted(f"piece/{fragment}/{oid}" for oid in gone))
        if drop or prefixes:
            self.out.append(ev.Forget(fragment=fragment, prefixes=prefixes, digests=drop))

    def _discarded(self, fragment: int, exchange: msg.ExchangeId) -> None:
        state = self.fragments[fragment]
        if state.assign is not None and state.assign.exchange == exchange:
            state.assign = state.spread = state.have = state.computing = None
            state.results, state.reduced, state.reducing = {}, {}, set()
        if state.pending is not None and state.pending.published:
            state.posted_s = self.now
            self._post(state.pending.offer)

    def _revoke(self, body: msg.RevokeQuery | msg.RevokeCancel) -> None:
        state = self.fragments[body.fragment]
        if isinstance(body, msg.RevokeCancel):
            if state.barred is not None and state.barred[1] == body.nonce:
                state.barred = None
                self._advance(body.fragment)
            return
        lacks = rules.lacks_version(state, self.log, body.fragment, body.version)
        if lacks and (state.barred is None or body.nonce >= state.barred[1]):
            state.barred = (body.version, body.nonce)
        self._post(msg.RevokeAnswer(fragment=body.fragment, nonce=body.nonce, lacks=lacks, n=state.n))

    # ------------------------------------------------------------ time

    def _tick(self) -> None:
        if self.incarnation is None:
            if not self.reset_wanted:
                self._join()
            return
        for fragment, state in enumerate(self.fragments):
            if state.pending is not None and state.pending.published and self.now - state.posted_s >= RESEND_S:
                state.posted_s = self.now
                self._post(state.pending.offer)
            if state.have is not None and self.now - state.have_s >= RESEND_S:
                state.have_s = self.now
                self._post(state.have)
            self._advance(fragment)
        if self.drop_asked:
            self._post(msg.DropRequest(upto=self.consumed, why=self.drop_asked))
        self._hello()

    def _join(self) -> None:
        if self.now - self.join_s >= RESEND_S:
            self.join_s = self.now
            self.out.append(ev.Post(body=self._join_body()))

    def _join_body(self) -> msg.Join:
        return msg.Join(info=self.info, ready=all(state.n >= 0 for state in self.fragments))

    def join_now(self, now: float) -> list[ev.Command]:
        """Ask to be a member."""
        self.now, self.out, self.join_s = now, [], now
        self.out.append(ev.Post(body=self._join_body()))
        return self.out

    def _hello(self) -> None:
        if self.incarnation is None:
            return
        reports = []
        for fragment, state in enumerate(self.fragments):
            record = self.log.next(fragment, state.chain) if state.n >= 0 else None
            reports.append(
                msg.FragmentReport(
                    n=state.n, chain=state.chain, barred=state.barred[1] if state.barred else None, watermark=state.watermark,
                    holds_next=record is not None and set(record.chunk_digests) <= state.content,
                    exchange=state.assign.exchange if state.assign else None,
                    attempt=state.assign.attempt if state.assign else 0, spread=state.spread is not None,
                )
            )  # fmt: skip
        self._post(
            msg.Hello(
                info=self.info, journal_len=len(self.log), num_leased=self.num_leased(), consumed=self.consumed,
                steps=self.steps, bytes_sent=self.bytes_sent, fragments=tuple(reports), waiting=self.waiting,
            )
        )  # fmt: skip

    def _post(self, body: msg.MemberBody) -> None:
        self.out.append(ev.Post(body=body))
