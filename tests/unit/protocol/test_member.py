"""Traces of a member's machine (protocol 1.4 to 1.9)."""

from __future__ import annotations

from dataclasses import replace

from mate import Mate, entry, member_id, offer_id

from strategies.robust import Recipe
from workers import member_events as ev
from workers import messages as msg
from workers.record_log import GENESIS_CHAIN
from workers.records import DropRecord, FenceRecord, GenesisRecord, JoinRecord, RevokeRecord, RollbackRecord, Term

# ---------------------------------------------------------------- what counts


def test_messages_for_others_are_dropped_and_counted() -> None:
    mate = Mate().start()
    for changes in ({"run_id": "other"}, {"nonce": "older"}, {"term": Term(lineage=0, number=0, controller="z")}):
        before = mate.machine.num_leased()
        mate.happen(ev.Delivered(batch=mate.batch(msg.LeaseGrant(index=32, ranges=((40, 44),)), **changes)))
        assert mate.machine.num_leased() == before
    assert mate.machine.stale == 3


def test_lower_term_is_answered_with_what_is_obeyed() -> None:
    mate = Mate().start()
    mate.tell(term=Term(lineage=0, number=5, controller="new"))
    mate.commands.clear()
    mate.happen(ev.Delivered(batch=mate.batch(msg.Tail(active=True))))
    assert not mate.machine.tail
    assert mate.found(msg.Hello), "the old controller hears of the new term"
    assert mate.machine.envelope().term == Term(lineage=0, number=5, controller="new")


def test_higher_term_voids_attempts_and_promises() -> None:
    mate = Mate().start()
    mate.tell(mate.assign(entry("island-1", 0, 4), owners=("island-1", "island-1")))
    mate.tell(msg.RevokeQuery(fragment=0, version=msg.Version(n=1, chain="x"), nonce=1))
    state = mate.machine.fragments[0]
    assert state.assign is not None and state.barred is not None
    mate.tell(term=Term(lineage=0, number=2, controller="new"))
    assert state.assign is None and state.barred is None


def test_gap_in_the_journal_is_reported_and_leases_still_count() -> None:
    mate = Mate().start()
    mate.commit()
    mate.commit()
    mate.told += 1
    mate.commands.clear()
    mate.tell()
    assert mate.found(msg.Hello)[-1].journal_len == 3
    assert mate.machine.log.head(0) == 0


def test_leases_are_idempotent_by_index() -> None:
    mate = Mate().start()
    for index, ranges in ((0, ((0, 32),)), (32, ((50, 60),)), (32, ((50, 60),)), (40, ((58, 60), (70, 75)))):
        mate.tell(msg.LeaseGrant(index=index, ranges=ranges))
    assert mate.machine.leases == [(0, 32), (50, 60), (70, 75)]
    mate.tell(msg.LeaseGrant(index=60, ranges=((90, 95),)))
    assert mate.machine.num_leased() == 47, "a gap is not filled"


def test_older_news_do_not_replace_newer_ones() -> None:
    """Messages overtake each other: a list of peers from before the start came last, and nobody could be asked."""
    mate = Mate().start()
    old = mate.batch(msg.Peers(peers=()), msg.Tail(active=True))
    mate.tell(msg.Peers(peers=(("island-2.1", "at-2", (0,)),)), msg.Tail(active=False))
    mate.happen(ev.Delivered(batch=old))
    assert set(mate.machine.peers) == {"island-2.1"} and not mate.machine.tail


def test_handing_in_the_journal_is_a_promise() -> None:
    mate = Mate().start()
    term, rows = mate.machine.attach(Term(lineage=1, number=1, controller="rebuilt"))
    assert len(rows) == 3 and term == Term(lineage=1, number=1, controller="rebuilt")
    mate.commit()
    mate.tell()
    assert mate.machine.log.head(0) == 0, "a version beyond the recovered history is not applied (C11)"


# ---------------------------------------------------------------- genesis


def test_lost_answer_about_genesis_is_given_again() -> None:
    mate = Mate()
    mate.tell(msg.Welcome(incarnation=1), msg.MakeGenesis(), incarnation=None)
    mate.tell(msg.MakeGenesis())
    assert len(mate.found(ev.BuildGenesis)) == 1, "it is being built"
    mate.happen(ev.GenesisBuilt(digests=("g0",), num_params=1))
    mate.tell(msg.MakeGenesis())
    assert len(mate.found(msg.GenesisMade)) == 2


