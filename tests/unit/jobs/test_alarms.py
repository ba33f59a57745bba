"""What somebody is woken for, and the command that tells him."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import threading
import time
from pathlib import Path

import pytest

from faults.recovery import GIVEN_UP, KINDS
from orchestrator.alarms import Alarm, Alarms, NotifyConfig
from orchestrator.local import LocalRun
from orchestrator.notify import MAX_WAITING, Notifier, notifying
from orchestrator.settings import ExchangeConfig
from tests.small_run import make_pack, small_config
from workers.records import FaultRecord, FenceRecord, StopRecord
from workers.replica import Replica


def kinds(alarms: list[Alarm]) -> list[str]:
    return [alarm.kind for alarm in alarms]


def step(loss: float) -> dict[str, object]:
    return {"kind": "step", "member": "island-0", "loss": loss}


def fault(name: str, *, injected: bool = False) -> FaultRecord:
    return FaultRecord(fault=name, member="island-1", injected=injected, t_s=1.0, detail="why")


def test_a_death_is_told_and_the_announcement_of_one_is_not() -> None:
    alarms = Alarms(NotifyConfig(), num_islands=2)
    assert kinds(alarms.on_record(fault("kill", injected=True), 1.0)) == []
    [alarm] = alarms.on_record(fault("died"), 2.0)
    assert (alarm.kind, alarm.member, alarm.detail, alarm.t_s) == ("member_dead", "island-1", "died: why", 2.0)
    assert kinds(alarms.on_record(fault("suspect"), 2.0)) == []
    assert kinds(alarms.on_record(FenceRecord(member="island-1", incarnation=1, why="it left"), 3.0)) == []


@pytest.mark.parametrize("name", [*KINDS, GIVEN_UP])
def test_every_end_of_a_member_is_told(name: str) -> None:
    [alarm] = Alarms(NotifyConfig(), num_islands=2).on_record(fault(name), 2.0)
    assert (alarm.kind, alarm.member, alarm.detail) == ("member_dead", "island-1", f"{name}: why")


def test_divergence_and_the_end() -> None:
    alarms = Alarms(NotifyConfig(), num_islands=2)
    assert kinds(alarms.on_record(fault("digest_mismatch"), 1.0)) == ["diverged"]
    assert kinds(alarms.on_record(fault("digest_mismatch"), 2.0)) == [], "not again and again"
    assert kinds(alarms.on_record(fault("digest_mismatch"), 400.0)) == ["diverged"]
    [end] = alarms.on_record(StopRecord(reason="failed", detail="no snapshot"), 5.0)
    assert (end.kind, end.detail) == ("finished", "failed: no snapshot")
    assert alarms.on_record(StopRecord(reason="failed"), 6.0) == []


def test_a_loss_that_is_no_number_and_one_that_jumps() -> None:
    alarms = Alarms(NotifyConfig(loss_spike=2.0), num_islands=2)
    for n in range(10):
        assert alarms.on_metric(step(3.0 - 0.1 * n), float(n)) == []
    assert alarms.on_metric(step(4.0), 10.0) == []
    [spike] = alarms.on_metric(step(9.0), 11.0)
    assert spike.kind == "loss_spike" and "9" in spike.detail
    assert alarms.on_metric(step(9.0), 12.0) == []
    assert kinds(alarms.on_metric(step(math.nan), 13.0)) == ["loss_nan"]
    assert kinds(alarms.on_metric({"kind": "eval", "member": "island-2", "val_loss": math.inf}, 14.0)) == ["loss_nan"]
    assert kinds(alarms.on_record(fault("non_finite"), 15.0)) == ["loss_nan"]
    assert alarms.on_metric({"kind": "span", "member": "x"}, 16.0) == []


def test_the_beginning_of_a_run_is_no_spike() -> None:
    alarms = Alarms(NotifyConfig(), num_islands=2)
    assert [alarms.on_metric(step(loss), 0.0) for loss in (1.0, 9.0, 1.0)] == [[], [], []]


def test_too_few_members_for_too_long() -> None:
    alarms = Alarms(NotifyConfig(below_quorum_s=10.0), num_islands=4)
    assert alarms.on_time(0, 0.0, started=False, exchange=ExchangeConfig()) == []
    assert alarms.on_time(1, 1.0, started=True, exchange=ExchangeConfig()) == []
    assert alarms.on_time(1, 10.5, started=True, exchange=ExchangeConfig()) == []
    assert kinds(alarms.on_time(1, 11.0, started=True, exchange=ExchangeConfig())) == ["below_quorum"]
    assert alarms.on_time(1, 30.0, started=True, exchange=ExchangeConfig()) == []
    assert alarms.on_time(2, 31.0, started=True, exchange=ExchangeConfig()) == []
    assert alarms.on_time(1, 32.0, started=True, exchange=ExchangeConfig()) == []
    assert kinds(alarms.on_time(1, 42.0, started=True, exchange=ExchangeConfig())) == ["below_quorum"]


def alarm(detail: str = "x") -> Alarm:
    return Alarm(kind="member_dead", t_s=1.5, member="island-1", detail=detail)


def test_the_command_gets_the_event_on_its_standard_input(tmp_path: Path) -> None:
    out = tmp_path / "told"
    code = f"import sys; open({str(out)!r}, 'a').write(sys.stdin.read())"
    notifier = Notifier(NotifyConfig(command=f"{sys.executable} -c {code!r}"), {"run": "r", "run_dir": "/r"})
    notifier.start()
    notifier.tell(alarm("a"))
    notifier.tell(alarm("b"))
    notifier.close(20.0)
    events = [json.loads(line) for line in out.read_text().splitlines()]
    assert [event["detail"] for event in events] == ["a", "b"]
    assert {key: events[0][key] for key in ("schema_version", "kind", "t_s", "member", "run", "run_dir")} == {
        "schema_version": 1, "kind": "member_dead", "t_s": 1.5, "member": "island-1", "run": "r", "run_dir": "/r",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (f"{sys.executable} -c 'import sys; sys.exit(\"no mail\")'", "ended with 1: no mail"),
        (f"{sys.executable} -c 'import time; time.sleep(60)'", "took more than notify.timeout_s = 0.5"),
        ("/nowhere/command", "cannot be run"),
        ("'unbalanced", "cannot be run"),
    ],
)
def test_a_command_that_fails_is_logged(command: str, told: str, caplog: pytest.LogCaptureFixture) -> None:
    notifier = Notifier(NotifyConfig(command=command, timeout_s=0.5), {})
    with caplog.at_level(logging.WARNING, "atoll.controller"):
        notifier.start()
        notifier.tell(alarm())
        notifier.close(20.0)
    assert told in caplog.text


def test_nobody_waits_for_the_command(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gate = tmp_path / "gate"
    code = f"import os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.02)"
    notifier = Notifier(NotifyConfig(command=f"{sys.executable} -c {code!r}"), {})
    notifier.start()
    began = time.monotonic()
    with caplog.at_level(logging.WARNING, "atoll.controller"):
        for _ in range(MAX_WAITING + 10):
            notifier.tell(alarm())
    assert time.monotonic() - began < 5.0
    assert "is not told" in caplog.text
    notifier.close(0.1)
    assert any(thread.name == "notify" for thread in threading.enumerate()), "it gives up on what waits"
    while not notifier._queue.empty():
        notifier._queue.get_nowait()
    notifier._queue.put(None)
    gate.touch()
    notifier._thread.join(20.0)
    assert not notifier._thread.is_alive()


def test_a_run_in_which_much_goes_wrong_has_woken_somebody_each_time(tmp_path: Path) -> None:
    """An anchor is changed under a member, parameters of another jump, one of a third is no number any more."""
    out = tmp_path / "told"
    code = f"import sys; open({str(out)!r}, 'a').write(sys.stdin.read())"
    command = f"notify.command={sys.executable} -c {code!r}"
    config = small_config(make_pack(tmp_path), "run.islands=3", command, "train.tokens=40_000")
    run = LocalRun(config, tmp_path / "run")

    def at(version: int, name: str) -> Replica:
        run.run(until=lambda: run.host.coordinator.state.heads[0].version.n >= version)
        for _ in range(4):  # in the middle of a round
            run.turn()
        return run.islands[name].loop.island.sync.replica

    with notifying(run.host, run.config.notify, run_id="run", num_islands=3):
        run.start()
        at(3, "island-1").parts[0].anchor[7] += 1.0
        for tensor in at(16, "island-2").tensors.values():
            tensor.mul_(30.0)
        next(iter(at(20, "island-0").tensors.values())).fill_(math.nan)
        ended = run.run(max_turns=40_000)
    run.close()
    assert ended is not None and ended.reason == "done"
    events = [json.loads(line) for line in out.read_text().splitlines()]
    told = {(event["kind"], event["member"]): event["detail"] for event in events}
    assert told["diverged", ""].startswith("digest_mismatch: next anchors of fragment 0 differ")
    assert told["diverged", "island-1"].startswith("corrupt_anchor: fragment 0 version 3")
    assert re.match(r"the training loss is \d+(\.\d+)?, its running mean 3\.", told["loss_spike", "island-2"])
    assert "the largest magnitude is nan" in told["loss_nan", "island-0"]
    assert {kind for kind, _ in told} == {"diverged", "loss_spike", "loss_nan", "finished"}
    assert [event["kind"] for event in events][-1] == "finished"
    assert {event["run"] for event in events} == {"run"}
