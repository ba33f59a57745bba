"""What is blamed on an injected fault, and what is not."""

from __future__ import annotations

import pytest

from orchestrator import events as ev
from tests.unit.protocol.control import Control
from workers.records import FaultRecord


@pytest.fixture
def control() -> Control:
    made = Control()
    made.start()
    return made


def inject(control: Control, fault: str, member: str = "island-1") -> None:
    control.handle(ev.FaultInjected(fault=fault, member=member, detail=f"{fault}:{member}"))


@pytest.mark.parametrize("fault", ["kill", "oom", "nan"])
def test_a_death_is_that_of_the_fault_that_was_injected(control: Control, fault: str) -> None:
    began_s = control.coordinator.seconds()
    inject(control, fault)
    control.now += 0.2
    control.die("island-1")
    (track,) = control.coordinator.faults
    assert (track.fault, track.injected_s, track.estimated) == (fault, began_s, False)
    noticed = [r for r in control.records(FaultRecord) if isinstance(r, FaultRecord)]
    assert next((r.injected, r.detail) for r in noticed) == (True, f"{fault}:island-1")


def test_a_death_long_after_a_hang_that_passed_is_its_own(control: Control) -> None:
    inject(control, "hang")
    control.tick(10.0)
    control.die("island-1")
    (track,) = control.coordinator.faults
    assert (track.fault, track.estimated) == ("kill", True)


def test_a_death_of_somebody_else_is_not_blamed_on_it(control: Control) -> None:
    inject(control, "kill", "island-2")
    control.die("island-1")
    (track,) = control.coordinator.faults
    assert (track.member, track.estimated) == ("island-1", True)


def test_a_silent_member_that_is_given_up_was_ended_by_its_cut(control: Control) -> None:
    inject(control, "cut")
    control.tick(60.0, quiet=["island-1"])
    tracks = [track for track in control.coordinator.faults if track.member == "island-1"]
    assert tracks[0].fault == "cut" and not tracks[0].estimated


def test_a_full_journal_is_told_once_and_again_when_it_is_full_again(control: Control) -> None:
    def times_told() -> int:
        rows = [*control.rows, *control.unflushed]
        return sum(isinstance(row.record, FaultRecord) and row.record.fault == "journal_full" for row in rows)

    control.hold = True
    for _ in range(3):
        control.handle(ev.JournalFullNow())
    assert times_told() == 1
    control.hold = False
    control.flush()
    control.handle(ev.JournalFullNow())
    assert times_told() == 2


def test_what_the_shell_noticed_is_journalled(control: Control) -> None:
    control.handle(ev.FaultNoticed(fault="controller_restarted", member="controller", detail="after 1 s"))
    (record,) = control.records(FaultRecord)
    assert isinstance(record, FaultRecord)
    assert (record.fault, record.injected, record.detail) == ("controller_restarted", False, "after 1 s")
