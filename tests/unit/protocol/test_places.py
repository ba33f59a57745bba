"""Which island goes to which machine, as machines come and go."""

from __future__ import annotations

from orchestrator.places import choose, displaced, fill, free_places, kept_for


def test_each_free_place_gets_an_island_with_the_lowest_name() -> None:
    assert fill({"a": 2, "b": 1}, {}, (), ()) == [("island-0", "a"), ("island-1", "a"), ("island-2", "b")]
    assert fill({"a": 2, "b": 1}, {"island-1": "a"}, (), ()) == [("island-0", "a"), ("island-2", "b")]
    assert fill({"a": 1}, {"island-5": "a"}, (), ()) == []


def test_islands_are_spread() -> None:
    assert [node for _, node in fill({"a": 1, "b": 3, "c": 2}, {}, (), ())] == ["b", "b", "c", "a", "b", "c"]


def test_who_lost_its_place_comes_first() -> None:
    placed = {"island-0": "a"}
    assert fill({"a": 1, "b": 2}, placed, (), ("island-3", "island-1")) == [("island-3", "b"), ("island-1", "b")]
    assert fill({"a": 1, "b": 1}, placed, (), ("island-3", "island-1")) == [("island-3", "b")]
    # A new island does not take the name of one that waits.
    assert fill({"a": 1, "b": 3}, placed, (), ("island-1",))[-1] == ("island-3", "b")


def test_a_machine_that_leaves_gets_nobody() -> None:
    assert fill({"a": 1, "b": 1}, {}, {"b"}, ()) == [("island-0", "a")]
    assert free_places({"a": 2, "b": 2}, {"x": "a", "y": "gone"}, {"b"}) == {"a": 1}


def test_who_has_a_pack_of_its_own_has_a_place_where_that_is_and_nowhere_else() -> None:
    owners, at_b = {"island-0", "island-2"}, {"b": "island-2"}
    nodes = {"a": 2, "b": 2}
    assert fill(nodes, {}, (), (), owners, at_b) == [
        ("island-2", "b"), ("island-1", "a"), ("island-3", "a"), ("island-4", "b")
    ]  # fmt: skip
    # Its machine went: it waits, and nobody else takes its name; others that wait have the places.
    assert fill({"a": 2}, {}, (), ("island-2", "island-1"), owners, {}) == [("island-1", "a"), ("island-3", "a")]
    assert fill({"b": 1}, {}, (), ("island-1", "island-2"), owners, at_b) == [("island-2", "b")]
    # A second machine with the same pack is a machine like others.
    assert fill({"a": 1, "b": 1}, {"island-2": "b"}, (), (), owners, {"a": "island-2", "b": "island-2"}) == [
        ("island-1", "a")
    ]
    assert kept_for(nodes, {}, (), {"a": "island-2", "b": "island-2"}) == {"island-2": "a"}
    assert kept_for({"b": 1}, {"island-5": "b"}, (), at_b) == {} and kept_for(nodes, {}, {"b"}, at_b) == {}


def test_choose_and_displaced() -> None:
    assert choose({}) is None and choose({"a": 0}) is None
    assert choose({"b": 1, "a": 1, "c": 0}) == "a"
    assert displaced({"island-1": "gone", "island-0": "a"}, {"a"}) == ["island-1"]
