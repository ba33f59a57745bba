"""Traces of one exchange, as the controller lives them (protocol 1.3)."""

from __future__ import annotations

import pytest
from control import BATCH, Control

from workers import messages as msg
from workers.records import CommitRecord, DropRecord, FenceRecord, RevokeRecord, SettleRecord


def names(control: Control) -> set[str]:
    return {entry.member for entry in control.open().roster}


def last_commit(control: Control) -> CommitRecord:
    record = control.records(CommitRecord)[-1]
    assert isinstance(record, CommitRecord)
    return record


def test_happy_path() -> None:
    control = Control()
    control.start()
    for name in ("island-0", "island-1", "island-2"):
        control.offer(name)
    open_ = control.open()
    assert open_.state == "reducing" and open_.attempt == 1
    assert names(control) == {"island-0", "island-1", "island-2"}
    assert sum(entry.coefficient for entry in open_.roster) == pytest.approx(1.0)
    control.reduce()
    assert control.open().state == "spread"
    control.have("island-0")
    assert control.head() == 0, "one copy is not enough"
    control.have("island-2")
    assert control.head() == 1
    commit = last_commit(control)
    assert [entry.member for entry in commit.roster] == ["island-0", "island-1", "island-2"]
    assert control.state.samples_committed() == 3 * control.steps * BATCH
    assert not control.told("island-1", msg.Discarded)


def test_offers_are_repeated_without_effect() -> None:
    control = Control()
    control.start()
    offer = control.make_offer("island-0")
    for _ in range(3):
        control.say("island-0", offer)
    assert len(control.open().offers) == 1
    assert len(control.told("island-1", msg.Announce)) == 1


def test_late_offer_waits_for_the_next_version() -> None:
    control = Control()
    control.start()
    control.offer("island-0")
    control.offer("island-1")
    control.tick(3.0)
    assert names(control) == {"island-0", "island-1"}
    late = control.make_offer("island-2")
    control.say("island-2", late)
    assert names(control) == {"island-0", "island-1"}
    control.reduce()
    control.have("island-0")
    control.have("island-1")
    assert control.head() == 1
    # The old base is answered with the records that it lacks; rebased, the same work comes in.
    control.say("island-2", late)
    assert control.coordinator.exchanges[0].open is None
    control.ready("island-2")
    control.offer("island-2", steps=6, born=0)
    assert control.open().offers[control.id("island-2")][1].since == 0


def test_coefficients_are_shares_of_all_live_members_that_have_stepped() -> None:
    control = Control()
    control.start()
    for name in ("island-0", "island-1", "island-2"):
        control.consumed[name] = 4
        control.hello(name)
    control.offer("island-0")
    control.offer("island-1")
    control.tick(3.0)
    assert [entry.coefficient for entry in control.open().roster] == pytest.approx([1 / 3, 1 / 3])


def test_quorum_then_grace() -> None:
    control = Control(members=4)
    control.start()
    control.offer("island-0")
    control.tick(10.0)
    control.offer("island-1")
    control.tick(10.0)
    assert control.open().state == "open", "half is no quorum"
    control.offer("island-2")
    control.tick(1.0)
    assert control.open().state == "open", "grace begins with the quorum-th offer"
    control.tick(2.0)
    assert control.open().state == "reducing"
    assert "not waiting for island-3.1" in control.open().closed_because


def test_full_quorum_waits_for_everybody_but_the_suspect() -> None:
    control = Control(exchange={"quorum": 1.0})
    control.start()
    control.offer("island-0")
    control.offer("island-1")
    control.tick(20.0, quiet=["island-2"])
    assert control.open().state == "open", "who is suspect is still expected"
    control.tick(15.0, quiet=["island-2"])
    assert control.state.current.keys() == {"island-0", "island-1"}, "limbo is over"
    assert control.open().state == "reducing"


def test_suspects_are_not_waited_for_after_quorum() -> None:
    control = Control()
    control.start()
    control.tick(4.0, quiet=["island-2"])
    control.offer("island-0")
    control.offer("island-1")
    assert control.open().state == "reducing", "everybody who can has offered"
    assert all(owner.name != "island-2" for owner in control.open().owners)
    assert control.entry("island-2").num_leased > 0 and control.entry("island-2").live


