"""Traces of whole controllers: flushes, restarts, processes that come and go, the end of a run."""

from __future__ import annotations

from control import BATCH, Control

from orchestrator import events as ev
from workers import messages as msg
from workers import ranges
from workers.records import (
    CommitRecord,
    DropRecord,
    FaultRecord,
    FenceRecord,
    GenesisRecord,
    JoinRecord,
    LeaseRecord,
    SettleRecord,
    StopRecord,
    Term,
)

# ---------------------------------------------------------------- journal first


def test_nothing_is_told_before_it_is_flushed() -> None:
    control = Control()
    control.hold = True
    control.join("island-0")
    assert not control.sent
    control.flush()
    assert control.told("island-0", msg.Welcome) == [msg.Welcome(incarnation=1)]


def test_lease_that_was_not_flushed_is_granted_again() -> None:
    control = Control()
    control.start()
    control.hold = True
    for name in ("island-0", "island-1", "island-2"):
        control.offer(name)
    control.reduce()
    control.have("island-0")
    control.have("island-1")
    control.flush()  # the commit; the leases that follow from it are written, not flushed
    assert control.head() == 1
    control.hold = True
    control.restart()
    control.hold = False
    for name in ("island-0", "island-1", "island-2"):
        control.hello(name)
    given = [r for record in control.records(LeaseRecord) for r in record.ranges]  # type: ignore[attr-defined]
    assert len({p for a, b in given for p in range(a, b)}) == sum(b - a for a, b in given)


def test_decision_that_survived_unheard_is_told_by_the_next_controller() -> None:
    control = Control()
    control.start()
    control.hold = True
    for name in ("island-0", "island-1", "island-2"):
        control.offer(name)
    control.reduce()
    control.have("island-0")
    control.have("island-1")
    control.restart(lose_unflushed=False)
    control.hold = False
    assert control.head() == 1
    control.sent.clear()
    control.hello("island-2")
    rows = [row for batch in control.sent if batch.nonce == control.nonces["island-2"] for row in batch.rows]
    assert any(isinstance(row.record, CommitRecord) for row in rows)


def test_full_journal_holds_everything_back_until_there_is_space() -> None:
    control = Control()
    control.start()
    control.sent.clear()
    control.hold = True
    control.die("island-0")
    control.handle(ev.JournalFullNow())
    assert any("full" in text for text in control.said)
    control.tick(3.0)
    assert not any(batch.rows for batch in control.sent)
    control.hold = False
    control.flush()
    assert control.records(FenceRecord)


# ---------------------------------------------------------------- terms and restarts


def test_members_reattach_and_keep_incarnation_leases_and_work() -> None:
    control = Control()
    control.start()
    control.commit()
    leased = control.entry("island-1").num_leased
    control.offer("island-0")
    control.restart()
    for name in ("island-0", "island-1", "island-2"):
        control.hello(name)
    assert len(control.records(JoinRecord)) == 3
    assert control.entry("island-1").num_leased == leased
    assert control.coordinator.exchanges[0].open is None, "open exchanges are lost, harmlessly"
    control.offer("island-0")
    assert control.open().id.term == Term(lineage=0, number=2, controller="c2")


def test_higher_term_ends_this_controller() -> None:
    control = Control()
    control.start()
    envelope = control.envelope("island-0")
    later = Term(lineage=0, number=9, controller="other")
    values = {name: getattr(envelope, name) for name in msg.Envelope.__slots__}
    control.handle(ev.Received(envelope=msg.Envelope(**{**values, "term": later})))
    assert control.died is not None
    control.sent.clear()
    control.join("island-3")
    assert not control.sent, "without another word"


def test_messages_of_another_run_are_dropped() -> None:
    control = Control()
    control.start()
    envelope = control.envelope("island-0", control.make_offer("island-0"))
    values = {name: getattr(envelope, name) for name in msg.Envelope.__slots__}
    control.handle(ev.Received(envelope=msg.Envelope(**{**values, "run_id": "other"})))
    assert control.coordinator.exchanges[0].open is None
    assert control.coordinator.stale_messages == 1


