"""Verdicts in the coordinator: hangs, slowness, loops, quorum, settings that change; what is journalled and told."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
from control import Control

from orchestrator import events as ev
from orchestrator.settings import ExchangeConfig
from orchestrator.standby import StandbyPool
from workers import messages as msg
from workers.records import HUNG, FaultRecord, FenceRecord, SettingRecord


class Watched(Control):
    """Members that say what their training threads do."""

    def __post_init__(self) -> None:
        self.doing: dict[str, tuple[str, float, float]] = {}
        self.rows_of_metrics: list[dict[str, object]] = []
        self.stacks: list[str] = []
        super().__post_init__()

    def say(self, name: str, *bodies: msg.MemberBody, nonce: str = "") -> None:
        doing, since_s, step_s = self.doing.get(name, ("waiting", self.now, 0.1))
        said = [
            replace(body, doing=doing, doing_s=self.now - since_s, step_s=step_s)
            if isinstance(body, msg.Hello)
            else body
            for body in bodies
        ]
        super().say(name, *said, nonce=nonce)

    def restart(self, *, lose_unflushed: bool = True) -> None:
        super().restart(lose_unflushed=lose_unflushed)
        handle = self.coordinator.handle

        def watching(event: ev.Event, now: float) -> list[ev.Command]:
            commands = handle(event, now)
            self.rows_of_metrics += [c.row for c in commands if isinstance(c, ev.Metric)]
            self.stacks += [c.name for c in commands if isinstance(c, ev.End) and c.save_stack]
            return commands

        self.coordinator.handle = watching  # type: ignore[method-assign]

    def train(self, name: str, step_s: float = 0.1) -> None:
        """It has begun a step just now."""
        self.doing[name] = ("stepping", self.now, step_s)

    def status(self, name: str) -> str:
        return self.coordinator.roll.processes[self.id(name)].status

    def faults(self, fault: str) -> list[str]:
        return [r.member for r in self.records(FaultRecord) if r.fault == fault]  # type: ignore[attr-defined]


def started(**options: object) -> Watched:
    control = Watched(**options)  # type: ignore[arg-type]
    control.start()
    return control


# ---------------------------------------------------------------- hangs


def test_a_hang_is_suspect_then_ended_with_its_stack_and_replaced() -> None:
    control = started()
    hung = control.id("island-1")
    control.train("island-1")
    control.tick(4.0)
    assert control.status("island-1") == "suspect" and control.faults("suspect") == ["island-1"]
    assert control.spawned == []
    control.tick(3.0)
    fences = control.records(FenceRecord)
    assert [(f.member, f.why.startswith(HUNG)) for f in fences] == [("island-1", True)]  # type: ignore[attr-defined]
    assert control.stacks == ["island-1"] and control.spawned == ["island-1"]
    (track,) = control.coordinator.faults
    assert (track.fault, track.victim) == ("hung", hung)


def test_a_step_that_ends_takes_the_suspicion_back() -> None:
    control = started()
    control.train("island-1")
    control.tick(4.0)
    control.train("island-1")
    control.tick(2.0)
    assert control.status("island-1") == "healthy" and control.records(FenceRecord) == []
    assert control.coordinator.roll.processes[control.id("island-1")].reason == "makes steps again"


def test_who_waits_evaluates_saves_or_compiles_does_not_hang() -> None:
    control = started()
    for name, doing in zip(("island-0", "island-1", "island-2"), ("evaluating", "waiting", "first_steps"), strict=True):
        control.doing[name] = (doing, control.now, 0.0)
    control.tick(25.0)
    assert control.faults("suspect") == [] and control.records(FenceRecord) == []


def test_when_most_hang_at_once_nobody_is_ended() -> None:
    control = started()
    for name in ("island-0", "island-1"):
        control.train(name)
    control.tick(20.0)
    assert control.records(FenceRecord) == []
    assert control.status("island-0") == control.status("island-1") == "suspect"


def test_the_only_holder_of_the_state_is_not_ended_before_limbo_is_over() -> None:
    control = started(members=1)
    control.train("island-0")
    control.tick(25.0)
    assert control.records(FenceRecord) == [] and control.status("island-0") == "suspect"
    control.tick(10.0)
    assert len(control.records(FenceRecord)) == 1 and control.spawned == ["island-0"]


def test_the_fence_of_a_hang_is_durable_before_its_process_ends() -> None:
    control = started()
    control.train("island-1")
    control.tick(5.0)
    control.hold = True
    control.tick(3.0)
    assert control.ended == [] and control.spawned == []
    control.hold = False
    control.flush()
    assert control.stacks == ["island-1"] and control.spawned == ["island-1"]


# ---------------------------------------------------------------- slowness and statuses


def test_slow_is_said_with_its_reason_and_costs_nothing() -> None:
    control = started()
    for name, step_s in (("island-0", 0.1), ("island-1", 0.1), ("island-2", 1.0)):
        control.doing[name] = ("waiting", 1e9, step_s)
    control.tick(8.0)
    assert control.status("island-2") == "slow" and control.faults("slow") == ["island-2"]
    told = [row for row in control.rows_of_metrics if row["kind"] == "member" and row["status"] == "slow"]
    assert [row["reason"] for row in told] == ["1 s a step, the others take 0.1 to 0.1 s"]
    control.commit()
    assert control.head() == 1


def test_every_status_is_told_once_with_its_reason() -> None:
    control = started()
    control.tick(1.0)
    control.tick(5.0, quiet=["island-1"])
    control.tick(1.0)
    control.handle(ev.LeaveRequested(name="island-2", why="asked to"))
    control.tick(1.0)
    rows = [row for row in control.rows_of_metrics if row["kind"] == "member"]
    told = {name: [row["status"] for row in rows if row["member"] == name] for name in control.state.current}
    assert told["island-1"] == ["healthy", "suspect", "healthy"]
    assert told["island-2"] == ["healthy", "draining"]
    assert all(row["reason"] for row in rows)


# ---------------------------------------------------------------- loops


def test_a_crash_loop_waits_longer_and_ends_with_a_verdict_in_the_journal() -> None:
    control = started()
    control.commit()
    waits = 0
    for life in range(6):
        control.die("island-1")
        before = len(control.spawned)
        control.tick(8.0)
        waits += len(control.spawned) > before
        control.join("island-1", nonce=f"life-{life}") if life < 5 else None
    assert control.faults("given_up") == ["island-1"]
    verdict = control.coordinator.given_up["island-1"]
    assert "5 processes in a row ended before their first step" in verdict and "killed" in verdict
    assert waits == 3, "the second try and those after it were not made at once"
    control.restart()
    assert control.coordinator.given_up == {"island-1": verdict}, "the next controller knows"


def test_who_was_taken_away_is_not_given_up() -> None:
    control = started()
    control.commit()
    for life in range(30):
        control.handle(ev.ProcessDied(name="island-1", nonce=None, why="drained", taken="preempted"))
        control.join("island-1", nonce=f"life-{life}")
    assert len(control.spawned) == 30 and control.coordinator.given_up == {}


@pytest.mark.parametrize("hung", [True, False])
def test_a_process_that_never_joined_gets_a_verdict_and_a_successor(hung: bool) -> None:
    control = started()
    control.commit()
    control.die("island-1")
    before = len(control.spawned)
    taken: Literal["", "lost"] = "" if hung else "lost"
    control.handle(ev.ProcessDied(name="island-1", nonce=None, why="silent", hung=hung, taken=taken))
    assert control.faults("hung" if hung else "lost") == ["island-1"]
    assert any(text == f"island-1 is {'hung' if hung else 'lost'}: silent" for text in control.said)
    control.tick(8.0)
    assert len(control.spawned) == before + 1
    spent = control.coordinator.policy.spent("island-1", "hung", control.coordinator.seconds())
    assert spent == hung, "where nobody can be blamed no budget is spent"


# ---------------------------------------------------------------- quorum


def test_too_few_members_say_who_is_missing_and_what_to_set_once_a_minute() -> None:
    control = started(members=4, exchange={"limbo_s": 1000.0})
    control.offer("island-0")
    control.offer("island-1")
    control.tick(150.0, quiet=["island-2", "island-3"])
    told = [text for text in control.said if text.startswith("too few members")]
    assert len(told) == 3
    for part in ("2 are here, 3 are needed", "island-2.1 (suspect", "island-3.1", "exchange.min_members = 2"):
        assert part in told[0]
    assert control.head() == 0 and control.coordinator.short_of
    control.handle(ev.SettingsRequested(values=(("exchange.min_members", 2),)))
    control.tick(2.0, quiet=["island-2", "island-3"])
    assert control.open().state == "reducing" and not control.coordinator.short_of


def test_settings_that_changed_outlive_the_controller() -> None:
    control = started()
    control.handle(ev.SettingsRequested(values=(("exchange.min_members", 2), ("exchange.grace_s", 0.25))))
    at_once = [SettingRecord(key="exchange.min_members", value=2, since=(control.head(),))]
    at_once += [SettingRecord(key="exchange.grace_s", value=0.25, since=(control.head(),))]
    assert control.records(SettingRecord) == at_once
    for _ in range(2):
        config = control.coordinator.exchanges[0].config
        assert (config.min_members, config.grace_s) == (2, 0.25)
        control.restart()
    control.handle(ev.SettingsRequested(values=(("exchange.min_members", None),)))
    assert control.coordinator.exchanges[0].config.min_members is None


def test_profiles_fill_in_what_is_not_set() -> None:
    lan, wan = ExchangeConfig(), ExchangeConfig(profile="wan", heartbeat_s=2.0)
    assert (lan.heartbeat_s, lan.suspect_s) == (0.5, 2.5) and lan.suspect_s + lan.heartbeat_s <= 3.0
    assert (wan.heartbeat_s, wan.suspect_s, wan.limbo_s) == (2.0, 9.0, 300.0)


def test_who_was_fenced_and_never_comes_back_is_replaced() -> None:
    """The simulator found it: who died unseen between its refusal and its next incarnation was missed by nobody."""
    control = started()
    limbo_s = control.coordinator.plan.exchange.limbo_s
    control.say("island-1", msg.DropRequest(upto=0, why="its update is not finite"))
    control.tick(limbo_s - 1.0)
    assert not control.spawned, "its process begins a new incarnation by itself, and may take a while"
    control.tick(2.0)
    control.tick(limbo_s + 2.0)
    assert control.spawned == ["island-1"], "once: the new process is the supervisor's business"
    control.join("island-1", nonce="another")
    control.say("island-2", msg.DropRequest(upto=0, why="its update is not finite"))
    control.join("island-2", nonce="back")
    control.tick(limbo_s + 1.0, quiet=[])
    assert control.spawned == ["island-1"], "who has come back is not missed"


# ---------------------------------------------------------------- standbys


def test_the_best_standby_is_taken_and_another_one_is_lacking() -> None:
    pool = StandbyPool(wanted=3)
    names = [pool.start(f"n{i}") for i in range(3)]
    assert pool.lacking() == 0
    pool.here(names[1], "west")
    pool.here(names[2], "east")
    pool.holds("n1")
    pool.holds("n2")
    assert pool.take("east") == (names[2], "n2", "east"), "ready, and on the dead one's node"
    assert pool.take("east") == (names[1], "n1", "west"), "ready elsewhere"
    assert pool.take() == (names[0], "n0", None), "not ready, but ahead of a new process"
    assert pool.take() is None and pool.lacking() == 3
    assert pool.start("n3") not in names