def test_who_is_heard_after_a_cut_and_does_not_hear_yet_stops_nobody() -> None:
    """It was cut off for three versions. Healed, its messages arrive many seconds before it gets any."""
    control = Control()
    control.start()
    control.consumed["island-2"] = 4
    control.hello("island-2")
    for _ in range(3):
        control.tick(4.0, quiet=["island-2"])
        control.commit("island-0", "island-1")
        control.versions["island-2"] = [0]
    control.hello("island-2")
    assert control.coordinator.roll.processes[control.id("island-2")].status == "healthy"
    control.offer("island-0")
    control.offer("island-1")
    assert control.open().state == "reducing", "it cannot offer before it has caught up, and is not waited for"
    assert {owner.name for owner in control.open().owners} == {"island-0", "island-1"}


def test_member_blocked_by_another_fragment_is_not_waited_for() -> None:
    control = Control(members=2, fragments=2, exchange={"quorum": 1.0})
    control.start()
    control.commit("island-0", "island-1", fragment=0)
    control.consumed["island-1"] = control.entry("island-1").watermarks[0]
    control.hello("island-1", waiting="bound")
    control.offer("island-0", 0)
    assert control.open(0).state == "reducing"


def test_who_has_not_heard_of_its_leases_yet_is_waited_for() -> None:
    """It evaluates before its first step, and its last word was that it waits for leases."""
    control = Control(members=2, exchange={"quorum": 1.0})
    control.start()
    control.hello("island-1", waiting="leases")
    control.offer("island-0")
    assert control.open().state == "open"
    control.offer("island-1")
    assert control.open().state == "reducing"


def test_missing_goes_to_another_owner_first_then_leaves_the_roster() -> None:
    control = Control(chunks=3)
    control.start()
    lost = control.offer("island-2")
    control.offer("island-0")
    control.offer("island-1")
    control.missing("island-0", lost)
    open_ = control.open()
    assert open_.attempt == 2 and "island-0" not in {owner.name for owner in open_.owners}
    assert names(control) == {"island-0", "island-1", "island-2"}
    control.reduce("island-2")
    control.missing("island-1", lost)
    assert control.open().attempt == 3
    control.missing(next(owner.name for owner in control.open().owners), lost)
    assert "island-2" not in names(control), "nobody can reach it"
    assert control.open().reduced == {}, "parts of the old roster do not count (C6)"
    assert sum(e.coefficient for e in control.open().roster) <= 1.0


def test_dead_contributor_stays_until_somebody_misses_its_pieces() -> None:
    control = Control(members=3, chunks=2)
    control.start()
    lost = control.offer("island-2")
    control.offer("island-0")
    control.offer("island-1")
    control.die("island-2")
    assert "island-2" in names(control)
    assert not control.records(SettleRecord), "it may still be committed (C3)"
    control.missing(control.open().owners[0].name, lost)
    assert "island-2" not in names(control)
    control.reduce()
    control.have("island-0")
    control.have("island-1")
    assert control.head() == 1
    assert control.records(SettleRecord)
    assert control.state.reissued or control.state.free or control.entry("island-0").num_leased


def test_refused_leaves_the_roster_and_is_fenced() -> None:
    control = Control()
    control.start()
    bad = control.offer("island-1")
    control.offer("island-0")
    control.offer("island-2")
    control.refused("island-0", bad)
    assert names(control) == {"island-0", "island-2"}
    fence = control.records(FenceRecord)[-1]
    assert isinstance(fence, FenceRecord) and fence.member == "island-1" and fence.refused


def test_owner_lost_while_reducing() -> None:
    control = Control(chunks=3)
    control.start()
    for name in ("island-0", "island-1", "island-2"):
        control.offer(name)
    control.reduce("island-0")
    control.die("island-1")
    open_ = control.open()
    assert open_.attempt == 2 and "island-1" not in {owner.name for owner in open_.owners}
    assert 0 in open_.reduced, "the roster is the same: what others made stays"
    assert [owner.name for owner in open_.owners] == ["island-0", "island-0", "island-2"], "nobody else changes places"


