"""What a fault plan may say, and the one error for each thing that it may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.lab.errors import LabError
from faults.lab.schedule import LinkChange
from faults.lab.state import LabRecord, LabStates
from faults.plan import KINDS, FaultPlanError, PlannedFault, parse_fault, read_plan
from orchestrator.config import RunConfig, load_config
from orchestrator.errors import UserError
from orchestrator.fault_plan import load_plan, read_link_changes

DEMO = load_config("demo").config
NAMES = ("island-0", "island-1", "island-2")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("kill:island-1@round=15", PlannedFault(kind="kill", targets=("island-1",), round=15)),
        ("hang:island-0@t=30s,for=6s", PlannedFault(kind="hang", targets=("island-0",), at_s=30.0, for_s=6.0)),
        ("stop:island-0@t=2m", PlannedFault(kind="stop", targets=("island-0",), at_s=120.0, for_s=5.0)),
        ("cut:island-0+island-2@round=1", PlannedFault(kind="cut", targets=("island-0", "island-2"), round=1)),
        ("slow:island-2,factor=4,for=500ms", PlannedFault(kind="slow", targets=("island-2",), factor=4.0, for_s=0.5)),
        ("clock_jump:island-0,by=-5s", PlannedFault(kind="clock_jump", targets=("island-0",), by_s=-5.0)),
        ("disk_full@t=1", PlannedFault(kind="disk_full", targets=("controller",), at_s=1.0, for_s=5.0)),
        ("controller_kill@round=3", PlannedFault(kind="controller_kill", round=3)),
        ("head_kill", PlannedFault(kind="head_kill")),
        (
            "storm@round=2,rate=60,seed=7,kinds=kill+nan",
            PlannedFault(kind="storm", round=2, rate=60.0, seed=7, kinds=("kill", "nan")),
        ),
    ],
)
def test_a_fault_is_what_it_says(text: str, fault: PlannedFault) -> None:
    assert parse_fault(text, NAMES) == fault
    assert parse_fault(str(fault), NAMES) == fault  # the journal's form is one that can be read again


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("kil:island-1@round=1", "unknown kind 'kil'; known: kill, oom, stop"),
        ("kill:island-7@round=1", "there is no member 'island-7'; this run has island-0, island-1, island-2"),
        ("kill@round=1", "kill of whom? This run has island-0"),
        ("kill:island-0+island-1@round=1", "kill takes one member"),
        ("cut:island-0+island-0", "two different ones"),
        ("cut:island-0+island-1+island-2", "two different ones"),
        ("controller_kill:island-1", "has no target"),
        ("kill:island-1@round=x", "is no time"),
        ("kill:island-1@tomorrow=1", "is no time"),
        ("kill:island-1@t=1x", "at_s = '1x' is no number"),
        ("kill:island-1,for=3s", "kill takes no for_s; its options: none"),
        ("hang:island-1,for=0s", "for_s = '0s' must be above 0"),
        ("hang:island-1,until=9", "'until=9' is no option; known: for, factor"),
        ("storm,kinds=kill+rain", "a storm has no kind 'rain'"),
        ("storm,kinds=storm", "a storm has no kind 'storm'"),
        ("kill island-1", "expected kind:target@round=N"),
        ("", "expected kind:target@round=N"),
    ],
)
def test_what_cannot_be_is_one_clear_error(text: str, error: str) -> None:
    with pytest.raises(FaultPlanError) as caught:
        parse_fault(text, NAMES)
    assert error in str(caught.value)
    assert repr(text) in str(caught.value)


def test_a_file_says_the_same_as_the_texts(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(
        """
        [[fault]]
        kind = "kill"
        target = "island-1"
        round = 15
        [[fault]]
        kind = "cut"
        target = ["island-0", "island-2"]
        at_s = 30
        for_s = 2.5
        [[fault]]
        kind = "storm"
        rate = 240
        kinds = ["kill", "hang"]
        """
    )
    texts = ("kill:island-1@round=15", "cut:island-0+island-2@t=30s,for=2.5s", "storm,rate=240,kinds=kill+hang")
    assert load_plan(path, NAMES) == tuple(parse_fault(text, NAMES) for text in texts)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ('[[fault]]\nkind = "kill"\ntarget = "nobody"', "plan.toml, fault 1: there is no member 'nobody'"),
        ('[[fault]]\nkind = "kill"\ntarget = "island-0"\n[[fault]]\nkind = "rain"', "fault 2: unknown kind 'rain'"),
        ('[[fault]]\nkind = "kill"\ntarget = "island-0"\nwhen = 3', "unknown key 'when'"),
        ('[[fault]]\nkind = "kill"\ntarget = "island-0"\nround = 1\nat_s = 3', "not both"),
        ('[[fault]]\nkind = "kill"\ntarget = "island-0"\nround = true', "a round is a whole number"),
        ('[[fault]]\nkind = "kill"\ntarget = 5', "fault 1: target = 5; a name, or a list of names"),
        ('[[fault]]\nkind = "cut"\ntarget = [1, 2]', "target = [1, 2]; a name, or a list of names"),
        ('[[fault]]\nkind = "storm"\nkinds = true', "kinds = True; a name, or a list of names"),
        ('[faults]\nkind = "kill"', "a fault plan is a list of tables [[fault]], not 'faults'"),
        ("", "a fault plan is a list of tables"),
        ("[[fault", "not valid TOML"),
    ],
)
def test_a_wrong_file_is_one_clear_error(tmp_path: Path, content: str, error: str) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(content)
    with pytest.raises((FaultPlanError, UserError)) as caught:
        load_plan(path, NAMES)
    assert error in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the fault plan"):
        load_plan(tmp_path / "none.toml", NAMES)


def test_every_kind_can_be_written_down_and_read_again() -> None:
    for name, kind in KINDS.items():
        target = {"member": ":island-0", "link": ":island-0"}.get(kind.targets, "")
        fault = parse_fault(f"{name}{target}@round=1", NAMES)
        assert parse_fault(str(fault), NAMES) == fault
        table = {"kind": name, "round": 1} | ({"target": "island-0"} if target else {})
        assert read_plan({"fault": [table]}, NAMES, place="here") == (fault,)


LINKS = '[[links]]\nat_s = 20\naction = "cut"\ntarget = "eu"\n'


@pytest.fixture
def in_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a node of a lab with the regions us and eu; nothing of it is made."""
    states = LabStates(tmp_path / "labs")
    regions = {"us": {"nodes": ["us-1"]}, "eu": {"nodes": ["eu-1"]}}
    record = LabRecord(
        name="one",
        namespaces={},
        network="10.201.0.0/24",
        topology={"regions": regions},
        owner=None,
        switch=None,
        scratch="",
    )
    states.root.mkdir()
    states.write(record)
    monkeypatch.setenv("ATOLL_LAB", str(states.path("one")))


