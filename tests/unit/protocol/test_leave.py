"""A member that is asked to leave hands over everything, owns no parts meanwhile, and is ended when that is durable."""

from __future__ import annotations

from control import BATCH, Control

from orchestrator import events as ev
from workers import messages as msg
from workers.records import LEFT, FaultRecord, FenceRecord, LeaseRecord, SnapshotRecord

ALL = ("island-0", "island-1", "island-2")
ASKED = ev.LeaveRequested(name="island-1", why="asked to")


def asked(*, offers: bool) -> Control:
    """Three members; the second was asked to leave, and has offered a round or made no step."""
    control = Control()
    control.start()
    control.handle(ASKED)
    if offers:
        control.offer("island-1")
    return control


def commit_without_its_parts(control: Control) -> None:
    control.reduce()
    for name in ("island-0", "island-2"):
        control.have(name)
        control.ready(name)


def fences(control: Control) -> list[str]:
    return [f"{r.member}: {r.why}" for r in control.records(FenceRecord)]  # type: ignore[attr-defined]


def test_who_leaves_owns_no_parts() -> None:
    control = asked(offers=True)
    control.offer("island-0")
    control.offer("island-2")
    assert control.open().state == "reducing"
    assert {owner.name for owner in control.open().owners} == {"island-0", "island-2"}


def test_it_goes_when_its_work_is_committed_and_others_have_it() -> None:
    control = asked(offers=True)
    process = control.nonces["island-1"]
    control.hello("island-1", waiting="leaving")
    assert not fences(control), "its offer is open"
    control.offer("island-0")
    control.offer("island-2")
    control.hello("island-1", waiting="leaving")
    assert not fences(control), "it is in the roster"
    commit_without_its_parts(control)
    assert fences(control) == [f"island-1: {LEFT}"]
    assert control.ended == [process] and not control.spawned
    assert not control.records(FaultRecord), "that is no fault"


def test_its_process_is_ended_only_when_that_is_durable() -> None:
    control = asked(offers=False)
    control.hold = True
    control.hello("island-1", waiting="leaving")
    assert not control.ended
    control.flush()
    assert len(control.ended) == 1


def test_its_unused_samples_go_to_others_and_it_gets_no_more() -> None:
    control = asked(offers=False)
    had = control.entry("island-1").num_leased
    member = control.id("island-1")
    control.commit("island-0", "island-2")
    assert control.state.members[member].num_leased == had
    control.hello("island-1", waiting="leaving")
    control.commit("island-0", "island-2")
    later = [r for r in control.records(LeaseRecord)[3:]]
    assert {r.member for r in later} == {"island-0", "island-2"}  # type: ignore[attr-defined]
    assert control.state.reissued == had > 0
    assert control.state.lost == 0


def test_nobody_goes_with_the_only_copy() -> None:
    control = asked(offers=True)
    control.offer("island-0")
    control.offer("island-2")
    control.reduce()
    control.have("island-0")
    control.have("island-2")  # committed, and applied by nobody yet
    control.hello("island-1", waiting="leaving")
    assert not fences(control)
    control.ready("island-2")
    assert fences(control) == [f"island-1: {LEFT}"]


def test_the_last_one_leaves_a_snapshot_behind() -> None:
    control = Control(members=1, exchange={"copies": 1})
    control.start()
    control.commit("island-0")
    control.handle(ev.LeaveRequested(name="island-0", why="asked to"))
    control.hello("island-0", waiting="leaving")
    assert not fences(control)
    saves = control.told("island-0", msg.Save)
    assert saves[-1] == msg.Save(name="v1", local=False)
    control.say("island-0", msg.Saved(name="v1", versions=(1,), local=False))
    control.handle(ev.Tick())
    assert control.records(SnapshotRecord) and fences(control) == [f"island-0: {LEFT}"]


def test_it_is_asked_again_until_it_has_heard() -> None:
    control = asked(offers=False)
    control.sent.clear()
    control.hello("island-1")
    control.hello("island-1")
    assert control.told("island-1", msg.Leave) == [msg.Leave(), msg.Leave()]
    control.handle(ASKED)
    assert control.said.count("island-1 is asked to leave: asked to") == 1


def test_who_dies_on_its_way_out_is_not_replaced() -> None:
    control = asked(offers=False)
    control.consumed["island-1"] = BATCH
    control.die("island-1")
    assert not control.spawned and control.records(FaultRecord)
    control.handle(ASKED)  # it is not there any more
    assert "island-1" not in control.coordinator.leaving


def test_a_run_does_not_wait_at_its_start_for_who_leaves() -> None:
    control = Control(members=2)
    control.join("island-0")
    control.join("island-1")
    control.say("island-0", msg.GenesisMade(digests=("g0",), num_params=10, num_chunks=(2,)))
    control.handle(ASKED)
    assert not fences(control), "nobody has said yet that it holds version 0"
    control.ready("island-0")
    assert fences(control) == [f"island-1: {LEFT}"]
    assert control.records(LeaseRecord)
