"""The controller's side of faults: journalled before they happen, handed to the right processes, each once."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from faults.lab.errors import LabError
from faults.lab.lab import Lab
from faults.lab.schedule import LinkChange
from faults.plan import FaultPlanError, PlannedFault, parse_fault
from faults.process import JumpClock
from orchestrator import injector as module
from orchestrator.cluster.state import ClusterState
from orchestrator.errors import UserError
from orchestrator.events import FaultInjected, FaultNoticed
from orchestrator.injector import Injector, IslandSite
from workers.records import FaultRecord, MemberId

NAMES = ("island-0", "island-1", "island-2")


class Controller:
    """What an injector sees of its host and of the islands' actors, and what happened, in order."""

    def __init__(self, *plan: str | LinkChange, own_code: str = "") -> None:
        self.story: list[Any] = []
        self.version, self.now_s = 0, 0.0
        self.records: list[FaultRecord] = []
        self.clock = JumpClock(lambda: 0.0)
        self.gone: set[str] = set()
        processes = {
            MemberId(name=name, incarnation=1): SimpleNamespace(status="healthy", is_steady=True) for name in NAMES
        }
        coordinator = SimpleNamespace(
            state=SimpleNamespace(heads=[SimpleNamespace(version=SimpleNamespace(n=0))], last_incarnation={}),
            roll=SimpleNamespace(processes=processes),
            seconds=lambda: self.now_s,
        )
        self.heads = coordinator.state.heads
        self.processes = processes
        host = SimpleNamespace(
            coordinator=coordinator,
            plan=SimpleNamespace(islands=NAMES),
            handle=self._handle,
            blocked=[],
            journal=SimpleNamespace(rows=[]),
        )
        self.host = host
        faults = [parse_fault(one, NAMES) if isinstance(one, str) else one for one in plan]
        site = IslandSite(cast(Any, host), own_code)
        self.injector = Injector(faults, site, self.clock, self._actors, lambda: "10.0.0.1:1")

    def _actors(self) -> dict[str, Any]:
        def afflict(name: str) -> Any:
            return SimpleNamespace(remote=lambda fault: self.story.append((name, str(fault))))

        return {name: SimpleNamespace(afflict=afflict(name)) for name in NAMES if name not in self.gone}

    def _handle(self, event: FaultInjected | FaultNoticed) -> None:
        injected = isinstance(event, FaultInjected)
        self.story.append(("journal", event.detail if injected else event.fault))
        record = FaultRecord(
            fault=event.fault, member=event.member, injected=injected, t_s=self.now_s, detail=event.detail
        )
        self.host.journal.rows.append(SimpleNamespace(record=record))

    def tick(self, version: int, now_s: float) -> list[Any]:
        self.story.clear()
        self.heads[0].version.n, self.now_s = version, now_s
        self.injector.tick()
        return list(self.story)


def test_a_fault_is_journalled_and_then_handed_to_its_member_alone() -> None:
    controller = Controller("hang:island-1@round=2,for=5s")
    assert controller.tick(1, 1.0) == []
    text = "hang:island-1@round=2,for=5s"
    assert controller.tick(2, 2.0) == [("journal", text), ("island-1", text)]
    assert controller.tick(3, 3.0) == []


def test_all_ends_of_a_cut_link_are_told_and_so_are_new_processes() -> None:
    controller = Controller("cut:island-1@t=1s", "cut:island-0+island-2@t=2s,for=60s", "heal:island-1@t=3s")
    assert {name for name, _ in controller.tick(0, 1.0)} == {"journal", *NAMES}
    assert [name for name, _ in controller.tick(0, 2.0)] == ["journal", "island-0", "island-2"]
    controller.story.clear()
    controller.injector.greet("island-0")
    assert [text.partition(",")[0] for _, text in controller.story] == [
        "cut:island-1@t=1s",
        "cut:island-0+island-2@t=2s",
    ]
    assert {name for name, _ in controller.tick(0, 3.0)} == {"journal", *NAMES}
    controller.story.clear()
    controller.injector.greet("island-2")
    ((name, text),) = controller.story
    assert name == "island-2" and text.startswith("cut:island-0+island-2@t=2s,for=")
    assert float(text.rpartition("=")[2].rstrip("s")) <= 60.0