def test_live_member_that_a_new_controller_never_hears_is_fenced_after_limbo() -> None:
    control = Control()
    control.start()
    control.restart()
    control.tick(20.0, quiet=["island-2"])
    assert "island-2" in control.state.current
    control.tick(15.0, quiet=["island-2"])
    assert "island-2" not in control.state.current
    assert control.spawned == ["island-2"]


# ---------------------------------------------------------------- genesis, peers


def test_genesis_is_asked_again_and_of_others() -> None:
    """The question, or its answer, was lost: nobody ever made version 0."""
    control = Control()
    for name in ("island-0", "island-1"):
        control.join(name)
    assert control.told("island-0", msg.MakeGenesis) and not control.told("island-1", msg.MakeGenesis)
    control.now += 61.0
    control.hello("island-1")
    control.tick()
    assert len(control.told("island-0", msg.MakeGenesis)) + len(control.told("island-1", msg.MakeGenesis)) >= 2
    control.say("island-1", msg.GenesisMade(digests=("x",), num_params=1, num_chunks=(2,)))
    control.say("island-0", msg.GenesisMade(digests=("y",), num_params=1, num_chunks=(2,)))
    (genesis,) = control.records(GenesisRecord)
    assert isinstance(genesis, GenesisRecord) and genesis.maker == "island-1.1"


def test_member_that_stays_behind_hears_of_its_peers_again() -> None:
    """A joiner that missed the list of peers, or got an older one after a newer one, never fetched a state."""
    control = Control()
    control.start()
    control.commit("island-0", "island-1")
    control.versions["island-2"] = [0]
    control.hello("island-2")
    control.sent.clear()
    control.hello("island-2")
    assert control.told("island-2", msg.Peers)
    numbers = [batch.number for batch in control.sent]
    assert numbers == sorted(set(numbers)), "a newer batch has a higher number"


def test_owner_that_missed_its_assignment_is_told_again() -> None:
    """Only members that waited were told again; an owner that trained on was not."""
    control = Control()
    control.start()
    for name in ("island-0", "island-1", "island-2"):
        control.offer(name)
    control.sent.clear()
    exchange = control.open()
    control.coordinator.exchanges[0].open = None  # what a member reports that has not heard of it
    before = [control.coordinator.exchanges[0]]
    for _ in range(2):
        control.coordinator.exchanges[0].open = None
        hello = _hello_without_exchange(control, "island-1")
        before[0].open = exchange
        control.say("island-1", hello)
    assert control.told("island-1", msg.Assign)


def _hello_without_exchange(control: Control, name: str) -> msg.Hello:
    report = msg.FragmentReport(n=0, chain="", holds_next=False, barred=None, watermark=0)
    return msg.Hello(
        info=control.info(name),
        journal_len=len(control.rows),
        num_leased=control.entry(name).num_leased,
        consumed=control.consumed[name],
        steps=1,
        bytes_sent=0,
        fragments=(report,),
        waiting="",
    )


# ---------------------------------------------------------------- drops


def test_refused_work_in_a_fixed_roster_is_settled_after_its_commit() -> None:
    """Its watermark must not move before the commit that names the old one."""
    control = Control(fragments=2)
    control.start()
    member = control.id("island-1")
    for name in ("island-0", "island-1", "island-2"):
        control.offer(name, 0)
    request = msg.DropRequest(upto=control.consumed["island-1"], why="its update is not finite")
    control.say("island-1", request)
    assert [(f.member, f.refused) for f in control.records(FenceRecord)] == [("island-1", True)]  # type: ignore[attr-defined]
    assert not control.state.members[member].settled, "its offer may still be committed"
    control.reduce()
    control.have("island-0")
    control.have("island-2")
    assert control.head() == 1
    assert control.state.members[member].settled
    assert control.state.partial, "one fragment has counted it, the other never will"
    control.say("island-1", request, nonce=control.nonces["island-1"])
    assert len(control.records(FenceRecord)) == 1, "asked twice"


