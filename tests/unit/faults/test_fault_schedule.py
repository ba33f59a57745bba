"""When faults come: once each, storms at their rate and from their seed, and on where an earlier controller ended."""

from __future__ import annotations

import itertools

import pytest

from faults.plan import PlannedFault, parse_fault
from faults.schedule import LASTING_S, Past, Schedule, Storm, uniform

NAMES = ("island-0", "island-1", "island-2")
HOUR_S = 3600.0


def plan(*texts: str) -> list[PlannedFault]:
    return [parse_fault(text, NAMES) for text in texts]


def rain(storm: Storm, until_s: float, *, fit: tuple[str, ...] = NAMES) -> list[tuple[PlannedFault, str]]:
    out = []
    while storm.next_s < until_s and (found := storm.due(storm.next_s, fit)) is not None:
        out.append(found)
    return out


def test_each_fault_comes_once_and_not_before_its_time() -> None:
    schedule = Schedule(plan("kill:island-0@round=3", "hang:island-1@t=10s,for=1s", "nan:island-2"))

    def texts(version: int, now_s: float) -> list[str]:
        return [text for _, text in schedule.due(version, now_s, NAMES, NAMES)]

    assert texts(0, 1.0) == ["nan:island-2"]
    assert texts(2, 9.9) == []
    assert texts(3, 9.9) == ["kill:island-0@round=3"]
    assert texts(9, 10.0) == ["hang:island-1@t=10s,for=1s"]
    assert texts(99, 99.0) == []
    assert schedule.unfired() == []


def test_a_fault_waits_for_its_member_and_is_named_if_it_never_came() -> None:
    schedule = Schedule(plan("kill:island-0@round=3"))
    assert schedule.due(5, 0.0, {"island-1"}, ()) == []
    assert schedule.unfired() == ["kill:island-0@round=3"]
    assert len(schedule.due(5, 0.0, {"island-0"}, ())) == 1


def test_a_storm_keeps_its_rate_its_kinds_and_its_seed() -> None:
    (storm,) = plan("storm,rate=240,seed=3,kinds=kill+hang+cut")
    first, second = (rain(Storm(storm, 0.0), 20 * HOUR_S) for _ in range(2))
    assert first == second
    assert len(first) == pytest.approx(20 * 240, rel=0.05)
    for kind, name in itertools.product(("kill", "hang", "cut"), NAMES):
        share = sum(fault.kind == kind and fault.targets == (name,) for fault, _ in first) / len(first)
        assert share == pytest.approx(1 / 9, rel=0.2)
    lengths = [fault.for_s for fault, _ in first if fault.kind == "hang"]
    assert all(length is not None and LASTING_S[0] <= length <= LASTING_S[1] for length in lengths)
    assert all(fault.for_s is None for fault, _ in first if fault.kind == "kill")
    (other,) = plan("storm,rate=240,seed=4,kinds=kill+hang+cut")
    assert rain(Storm(other, 0.0), HOUR_S) != first[: len(rain(Storm(other, 0.0), HOUR_S))]


def test_a_storm_ends_and_hits_only_whom_it_may() -> None:
    (storm,) = plan("storm:island-0+island-2,rate=3600,for=60s")
    found = rain(Storm(storm, 100.0), 1000.0)
    assert 30 < len(found) < 100
    assert {fault.targets[0] for fault, _ in found} == {"island-0", "island-2"}
    assert Storm(storm, 100.0).is_over(160.0) and not Storm(storm, 100.0).is_over(159.0)


def test_a_storm_spares_the_last_that_are_well() -> None:
    (storm,) = plan("storm,rate=36000")
    assert Storm(storm, 0.0).due(1000.0, ["island-0"]) is None
    assert Storm(storm, 0.0).due(1000.0, ["island-0", "island-1"]) is not None


def test_the_next_controller_goes_on_where_the_last_one_ended() -> None:
    faults = plan(
        "storm@t=5s,rate=240,seed=1", "kill:island-0@round=1", "kill:island-0@round=1", "nan:island-1@round=9"
    )
    whole = Schedule(faults)
    story = [(now_s / 10, found) for now_s in range(0, 6000) for found in whole.due(1, now_s / 10, NAMES, NAMES)]
    cut = len(story) // 2
    past = [Past(text=text, t_s=t_s) for t_s, (_, text) in story[:cut]]
    second = Schedule(faults, past)
    begin = int(story[cut - 1][0] * 10)
    rest = [(now_s / 10, found) for now_s in range(begin, 6000) for found in second.due(1, now_s / 10, NAMES, NAMES)]
    assert rest == story[cut:]
    assert len(story) > 20
    assert second.unfired() == ["nan:island-1@round=9"]


def test_the_numbers_are_those_of_splitmix64() -> None:
    # Reference values of the published algorithm for the seed 1234567.
    wanted = (6457827717110365317, 3203168211198807973, 9817491932198370423)
    got = list(itertools.islice(uniform(1234567), 3))
    assert got == [(value >> 11) / (1 << 53) for value in wanted]