def planned(tmp_path: Path, content: str) -> RunConfig:
    (tmp_path / "plan.toml").write_text(content)
    return DEMO.with_values({"run.fault_plan": str(tmp_path / "plan.toml")})


def test_a_plan_holds_changes_of_links_beside_faults(tmp_path: Path, in_lab: None) -> None:
    config = planned(tmp_path, LINKS + '[[fault]]\nkind = "kill"\ntarget = "island-1"\nround = 15\n')
    assert load_plan(tmp_path / "plan.toml", NAMES) == (parse_fault("kill:island-1@round=15", NAMES),)
    assert read_link_changes(config) == (LinkChange(at_s=20, action="cut", target="eu"),)
    config = planned(tmp_path, LINKS)
    assert (load_plan(tmp_path / "plan.toml", NAMES), len(read_link_changes(config))) == ((), 1)
    assert read_link_changes(DEMO) == ()


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (LINKS.replace("eu", "mars"), "no node or region is called 'mars' (place: {path}, cut mars at 20 s"),
        (LINKS.replace("cut", "snip"), 'action = "snip" is not allowed: it takes one of cut, heal, set'),
        ("links = 3", "links is a list of tables [[links]]"),
    ],
)
def test_a_wrong_change_of_links_is_one_clear_error(tmp_path: Path, in_lab: None, content: str, error: str) -> None:
    with pytest.raises((LabError, UserError)) as caught:
        read_link_changes(planned(tmp_path, content))
    assert error.format(path=tmp_path / "plan.toml") in str(caught.value)


def test_changes_of_links_are_refused_where_there_is_no_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOLL_LAB", str(tmp_path / "labs" / "gone"))
    with pytest.raises(LabError, match="link changes are for a lab: there is no lab 'gone'"):
        read_link_changes(planned(tmp_path, LINKS))
