"""The member's part in exchanges: owning parts, fetching results, catching up (protocol 1.4)."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from itertools import islice

from workers import member_events as ev
from workers import member_rules as rules
from workers import messages as msg
from workers.fragment_state import KEEP_RESULTS, FragmentState
from workers.member_core import MemberCore
from workers.messages import Assign, Offer
from workers.records import CommitRecord, MemberId, OfferId

MAX_DONORS = 32
"""A whole state is fetched from so many peers at most."""


class ExchangeSide(MemberCore):
    """What a member does for the exchanges of all fragments, whoever began them."""

    # ------------------------------------------------------------ owner

    def _announce(self, body: msg.Announce) -> None:
        state = self.fragments[body.offer.fragment]
        if body.offer.base != state.version and body.offer.base.n < state.n:
            return
        offer = OfferId(member=body.offer_by, seq=body.offer.seq)
        state.announced[offer] = body
        self.out.append(ev.Wake())
        if self.incarnation is not None:
            name = str(self.id)
            mine = tuple(c for c, owner in enumerate(body.owners) if owner == name)
            if mine:
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
            state.results, state.reduced, state.measured, state.reducing = {}, {}, {}, set()
        state.assign, state.spread, state.have, state.computing = body, None, None, None
        state.fetching_results = set()
        mine = self._own_chunks(state)
        for by, address, offer in body.offers if mine else ():
            self._fetch_pieces(body.fragment, by, address, offer, mine)
        if state.reduced:
            kept = tuple((c, d) for c, d in sorted(state.reduced.items()) if c in mine)
            self._post_reduced(body, kept)
        self._post_measured(body, tuple((c, s) for c, s in sorted(state.measured.items()) if c in mine))
        self._reduce(body.fragment)
        self._fetch_results(body.fragment)

    def _own_chunks(self, state: FragmentState) -> tuple[int, ...]:
        if state.assign is None or self.incarnation is None:
            return ()
        mine, assign = self.id, state.assign
        return tuple(c for c in range(len(assign.owners)) if assign.works_on(mine, c))

    def _reduce(self, fragment: int) -> None:
        state = self.fragments[fragment]
        if state.assign is None:
            return
        recipe = state.assign.recipe
        if recipe is not None and recipe.history and state.version != state.assign.base:
            return  # what is kept of earlier results is that of another version: when the base is applied
        todo = [chunk for chunk in self._own_chunks(state) if chunk not in state.reducing]
        if not todo:
            return
        roster = [entry.offer for entry in state.assign.roster]
        ready = tuple(c for c in todo if all((oid, c) in state.pieces for oid in roster))
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
            self.apart.miss(event.offer.member, self.now)
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

    def _chunks_measured(self, event: ev.ChunksMeasured) -> None:
        state = self.fragments[event.fragment]
        if state.assign is not None and state.assign.roster_digest == event.roster_digest:
            state.measured.update(event.chunks)
            self._post_measured(state.assign, event.chunks)

    def _post_measured(self, assign: Assign, chunks: tuple[tuple[int, tuple[float, ...]], ...]) -> None:
        if chunks:
            self._post(
                msg.Measured(
                    fragment=assign.fragment, exchange=assign.exchange, attempt=assign.attempt,
                    roster_digest=assign.roster_digest, chunks=chunks,
                )
            )  # fmt: skip

    # ------------------------------------------------------------ results

    def _fetch_results(self, fragment: int) -> None:
        """Pull result chunks straight from the owners as soon as they are named; by content once `Spread` is known."""
        state = self.fragments[fragment]
        assign = state.assign
        if assign is None or state.have is not None or assign.measures:
            return
        addresses = dict(assign.owner_addresses)
        wanted: dict[MemberId, list[int]] = {}
        for chunk, owner in enumerate(assign.owners):
            if self.incarnation is not None and (
                owner == self.id or (not state.spread and assign.works_on(self.id, chunk))
            ):
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
                    n=assign.base.n + 1,
                    address=address,
                    roster_digest=assign.roster_digest,
                    chunks=tuple(chunks),
                    digests=digests,
                    assign=assign,
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
        if complete and state.computing != key and state.have is None and not self.still:
            state.computing = key
            self.out.append(ev.ComputeNext(assign=assign, chunk_digests=spread.chunk_digests))

    def _next_computed(self, event: ev.NextComputed) -> None:
        state = self.fragments[event.fragment]
        if state.computing != (event.exchange, event.attempt) or state.spread is None or self.still:
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
                    fragment=body.fragment,
                    chain=state.chain,
                    digest=digest,
                    exchange=body.exchange,
                    attempt=body.attempt,
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
        if behind > KEEP_RESULTS or state.tries > 2 * max(len(self.told_peers), 1):
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
        address = self._other_peer(state.tries)
        if not wanted or address is None:
            return
        state.fetching_results |= set(wanted)
        self.out.append(
            ev.FetchResults(
                fragment=fragment, n=record.n, address=address, roster_digest=record.roster_digest, chunks=wanted,
                digests=tuple(record.chunk_digests[c] for c in wanted),
            )
        )  # fmt: skip

    def _other_peer(self, turn: int) -> str | None:
        """The address of another member, another one each turn; there may be thousands, and only one is wanted."""
        mine, told = str(self.id), self.told_peers
        num = len(told) - any(name == mine for name, _, _ in told)
        others = (address for name, address, _ in told if name != mine)
        return next(islice(others, turn % num, None), None) if num else None

    def _fetch_state(self, fragment: int) -> None:
        """From peers that are known to hold a newer version; who does not know of any hears of them soon."""
        state = self.fragments[fragment]
        if state.fetching_state or state.staged is not None or self.incarnation is None:
            return
        mine = str(self.id)
        donors = [
            (name, address)
            for name, address, held in self.told_peers
            if len(held) > fragment and held[fragment] > state.n and name != mine
        ]
        if donors:
            state.fetching_state = True
            begin = bisect(donors, (mine, "")) if len(donors) > MAX_DONORS else 0  # not everybody asks the same ones
            chosen = tuple([*donors[begin:], *donors[:begin]][:MAX_DONORS])
            self.out.append(ev.FetchState(fragment=fragment, donors=chosen))

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
        if state.assign is not None and state.assign.base.n >= state.n:  # asked for by name, announced or not
            gone -= {OfferId(member=m, seq=offer.seq) for m, _, offer in state.assign.offers}
        state.pieces = {(oid, c) for oid, c in state.pieces if oid not in gone}
        if state.assign is not None and state.assign.base.n < state.n:
            state.assign = state.spread = state.have = state.computing = None
            state.results, state.reduced, state.measured, state.reducing = {}, {}, {}, set()
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

    def _forget_overtaken(self, fragment: int) -> None:
        """Results of versions that a member which applies nothing (its training thread is busy) will never apply.

        It catches up by the next ones, or by a whole state; what it reduced for others meanwhile they have by now.
        """
        state, head = self.fragments[fragment], self.log.head(fragment)
        if state.n < 0 or head - state.n <= 2 * KEEP_RESULTS:
            return
        near = [*range(state.n + 1, state.n + KEEP_RESULTS + 1), *range(head - KEEP_RESULTS + 1, head + 1)]
        records = [record for n in near if (record := self.log.commit(fragment, n)) is not None]
        keep = {d for digests in state.recent.values() for d in digests} | set(state.results.values())
        keep |= {digest for record in records for digest in record.chunk_digests}
        drop = tuple(sorted(state.content - keep))
        state.content &= keep
        if drop:
            self.out.append(ev.Forget(fragment=fragment, prefixes=(), digests=drop))

    def _discarded(self, fragment: int, exchange: msg.ExchangeId) -> None:
        state = self.fragments[fragment]
        if state.assign is not None and state.assign.exchange == exchange:
            state.assign = state.spread = state.have = state.computing = None
            state.results, state.reduced, state.measured, state.reducing = {}, {}, {}, set()
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