def test_version_0_of_somebody_else_replaces_the_own_one() -> None:
    """Two members made version 0; the one whose record lost kept its own and called it by the same name."""
    mate = Mate()
    mate.tell(msg.Welcome(incarnation=1), msg.MakeGenesis(), incarnation=None)
    mate.happen(ev.GenesisBuilt(digests=("mine",), num_params=1))
    assert mate.machine.fragments[0].n == 0
    mate.record(GenesisRecord(maker="island-1.1", digests=("theirs",), num_params=1))
    mate.tell(msg.Peers(peers=(("island-1.1", "at-1", (0,)),)))
    assert mate.machine.fragments[0].n == -1
    assert mate.found(ev.FetchState)


# ---------------------------------------------------------------- owning


def test_pieces_are_pulled_as_soon_as_they_are_offered() -> None:
    mate = Mate().start()
    assign = mate.assign(entry("island-1", 0, 4), owners=("island-0", "island-2"))
    by, address, offer = assign.offers[0]
    announce = msg.Announce(offer_by=by, address=address, offer=offer, owners=("island-0.1", "island-2.1"))
    mate.tell(announce)
    (fetch,) = mate.found(ev.FetchPieces)
    assert (fetch.address, fetch.chunks) == ("at-1", (0,))
    mate.happen(ev.PiecesFetched(fragment=0, offer=offer_id("island-1"), chunks=(0,)))
    mate.tell(assign)
    assert len(mate.found(ev.FetchPieces)) == 1, "what is here is not pulled again"
    (reduce,) = mate.found(ev.Reduce)
    assert reduce.chunks == (0,)


def test_owner_reduces_once_all_pieces_of_the_roster_are_there() -> None:
    mate = Mate().start()
    roster = (entry("island-1", 0, 4), entry("island-2", 4, 8))
    mate.tell(mate.assign(*roster, owners=("island-0", "island-0")))
    mate.happen(ev.PiecesFetched(fragment=0, offer=offer_id("island-1"), chunks=(0, 1)))
    assert not mate.found(ev.Reduce)
    mate.happen(ev.PiecesFetched(fragment=0, offer=offer_id("island-2"), chunks=(1,)))
    assert mate.found(ev.Reduce)[-1].chunks == (1,)
    mate.happen(ev.PiecesFetched(fragment=0, offer=offer_id("island-2"), chunks=(0,)))
    assert mate.found(ev.Reduce)[-1].chunks == (0,)


def test_parts_survive_a_new_attempt_of_the_same_roster_only() -> None:
    mate = Mate().start()
    roster = (entry("island-1", 0, 4), entry("island-2", 4, 8))
    first = mate.assign(*roster, owners=("island-0", "island-2"))
    mate.tell(first)
    for name in ("island-1", "island-2"):
        mate.happen(ev.PiecesFetched(fragment=0, offer=offer_id(name), chunks=(0,)))
    mate.happen(ev.ChunksReduced(fragment=0, roster_digest=first.roster_digest, chunks=((0, "r0"),)))
    mate.tell(mate.assign(*roster, owners=("island-0", "island-0"), attempt=2))
    assert mate.found(msg.Reduced)[-1].chunks == ((0, "r0"),) and mate.found(msg.Reduced)[-1].attempt == 2
    mate.commands.clear()
    mate.tell(mate.assign(roster[0], owners=("island-0", "island-0"), attempt=3))
    assert not mate.found(msg.Reduced)
    assert mate.found(ev.Reduce)[-1].chunks == (0,), "made anew from the pieces that are here"