def test_owner_without_progress_loses_its_parts() -> None:
    control = Control(chunks=3)
    control.start()
    for name in ("island-0", "island-1", "island-2"):
        control.offer(name)
    control.reduce("island-0", "island-2")
    control.tick(6.0)
    assert "island-1" not in {owner.name for owner in control.open().owners}
    assert control.open().attempt == 2


def test_owner_lost_in_spread_before_anybody_has_the_result() -> None:
    control = Control(chunks=3)
    control.start()
    for name in ("island-0", "island-1", "island-2"):
        control.offer(name)
    control.reduce()
    assert control.open().state == "spread"
    control.die("island-1")
    assert control.open().state == "reducing" and control.open().attempt == 2


def test_owner_lost_in_spread_after_somebody_has_the_result() -> None:
    control = Control(chunks=3)
    control.start()
    for name in ("island-0", "island-1", "island-2"):
        control.offer(name)
    control.reduce()
    control.have("island-0")
    control.die("island-1")
    assert control.open().state == "spread", "who has it all can serve it"
    control.have("island-2")
    assert control.head() == 1


def test_have_of_a_fenced_member_does_not_count() -> None:
    control = Control(members=3, exchange={"copies": 3})
    control.start()
    for name in ("island-0", "island-1", "island-2"):
        control.offer(name)
    control.reduce()
    control.have("island-0")
    control.have("island-2")
    control.die("island-2")
    assert control.head() == 0
    control.have("island-1")
    assert control.head() == 1, "two are left and both have it"


def test_copies_on_different_nodes() -> None:
    control = Control(members=3)
    for i in range(3):
        control.join(f"island-{i}", node="same" if i < 2 else "other")
    control.say("island-0", msg.GenesisMade(digests=("g0",), num_params=1, num_chunks=(2,)))
    for i in range(3):
        control.ready(f"island-{i}")
    for i in range(3):
        control.offer(f"island-{i}")
    control.reduce()
    control.have("island-0")
    control.have("island-1")
    assert control.head() == 0, "both copies are on one node"
    control.have("island-2")
    assert control.head() == 1


def test_unequal_next_digests_are_verified_and_never_voted_on() -> None:
    control = Control()
    control.start()
    for name in ("island-0", "island-1", "island-2"):
        control.offer(name)
    control.reduce()
    control.have("island-0", digest="a")
    control.have("island-1", digest="b")
    assert control.head() == 0 and control.told("island-0", msg.Verify)
    control.have("island-0", digest="a")
    control.have("island-2", digest="a")
    assert control.head() == 1


def test_unequal_after_verification_discards() -> None:
    control = Control()
    control.start()
    for name in ("island-0", "island-1", "island-2"):
        control.offer(name)
    control.reduce()
    for digest_of_1 in ("b", "b"):
        control.have("island-0", digest="a")
        control.have("island-1", digest=digest_of_1)
    assert control.coordinator.exchanges[0].open is None
    assert control.told("island-1", msg.Discarded)
    assert control.head() == 0


def test_messages_of_an_older_attempt_are_dropped() -> None:
    control = Control(chunks=3)
    control.start()
    for name in ("island-0", "island-1", "island-2"):
        control.offer(name)
    old = control.reduced("island-0")
    control.refused("island-2", control.open().roster[1].offer)
    assert control.open().attempt > 1
    control.say("island-0", old)
    assert control.open().reduced == {}, "made of another roster"


def test_attempts_are_bounded() -> None:
    control = Control(members=4, chunks=4)
    control.start()
    for i in range(4):
        control.offer(f"island-{i}")
    for _ in range(20):
        open_ = control.coordinator.exchanges[0].open
        if open_ is None:
            break
        assert open_.attempt <= 8, "roster and owners only shrink"
        owner = open_.owners[0]
        left = [entry.offer for entry in open_.roster if entry.offer.member != owner]
        if not left:
            break
        control.missing(owner.name, left[0])
    assert len(set(open_.owners)) == 1 and len(open_.roster) == 1


def test_stale_work_is_dropped_by_rule() -> None:
    control = Control(exchange={"staleness_limit": 2})
    control.start()
    for _ in range(3):
        control.commit("island-0", "island-1")
    control.ready("island-2")
    control.offer("island-2", born=0)
    drop = control.records(DropRecord)[-1]
    assert isinstance(drop, DropRecord) and (drop.member, drop.upto) == ("island-2", control.steps * BATCH)
    assert control.state.dropped
    assert control.entry("island-2").watermarks == [control.steps * BATCH]


