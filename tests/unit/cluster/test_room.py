"""A run begins where its islands have places: what is refused, and whom it says that it waits for."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.room import Room, check_room, who_is_waited_for
from tests.small_run import small_config


def run_of(*values: str, address: str = "10.0.0.1:6379") -> RunConfig:
    return small_config(Path("pack"), f"run.address={address}", *values)


def complaint(config: RunConfig, room: Room) -> UserError:
    with pytest.raises(UserError) as raised:
        check_room(config, room)
    return raised.value


def test_a_label_that_no_machine_has_is_refused_with_those_that_there_are() -> None:
    room = Room(places=0, free=0, elsewhere=4, known=("region=us", "zone=b"))
    error = complaint(run_of("run.islands=2", "run.labels.region=eu", "run.labels.disk=ssd"), room)
    assert error.message.startswith("the cluster at '10.0.0.1:6379' has room for 0 islands")
    assert error.message.endswith("on machines with the label disk=ssd, region=eu, the run has 2")
    assert error.place == "run.labels"
    assert "--label disk=ssd --label region=eu" in error.remedy and "labels there are region=us, zone=b" in error.remedy
    bare = complaint(run_of("run.islands=2", "run.labels.region=eu"), Room(places=1, free=1, elsewhere=4))
    assert "room for 1 islands" in bare.message and "no machine there has a label" in bare.remedy


def test_more_islands_than_the_whole_cluster_holds_are_a_matter_of_places() -> None:
    for labels in ((), ("run.labels.region=eu",)):
        error = complaint(run_of("run.islands=5", *labels), Room(places=1, free=1, elsewhere=3))
        assert error.place == "run.address" and "a smaller run.islands" in error.remedy
    own = complaint(small_config(Path("pack"), "run.islands=2"), Room(places=0, free=0, elsewhere=0))
    assert "the Ray of this process" in own.message and "'atoll_worker': 2" in own.remedy


def test_places_of_other_runs_are_waited_for_and_it_is_said() -> None:
    check_room(run_of("run.islands=3"), Room(places=3, free=1, elsewhere=0))
    said = who_is_waited_for(run_of("run.islands=3", "run.labels.zone=b"), Room(places=3, free=1, elsewhere=0))
    assert said.startswith("2 of the 3 places that it needs on machines with zone=b are used by other runs")
    assert who_is_waited_for(run_of("run.islands=3"), Room(places=4, free=3, elsewhere=0)) == ""


def test_an_elastic_run_begins_with_the_places_that_are_free() -> None:
    config = run_of("run.elastic=true", "run.islands=3")
    assert who_is_waited_for(config, Room(places=3, free=1, elsewhere=0)) == ""
    assert "3 of the 3 places" in who_is_waited_for(config, Room(places=3, free=0, elsewhere=0))
