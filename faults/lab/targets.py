"""What a command is about: `eu` (a node or a region), `us:eu` (between two of them), `us>eu` (one way only). Pure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from faults.lab.errors import LabError

NAME = r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?"
_FORM = re.compile(rf"(?P<place>{NAME})(?:(?P<arrow>[:>])(?P<other>{NAME}))?")

Regions = Mapping[str, Sequence[str]]
"""Region -> its nodes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A place (`other` is None), or the way between two places: both directions, or from the first to the second."""

    place: str
    other: str | None = None
    one_way: bool = False

    def __str__(self) -> str:
        """The form it was written in."""
        if self.other is None:
            return self.place
        return f"{self.place}{'>' if self.one_way else ':'}{self.other}"

    def directions(self) -> tuple[tuple[str, str], ...]:
        """The (from, to) pairs of places of a pair; none for a single place."""
        if self.other is None:
            return ()
        there, back = (self.place, self.other), (self.other, self.place)
        return (there,) if self.one_way else (there, back)


@dataclass(frozen=True, kw_only=True, slots=True)
class RouteBlock:
    """All ways from any of some nodes to any of some others."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]


def parse_target(text: str, regions: Regions) -> Target:
    """Read a target; every name in it exists.

    Raises:
        LabError: not of one of the three forms, an unknown name, or the same place twice.
    """
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise LabError(f"{text!r} names no place", remedy="a node or a region (eu), a pair (us:eu), or one way (us>eu)")
    target = Target(place=match["place"], other=match["other"], one_way=match["arrow"] == ">")
    for name in filter(None, (target.place, target.other)):
        check_place(name, regions, within=text)
    if set(nodes_of(target.place, regions)) & set(nodes_of(target.other or "", regions)):
        raise LabError(f"{text!r}: {target.place} and {target.other} share a node, there is no way between them")
    return target


def check_place(name: str, regions: Regions, *, within: str) -> None:
    """Raise `LabError` unless a name is a node or a region; the message names the nearest one."""
    places = [*regions, *_all_nodes(regions)]
    if name not in places:
        near = difflib.get_close_matches(name, places, n=1)
        where = "" if name == within else f" in {within!r}"
        raise LabError(
            f"no node or region is called {name!r}{where}",
            remedy=near[0] if near else f"one of {', '.join(places)}",
        )


def nodes_of(place: str, regions: Regions) -> tuple[str, ...]:
    """The nodes of a region, or the node itself; none for a name that does not exist."""
    if place in regions:
        return tuple(regions[place])
    return (place,) if place in _all_nodes(regions) else ()


def routes_of(target: Target, regions: Regions) -> tuple[RouteBlock, ...]:
    """The ways that a cut of the target closes.

    A node: to and from all others. A region: between its nodes and those outside; inside it all goes on.

    Raises:
        LabError: nothing lies outside the place.
    """
    if target.other is not None:
        return tuple(
            RouteBlock(sources=nodes_of(source, regions), targets=nodes_of(to, regions))
            for source, to in target.directions()
        )
    inside = nodes_of(target.place, regions)
    outside = tuple(node for node in _all_nodes(regions) if node not in inside)
    if not outside:
        raise LabError(
            f"{target.place!r} is the whole lab, there is nothing to part it from",
            remedy=f"one of its nodes: {', '.join(inside)}",
        )
    return (RouteBlock(sources=inside, targets=outside), RouteBlock(sources=outside, targets=inside))


def _all_nodes(regions: Regions) -> list[str]:
    return [node for nodes in regions.values() for node in nodes]


def duplicates(names: Iterable[str]) -> list[str]:
    """The names that occur more than once, each once."""
    seen: set[str] = set()
    twice: dict[str, None] = {}
    for name in names:
        if name in seen:
            twice[name] = None
        seen.add(name)
    return list(twice)
