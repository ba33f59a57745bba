"""Ask the switch of a lab: one JSON object for another over its socket."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.lab.errors import LabError
from faults.lab.switch import MAX_MESSAGE_BYTES, SOCKET
from faults.lab.targets import RouteBlock

TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkStatus:
    """One direction of a link: its shape, and what it has carried and dropped (bytes of IP packets; packets)."""

    name: str
    rate_mbit: float | None
    delay_ms: float
    jitter_ms: float
    loss: float
    queue_ms: float
    num_bytes: int
    num_packets: int
    dropped_queue: int
    dropped_loss: int
    dropped_cut: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LabStatus:
    """A lab as its switch sees it.

    Attributes:
        cut: the (from, to) nodes between which nothing passes.
        num_on_the_way: frames on their way.
        num_frames: frames that were handed over after a delay, and
        num_late: those of them that came more than a millisecond later than they should have;
        worst_late_ms: the latest one.
        num_unroutable, num_refused: frames for nobody, and for an interface that was down.
        overruns: node -> frames dropped as the switch did not take them in time: loss that nobody asked for.
        scheduling: whether the switch runs before all other processes ("realtime") or among them ("normal").
        cpu_s: CPU time of the switch.
    """

    links: tuple[LinkStatus, ...]
    cut: tuple[tuple[str, str], ...]
    num_on_the_way: int
    num_frames: int
    num_late: int
    worst_late_ms: float
    num_unroutable: int
    num_refused: int
    overruns: dict[str, int]
    scheduling: str
    cpu_s: float

    def link(self, name: str) -> LinkStatus:
        """One direction by its name ("us-1 up", "us>eu"); raises `LabError` if there is none."""
        by_name = {link.name: link for link in self.links}
        if name not in by_name:
            raise LabError(f"no link is called {name!r}", remedy=f"one of {', '.join(by_name)}")
        return by_name[name]


class SwitchControl:
    """A client of one switch; opens a connection for each request, so that it holds nothing."""

    def __init__(self, state_dir: Path, lab: str) -> None:
        self.path = state_dir / SOCKET
        self.lab = lab

    def set(self, links: Mapping[str, Mapping[str, Any]]) -> None:
        """Change links: name -> fields of `Shape`."""
        self._ask({"do": "set", "links": links})

    def cut(self, blocks: Iterable[RouteBlock]) -> None:
        """Close ways."""
        self._ask({"do": "cut", "blocks": _plain(blocks)})

    def heal(self, blocks: Iterable[RouteBlock] | None) -> None:
        """Open ways; None = all."""
        self._ask({"do": "heal"} | ({} if blocks is None else {"blocks": _plain(blocks)}))

    def detach(self) -> None:
        """Have the switch go on when its owner is gone."""
        self._ask({"do": "detach"})

    def status(self) -> LabStatus:
        """What the switch says; what the kernel counts beside it (`overruns`) is the caller's to add."""
        answer = self._ask({"do": "status"})
        links = tuple(LinkStatus(name=name, **values) for name, values in answer.pop("links").items())
        cut = tuple((source, target) for source, target in answer.pop("cut"))
        return LabStatus(links=links, cut=cut, overruns={}, **answer)

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(TIMEOUT_S)
            try:
                connection.connect(str(self.path))
                connection.send(json.dumps(request).encode())
                data = connection.recv(MAX_MESSAGE_BYTES)
            except OSError as error:
                raise LabError(
                    f"the switch of lab {self.lab!r} does not answer: {error}", remedy="atoll lab down, then up"
                ) from error
        answer: dict[str, Any] = json.loads(data or b'{"error": "it ended"}')
        if "error" in answer:
            raise LabError(f"the switch of lab {self.lab!r} refused: {answer['error']}")
        return answer


def _plain(blocks: Iterable[RouteBlock]) -> list[dict[str, list[str]]]:
    return [{"sources": list(block.sources), "targets": list(block.targets)} for block in blocks]