def test_who_is_refused_again_and_again_is_given_up() -> None:
    control = Control(members=2)
    control.start()
    for attempt in range(3):
        assert not control.coordinator.given_up
        control.consumed["island-1"] = BATCH
        control.say("island-1", msg.DropRequest(upto=BATCH, why="its update is not finite"))
        control.join("island-1", nonce=f"again-{attempt}")
        if attempt < 2:
            control.ready("island-1")
    assert [f.refused for f in control.records(FenceRecord)] == [True] * 3  # type: ignore[attr-defined]
    assert control.sent[-1].bodies == (msg.Stop(save=False),), "its process is told to end"
    assert set(control.state.current) == {"island-0"} and control.finished is None


def test_a_commit_forgives_refusals_and_a_run_without_anybody_left_fails() -> None:
    control = Control(members=1, exchange={"copies": 1})
    control.start()

    def refuse(nonce: str) -> None:
        control.say("island-0", msg.DropRequest(upto=0, why="its update is not finite"))
        control.join("island-0", nonce=nonce)

    for nonce in ("b", "c"):
        refuse(nonce)
        control.ready("island-0")
    control.commit("island-0")
    for nonce in ("d", "e"):
        refuse(nonce)
        control.ready("island-0")
    assert control.finished is None
    refuse("f")
    assert control.finished is not None and control.finished.reason == "failed"
    assert "island-0 is given up after 3 refused updates in a row: its update is not finite" in control.finished.detail


def test_drop_takes_the_offer_out_of_an_open_exchange() -> None:
    control = Control()
    control.start()
    control.offer("island-1")
    control.say("island-1", msg.DropRequest(upto=control.consumed["island-1"], why="not finite"))
    assert control.coordinator.exchanges[0].open is None


def test_stale_work_is_dropped_up_to_what_other_fragments_have_counted() -> None:
    """The stale offer ended below another fragment's watermark: it was refused for ever and never dropped."""
    control = Control(members=2, fragments=2, exchange={"staleness_limit": 1, "quorum": 0.3})
    control.start()
    control.commit("island-0", "island-1", fragment=1)
    control.commit("island-0", "island-1", fragment=1)
    control.commit("island-0", fragment=0)
    control.commit("island-0", fragment=0)
    control.offer("island-1", 0, born=0)
    (drop,) = control.records(DropRecord)
    assert isinstance(drop, DropRecord) and drop.upto == control.entry("island-1").watermarks[1]


# ---------------------------------------------------------------- deaths


def test_death_is_replaced_until_the_budget_is_spent() -> None:
    control = Control()
    control.start()
    control.commit()
    for life in range(100):
        control.die("island-1")
        control.join("island-1", nonce=f"life-{life}")
        control.consumed["island-1"] = BATCH
        control.hello("island-1")
    assert len(control.spawned) == 100
    control.die("island-1")
    assert len(control.spawned) == 100
    assert any("given up" in text for text in control.said)


def test_suspect_keeps_its_leases_and_comes_back() -> None:
    control = Control()
    control.start()
    leased = control.entry("island-1").num_leased
    control.tick(5.0, quiet=["island-1"])
    assert control.coordinator.roll.processes[control.id("island-1")].status == "suspect"
    assert control.state.free == () and control.entry("island-1").num_leased == leased
    control.hello("island-1")
    assert control.coordinator.roll.processes[control.id("island-1")].status == "healthy"
    assert len(control.records(JoinRecord)) == 3


def test_fenced_samples_go_back_when_an_exchange_is_discarded() -> None:
    """They were settled at commits and fences only: with nothing left to lease nobody ever committed again."""
    control = Control(members=2, exchange={"progress_timeout_s": 1.0})
    control.start()
    control.offer("island-0")
    control.offer("island-1")
    control.die("island-0")
    assert not control.records(SettleRecord)
    control.tick(10.0)  # nobody finishes: the exchange is discarded
    assert control.records(SettleRecord)


# ---------------------------------------------------------------- the end


