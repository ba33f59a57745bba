from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from faults.lab.errors import LabError
from faults.lab.schedule import LinkChange, LinkSchedule, check_changes, due
from faults.lab.topology import Topology
from orchestrator.errors import UserError
from orchestrator.topology import load_schedule

PAIR = Topology.model_validate({"regions": {"p": {"nodes": ["a", "b"]}}, "links": {"a:b": {"rate_mbit": 10}}})
CUT = LinkChange(at_s=20, action="cut", target="a")
HEAL = LinkChange(at_s=40, action="heal", target="a")
SLOW = LinkChange(at_s=0, action="set", target="a:b", values={"rate_mbit": 5})


def test_changes_come_once_and_in_order_of_time() -> None:
    changes = [HEAL, CUT, SLOW]
    assert due(changes, after_s=-1, until_s=0) == [SLOW]
    assert due(changes, after_s=0, until_s=19.9) == []
    assert due(changes, after_s=19.9, until_s=60) == [CUT, HEAL]
    assert due(changes, after_s=40, until_s=60) == []


def test_changes_are_plain_data() -> None:
    values = {"at_s": 3, "action": "set", "target": "a:b", "values": {"loss": 0.1}}
    assert LinkChange.model_validate(values).model_dump() == values
    assert str(SLOW) == "set a:b rate_mbit=5 at 0 s"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"at_s": -1, "action": "cut", "target": "a"}, "at_s"),
        ({"at_s": 1, "action": "explode", "target": "a"}, "action"),
        ({"at_s": 1, "action": "set", "target": "a"}, "set of 'a' needs values"),
        ({"at_s": 1, "action": "cut", "target": "a", "values": {"loss": 1}}, "cut of 'a' takes no values"),
    ],
)
def test_what_is_no_change(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LinkChange.model_validate(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (LinkChange(at_s=1, action="cut", target="c"), "no node or region is called 'c'.*place: cut c at 1 s"),
        (LinkChange(at_s=1, action="cut", target="p"), "'p' is the whole lab"),
        (LinkChange(at_s=1, action="set", target="a", values={"speed": 1}), "a has no setting 'speed'"),
    ],
)
def test_a_plan_that_names_nobody_is_refused_before_it_starts(change: LinkChange, message: str) -> None:
    with pytest.raises(LabError, match=message):
        check_changes([SLOW, change], PAIR)
    check_changes([SLOW, CUT, HEAL], PAIR)


CUT_TEXT = '[[links]]\nat_s = 1\naction = "cut"\ntarget = "a"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a schedule has .* this one has nothing"),
        (CUT_TEXT + "[[fault]]\n", "this one has links, fault .*atoll train --faults"),
        ("links = [3]", "links is a list of tables"),
        (
            CUT_TEXT.replace('target = "a"', ""),
            r"target is missing \(place: .*, links\[0\], target; try: target = text",
        ),
        (CUT_TEXT + "when = 3", "unknown section or key 'when'.*one of at_s, action, target, values"),
        (
            CUT_TEXT.replace("cut", "set") + 'values = { loss = "x" }',
            r'values.loss = "x" is not allowed.*try: a number',
        ),
        ("[[links", "not valid TOML"),
    ],
)
def test_a_wrong_file_gives_one_clear_error(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "changes.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        load_schedule(path)
    assert str(path) in str(caught.value.place)


def test_a_file_is_named_with_the_change_that_does_not_fit() -> None:
    with pytest.raises(LabError, match=r"place: plan.toml, cut c at 1 s"):
        check_changes([LinkChange(at_s=1, action="cut", target="c")], PAIR, file="plan.toml")


def test_a_schedule_gives_each_change_once_also_to_whom_takes_it_over() -> None:
    schedule = LinkSchedule([HEAL, CUT, SLOW])
    assert [schedule.due(now_s) for now_s in (0.0, 5.0, 100.0, 200.0)] == [[SLOW], [], [CUT, HEAL], []]
    again = LinkSchedule([HEAL, CUT, CUT, SLOW])
    again.forget(["set a:b rate_mbit=5 at 0 s", "cut a at 20 s", "kill:island-0@t=3s"])
    assert again.waiting == [CUT, HEAL]
    assert [change.fault for change in again.due(100.0)] == ["link_cut", "link_heal"]
