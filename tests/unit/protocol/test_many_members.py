"""What the controller says and looks at grows with its members, not with their square; small fleets notice nothing."""

from __future__ import annotations

from unittest import mock

from control import Control

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