def test_who_begins_from_earlier_results_waits_until_it_has_those_of_the_base() -> None:
    mate = Mate().start()
    first = mate.commit()
    mate.tell()
    roster = (entry("island-1", 4, 8, seq=2),)
    assign = mate.assign(*roster, owners=("island-0", "island-1"), serial=2)
    recipe = Recipe(rows=((1.0,),), finish="measure", center=1.0, history=True)
    assign = replace(assign, base=msg.Version(n=1, chain=first.chain), recipe=recipe)
    mate.tell(assign)
    mate.happen(ev.PiecesFetched(fragment=0, offer=offer_id("island-1", 2), chunks=(0,)))
    assert mate.found(ev.Reduce) == [], "its momentum is that of version 0"
    mate.commands += mate.machine.applied(0, first, mate.now)
    assert [c.chunks for c in mate.found(ev.Reduce)] == [(0,)]


def test_older_attempt_is_ignored() -> None:
    mate = Mate().start()
    roster = (entry("island-1", 0, 4),)
    mate.tell(mate.assign(*roster, owners=("island-2", "island-2"), attempt=2))
    mate.tell(mate.assign(*roster, owners=("island-0", "island-0"), attempt=1))
    assert not mate.found(ev.FetchPieces)


def test_failed_pull_is_missing_only_for_the_present_roster() -> None:
    mate = Mate().start()
    mate.tell(mate.assign(entry("island-1", 0, 4), owners=("island-0", "island-2")))
    mate.happen(ev.PiecesFailed(fragment=0, offer=offer_id("island-2"), chunks=(0,), why="gone"))
    assert not mate.found(msg.Missing)
    mate.happen(ev.PiecesFailed(fragment=0, offer=offer_id("island-1"), chunks=(0,), why="gone"))
    assert mate.found(msg.Missing)[-1].offer == offer_id("island-1")


def test_bad_piece_is_refused_not_dropped() -> None:
    mate = Mate().start()
    mate.tell(mate.assign(entry("island-1", 0, 4), owners=("island-0", "island-0")))
    mate.happen(ev.PieceRejected(fragment=0, offer=offer_id("island-1"), why="not finite"))
    assert mate.found(msg.Refused)[-1].offer == offer_id("island-1")


# ---------------------------------------------------------------- results


def test_result_is_computed_and_reported_then_said_again() -> None:
    mate = Mate().start()
    assign = mate.assign(entry("island-1", 0, 4), owners=("island-1", "island-2"))
    mate.tell(assign)
    assert {fetch.address for fetch in mate.found(ev.FetchResults)} == {"at-1", "at-2"}
    mate.happen(ev.ResultsFetched(fragment=0, chunks=((0, "r0"),)))
    mate.happen(ev.ResultsFetched(fragment=0, chunks=((1, "r1"),)))
    assert not mate.found(ev.ComputeNext)
    mate.tell(mate.spread(assign, ("r0", "r1")))
    assert len(mate.found(ev.ComputeNext)) == 1
    mate.happen(ev.NextComputed(fragment=0, exchange=assign.exchange, attempt=1, digest="next"))
    assert mate.found(msg.Have)[-1].next_digest == "next"
    mate.tick(2.0)
    assert len(mate.found(msg.Have)) == 2


def test_wrong_chunk_is_fetched_again_by_content() -> None:
    mate = Mate().start()
    assign = mate.assign(entry("island-1", 0, 4), owners=("island-1", "island-1"))
    mate.tell(assign)
    mate.happen(ev.ResultsFetched(fragment=0, chunks=((0, "old"), (1, "r1"))))
    mate.tell(mate.spread(assign, ("r0", "r1")))
    fetch = mate.found(ev.FetchResults)[-1]
    assert (fetch.chunks, fetch.digests) == ((0,), ("r0",))


def test_result_that_was_committed_while_it_was_waited_for_by_name_is_fetched_by_content() -> None:
    """A newcomer asked an owner that had forgotten the name already, and waited half a minute for it."""
    mate = Mate().start()
    mate.tell(mate.assign(entry("island-1", 0, 4), owners=("island-1", "island-1")))
    by_name = mate.found(ev.FetchResults)[-1]
    record = mate.commit(entry("island-1", 0, 4))
    mate.tell()
    assert by_name.n == record.n and not by_name.digests and mate.machine.log.head(0) == record.n
    mate.happen(ev.ResultsFailed(fragment=0, chunks=by_name.chunks, address="at-1", why="given up"))
    mate.tick()
    assert mate.found(ev.FetchResults)[-1].digests == record.chunk_digests


