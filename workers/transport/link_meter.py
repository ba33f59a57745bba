"""How fast each peer answers and sends, learned from the fetches that are made anyway: no byte travels for it.

The way of BBR (Cardwell et al., ACM Queue 2016): the shortest answer is the round trip, the rate at which bytes come in
is the bandwidth. Only fetches of blobs that are there count; one that waits at the peer tells nothing of the link.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

SMOOTHING = 0.3
MIN_RATE_BYTES = 32 * 1024
"""A fetch below this is over before its rate can be told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkReport:
    """What was measured of one peer: see `orchestrator.metrics.LinkRow`."""

    address: str
    num_bytes: int
    bytes_per_s: float | None
    rtt_s: float | None


@dataclass(kw_only=True, slots=True)
class _Link:
    num_bytes: int = 0
    bytes_per_s: float | None = None
    rtt_s: float | None = None


class LinkMeter:
    """Running measurements of the links to all peers. Thread-safe."""

    def __init__(self) -> None:
        """Nothing is known of anybody."""
        self._lock = threading.Lock()
        self._links: dict[str, _Link] = {}

    def note(self, address: str, *, num_bytes: int, answer_s: float, receive_s: float) -> None:
        """A fetch is done: `answer_s` to its first message, `receive_s` from there to its last byte."""
        with self._lock:
            link = self._links.setdefault(address, _Link())
            link.num_bytes += num_bytes
            link.rtt_s = answer_s if link.rtt_s is None else min(link.rtt_s, answer_s)
            if num_bytes >= MIN_RATE_BYTES and receive_s > 0:
                rate, before = num_bytes / receive_s, link.bytes_per_s
                link.bytes_per_s = rate if before is None else before + SMOOTHING * (rate - before)

    def take(self, most: int = 8) -> tuple[LinkReport, ...]:
        """Links that were used since they were last taken, those first that waited longest for it.

        At most `most`: among hundreds of members each has hundreds of links. Their counts and round trips begin anew.
        """
        with self._lock:
            used = [(address, link) for address, link in self._links.items() if link.rtt_s is not None][:most]
            reports = tuple(
                LinkReport(address=address, num_bytes=link.num_bytes, bytes_per_s=link.bytes_per_s, rtt_s=link.rtt_s)
                for address, link in used
            )
            for address, link in used:
                link.num_bytes, link.rtt_s = 0, None
                self._links[address] = self._links.pop(address)  # to the end of the queue
        return reports

    def forget(self, address: str) -> None:
        """The peer is gone."""
        with self._lock:
            self._links.pop(address, None)