def test_last_samples_are_shared_and_the_run_ends() -> None:
    control = Control(members=3, samples=61, steps=4)
    control.start()
    while control.state.samples_accounted() < 61:
        for name in sorted(control.state.current):
            entry = control.entry(name)
            left = entry.num_leased - entry.watermarks[0]
            if left:
                _offer_up_to(control, name, min(left, control.steps * BATCH))
        if control.open().state == "open":
            control.tick(control.plan.exchange.grace_s + 1)
        control.reduce()
        for name in ("island-0", "island-1"):
            if control.coordinator.exchanges[0].open is not None:
                control.have(name)
        for name in sorted(control.state.current):
            control.versions[name] = [control.head()]
            control.hello(name)
    assert control.told("island-1", msg.Tail)[-1] == msg.Tail(active=True)
    leases = [control.entry(name).num_leased for name in sorted(control.state.current)]
    assert sum(leases) == 61 and max(leases) - min(leases) <= 2 * control.steps * BATCH
    assert control.finished is None
    order = control.told("island-0", msg.Evaluate) + control.told("island-1", msg.Evaluate)
    assert order
    for name in ("island-0", "island-1", "island-2"):
        control.say(name, msg.Evaluated(versions=(control.head(),), samples=61, val_loss=1.0))
        control.say(name, msg.Saved(name="final", versions=(control.head(),), local=False))
    assert control.finished is not None and control.finished.reason == "done"
    assert len(control.records(StopRecord)) == 1


def _offer_up_to(control: Control, name: str, samples: int) -> None:
    body = control.make_offer(name, steps=1) if samples >= BATCH else None
    entry, head = control.entry(name), control.state.heads[0].version
    since = entry.watermarks[0]
    values = {field: getattr(body, field) for field in msg.Offer.__slots__} if body is not None else {}
    if body is None:
        values = {
            "fragment": 0, "born": head.n, "weight": 16, "num_bytes": 1,
            "chunk_digests": (name, name), "sumsq": (1.0, 1.0),
        }  # fmt: skip
    ranges = control.state.offered_ranges(control.id(name), since, since + samples)
    values |= {"upto": since + samples, "since": since, "ranges": ranges, "num_steps": max(samples // BATCH, 1)}
    values |= {"base": head, "seq": head.n + 1}
    control.consumed[name] = since + samples
    control.say(name, msg.Offer(**values))


def test_samples_that_some_fragment_has_counted_are_never_issued_again() -> None:
    control = Control(members=2, fragments=2, exchange={"quorum": 0.3})
    control.start()
    control.offer("island-0", 0)
    control.tick(5.0)
    control.reduce()
    control.have("island-0")
    control.have("island-1")
    assert [head.version.n for head in control.state.heads] == [1, 0]
    gone = control.entry("island-0")
    counted = control.state.offered_ranges(gone.id, 0, control.steps * BATCH)
    control.die("island-0")
    assert gone.settled and control.state.partial == counted
    assert not ranges.intersect(control.state.free, counted)
    control.join("island-0")
    control.ready("island-0")
    assert not ranges.intersect(control.entry("island-0").leases, counted)


def test_when_no_living_member_holds_the_model_the_newest_snapshot_is_loaded() -> None:
    control = Control(members=2)
    control.start()
    for name in ("island-0", "island-1"):
        control.die(name)
        control.join(name)
        control.hello(name)
    control.tick(4.0)
    assert control.told("island-0", msg.Restore) and control.told("island-1", msg.Restore)
    assert "state_lost" in [record.fault for record in control.records(FaultRecord)]  # type: ignore[attr-defined]


def test_a_message_of_another_run_is_dropped_and_harms_nothing() -> None:
    control = Control()
    control.start()
    before, rows = control.coordinator.stale_messages, len(control.coordinator.rows)
    foreign = msg.Envelope(
        run_id="another", term=None, name="island-0", incarnation=None, nonce="x",
        bodies=(msg.Join(info=msg.ProcessInfo(address="x", node="n", weight=1, batch_size=1)),),
    )  # fmt: skip
    commands = control.coordinator.handle(ev.Received(envelope=foreign), control.now)
    assert [c.text for c in commands if isinstance(c, ev.Say)] == [
        "message of another run 'another' from 'island-0' dropped"
    ]
    assert not [c for c in commands if isinstance(c, ev.Send)], "nobody is answered"
    assert (control.coordinator.stale_messages, len(control.coordinator.rows)) == (before + 1, rows)
