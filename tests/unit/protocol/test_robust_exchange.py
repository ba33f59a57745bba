"""Traces of exchanges with members that send wrong updates, or reduce wrongly for others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from control import Control

from orchestrator import events as ev
from orchestrator.checking import Outcome, deal_checkers, outcome
from workers import messages as msg
from workers.records import FaultRecord, FenceRecord, MemberId, RefusalRecord, StandingRecord

A, B, C = (MemberId(name=name, incarnation=1) for name in "abc")


def offer_long(control: Control, name: str, times: float) -> None:
    body = control.make_offer(name)
    control.say(name, replace(body, sumsq=tuple(times**2 * s for s in body.sumsq)))


def offer_all(control: Control, **times: float) -> None:
    for name in sorted(control.state.current):
        offer_long(control, name, times.get(name.replace("-", "_"), 1.0))
    if control.open().state == "open":
        control.tick(control.plan.exchange.grace_s + 1)


def finish(control: Control) -> None:
    """Everybody reduces and holds the result."""
    before = control.head()
    for name in sorted(control.state.current):
        if control.head() == before:
            control.have(name)
    for name in sorted(control.state.current):
        control.ready(name)


def answers(control: Control, name: str, word: str = "r") -> msg.Reduced:
    open_ = control.open()
    chunks = [c for c in range(control.chunks) if control.id(name) in open_.workers(c)]
    return msg.Reduced(
        fragment=0, exchange=open_.id, attempt=open_.attempt, roster_digest=open_.roster_digest,
        chunks=tuple((c, f"{word}{c}") for c in chunks),
    )  # fmt: skip


def round_with(control: Control, **times: float) -> None:
    offer_all(control, **times)
    control.reduce()
    finish(control)


def test_who_is_far_too_long_is_refused_named_and_starts_again() -> None:
    control = Control(members=4, robust={"rule": "clip"})
    control.start()
    offer_all(control, island_2=10.0)
    assert {e.member for e in control.open().roster} == {"island-0", "island-1", "island-3"}
    assert sum(e.coefficient for e in control.open().roster) == pytest.approx(1.0), "the others are the whole"
    (refusal,) = control.records(RefusalRecord)
    assert isinstance(refusal, RefusalRecord) and refusal.member == "island-2"
    assert refusal.why.endswith("its length 14.1 is 10.0 times the median of 4")
    assert [r.refused for r in control.records(FenceRecord) if isinstance(r, FenceRecord)] == [True]
    control.reduce()
    finish(control)
    assert control.head() == 1


def test_without_a_rule_nobody_is_refused_for_its_length() -> None:
    control = Control(members=4)
    control.start()
    offer_all(control, island_2=100.0)
    assert len(control.open().roster) == 4 and not control.records(RefusalRecord)


def test_lengths_are_clipped_to_the_median_and_the_sum_of_fp32_weights_is_kept() -> None:
    control = Control(members=3, robust={"rule": "clip"})
    control.start()
    offer_all(control, island_2=2.0)
    weights = [entry.coefficient for entry in control.open().roster]
    assert weights == pytest.approx([0.4, 0.4, 0.2], rel=1e-5), "half of it, and what that leaves goes to all"
    assert all(weight == float(np.float32(weight)) for weight in weights)


def test_three_refusals_in_ten_exchanges_ban_for_twenty_then_probation() -> None:
    control = Control(members=4, samples=4000, robust={"rule": "clip"})
    control.start()
    for _ in range(3):
        round_with(control, island_2=10.0)
        if "island-2" not in control.state.current:
            control.join("island-2")
            control.ready("island-2")
    assert control.state.bans.standing("island-2") == "banned"
    assert control.entry("island-2").num_leased == 0, "who is banned is given no samples"
    assert control.finished is None and "island-2" not in control.coordinator.given_up
    while control.head() < 23:
        for name in ("island-0", "island-1", "island-3"):
            control.offer(name)
        assert control.id("island-2") not in control.open().owners, "nor does it reduce for others"
        control.reduce()
        control.have("island-2", digest="a lie")
        assert control.coordinator.exchanges[0].disagreements == 0 and not control.open().haves
        finish(control)
    assert control.state.bans.standing("island-2") == "probation"
    control.tick()
    round_with(control)
    weights = {e.member: e.coefficient for e in control.state.history[0][-1].roster}
    assert weights["island-2"] == pytest.approx(0.1 * weights["island-0"])
    control.restart()
    assert control.state.bans.standing("island-2") == "probation", "standing is in the journal"


def test_a_ban_ends_by_hand() -> None:
    control = Control(members=4, samples=4000, robust={"rule": "clip"})
    control.start()
    for _ in range(3):
        round_with(control, island_2=10.0)
        control.join("island-2")
        control.ready("island-2")
    control.handle(ev.UnbanRequested(member="island-1"))
    assert [r.standing for r in control.records(StandingRecord) if isinstance(r, StandingRecord)] == ["banned"]
    control.handle(ev.UnbanRequested(member="island-2"))
    assert control.state.bans.standing("island-2") == "probation"
    assert control.entry("island-2").num_leased > 0


def test_one_refusal_in_ten_bans_nobody() -> None:
    control = Control(members=4, samples=4000, robust={"rule": "clip"})
    control.start()
    for turn in range(12):
        round_with(control, **({"island_2": 10.0} if turn in (0, 9) else {}))
        if "island-2" not in control.state.current:
            control.join("island-2")
            control.ready("island-2")
    assert not control.records(StandingRecord)


def test_distances_are_measured_before_krum_chooses() -> None:
    control = Control(members=5, chunks=2, robust={"rule": "krum", "num_wrong": 1})
    control.start()
    offer_all(control)
    open_ = control.open()
    assert open_.state == "measuring" and open_.recipe is not None and open_.recipe.finish == "measure"
    first = open_.roster_digest
    pairs = [(i, j) for i in range(5) for j in range(i)]
    distances = tuple(9.0 if 4 in pair else 1.0 for pair in pairs)  # island-4 is far from all others
    for chunk, owner in enumerate(open_.owners):
        body = msg.Measured(
            fragment=0, exchange=open_.id, attempt=open_.attempt, roster_digest=first, chunks=((chunk, distances),)
        )
        control.say(owner.name, body)
        control.say(owner.name, body)
    assert open_.state == "reducing" and open_.roster_digest != first
    assert [e.coefficient for e in open_.roster] == pytest.approx([0.25] * 4 + [0.0])
    control.reduce()
    finish(control)
    assert control.head() == 1
    assert control.state.samples_committed() == 5 * control.steps * 2, "who is not chosen has been heard"


def test_two_equal_answers_count() -> None:
    control = Control(members=4, chunks=4, robust={"verify": True})
    control.start()
    offer_all(control)
    open_ = control.open()
    assert all(len(set(open_.workers(c))) == 2 for c in range(4))
    for name in ("island-0", "island-1", "island-2"):
        control.say(name, answers(control, name))
    assert open_.state == "reducing", "some parts have one answer"
    control.say("island-3", answers(control, "island-3"))
    assert open_.state == "spread"
    finish(control)
    assert control.head() == 1 and not control.records(RefusalRecord)


@pytest.mark.parametrize("liar", ["island-0", "island-1", "island-2", "island-3"])
def test_a_lying_owner_is_found_by_a_third_and_nobody_else_is_blamed(liar: str) -> None:
    control = Control(members=4, chunks=4, robust={"verify": True})
    control.start()
    offer_all(control)
    open_ = control.open()
    for _ in range(4):  # whoever is asked answers, as often as there is a new attempt
        for name in sorted(control.state.current):
            if open_.state == "reducing":
                control.say(name, answers(control, name, "lie" if name == liar else "r"))
    assert open_.state == "spread"
    assert open_.reduced == {c: f"r{c}" for c in range(4)}
    assert {r.member for r in control.records(RefusalRecord) if isinstance(r, RefusalRecord) and r.as_owner} == {liar}
    assert {r.member for r in control.records(FaultRecord) if isinstance(r, FaultRecord)} == {liar}
    assert control.id(liar) not in open_.owners
    finish(control)
    assert control.head() == 1 and liar in control.state.current


def test_two_liars_that_agree_on_one_part_are_found_by_their_others() -> None:
    control = Control(members=5, chunks=5, robust={"verify": True})
    control.start()
    offer_all(control)
    open_ = control.open()
    pair = next(tuple(sorted(w.name for w in open_.workers(c))) for c in range(5))
    for _ in range(6):
        for name in sorted(control.state.current, key=lambda name: (name not in pair, name)):
            if open_.state == "reducing":
                control.say(name, answers(control, name, "lie" if name in pair else "r"))
    assert open_.state == "spread" and open_.reduced == {c: f"r{c}" for c in range(5)}
    assert {r.member for r in control.records(RefusalRecord) if isinstance(r, RefusalRecord)} == set(pair)


def test_an_exchange_stays_open_while_nobody_can_check() -> None:
    control = Control(members=3, exchange={"quorum": 0.3, "grace_s": 0.0}, robust={"verify": True})
    control.start()
    control.tick(5.0, quiet=["island-1", "island-2"])
    control.offer("island-0")
    assert control.open().state == "open", "the other two are suspect: nobody could check a part"
    control.tick(1.0)
    assert control.open().state == "reducing"


def test_a_checker_that_dies_is_replaced() -> None:
    control = Control(members=4, chunks=4, robust={"verify": True})
    control.start()
    offer_all(control)
    for name in ("island-0", "island-1", "island-2"):
        control.say(name, answers(control, name))
    control.handle(ev.ProcessDied(name="island-3", nonce=None, why="killed"))
    for name in ("island-0", "island-1", "island-2"):
        control.say(name, answers(control, name))
    assert control.open().state == "spread"


def test_three_different_answers_blame_nobody() -> None:
    control = Control(members=4, chunks=4, robust={"verify": True})
    control.start()
    offer_all(control)
    for _ in range(3):
        for name in sorted(control.state.current):
            if control.coordinator.exchanges[0].open is not None:
                control.say(name, answers(control, name, name))
    assert control.coordinator.exchanges[0].open is None and not control.records(RefusalRecord)


def test_what_answers_say() -> None:
    assert outcome({A: 1}, [A], verify=False) == Outcome(answer=1)
    assert outcome({B: 1}, [A], verify=False) == Outcome()
    assert outcome({A: 1}, [A, B], verify=True) == Outcome()
    assert outcome({A: 1, B: 1}, [A, B], verify=True) == Outcome(answer=1)
    assert outcome({A: 1, B: 2}, [A, B], verify=True) == Outcome(ask_another=True)
    assert outcome({A: 1, B: 2, C: 2}, [A, B, C], verify=True) == Outcome(answer=2, liars=(A,))
    assert outcome({A: 1, B: 2, C: 3}, [A, B, C], verify=True) == Outcome(hopeless=True)
    assert all(
        owner not in checkers for owner, checkers in zip((A, B, C), deal_checkers((A, B, C), (A, B, C)), strict=True)
    )
