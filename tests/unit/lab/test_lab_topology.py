from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from faults.lab.errors import LabError
from faults.lab.links import Shape
from faults.lab.targets import RouteBlock, parse_target, routes_of
from faults.lab.topology import Topology, link_changes, plan_lab
from orchestrator.errors import UserError
from orchestrator.topology import list_topologies, load_topology

REGIONS = {"us": ("us-1", "us-2"), "eu": ("eu-1",), "asia": ("asia-1",)}
PLAIN = """
[regions.us]
nodes = ["us-1", "us-2"]
[regions.eu]
nodes = ["eu-1"]
"""


def topology(**values: Any) -> Topology:
    regions = {"us": {"nodes": ["us-1", "us-2"], "up_mbit": 20, "down_mbit": 100}, "eu": {"nodes": ["eu-1"]}}
    return Topology.model_validate({"regions": regions, **values})


def shapes(**values: Any) -> dict[str, Shape]:
    return plan_lab(topology(**values), "10.201.0.0/24").links


def test_the_six_topologies_are_there_and_load() -> None:
    names = ["home-uplinks", "satellite", "slow-pair", "starved", "three-continents", "two-regions"]
    assert list(list_topologies()) == names
    for name in names:
        assert plan_lab(load_topology(name), "10.201.0.0/24").routes


@pytest.mark.parametrize(
    ("name", "source", "target", "rate_mbit", "round_trip_ms", "loss"),
    [
        ("two-regions", "us-1", "eu-1", 1000, 100, 0),
        ("slow-pair", "a", "b", 100, 50, 0),
        ("three-continents", "us-1", "asia-1", 500, 160, 0),
        ("home-uplinks", "home-1", "home-2", 20, 30, 0),
        ("starved", "a", "b", 10, 80, 0),
        ("satellite", "ground-1", "remote-1", 50, 600, 0.01),
    ],
)
def test_topologies_are_what_their_names_say(
    name: str, source: str, target: str, rate_mbit: float, round_trip_ms: float, loss: float
) -> None:
    plan = plan_lab(load_topology(name), "10.201.0.0/24")
    there, back = (
        [plan.links[link] for route in plan.routes if (route.source, route.target) == way for link in route.links]
        for way in ((source, target), (target, source))
    )
    assert min(shape.rate_mbit for shape in there if shape.rate_mbit) == rate_mbit
    assert sum(shape.delay_ms for shape in there + back) == round_trip_ms
    assert [shape.loss for shape in there if shape.loss] == [loss] * (loss > 0)


def test_a_way_passes_the_lines_of_both_ends_and_the_link_between() -> None:
    links = {"us:eu": {"delay_ms": 45}, "us-1:eu-1": {"delay_ms": 5}}
    plan = plan_lab(topology(links=links), "10.201.0.0/24")
    ways = {(route.source, route.target): route.links for route in plan.routes}
    assert ways["us-1", "us-2"] == ("us-1 up", "us-2 down")
    assert ways["us-2", "eu-1"] == ("us-2 up", "us>eu", "eu-1 down")
    assert ways["eu-1", "us-1"] == ("eu-1 up", "eu-1>us-1", "us-1 down"), "the nearer link goes first"
    assert [node.address for node in plan.nodes] == ["10.201.0.1", "10.201.0.2", "10.201.0.3"]
    assert len({node.mac for node in plan.nodes}) == 3


def test_a_line_is_its_regions_unless_the_node_says_otherwise() -> None:
    found = shapes(nodes={"us-2": {"rate_mbit": 5, "loss": 0.1}})
    assert found["us-1 up"] == Shape(rate_mbit=20)
    assert found["us-1 down"] == Shape(rate_mbit=100)
    assert found["us-2 up"] == found["us-2 down"] == Shape(rate_mbit=5, loss=0.1)


def test_a_link_may_differ_by_direction() -> None:
    found = shapes(links={"us:eu": {"rate_mbit": 10, "delay_ms": 5}, "us>eu": {"rate_mbit": 2}})
    assert found["us>eu"] == Shape(rate_mbit=2, delay_ms=5)
    assert found["eu>us"] == Shape(rate_mbit=10, delay_ms=5)


def test_congestion_control_is_the_nodes_the_regions_or_everybodys() -> None:
    plan = plan_lab(topology(congestion="cubic", nodes={"us-2": {"congestion": "bbr"}}), "10.201.0.0/24")
    assert [node.congestion for node in plan.nodes] == ["cubic", "bbr", "cubic"]


def test_targets() -> None:
    assert str(parse_target("us>eu", REGIONS)) == "us>eu"
    assert routes_of(parse_target("eu", REGIONS), REGIONS) == (
        RouteBlock(sources=("eu-1",), targets=("us-1", "us-2", "asia-1")),
        RouteBlock(sources=("us-1", "us-2", "asia-1"), targets=("eu-1",)),
    )
    assert routes_of(parse_target("us-1:eu", REGIONS), REGIONS) == (
        RouteBlock(sources=("us-1",), targets=("eu-1",)),
        RouteBlock(sources=("eu-1",), targets=("us-1",)),
    )
    assert routes_of(parse_target("us>asia", REGIONS), REGIONS) == (
        RouteBlock(sources=("us-1", "us-2"), targets=("asia-1",)),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mars", "no node or region is called 'mars'"),
        ("us:erp", "no node or region is called 'erp' in 'us:erp'"),
        ("us-3", "try: us-"),
        ("us/eu", "names no place"),
        ("us:us-1", "us and us-1 share a node"),
        ("eu-1:eu-1", "share a node"),
        ("", "names no place"),
    ],
)
def test_targets_that_name_nobody(text: str, message: str) -> None:
    with pytest.raises(LabError, match=message):
        parse_target(text, REGIONS)