def test_zero_weight_offers_are_no_contributions() -> None:
    control = Control()
    control.start()
    body = control.make_offer("island-0")
    for changes in ({"weight": 0}, {"num_steps": 0}, {"upto": 0, "ranges": ()}):
        values = {name: getattr(body, name) for name in msg.Offer.__slots__}
        control.say("island-0", msg.Offer(**{**values, **changes}))
        assert control.coordinator.exchanges[0].open is None


def test_offer_of_what_was_not_leased_is_refused() -> None:
    control = Control()
    control.start()
    body = control.make_offer("island-0")
    values = {name: getattr(body, name) for name in msg.Offer.__slots__}
    control.say("island-0", msg.Offer(**{**values, "ranges": ((200, 208),)}))
    assert control.coordinator.exchanges[0].open is None


def test_revoked_version_goes_back() -> None:
    control = Control(members=3)
    control.start()
    for name in ("island-0", "island-1", "island-2"):
        control.offer(name)
    control.reduce()
    control.have("island-0")
    control.have("island-1")
    assert control.head() == 1
    for name in ("island-0", "island-1"):
        control.die(name)
    chain = control.state.heads[0].version
    for _ in range(4):
        control.tick(1.0)
    question = control.told("island-2", msg.RevokeQuery)[-1]
    assert isinstance(question, msg.RevokeQuery) and question.version == chain
    control.say("island-2", msg.RevokeAnswer(fragment=0, nonce=question.nonce, lacks=True, n=0))
    assert control.head() == 0
    assert control.records(RevokeRecord)
    assert control.entry("island-2").watermarks == [0], "its work can be offered again"
    assert control.state.samples_committed() == 0


def test_one_holder_ends_the_question() -> None:
    control = Control(members=2)
    control.start()
    control.commit("island-0", "island-1")
    control.versions["island-0"] = control.versions["island-1"] = [0]
    for _ in range(4):
        control.tick(1.0)
    question = control.told("island-0", msg.RevokeQuery)[-1]
    assert isinstance(question, msg.RevokeQuery)
    control.say("island-0", msg.RevokeAnswer(fragment=0, nonce=question.nonce, lacks=True, n=0))
    control.say("island-1", msg.RevokeAnswer(fragment=0, nonce=question.nonce, lacks=False, n=1))
    control.say("island-0", msg.RevokeAnswer(fragment=0, nonce=question.nonce, lacks=True, n=0))
    assert control.head() == 1 and not control.records(RevokeRecord)


def test_missing_and_refused_of_an_older_attempt_change_nothing() -> None:
    """The pieces they speak of belong to a roster that is over."""
    control = Control(members=4, chunks=4)
    control.start()
    for i in range(4):
        control.offer(f"island-{i}")
    first = control.open()
    exchange, attempt, owner = first.id, first.attempt, first.owners[0]
    gone, other, *_ = (entry.offer for entry in first.roster if entry.offer.member != owner)
    control.refused(owner.name, gone)
    now = control.open()
    before = (now.attempt, now.owners, now.roster)
    assert now.attempt > attempt
    control.say(owner.name, msg.Missing(fragment=0, exchange=exchange, attempt=attempt, offer=other, why="late"))
    assert (control.open().attempt, control.open().owners, control.open().roster) == before
    control.say(owner.name, msg.Refused(fragment=0, exchange=exchange, attempt=attempt, offer=other, why="late"))
    assert (control.open().attempt, control.open().owners, control.open().roster) == before


def test_late_work_weighs_less() -> None:
    """One version late is usual with overlap; two versions late weigh 1 / sqrt(2)."""
    control = Control(exchange={"staleness_limit": 4})
    control.start()
    for _ in range(2):
        control.commit("island-0", "island-1")
    control.ready("island-2")
    for name, born in (("island-2", 0), ("island-0", 2), ("island-1", 2)):
        control.offer(name, born=born)
    share = {entry.member: entry.coefficient for entry in control.open().roster}
    assert share["island-0"] == share["island-1"]
    assert share["island-2"] == pytest.approx(share["island-0"] / 2**0.5)
