"""What the controller makes of what it hears, and when: silence, clocks, work that nobody will ever see."""

from __future__ import annotations

import pytest
from control import BATCH, Control

from orchestrator.membership import MemberClock, Process, Roll
from orchestrator.run_state import Membership
from workers import messages as msg
from workers.records import FaultRecord, MemberId, SettleRecord

A = MemberId(name="a", incarnation=1)
INFO = msg.ProcessInfo(address="at-a", node="n", weight=16, batch_size=BATCH)


def process(*, heard_s: float = 0.0) -> Process:
    entry = Membership(id=A, nonce="p", node="n", watermarks=[0])
    return Process(id=A, entry=entry, nonce="p", info=INFO, joined_s=0.0, heard_s=heard_s)


def hello(consumed: int, *, waiting: str = "") -> msg.Hello:
    return msg.Hello(
        info=INFO, journal_len=0, num_leased=1000, consumed=consumed, steps=consumed // BATCH, bytes_sent=0,
        fragments=(), waiting=waiting,
    )  # fmt: skip


# ---------------------------------------------------------------- silence


def test_silence_makes_suspect_and_then_ends_it() -> None:
    roll = Roll(suspect_s=3.0, limbo_s=10.0, processes={A: process()})
    verdicts = {t: [v.verdict for v in roll.judge(float(t))] for t in range(12)}
    assert {t: v for t, v in verdicts.items() if v} == {4: ["suspect"], 11: ["fence"]}


def test_while_the_controller_itself_stood_still_nobody_was_silent() -> None:
    roll = Roll(suspect_s=3.0, limbo_s=10.0, processes={A: process()})
    for second in range(3):
        assert roll.judge(float(second)) == []
    assert roll.judge(60.0) == [], "58 s without a look: its messages may be waiting"
    assert roll.judge(60.5) == []
    verdicts = {t: [v.verdict for v in roll.judge(float(t))] for t in range(61, 70)}
    assert {t: v for t, v in verdicts.items() if v} == {62: ["suspect"], 69: ["fence"]}, "now it listens"


# ---------------------------------------------------------------- clocks


def test_the_quickest_message_tells_what_a_clock_shows() -> None:
    clock = MemberClock()
    delays = [0.050, 0.002, 0.300, 0.010]
    found = [clock.offset(100.0 + i, 5000.0 + i + delay) for i, delay in enumerate(delays)]
    assert found == pytest.approx([4900.05, 4900.002, 4900.002, 4900.002], abs=1e-3)


def test_a_clock_that_drifts_is_followed() -> None:
    clock = MemberClock()
    slow = 1 - 5e-5
    for second in range(0, 100_000, 10):
        offset = clock.offset(second * slow, second + 0.001)
    assert offset == pytest.approx(99_990 * 5e-5, abs=0.01)


def test_spans_do_not_overlap() -> None:
    clock = MemberClock()
    assert clock.span(1.0, 2.0) == (1.0, 2.0)
    assert clock.span(1.9, 3.0) == (2.0, 3.0)
    assert clock.span(2.5, 2.9) == (3.0, 3.0)


def test_rows_are_told_in_the_run_s_time_without_jitter() -> None:
    control = Control()
    control.start()
    spans = []
    handle = control.coordinator.handle

    def watching(event: object, now: float) -> list[object]:
        out = handle(event, now)  # type: ignore[arg-type]
        spans.extend(c.row for c in out if getattr(c, "row", {}).get("kind") == "span")  # type: ignore[union-attr]
        return out  # type: ignore[return-value]

    control.coordinator.handle = watching  # type: ignore[assignment, method-assign]
    for start, delay in ((10.0, 0.5), (11.0, 0.0), (12.0, 0.9)):
        control.now = start + 1.0 + delay
        row: dict[str, object] = {"kind": "span", "phase": "compute", "seconds": 1.0}
        control.say("island-0", msg.Observed(sent_s=start + 1001.0, rows=((start + 1001.0, row),)))
    assert [(span["start_s"], span["end_s"]) for span in spans] == [
        (10.5, 11.5),
        (11.5, 12.0),
        (pytest.approx(12.0, abs=1e-3), pytest.approx(13.0, abs=1e-3)),
    ]


# ---------------------------------------------------------------- lost work


def test_what_a_dead_process_made_since_its_last_heartbeat_is_estimated_from_its_speed() -> None:
    mine = process()
    assert mine.said(hello(4), 10.0)
    mine.heard_s = 12.0
    assert not mine.said(hello(40), 12.0)
    assert mine.trained_by(12.0, 0.5) == 40
    assert mine.trained_by(12.25, 0.5) == 40 + 4, "20 samples a second, in whole steps of 2"
    assert mine.trained_by(90.0, 0.5) == 40 + 10, "it would have been heard after half a second"
    mine.said(hello(40, waiting="exchange"), 12.0)
    assert mine.trained_by(12.25, 0.5) == 40, "it waited"


def test_an_island_that_hangs_is_a_fault_with_lost_work_and_dead_time() -> None:
    control = Control(exchange={"limbo_s": 8.0})
    control.start()
    control.consumed["island-1"] = 3 * BATCH
    control.hello("island-1")
    hung = control.id("island-1")
    control.tick(12.0, quiet=["island-1"])
    (track,) = control.coordinator.faults
    assert (track.fault, track.member, track.victim, track.estimated) == ("lost", "island-1", hung, True)
    assert track.injected_s is not None and 8.0 <= track.detected_s - track.injected_s < 10.0
    assert "lost" in [r.fault for r in control.records(FaultRecord)]  # type: ignore[attr-defined]
    assert [r.lost for r in control.records(SettleRecord)] == [3 * BATCH]  # type: ignore[attr-defined]
    assert control.spawned == ["island-1"] and "island-1" in control.coordinator.missing_since
    control.join("island-1")
    assert "island-1" not in control.coordinator.missing_since


def test_dropped_work_is_lost_work() -> None:
    control = Control()
    control.start()
    control.consumed["island-2"] = 3 * BATCH
    control.hello("island-2")
    control.say("island-2", msg.DropRequest(upto=3 * BATCH, why="its gradients were not finite"))
    assert control.state.lost == 3 * BATCH
    assert control.state.samples_accounted() == 0, "they are issued again"
