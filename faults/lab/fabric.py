"""The network between the nodes of a lab: routes over links, and what is on its way. Pure: clock and seed are given.

The caller hands over each frame that a node sends (`send`) and passes on what has arrived (`due`). A frame is taken
through the links of its route one by one. A link with a rate or jitter must see its packets in order of time, so a
frame that comes to one later than now waits in a heap until then; the arrival at the last end waits there too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush
from itertools import accumulate
from random import Random
from typing import Any

from faults.lab.errors import LabError
from faults.lab.links import Link, Shape
from faults.lab.segments import OVERHEAD_BYTES, Run, runs_of, runs_without, take_runs

EARLY_S = 5e-4
"""What is due so soon is due now: it is not worth another turn of the loop."""

LATE_S = 1e-3
"""A frame that is handed over later than this after it was due counts as late."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutePlan:
    """The way from one node to another: the names of its links in order."""

    source: str
    target: str
    links: tuple[str, ...]


@dataclass(slots=True, eq=False)
class Route:
    """A way in operation. `is_plain`: a frame may be handed over at once; `exit_fd`: where, for the caller to know."""

    source: str
    target: str
    links: tuple[Link, ...]
    is_cut: bool = False
    is_plain: bool = True
    max_packets: int = 1
    exit_fd: int = -1

    def refresh(self) -> None:
        """Look at the links again after one has changed."""
        self.is_plain = not self.is_cut and all(link.is_plain for link in self.links)
        self.max_packets = min(link.max_packets for link in self.links)

    def count(self, num_bytes: int, num_packets: int) -> None:
        """Count what was handed over at once."""
        for link in self.links:
            link.counters.num_bytes += num_bytes
            link.counters.num_packets += num_packets


@dataclass(slots=True, eq=False)
class _Transit:
    """A frame on its way, before link number `hop` of its route (or at the end of it)."""

    route: Route
    frame: bytes
    num_packets: int
    num_bytes: int
    hop: int = 0


@dataclass(kw_only=True, slots=True)
class Punctuality:
    """How well the emulation kept its own times: frames handed over, those late by more than `LATE_S`, the worst."""

    num_frames: int = 0
    num_late: int = 0
    worst_s: float = 0.0


