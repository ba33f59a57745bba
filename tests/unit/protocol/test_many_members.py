"""What the controller says and looks at grows with its members, not with their square; small fleets notice nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from unittest import mock

from control import Control

from orchestrator import events as ev
from workers import messages as msg

MANY = 40


def announcements(control: Control, name: str) -> list[msg.ControllerBody]:
    return control.told(name, msg.Announce)


def test_of_many_offers_only_those_hear_who_may_reduce_them() -> None:
    control = Control(members=MANY)
    control.start()
    names = [f"island-{i}" for i in range(MANY)]
    control.sent.clear()
    for name in names[: MANY // 2]:
        control.offer(name)
    control.tick()
    heard = {name: len(announcements(control, name)) for name in names}
    owners = {str(owner) for owner in control.open().likely}
    assert owners and len(owners) < MANY // 2
    assert all(heard[name] >= MANY // 2 for name in names if str(control.id(name)) in owners), "they pull ahead"
    assert {heard[name] for name in names if str(control.id(name)) not in owners} == {2}, "there is an exchange"


def test_who_comes_while_an_exchange_is_open_hears_of_it() -> None:
    """It offers before its time, and so is in the exchange that closes next."""
    control = Control(members=4)
    control.start()
    for name in ("island-0", "island-1"):
        control.offer(name)
    control.die("island-3")
    control.join("island-3", nonce="again")
    control.sent.clear()
    control.ready("island-3")
    assert len(announcements(control, "island-3")) == 1


def test_many_that_come_at_once_are_told_of_each_other_in_one_go() -> None:
    control = Control(members=MANY)
    for i in range(MANY):
        control.join(f"island-{i}")
    control.flush()
    told = len(control.told("island-0", msg.Peers))
    assert told < MANY
    control.tick(1.0)
    newest = control.told("island-0", msg.Peers)[-1]
    assert isinstance(newest, msg.Peers) and len(newest.peers) == MANY


def test_a_large_fleet_is_looked_at_less_often() -> None:
    def looks(per_member_s: float) -> int:
        control = Control(members=3)
        control.start()
        seen = set()
        with mock.patch("orchestrator.coordinator.LOOK_S_PER_MEMBER", per_member_s):
            for _ in range(20):
                control.tick(0.1)
                seen.add(control.coordinator.looked_s)
        return len(seen)

    assert looks(1e-4) == 20, "three members: with each tick"
    suspect_s = Control(members=3).coordinator.roll.suspect_s
    assert 2.0 / 0.4 <= looks(0.1) + 1 <= 8, "every 0.3 s"
    assert looks(100.0) >= 2.0 // (suspect_s / 4), "but often enough to hear of silence in time"


def calls_of(action: Callable[[], object]) -> int:
    """How many functions are called meanwhile, compiled ones included."""
    num = 0

    def count(frame: FrameType, event: str, of: object) -> None:
        nonlocal num
        num += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(None)
    return num


def handled(control: Control, body: msg.MemberBody) -> int:
    event = ev.Received(envelope=control.envelope("island-1", body))
    return calls_of(lambda: control.coordinator.handle(event, control.now))


def test_a_message_costs_the_same_among_few_and_among_many() -> None:
    found: dict[int, dict[str, int]] = {}
    for members in (10, 10 * MANY):
        control = Control(members=members, samples=100 * members)
        control.start()
        control.tick(1.0)
        hello = control.coordinator.roll.processes[control.id("island-1")].hello
        assert hello is not None
        heartbeat = handled(control, hello)
        for i in range(3):
            control.offer(f"island-{i + 2}")
        offer = handled(control, control.make_offer("island-1"))
        control.now += 0.5
        quiet = calls_of(lambda control=control: control.coordinator.roll.judge(control.now))
        found[members] = {"heartbeat": heartbeat, "offer": offer, "judging": quiet}
    few, many = found[10], found[10 * MANY]
    assert many["heartbeat"] <= few["heartbeat"] <= 60, found
    assert many["offer"] <= few["offer"] + 10, found
    assert many["judging"] <= few["judging"] + 10, "nobody's judgement can have changed"


def test_what_a_status_depends_on_is_never_forgotten() -> None:
    """A look costs what has changed: after each kind of change the status that is told is the right one."""
    control = Control(members=4, exchange={"suspect_s": 3.0, "limbo_s": 12.0, "heartbeat_s": 1.0})
    brain = control.coordinator

    def agree() -> None:
        control.now += 0.1
        control.handle(ev.Tick())
        assert brain.told_status == {m: p.status for m, p in brain.roll.processes.items()}

    control.join("island-0")
    agree()
    control.start()
    agree()
    for _ in range(5):
        control.tick(1.0, quiet=["island-1"])
        agree()
    assert brain.told_status[control.id("island-1")] == "suspect"
    control.hello("island-1")
    agree()
    assert brain.told_status[control.id("island-1")] == "healthy"
    control.handle(ev.LeaveRequested(name="island-2", why="asked"))
    agree()
    assert brain.told_status[control.id("island-2")] == "draining"
    gone = control.id("island-3")
    control.tick(14.0, quiet=["island-3"])
    agree()
    assert gone not in brain.told_status
