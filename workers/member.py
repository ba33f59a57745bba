"""The member's side of the exchanges: pure, no tensors, no clock, no threads (protocol 1.4 to 1.9).

`handle(event, now) -> list[Command]`. The shell (`workers/sync.py`, or a simulator with symbolic tensors) carries the
commands out and reports back. What touches live parameters happens at a step boundary of the training thread, which
asks `due()` and says `applied()`, `installed()`, `was_reset()`, `offered()`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from workers import member_events as ev
from workers import member_rules as rules
from workers import messages as msg
from workers import ranges, shares
from workers.apart import Reached
from workers.fragment_state import KEEP_RESULTS, FragmentState, Pending
from workers.member_exchange import ExchangeSide
from workers.messages import Offer, Version
from workers.ranges import Range
from workers.record_log import GENESIS_CHAIN, RecordLog
from workers.records import (
    LEFT,
    CommitRecord,
    DropRecord,
    FenceRecord,
    MemberId,
    OfferId,
    RollbackRecord,
    Row,
    Scalar,
    Term,
)

__all__ = ["KEEP_RESULTS", "FragmentState", "MemberMachine", "Pending"]

RESEND_S = 1.0


class MemberMachine(ExchangeSide):
    """One process's view of the run."""

    # ------------------------------------------------------------ entry

    def handle(self, event: ev.Event, now: float) -> list[ev.Command]:
        """One event in, commands out."""
        self.now, self.out = now, []
        match event:
            case ev.Delivered(batch=batch):
                self._delivered(batch)
            case ev.Tick():
                self.pace.tick(now)
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
            case ev.Knocked(member=member, reached=reached):
                if self.apart.answered(member, now, reached=reached):
                    self._post(Reached(member=member))
            case ev.PieceRejected():
                self._piece_rejected(event)
            case ev.ChunksMeasured():
                self._chunks_measured(event)
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

    # ------------------------------------------------------------ questions of the training thread

    def is_deciding(self) -> bool:
        """Whether an exchange is closed whose commit or end is not known here yet."""
        return any(
            state.assign is not None and self.log.head(fragment) <= state.assign.base.n
            for fragment, state in enumerate(self.fragments)
        )

    def holds_all(self) -> bool:
        """Whether a state of every fragment is here, so that training can go on.

        A version 0 that was made here is none before the journal has it: a lease may overtake that row.
        """
        known = self.incarnation is not None and self.log.genesis is not None
        return known and all(state.n >= 0 for state in self.fragments)

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

    def share(self, fragment: int) -> float:
        """This member's coefficient in the present version's sum; where it is not in it, that of equal members."""
        record = self.log.commit(fragment, self.fragments[fragment].n)
        mine = [entry.coefficient for entry in record.roster if entry.member_id == self.id] if record else []
        return mine[0] if mine else 1.0 / max(len(self.log.live), 1)

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
        self._reduce(fragment)
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
        self._reduce(fragment)
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

    def consumed_to(self, consumed: int, steps: int, seconds: float = 0.0) -> None:
        """An inner step was finished; it took that long (0: not measured)."""
        self.consumed, self.steps = consumed, steps
        self.step_times.add(seconds)

    def changes_of(self, fragment: int) -> tuple[tuple[str, Scalar], ...]:
        """`(key, value)` of the settings that were changed and hold for a fragment's next transition."""
        return self.log.settings.of_members(fragment, self.fragments[fragment].n)

    def round_steps(self, inner_steps: int) -> int:
        """Local steps of this member in a round of `inner_steps`: all, or its share by speed."""
        if self.log.shares is None:
            return max(inner_steps, 1)
        return shares.round_steps(self.log.shares, self._own_name(), inner_steps)

    def fleet_samples(self) -> float:
        """Samples that the fleet plans for each one that this member plans."""
        live = [str(MemberId(name=name, incarnation=incarnation)) for name, incarnation in sorted(self.log.live)]
        return shares.fleet_samples(self.log.shares, self._own_name(), live)

    def _own_name(self) -> str:
        return str(self.id) if self.incarnation is not None else ""

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

    def begin_with(self, log: RecordLog, versions: Mapping[int, tuple[int, str]]) -> None:
        """Before it joins: a copy of the journal, and states that were fetched without being a member."""
        self.log = log
        for fragment, (n, chain) in versions.items():
            self.fragments[fragment].n, self.fragments[fragment].chain = n, chain

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
                self._forget_overtaken(fragment)
                self._advance(fragment)
            self.out.append(ev.Wake())
        if welcome is not None:
            self._hello()

    def _rows(self, rows: Sequence[Row]) -> None:
        for row in rows:
            record = row.record
            if isinstance(record, RollbackRecord):
                self._forget_states()
            if isinstance(record, DropRecord) and self.incarnation is not None:
                if (record.member, record.incarnation) == (self.name, self.incarnation):
                    self.dropped_to, self.reset_wanted, self.drop_asked = record.upto, record.why, ""
            if isinstance(record, FenceRecord) and record.why == LEFT and record.member == self.name:
                if record.incarnation == self.incarnation:
                    self._dismiss()
        if self.incarnation is not None and (self.name, self.incarnation) in self.log.fenced:
            self._want_reset("fenced")
        self._confirm_genesis()
        for fragment, state in enumerate(self.fragments):
            if state.n >= 0 and self.log.genesis is not None and not self.log.on_path(fragment, state.chain):
                self._want_reset(f"version {state.n} of fragment {fragment} is not in the journal's history")

    def _forget_states(self) -> None:
        """The run went back: nobody goes on from what it holds, all begin from the snapshot that the journal names.

        The incarnation that trained was fenced before; this one has not taken a sample yet.
        """
        if self.consumed:
            self._want_reset("the run went back to an older version")
        self.fragments = [FragmentState() for _ in self.fragments]
        self.hear_of_peers(())  # what was known of them was before
        self.out.append(ev.Wake())

    def _confirm_genesis(self) -> None:
        """Version 0 is what the journal says it is (H3); one that was made here and not journalled is nothing."""
        if self.built is None or self.log.genesis is None:
            return
        if self.log.genesis.digests != self.built.digests:
            for state in self.fragments:
                state.n, state.chain, state.late = -1, "", True
        self.built = None

    def _body(self, body: msg.ControllerBody, batch: msg.Batch) -> None:
        match body:
            case msg.Rejoin():
                self._want_reset("its nonce was fenced")
            case msg.Fenced(why=why) if why == LEFT and batch.incarnation == self.incarnation:
                self._dismiss()
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
                self.hear_of_peers(peers)
                for fragment in range(len(self.fragments)):
                    self._advance(fragment)
            case msg.Tail(active=active) if self._is_news(body, batch):
                self.tail = active
                self.out.append(ev.Wake())
            case msg.Inherit():
                self.out.append(ev.Copies(body=body))
            case msg.Keeping() if self._is_news(body, batch):
                self.out.append(ev.Copies(body=body))
            case msg.Leave():
                self.leaving = True
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
                if isinstance(body, msg.Stop):
                    self.stop_asked_s = self.now
                self.out.append(ev.Order(body=body))
                self.out.append(ev.Wake())
            case _:
                pass

    def _dismiss(self) -> None:
        """It was asked to leave, and everything that it did is committed: the loop ends."""
        self.dismissed = True
        self.out.append(ev.Order(body=msg.Stop(save=False)))
        self.out.append(ev.Wake())

    def _make_genesis(self) -> None:
        if self.built is not None:  # the answer was lost
            self._post(self.built)
        elif not self.building:
            self.building = True
            self.out.append(ev.BuildGenesis())

    def _is_news(self, body: msg.Peers | msg.Tail | msg.Keeping, batch: msg.Batch) -> bool:
        """Whether a present state is not older than what was told before: messages overtake each other."""
        at = (batch.term.rank, batch.number)
        if at < self.told.get(type(body), at):
            return False
        self.told[type(body)] = at
        return True

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
        for member, address in self.apart.due(self.peers, self.now) if self.apart.missed_s else ():
            self.out.append(ev.Knock(member=member, address=address))
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
