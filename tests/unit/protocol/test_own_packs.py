"""Samples that only one member may have: who is leased them, and what becomes of them when it is gone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from control import BATCH, Control

from orchestrator import leases
from orchestrator.coordinator import Coordinator
from orchestrator.ledger import recompute
from orchestrator.run_state import JournalContradiction, RunState
from workers import messages as msg
from workers.ranges import Range
from workers.records import AbandonRecord, LeaseRecord, ScopeRecord, Term, make_row
from workers.scopes import SHARED, Scopes, scopes_of

SHARED_SAMPLES, OWN_SAMPLES = 60, 24
OWN = (SHARED_SAMPLES, SHARED_SAMPLES + OWN_SAMPLES)


def started(samples: int = SHARED_SAMPLES + OWN_SAMPLES, **settings: object) -> Control:
    control = Control(samples=samples, **settings)  # type: ignore[arg-type]
    control.plan = replace(control.plan, own_samples=(("island-1", OWN_SAMPLES),))
    control.rows = []
    control.restart()
    control.start()
    return control


def leased(control: Control) -> dict[str, list[Range]]:
    out: dict[str, list[Range]] = {}
    for record in control.records(LeaseRecord):
        assert isinstance(record, LeaseRecord)
        out.setdefault(record.member, []).extend(record.ranges)
    return out


def positions(spans: list[Range]) -> set[int]:
    return {position for start, stop in spans for position in range(start, stop)}


def test_positions_have_owners() -> None:
    scopes = scopes_of(100, {"b": 10, "a": 20})
    assert scopes.own == {"a": (70, 90), "b": (90, 100)}
    assert scopes.shared_stop == 70
    assert scopes.owners(0, 70) == {SHARED} and scopes.owners(69, 71) == {SHARED, "a"}
    assert scopes.owners(80, 95) == {"a", "b"} and scopes.owners(90, 91) == {"b"}
    assert scopes.may_have("a", [(0, 5), (70, 71)]) and not scopes.may_have("a", [(89, 91)])
    assert Scopes(own={}).may_have("anybody", [(0, 1000)])
    with pytest.raises(ValueError, match="the run has only 5"):
        scopes_of(5, {"a": 6})


def test_only_its_owner_is_leased_them_and_they_come_first() -> None:
    control = started()
    (scope,) = control.records(ScopeRecord)
    assert scope == ScopeRecord(members=("island-1",), ranges=(OWN,))
    before = [row.record.kind for row in control.rows]
    assert before.index("scope") < before.index("lease")
    given = leased(control)
    assert given["island-1"][0] == OWN, "24 of its own: that is less than it may have"
    assert positions(given["island-1"][1:]) <= set(range(SHARED_SAMPLES))
    assert all(positions(given[name]) <= set(range(SHARED_SAMPLES)) for name in ("island-0", "island-2"))


def test_what_the_dead_did_not_train_on_waits_for_its_next_incarnation() -> None:
    control = started()
    control.die("island-1")
    control.tick(3.0)
    assert control.coordinator.state.free, "it had trained on nothing"
    assert positions(leased(control)["island-0"] + leased(control)["island-2"]) <= set(range(SHARED_SAMPLES))
    told = [text for text in control.said if "wait for it" in text]
    assert told and told[-1].startswith(f"{OWN_SAMPLES} samples of island-1's own pack wait for it (not here)")
    assert leases.waiting(control.state) == {"island-1": OWN_SAMPLES}
    assert recompute(control.rows).waiting == (("island-1", OWN_SAMPLES),)
    control.join("island-1", nonce="again")
    control.ready("island-1")
    assert leased(control)["island-1"][-1] != OWN or leased(control)["island-1"].count(OWN) == 2
    assert positions(leased(control)["island-1"]) >= set(range(*OWN))
    assert leases.waiting(control.state) == {}
    assert recompute(control.rows).ok


def train_out(control: Control, *names: str) -> None:
    """Those named commit all that they are leased, round by round."""
    for _ in range(40):
        busy = [name for name in names if control.entry(name).num_leased > min(control.entry(name).watermarks)]
        if not busy:
            return
        for name in busy:
            entry = control.entry(name)
            left = entry.num_leased - entry.watermarks[0]
            control.offer(name, steps=min(control.steps, -(-left // BATCH)))
        if control.open().state == "open":
            control.tick(control.plan.exchange.grace_s + 1)
        control.reduce()
        for name in names:
            if control.coordinator.exchanges[0].open is not None:
                control.have(name)
        for name in names:
            control.versions[name][0] = control.head()
            control.hello(name, waiting="leases")
    raise AssertionError("there is no end of it")


def test_a_run_is_not_over_without_them_and_ends_with_them() -> None:
    control = started()
    control.die("island-1")
    control.tick(1.0)
    train_out(control, "island-0", "island-2")
    assert control.state.samples_committed() == SHARED_SAMPLES
    assert not control.coordinator.done()
    assert msg.Tail(active=True) in control.told("island-0", msg.Tail)
    control.tick(70.0)
    said = [text for text in control.said if "wait for it" in text]
    assert len(said) >= 2, "once a minute"
    control.join("island-1", nonce="again")
    control.ready("island-1")
    assert msg.Tail(active=True) in control.told("island-1", msg.Tail), "it has all of its own"
    train_out(control, "island-0", "island-1", "island-2")
    assert control.coordinator.done()
    assert recompute(control.rows).ok


def alone(**settings: object) -> Control:
    """Nothing is left but island-1's own samples, and island-1 is away."""
    control = started(**settings)  # type: ignore[arg-type]
    control.die("island-1")
    control.tick(1.0)
    train_out(control, "island-0", "island-2")
    control.tick(0.1)
    return control