def test_verification_computes_again_or_gives_the_state_up() -> None:
    mate = Mate().start()
    assign = mate.assign(entry("island-1", 0, 4), owners=("island-1", "island-1"))
    mate.tell(assign)
    mate.happen(ev.ResultsFetched(fragment=0, chunks=((0, "r0"), (1, "r1"))))
    mate.tell(mate.spread(assign, ("r0", "r1")))
    mate.happen(ev.NextComputed(fragment=0, exchange=assign.exchange, attempt=1, digest="odd"))
    mate.tell(msg.Verify(fragment=0, exchange=assign.exchange, attempt=1))
    verify = mate.found(ev.VerifyAnchor)[-1]
    assert (verify.chain, verify.digest) == (GENESIS_CHAIN, "g0"), "a later version would be taken for a damaged one"
    mate.happen(ev.AnchorVerified(fragment=0, intact=True, exchange=assign.exchange, attempt=1))
    assert len(mate.found(ev.ComputeNext)) == 2
    mate.happen(ev.AnchorVerified(fragment=0, intact=False, exchange=assign.exchange, attempt=1))
    assert mate.machine.reset_wanted and mate.machine.fragments[0].n == -1


def test_unverified_state_is_reported_and_everybody_can_be_asked() -> None:
    mate = Mate().start()
    mate.happen(ev.StateFailed(fragment=0, why="not as sealed", mismatch=True))
    assert mate.found(msg.FaultSeen)[-1].fault == "unverified_state"
    mate.tell(msg.Verify(fragment=0, exchange=None, attempt=0))
    assert mate.found(ev.VerifyAnchor)


# ---------------------------------------------------------------- fate of an offer


def test_record_alone_decides_about_an_offer() -> None:
    for is_in in (True, False):
        mate = Mate().start()
        offer = mate.offer(8)
        mate.machine.consumed_to(12, 6)
        roster = (entry("island-0", 0, 8, seq=offer.seq),) if is_in else (entry("island-1", 0, 4),)
        record = mate.commit(*roster)
        mate.tell()
        assert mate.machine.due(0) is None, "its result is not here"
        mate.happen(ev.ResultsFetched(fragment=0, chunks=((0, "r1-0"), (1, "r1-1"))))
        due = mate.machine.due(0)
        assert due is not None and due.included == is_in
        mate.commands += mate.machine.applied(0, record, mate.now)
        state = mate.machine.fragments[0]
        assert state.pending is None and state.version == msg.Version(n=1, chain=record.chain)
        assert state.watermark == (8 if is_in else 0) and state.late == (not is_in)


def test_offer_is_repeated_until_it_is_decided() -> None:
    mate = Mate().start()
    mate.offer(8)
    for _ in range(3):
        mate.tick(1.0)
    assert len(mate.found(msg.Offer)) == 4
    mate.tell(msg.Discarded(fragment=0, exchange=msg.ExchangeId(term=mate.term, serial=1), why="x"))
    assert len(mate.found(msg.Offer)) == 5


def test_versions_are_applied_in_order() -> None:
    mate = Mate().start()
    first, second = mate.commit(), mate.commit()
    mate.tell()
    mate.happen(ev.ResultsFetched(fragment=0, chunks=((0, "r2-0"), (1, "r2-1"))))
    assert mate.machine.due(0) is None
    mate.happen(ev.ResultsFetched(fragment=0, chunks=((0, "r1-0"), (1, "r1-1"))))
    due = mate.machine.due(0)
    assert due is not None and due.record == first
    mate.machine.applied(0, first, mate.now)
    due = mate.machine.due(0)
    assert due is not None and due.record == second


def test_far_behind_fetches_a_whole_state_and_decides_first() -> None:
    mate = Mate().start()
    offer = mate.offer(8)
    mate.commit(entry("island-0", 0, 8, seq=offer.seq))
    for _ in range(3):
        mate.commit()
    mate.tell()
    assert not mate.found(ev.FetchState), "all that is known of the others is that they hold version 0"
    mate.tell(msg.Peers(peers=(("island-1.1", "at-1", (4,)), ("island-2.1", "at-2", (0,)))))
    (fetch,) = mate.found(ev.FetchState)
    assert fetch.donors == (("island-1.1", "at-1"),)  # type: ignore[attr-defined]
    newest = mate.machine.log.commit(0, 4)
    assert newest is not None
    mate.happen(ev.StateStaged(fragment=0, n=4, chain=newest.chain))
    mate.commands += mate.machine.installed(0, mate.now)
    state = mate.machine.fragments[0]
    assert (state.n, state.watermark, state.pending) == (4, 8, None)


