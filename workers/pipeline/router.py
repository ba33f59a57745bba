"""Which peer of a stage gets the next microbatch: interleaved weighted round robin on measured throughput.

Source: SWARM (arXiv 2301.11913), algorithm 1, and its published balancer. Each peer has a load in seconds; the least
loaded is chosen and its load grows by what the task will take it. A newcomer enters at the smallest load of its stage,
not at zero: it gets no burst. A peer that failed is banned until it announces itself again.

Pure: no clock, no randomness; ties are broken by a hash of the trainer and the peer, so that trainers differ.
What differs from the published one: a peer that was not measured yet is taken for the median of its stage, and loads
from before the first measurement, which have no unit, are converted by it.
"""

from __future__ import annotations

import zlib
from collections.abc import Container
from dataclasses import dataclass
from statistics import median

UNMEASURED = 1.0


@dataclass(kw_only=True, slots=True)
class _Peer:
    stage: int
    announcement: int
    load_s: float
    order: int
    throughput: float | None = None
    banned: str = ""


def newcomer_load_s(loads_s: list[float]) -> float:
    """Where a newcomer enters: at the current minimum of its stage."""
    return min(loads_s, default=0.0)


def lifts_ban(announcement: int, known: int) -> bool:
    """Whether an announcement is newer than the one that was known when the peer failed."""
    return announcement > known


class Router:
    """One trainer's view of the peers. Throughput is in tasks of size 1 a second; `smoothing` is of its average."""

    def __init__(self, *, trainer: str, smoothing: float = 0.1) -> None:
        assert 0 < smoothing <= 1, f"smoothing {smoothing}"
        self._trainer = trainer
        self._smoothing = smoothing
        self._peers: dict[str, _Peer] = {}

    def announce(self, peer: str, *, stage: int, announcement: int) -> None:
        """A peer serves a stage (for the first time, again, or another one). Old announcements change nothing."""
        known = self._peers.get(peer)
        if known is not None and not lifts_ban(announcement, known.announcement):
            return
        if known is not None and known.stage == stage:
            known.announcement = announcement
            if known.banned:
                known.load_s = max(known.load_s, newcomer_load_s(self._loads(stage)))
                known.banned = ""
            return
        self._peers.pop(peer, None)
        order = zlib.crc32(f"{self._trainer}/{peer}".encode())
        load_s = newcomer_load_s(self._loads(stage))
        self._peers[peer] = _Peer(stage=stage, announcement=announcement, load_s=load_s, order=order)

    def ban(self, peer: str, reason: str) -> None:
        """Choose a peer no more until it is announced anew."""
        if (known := self._peers.get(peer)) is not None:
            known.banned = reason

    def lift(self, peer: str) -> None:
        """A banned peer has answered after all: it may be chosen again, from the smallest load of its stage on."""
        known = self._peers.get(peer)
        if known is not None and known.banned:
            known.load_s = max(known.load_s, newcomer_load_s(self._loads(known.stage)))
            known.banned = ""

    def serving(self, stage: int) -> list[str]:
        """Peers of a stage that may be chosen, by name."""
        return sorted(name for name, peer in self._peers.items() if peer.stage == stage and not peer.banned)

    def banned(self) -> dict[str, str]:
        """Banned peers and why."""
        return {name: peer.banned for name, peer in sorted(self._peers.items()) if peer.banned}

    def choose(
        self, stage: int, *, size: float = 1.0, avoid: Container[str] = (), prefer: str | None = None
    ) -> str | None:
        """Choose a peer for a task and charge it; None if the stage has nobody outside `avoid` who is not banned.

        `prefer`: this one, whatever its load, if it may be chosen.
        """
        found = [
            (peer.load_s, peer.order, name)
            for name, peer in self._peers.items()
            if peer.stage == stage and not peer.banned and name not in avoid
        ]
        if not found:
            return None
        name = prefer if prefer in {one[2] for one in found} and prefer is not None else min(found)[2]
        self._peers[name].load_s += size / self.throughput(name)
        return name

    def answered(self, peer: str, *, size: float, seconds: float) -> None:
        """A task was done in `seconds` of the peer's own time (what it waited for others in its queue is not its)."""
        known = self._peers.get(peer)
        if known is None or seconds <= 0:
            return
        rate = size / seconds
        if known.throughput is not None:
            known.throughput += self._smoothing * (rate - known.throughput)
            return
        mates = [mate for mate in self._peers.values() if mate.stage == known.stage]
        if all(mate.throughput is None for mate in mates):
            for mate in mates:
                mate.load_s *= UNMEASURED / rate
        known.throughput = rate

    def throughput(self, peer: str) -> float:
        """Measured throughput of a peer, or the median of its stage's, or 1 where nothing is measured."""
        known = self._peers[peer]
        if known.throughput is not None:
            return known.throughput
        measured = [
            mate.throughput
            for mate in self._peers.values()
            if mate.stage == known.stage and mate.throughput is not None
        ]
        return median(measured) if measured else UNMEASURED

    def _loads(self, stage: int) -> list[float]:
        return [peer.load_s for peer in self._peers.values() if peer.stage == stage and not peer.banned]