@dataclass(slots=True)
class Fabric:
    """All links and routes of a lab. Times are seconds on one monotonic clock of the caller."""

    shapes: Mapping[str, Shape]
    plans: Sequence[RoutePlan]
    seed: int = 0
    links: dict[str, Link] = field(init=False)
    routes: dict[tuple[str, str], Route] = field(init=False)
    punctuality: Punctuality = field(default_factory=Punctuality, init=False)
    _heap: list[tuple[float, int, _Transit]] = field(default_factory=list, init=False)
    _count: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        # Each link draws from its own generator: what happens on one does not change the luck of another.
        self.links = {
            name: Link(name, Random(f"{self.seed}/{name}").random, shape) for name, shape in self.shapes.items()
        }
        self.routes = {
            (plan.source, plan.target): Route(plan.source, plan.target, tuple(self.links[name] for name in plan.links))
            for plan in self.plans
        }
        self._refresh()

    @property
    def next_s(self) -> float:
        """When `due` has something to do next; infinity if nothing is on its way."""
        return self._heap[0][0] if self._heap else math.inf

    @property
    def num_on_the_way(self) -> int:
        """Frames on their way."""
        return len(self._heap)

    def send(self, route: Route, frame: bytes, *, num_bytes: int, num_packets: int, now_s: float) -> None:
        """Take a frame from a node.

        Args:
            route: one of `routes`.
            frame: with its virtio header.
            num_bytes, num_packets: what it is on the wire (`segments.on_the_wire`).
            now_s: the time.
        """
        if route.is_cut:
            route.links[0].counters.dropped_cut += num_packets
            return
        transit = _Transit(route, frame, num_packets, num_bytes)
        if num_packets <= route.max_packets:
            self._advance(transit, now_s, now_s)
        else:
            runs = runs_of(num_packets, route.max_packets)
            for part in _parts(transit, runs):
                self._advance(part, now_s, now_s)

    def due(self, now_s: float) -> list[tuple[Route, bytes]]:
        """What has arrived by `now_s`, in order of time: to be handed over to the target of each route."""
        heap, until_s = self._heap, now_s + EARLY_S
        arrived: list[tuple[Route, bytes]] = []
        first_s = now_s
        while heap and heap[0][0] <= until_s:
            at_s, _, transit = heappop(heap)
            route = transit.route
            if transit.hop < len(route.links):
                self._advance(transit, at_s, until_s)
            else:
                if not arrived:
                    first_s = at_s
                arrived.append((route, transit.frame))
                if at_s < now_s - LATE_S:
                    self.punctuality.num_late += 1
        if arrived:
            self.punctuality.num_frames += len(arrived)
            # The first one has waited longest.
            self.punctuality.worst_s = max(self.punctuality.worst_s, now_s - first_s)
        return arrived

    def configure(self, changes: Mapping[str, Mapping[str, Any]]) -> None:
        """Change links: name -> fields of `Shape` with their new values."""
        for name in changes:
            if name not in self.links:
                raise LabError(f"there is no link {name!r}", remedy=f"one of {', '.join(self.links)}")
        for name, values in changes.items():
            self.links[name].configure(replace(self.links[name].shape, **values))
        self._refresh()

    def cut(self, ways: Iterable[tuple[str, str]]) -> None:
        """Close ways from one node to another; what is on them is lost."""
        closed = {self.routes[way] for way in ways}
        for route in closed:
            route.is_cut = True
        for _, _, transit in self._heap:
            if transit.route in closed:
                transit.route.links[0].counters.dropped_cut += transit.num_packets
        self._heap = [entry for entry in self._heap if entry[2].route not in closed]
        heapify(self._heap)
        self._refresh()

    def heal(self, ways: Iterable[tuple[str, str]]) -> None:
        """Open ways again."""
        for way in ways:
            self.routes[way].is_cut = False
        self._refresh()

    def _refresh(self) -> None:
        for route in self.routes.values():
            route.refresh()

    def _advance(self, transit: _Transit, at_s: float, now_s: float) -> None:
        """Take a frame on, from `at_s`, as far as can be said `now_s`."""
        links = transit.route.links
        while transit.hop < len(links):
            link = links[transit.hop]
            if link.is_ordered and at_s > now_s:
                break
            arrival_s = link.carry(at_s, transit.num_bytes, transit.num_packets)
            if arrival_s is None:
                return
            transit.hop += 1
            at_s = arrival_s
            if link.has_loss and (lost := link.lose(transit.num_packets)):
                for part in _parts(transit, runs_without(transit.num_packets, lost)):
                    self._leave(part, link, at_s, now_s)
                return
            if link.has_jitter:
                self._leave(transit, link, at_s, now_s)
                return
        self._count += 1
        heappush(self._heap, (at_s, self._count, transit))

    def _leave(self, transit: _Transit, link: Link, at_s: float, now_s: float) -> None:
        """Take a frame on whose packets arrive at the end of a link at `at_s`, give or take its jitter."""
        if not link.has_jitter:
            self._advance(transit, at_s, now_s)
            return
        if transit.num_packets == 1:
            self._advance(transit, link.stray(at_s), now_s)
            return
        groups = link.scatter(at_s, transit.num_packets)
        if len(groups) == 1:
            self._advance(transit, groups[0][1], now_s)
            return
        ends = list(accumulate(num for num, _ in groups))
        runs = list(zip([0, *ends], ends, strict=False))
        for part, (_, arrival_s) in zip(_parts(transit, runs), groups, strict=True):
            self._advance(part, arrival_s, now_s)


def _parts(whole: _Transit, runs: Sequence[Run]) -> list[_Transit]:
    """Runs of the packets of a frame, each standing where the whole stands."""
    if runs == [(0, whole.num_packets)]:
        return [whole]
    frames = take_runs(whole.frame, runs)
    # All packets of a frame have the same headers.
    header_bytes = (whole.num_bytes - (len(whole.frame) - OVERHEAD_BYTES)) // max(1, whole.num_packets - 1)
    return [
        _Transit(
            whole.route,
            frame,
            end - start,
            len(frame) - OVERHEAD_BYTES + (end - start - 1) * header_bytes,
            whole.hop,
        )
        for frame, (start, end) in zip(frames, runs, strict=True)
    ]