def test_state_that_a_commit_has_overtaken_is_not_taken() -> None:
    """It came for the version that was held already; the open offer lost what it had sent, and its steps were lost."""
    mate = Mate().start()
    mate.offer(8)
    mate.happen(ev.StateStaged(fragment=0, n=0, chain=GENESIS_CHAIN))
    assert mate.machine.fragments[0].staged is None
    mate.happen(ev.StateStaged(fragment=0, n=3, chain="revoked"))
    assert mate.machine.fragments[0].staged is None
    assert mate.machine.fragments[0].pending is not None


# ---------------------------------------------------------------- resets


def test_drop_resets_the_work_but_not_the_incarnation() -> None:
    mate = Mate(fragments=2).start()
    mate.offer(8, fragment=0)
    mate.machine.consumed_to(12, 6)
    mate.record(DropRecord(member="island-0", incarnation=1, upto=10, why="stale"))
    mate.tell()
    assert mate.machine.reset_wanted
    mate.commands += mate.machine.was_reset(mate.now)
    assert mate.machine.incarnation == 1 and mate.machine.consumed == 10
    assert [state.watermark for state in mate.machine.fragments] == [10, 10]
    assert all(state.pending is None for state in mate.machine.fragments)


def test_fenced_member_keeps_its_anchors_and_joins_anew() -> None:
    mate = Mate().start()
    mate.offer(8)
    mate.record(FenceRecord(member="island-0", incarnation=1, why="lost"))
    mate.tell()
    mate.commands.clear()
    mate.now += 2.0
    mate.commands += mate.machine.was_reset(mate.now)
    assert mate.machine.nonce == "p+1" and mate.machine.incarnation is None
    assert mate.machine.leases == [] and mate.machine.consumed == 0
    assert mate.machine.fragments[0].n == 0, "a burst of false verdicts must not destroy the state (H5)"
    assert mate.found(msg.Join)[-1].ready


def test_revoked_version_is_given_up() -> None:
    mate = Mate().start()
    record = mate.commit()
    mate.tell()
    mate.happen(ev.ResultsFetched(fragment=0, chunks=((0, "r1-0"), (1, "r1-1"))))
    mate.machine.applied(0, record, mate.now)
    mate.record(RevokeRecord(fragment=0, n=1, chain=record.chain))
    mate.tell()
    assert mate.machine.reset_wanted
    mate.machine.was_reset(mate.now)
    assert mate.machine.fragments[0].n == -1


def test_rejoin_takes_a_new_nonce() -> None:
    mate = Mate()
    mate.tell(msg.Rejoin(), incarnation=None)
    mate.machine.was_reset(mate.now)
    assert mate.machine.nonce == "p+1"


# ---------------------------------------------------------------- revocation


def test_no_is_a_promise_until_it_is_void() -> None:
    mate = Mate().start()
    record = mate.commit()
    mate.tell(msg.RevokeQuery(fragment=0, version=msg.Version(n=1, chain=record.chain), nonce=7))
    assert mate.found(msg.RevokeAnswer)[-1].lacks
    mate.happen(ev.ResultsFetched(fragment=0, chunks=((0, "r1-0"), (1, "r1-1"))))
    assert mate.machine.due(0) is None, "it promised not to apply it"
    mate.tell(msg.RevokeCancel(fragment=0, nonce=6))
    assert mate.machine.due(0) is None
    mate.tell(msg.RevokeCancel(fragment=0, nonce=7))
    assert mate.machine.due(0) is not None


def test_who_holds_the_result_says_so() -> None:
    mate = Mate().start()
    record = mate.commit()
    mate.tell()
    mate.happen(ev.ResultsFetched(fragment=0, chunks=((0, "r1-0"), (1, "r1-1"))))
    mate.tell(msg.RevokeQuery(fragment=0, version=msg.Version(n=1, chain=record.chain), nonce=1))
    assert not mate.found(msg.RevokeAnswer)[-1].lacks
    assert mate.machine.due(0) is not None


