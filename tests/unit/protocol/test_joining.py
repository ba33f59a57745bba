"""Traces of a controller: who joins, joins again, was fenced, or comes back after it was given up."""

from __future__ import annotations

from control import Control

from orchestrator import events as ev
from workers import messages as msg
from workers.records import (
    JoinRecord,
)


def test_repeated_join_is_welcomed_again_and_journalled_once() -> None:
    control = Control()
    control.join("island-0", nonce="n")
    control.join("island-0", nonce="n")
    assert len(control.records(JoinRecord)) == 1
    assert len(control.told("island-0", msg.Welcome)) == 2


def test_nonce_that_was_fenced_must_be_renewed() -> None:
    control = Control()
    control.join("island-0", nonce="n")
    control.die("island-0")
    control.sent.clear()
    control.handle(
        ev.Received(envelope=control.envelope("island-0", msg.Join(info=control.info("island-0")), nonce="n"))
    )
    assert any(isinstance(body, msg.Rejoin) for batch in control.sent for body in batch.bodies)
    assert len(control.records(JoinRecord)) == 1


def test_fenced_member_is_told_so_and_its_offer_does_not_count() -> None:
    control = Control()
    control.start()
    offer = control.make_offer("island-0")
    control.die("island-0")
    control.sent.clear()
    control.say("island-0", offer)
    assert control.coordinator.exchanges[0].open is None
    assert any(isinstance(body, msg.Fenced) for batch in control.sent for body in batch.bodies)


def test_outlived_process_is_sent_away_once_its_successor_is_well() -> None:
    """Two processes of one name took the place from each other for ever."""
    control = Control()
    control.start()
    old = control.nonces["island-0"]
    control.join("island-0", nonce="fresh")
    assert control.state.current["island-0"].incarnation == 2
    control.join("island-0", nonce=f"{old}+1", ready=False)
    assert control.state.current["island-0"].incarnation == 2, "neither holds a state: the newer one stays"
    control.now += 1.0
    control.ready("island-0")
    control.join("island-0", nonce=f"{old}+2", ready=True)
    assert control.state.current["island-0"].incarnation == 2
    assert control.ended == [f"{old}+2"]


def test_outlived_process_is_not_sent_away_on_the_word_of_the_dead() -> None:
    """The successor had died a moment before; the old process held the last state, and was ended."""
    control = Control()
    control.start()
    old = control.nonces["island-0"]
    control.join("island-0", nonce="fresh")
    control.ready("island-0")
    control.now += 1.0
    control.join("island-0", nonce=f"{old}+1", ready=True)
    assert not control.ended, "the successor was heard before, but not since"
    control.now += 1.0
    control.join("island-0", nonce=f"{old}+1", ready=True)
    assert not control.ended


def test_outlived_process_with_the_state_takes_the_place_of_a_fresh_one() -> None:
    """It may hold the only copy: an end would lose the model."""
    control = Control()
    control.start()
    old = control.nonces["island-0"]
    control.join("island-0", nonce="fresh")
    control.join("island-0", nonce=f"{old}+1", ready=True)
    assert control.state.current["island-0"].incarnation == 3
    assert not control.ended


def test_replacing_a_process_does_not_commit_with_a_copy_too_few() -> None:
    """Between the fence of the old and the join of the new incarnation only one member was alive."""
    control = Control(members=2)
    control.start()
    control.offer("island-0")
    control.offer("island-1")
    control.reduce()
    control.have("island-0")
    control.join("island-1", nonce="fresh")
    assert control.head() == 0