def test_the_whole_lab_has_no_outside() -> None:
    regions = {"all": ("a", "b")}
    with pytest.raises(LabError, match="'all' is the whole lab"):
        routes_of(parse_target("all", regions), regions)


def test_what_set_changes() -> None:
    lab = topology(links={"us:eu": {"delay_ms": 45}})
    assert link_changes(lab, "us", {"rate_mbit": 5, "up_mbit": 1, "loss": None}) == {
        "us-1 up": {"rate_mbit": 1, "loss": 0.0},
        "us-1 down": {"rate_mbit": 5, "loss": 0.0},
        "us-2 up": {"rate_mbit": 1, "loss": 0.0},
        "us-2 down": {"rate_mbit": 5, "loss": 0.0},
    }
    assert link_changes(lab, "eu>us", {"rate_mbit": None}) == {"eu>us": {"rate_mbit": None}}


@pytest.mark.parametrize(
    ("target", "values", "message"),
    [
        ("us:eu", {"up_mbit": 5}, "us:eu has no setting 'up_mbit'"),
        ("us:eu", {"bogus": None}, "us:eu has no setting 'bogus'"),
        ("us", {"rate_mbit": -1}, "rate_mbit = -1 is not allowed.*try: rate_mbit=none for the default"),
        ("us", {"loss": 1.5}, "loss = 1.5 is not allowed"),
        ("us-1:us-2", {"delay_ms": 5}, "no link 'us-1>us-2'"),
        ("us-9", {"delay_ms": 5}, "no node or region is called 'us-9'"),
        ("us", {}, "nothing to set"),
    ],
)
def test_what_cannot_be_set(target: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(LabError, match=message):
        link_changes(topology(links={"us:eu": {"delay_ms": 45}}), target, values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PLAIN + "[links.'us:mars']\ndelay_ms = 1", "no node or region is called 'mars'"),
        (PLAIN + "[nodes.us-7]\nloss = 0.1", "no region has a node 'us-7'"),
        (PLAIN + "[links.'us:eu']\nrate_mbit = -5", r"links.us:eu.rate_mbit = -5 is not allowed: it takes a number"),
        (PLAIN + "[links.'us:eu']\nloss = 2", r"loss = 2 is not allowed: it takes a number from 0"),
        (PLAIN + "[links.'us:eu']\ndelay = 2", "unknown key 'delay'"),
        (PLAIN + "[links.'us:eu-1']\ndelay_ms = 2", "is no link"),
        (PLAIN + "[links.us]\ndelay_ms = 2", "is no link"),
        (PLAIN + "[links.'us:us-1']\ndelay_ms = 2", "share a node"),
        (PLAIN + "[links.'us:eu']\n[links.'eu:us']\n", "are the same link"),
        (PLAIN + "[regions.asia]\nnodes = ['us-1']", "'us-1' is the name of two"),
        (PLAIN + "[regions.asia]\nnodes = ['localhost']", "no node can be called 'localhost'"),
        (PLAIN + "[regions.asia]\nnodes = []", "regions.asia.nodes = .* a list of at least 1"),
        (PLAIN + "[regions.asia]\nnodes = ['X_1']", r"regions.asia.nodes\[0\] = \"X_1\" is not allowed"),
        (PLAIN + "[regions.Asia]\nnodes = ['x']", "'Asia' is no name for a table of .regions."),
        ("network = '10.0.0.1/8'\n" + PLAIN, "is no IPv4 network"),
        ("network = '8.8.8.0/24'\n" + PLAIN, "not private"),
        ("network = '0.0.0.0/24'\n" + PLAIN, "not private"),
        ("network = '240.0.0.0/24'\n" + PLAIN, "not private"),
        ("network = '127.7.0.0/24'\n" + PLAIN, "not private"),
        ("network = '10.9.9.0/30'\n" + PLAIN, "too small for 3 nodes"),
        ("network = 'fd00::/64'\n" + PLAIN, "is no IPv4 network"),
        ("regions = 3", "regions"),
        ("", "regions"),
        ("[regions", "not valid TOML"),
    ],
)
def test_a_wrong_file_gives_one_clear_error(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        load_topology(path)
    assert str(path) in str(caught.value.place)
    assert "\n" not in caught.value.message


def test_an_unknown_key_of_a_link_is_answered_with_those_of_a_link(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(PLAIN + "[links.'us:eu']\nspeed = 2", encoding="utf-8")
    with pytest.raises(UserError, match="try: one of rate_mbit, delay_ms, jitter_ms, loss, queue_ms"):
        load_topology(path)


def test_a_name_that_is_no_topology() -> None:
    with pytest.raises(UserError, match="try: slow-pair"):
        load_topology("slowpair")


def test_a_topology_made_in_python_is_checked_as_well() -> None:
    with pytest.raises(ValidationError, match="is no link"):
        topology(links={"us": {}})


def test_the_command_answers_without_torch_and_ray() -> None:
    code = "import sys, faults.lab.lab, orchestrator.cli.lab; print(sorted({'torch', 'ray'} & sys.modules.keys()))"
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == "[]\n"