def test_the_end_waits_for_an_owner_and_then_drops_what_only_it_may_have() -> None:
    control = alone()
    control.tick(control.plan.own_wait_s - 1.0)
    assert control.records(AbandonRecord) == [] and not control.coordinator.done()
    control.tick(2.0)
    (left,) = control.records(AbandonRecord)
    assert left == AbandonRecord(member="island-1", ranges=(OWN,), why="not here, and nothing else was left to do")
    assert any(f"{OWN_SAMPLES} samples of island-1's own pack are dropped" in text for text in control.said)
    assert control.coordinator.done() and leases.waiting(control.state) == {}
    assert positions(leased(control)["island-0"] + leased(control)["island-2"]) == set(range(SHARED_SAMPLES))
    found = recompute(control.rows)
    assert found.ok and found.waiting == ()
    assert (found.samples()["dropped"], found.samples()["full"]) == (OWN_SAMPLES, SHARED_SAMPLES)
    assert [(d.kind, d.member) for d in found.deviations][-1] == ("dropped", "island-1")
    control.restart()
    control.tick(1.0)
    assert control.coordinator.done() and len(control.records(AbandonRecord)) == 1


def test_an_owner_that_comes_back_meanwhile_gets_them() -> None:
    control = alone()
    control.tick(control.plan.own_wait_s - 1.0)
    control.join("island-1", nonce="again")
    control.ready("island-1")
    control.tick(2.0)
    assert control.records(AbandonRecord) == []
    train_out(control, "island-0", "island-1", "island-2")
    assert control.coordinator.done() and recompute(control.rows).samples()["dropped"] == 0


def test_nobody_waits_for_an_owner_that_was_given_up_or_that_never_came() -> None:
    control = alone()
    control.coordinator.given_up["island-1"] = "it crashed again and again"
    control.tick(0.5)
    assert [record.why for record in control.records(AbandonRecord)] == ["given up, and nothing else was left to do"]
    control = Control(samples=SHARED_SAMPLES + OWN_SAMPLES, members=2)
    control.plan = replace(control.plan, own_samples=(("island-9", OWN_SAMPLES),), own_wait_s=0.0)
    control.rows = []
    control.restart()
    control.start()
    train_out(control, "island-0", "island-1")
    control.tick(0.5)
    assert control.coordinator.done() and recompute(control.rows).ok
    assert [record.member for record in control.records(AbandonRecord)] == ["island-9"]


@pytest.mark.parametrize(
    "ranges",
    [((OWN[0], OWN[1] - 1),), ((OWN[0] + 1, OWN[1]),), ((0, 2), OWN)],
    ids=["less", "gap", "shared"],
)
def test_only_all_that_is_left_of_an_owner_that_is_away_can_be_given_up(ranges: tuple[Range, ...]) -> None:
    control = Control(samples=SHARED_SAMPLES + OWN_SAMPLES, members=2)
    control.plan = replace(control.plan, own_samples=(("island-9", OWN_SAMPLES),))
    control.rows = []
    control.restart()
    control.start()
    rows, state = list(control.rows), RunState()
    for row in rows:
        state.apply(row.record)
    wrong = AbandonRecord(member="island-9", ranges=ranges, why="test")
    with pytest.raises(JournalContradiction):
        state.apply(wrong)
    assert not recompute([*rows, make_row(len(rows), rows[-1].hash, wrong)]).ok
    lives = AbandonRecord(member="island-0", ranges=(OWN,), why="test")
    with pytest.raises(JournalContradiction, match="lives, or has nothing alone"):
        state.apply(lives)
    assert not recompute([*rows, make_row(len(rows), rows[-1].hash, lives)]).ok


def test_a_restarted_controller_knows_whose_they_are() -> None:
    control = started()
    control.restart()
    assert control.coordinator.state.scopes.own == {"island-1": OWN}
    assert control.coordinator.started
    again = Coordinator(control.plan, control.rows, Term(lineage=0, number=9, controller="c"), now=0.0)
    assert len([row for row in again.rows if isinstance(row.record, ScopeRecord)]) == 1


def test_a_journal_that_hands_them_to_others_is_refused_by_both_ledgers() -> None:
    control = started()
    rows = list(control.rows)
    entry = control.entry("island-0")
    stolen = LeaseRecord(member="island-0", incarnation=1, index=entry.num_leased, ranges=((OWN[0], OWN[0] + 2),))
    rows.append(make_row(len(rows), rows[-1].hash, stolen))
    state = RunState()
    with pytest.raises(JournalContradiction, match="another's own"):
        for row in rows:
            state.apply(row.record)
    found = recompute(rows)
    assert [(finding.seq, finding.rule) for finding in found.findings][:1] == [(len(rows) - 1, "lease")]
    assert "island-1's alone" in found.findings[0].text
    late = ScopeRecord(members=("island-2",), ranges=((0, 2),))
    assert not recompute([*control.rows, make_row(len(control.rows), control.rows[-1].hash, late)]).ok


@pytest.mark.parametrize("own", [(), (("island-1", OWN_SAMPLES - 1),), (("island-2", OWN_SAMPLES),)])
def test_owners_do_not_change_when_a_run_is_resumed(own: tuple[tuple[str, int], ...]) -> None:
    control = started()
    control.plan = replace(control.plan, own_samples=own)
    control.restart()
    control.tick(1.0)
    assert control.finished is not None and control.finished.reason == "failed"
    assert "data.per_island was changed: island-1 had samples alone when the run began" in control.finished.detail