def test_nothing_is_caused_that_cannot_be_written_down() -> None:
    controller = Controller("controller_kill@round=1")
    controller.host.blocked.append("rows")
    assert controller.tick(1, 1.0) == []
    with pytest.raises(UserError, match="disk is full"):
        controller.injector.now(["nan:island-0"])
    controller.host.blocked.clear()
    assert controller.injector.unfired() == ["controller_kill@round=1"]


def test_the_controllers_clock_jumps() -> None:
    controller = Controller("clock_jump@t=1s,by=60s")
    assert controller.tick(0, 1.0) == [("journal", "clock_jump:controller@t=1s,by=60s")]
    assert controller.clock() == 60.0


def test_the_controller_dies_after_it_was_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller("controller_kill@round=1")
    monkeypatch.setattr(module, "die", lambda: controller.story.append("dead"))
    assert controller.tick(1, 1.0) == [("journal", "controller_kill@round=1"), "dead"]
    controller.injector.resume()  # as the next controller does
    assert controller.tick(1, 2.0) == []


def test_a_storm_hits_who_is_well_one_fault_at_a_time() -> None:
    controller = Controller("storm,rate=36000,kinds=hang")
    controller.processes[MemberId(name="island-0", incarnation=1)].status = "suspect"
    hit = [name for now_s in range(100) for name, _ in controller.tick(0, float(now_s)) if name != "journal"]
    assert len(hit) == 1  # of the two that are well one hangs; a storm leaves the last one alone
    assert hit[0] in ("island-1", "island-2")


def test_a_storm_spares_who_makes_its_first_steps() -> None:
    """They may take long: nobody could tell that such a member hangs."""
    controller = Controller("storm,rate=36000,kinds=hang")
    for process in controller.processes.values():
        process.is_steady = False
    controller.tick(1, 0.0)
    assert [who for who, _ in controller.tick(1, 10.0) if who != "journal"] == []
    for process in controller.processes.values():
        process.is_steady = True
    assert [who for who, _ in controller.tick(1, 20.0) if who != "journal"]


def test_a_storm_that_was_asked_for_goes_on_after_a_restart() -> None:
    controller = Controller()
    controller.injector.now(["storm,rate=3600,kinds=slow,seed=4"])
    told = [text for now_s in range(40) for name, text in controller.tick(0, float(now_s)) if name == "journal"]
    assert told[0].startswith("storm@t=0s,rate=3600") and len(told) >= 3
    controller.injector.resume()
    controller.injector._struck.clear()
    later = [text for now_s in range(40, 80) for name, text in controller.tick(0, float(now_s)) if name == "journal"]
    assert f"(number {len(told)} of storm@t=0s" in later[0]


