"""What an island's transport has measured of its links, as rows for metrics.jsonl, every few seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from workers.transport.base import Transport

EVERY_S = 5.0


class LinkRows:
    """Asks the transport now and then; rows go to `observe(at_s, row)`."""

    def __init__(self, transport: Transport, observe: Callable[[float, dict[str, object]], None]) -> None:
        """The first rows come `EVERY_S` after the first call of `note`."""
        self._transport, self._observe = transport, observe
        self._noted_s: float | None = None

    def note(self, now: float, peers: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        """`peers`: `name.incarnation` -> (address, versions held). A link to an unknown address is nobody's."""
        if self._noted_s is None:
            self._noted_s = now
        if now - self._noted_s < EVERY_S:
            return
        self._noted_s = now
        name_of = {address: name.rpartition(".")[0] for name, (address, _) in list(peers.items())}
        for link in self._transport.take_links():
            if link.address in name_of:
                row: dict[str, object] = {"kind": "link", "peer": name_of[link.address], "bytes": link.num_bytes}
                self._observe(now, row | {"bytes_per_s": link.bytes_per_s, "rtt_s": link.rtt_s})