# ---------------------------------------------------------------- housekeeping


def test_what_a_version_made_useless_is_freed() -> None:
    mate = Mate().start()
    assign = mate.assign(entry("island-1", 0, 4), owners=("island-0", "island-0"))
    by, address, offer = assign.offers[0]
    mate.tell(msg.Announce(offer_by=by, address=address, offer=offer, owners=("island-0.1", "island-0.1")), assign)
    mate.happen(ev.PiecesFetched(fragment=0, offer=offer_id("island-1"), chunks=(0, 1)))
    mate.happen(ev.ChunksReduced(fragment=0, roster_digest=assign.roster_digest, chunks=((0, "r1-0"), (1, "r1-1"))))
    record = mate.commit(entry("island-1", 0, 4))
    mate.tell()
    mate.commands += mate.machine.applied(0, record, mate.now)
    assert mate.found(ev.Forget)[-1].prefixes == (f"piece/0/{offer_id('island-1')}",)
    for _ in range(3):
        record = mate.commit()
        mate.tell()
        chunks = ((0, record.chunk_digests[0]), (1, record.chunk_digests[1]))
        mate.happen(ev.ResultsFetched(fragment=0, chunks=chunks))
        mate.commands += mate.machine.applied(0, record, mate.now)
    assert mate.machine.fragments[0].content == {"r4-0", "r4-1"}, "the newest is kept"


def test_heartbeat_tells_what_the_member_knows_of_the_open_exchange() -> None:
    mate = Mate().start()
    assign = mate.assign(entry("island-1", 0, 4), owners=("island-1", "island-1"), attempt=3)
    mate.tell(assign)
    mate.tick(1.0)
    report = mate.found(msg.Hello)[-1].fragments[0]
    assert (report.exchange, report.attempt, report.spread) == (assign.exchange, 3, False)
    mate.tell(mate.spread(assign, ("a", "b")))
    mate.tick(1.0)
    assert mate.found(msg.Hello)[-1].fragments[0].spread


def test_roster_entries_name_incarnations() -> None:
    ours = entry("island-0", 0, 4, incarnation=2)
    assert ours.offer.member == member_id("island-0", 2) and ours._replace(seq=2).offer != ours.offer


def test_a_version_0_that_was_made_here_is_none_before_the_journal_has_it() -> None:
    """A lease overtook the genesis row (simulator, seed 5414): the member offered on a base that nobody knew."""
    mate = Mate()
    mate.record(JoinRecord(member="island-0", incarnation=1, nonce="p", node="n"))
    mate.tell(msg.Welcome(incarnation=1), incarnation=None)
    mate.happen(ev.GenesisBuilt(digests=("g",), num_params=1))
    assert mate.found(msg.GenesisMade)
    mate.record(GenesisRecord(maker="island-0.1", digests=("g",), num_params=1))
    late = mate.batch()
    mate.told = len(mate.rows)
    mate.tell(msg.LeaseGrant(index=0, ranges=((0, 32),)))
    assert mate.machine.num_leased() == 32
    assert not mate.machine.holds_all()
    mate.happen(ev.Delivered(batch=late))
    assert mate.machine.holds_all()


def test_after_a_rollback_no_state_counts_that_is_held_even_one_that_is_older() -> None:
    mate = Mate().start()
    mate.machine.consumed = 0
    chain = mate.machine.fragments[0].chain
    assert mate.machine.fragments[0].n == 0 and mate.machine.log.on_path(0, chain)
    versions = tuple(0 for _ in mate.machine.fragments)
    mate.record(RollbackRecord(name="v0", versions=versions, chains=tuple(GENESIS_CHAIN for _ in versions)))
    mate.tell()
    assert [state.n for state in mate.machine.fragments] == [-1 for _ in versions]
    assert not mate.machine.holds_all() and not mate.machine.reset_wanted
    mate.commands.clear()
    mate.tell(msg.Restore())
    assert any(isinstance(command, ev.LoadState) for command in mate.commands)