def test_what_is_asked_for_now_is_checked_before_anything_happens() -> None:
    controller = Controller()
    controller.gone.add("island-2")
    with pytest.raises(FaultPlanError, match="no member 'island-9'"):
        controller.injector.now(["hang:island-0", "kill:island-9"])
    with pytest.raises(UserError, match="island-2 has no process now"):
        controller.injector.now(["hang:island-0", "kill:island-2"])
    with pytest.raises(UserError, match="has a time"):
        controller.injector.now(["kill:island-0@round=3"])
    with pytest.raises(UserError, match="does not run the head of"):
        controller.injector.now(["hang:island-0", "head_kill"])
    assert controller.story == []
    assert controller.injector.now(["nan:island-0"]) == ["nan:island-0"]
    assert controller.story == [("journal", "nan:island-0"), ("island-0", "nan:island-0")]


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The head of the cluster runs on this machine, as far as anybody can tell."""
    state = SimpleNamespace(
        role="head", gcs_address="10.0.0.1:1", ray=SimpleNamespace(pid=4711), node_id="first", killed=[]
    )
    monkeypatch.setattr(module, "known_clusters", lambda: [cast(ClusterState, state)])
    monkeypatch.setattr(module.os, "killpg", lambda pid, number: state.killed.append((pid, number)))
    monkeypatch.setattr(module, "LOOK_S", 0.0)
    yield state


def test_the_head_dies_and_is_reported_when_it_is_back(head: SimpleNamespace) -> None:
    controller = Controller("head_kill@round=1")
    assert controller.tick(1, 1.0) == [("journal", "head_kill@round=1")]
    assert [pid for pid, _ in head.killed] == [4711]
    head.ray = None
    assert controller.tick(1, 2.0) == []
    head.ray, head.node_id = SimpleNamespace(pid=4712), "second"
    assert controller.tick(1, 3.0) == [("journal", "head_restarted")]
    assert controller.tick(1, 4.0) == []


def test_a_controller_that_died_with_its_head_reports_it(head: SimpleNamespace) -> None:
    controller = Controller("head_kill@round=1")
    controller.tick(1, 1.0)
    controller.story.clear()
    controller.injector.resume()
    assert controller.story == [("journal", "head_restarted")]
    controller.injector.resume()
    assert controller.story == [("journal", "head_restarted")]


def test_a_fault_of_an_unknown_kind_is_never_passed_on() -> None:
    from faults.chaos import Chaos

    chaos = cast(Any, SimpleNamespace(name="island-0"))
    with pytest.raises(ValueError, match="head_kill is no fault of a member"):
        Chaos.apply(chaos, PlannedFault(kind="head_kill"))


CUT = LinkChange(at_s=2, action="cut", target="eu")
SLOW = LinkChange(at_s=1, action="set", target="us:eu", values={"rate_mbit": 10.0})
HEAL = LinkChange(at_s=9, action="heal", target="eu")


@pytest.fixture
def wires(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done to the lab around the controller."""
    done: list[str] = []
    monkeypatch.setattr(Lab, "around", lambda: SimpleNamespace(apply=lambda change: done.append(str(change))))
    return done


def test_changes_of_links_are_journalled_and_then_made(wires: list[str]) -> None:
    controller = Controller(CUT, "nan:island-0@t=3s", SLOW, HEAL)
    controller.heads.clear()  # links need no model
    for now_s, told in ((0.5, []), (1.0, [str(SLOW)]), (2.5, [str(CUT)]), (8.0, [])):
        controller.now_s = now_s
        controller.story.clear()
        controller.injector.tick()
        assert controller.story == [("journal", text) for text in told]
    assert wires == [str(SLOW), str(CUT)]
    records = [row.record for row in controller.host.journal.rows]
    assert [(r.fault, r.member, r.injected, r.t_s) for r in records] == [
        ("link_set", "us:eu", True, 1.0),
        ("link_cut", "eu", True, 2.5),
    ]
    assert controller.injector.unfired() == ["nan:island-0@t=3s", "heal eu at 9 s"]


def test_a_controller_that_was_restarted_goes_on_with_the_links_where_it_was(wires: list[str]) -> None:
    first = Controller(SLOW, CUT, CUT, HEAL)
    first.tick(0, 1.0)
    second = Controller(SLOW, CUT, CUT, HEAL)
    second.host.journal.rows += first.host.journal.rows
    second.injector.resume()
    wires.clear()
    second.tick(0, 20.0)
    assert wires == [str(CUT), str(CUT), str(HEAL)], "what is overdue comes in its order"


def test_a_full_journal_holds_up_links_too(wires: list[str]) -> None:
    controller = Controller(CUT)
    controller.host.blocked.append("rows")
    assert controller.tick(0, 5.0) == [] and wires == []


def test_labels_are_not_flipped_in_code_of_the_users() -> None:
    controller = Controller(own_code="model.factory")
    with pytest.raises(UserError, match=r"model\.factory is set"):
        controller.injector.now(["copy_cat:island-0", "label_flip:island-1"])
    assert controller.story == [], "all are checked before the first is caused"
    assert Controller().injector.now(["label_flip:island-1"]) == ["label_flip:island-1"]


def test_a_link_that_cannot_be_changed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> Lab:
        raise LabError("there is no lab")

    monkeypatch.setattr(Lab, "around", gone)
    controller = Controller(CUT)
    assert controller.tick(0, 5.0) == [("journal", str(CUT)), ("journal", "link_change_failed")]
