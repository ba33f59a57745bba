"""Who is there: peers with the stages that they serve and hold, trainers, and who stands in for whom (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from workers.pipeline.messages import PeerPlace


@dataclass(kw_only=True, slots=True)
class Peer:
    """One process that serves a stage, or waits for one."""

    process: str
    nonce: str
    address: str
    node: str
    memory_bytes: int
    stage: int | None = None
    name: str = ""
    """Under which it serves; another one with each stage that it takes."""
    versions: dict[int, int] = field(default_factory=dict)
    """Stage -> version that it holds."""
    taking: dict[int, str | None] = field(default_factory=dict)
    """Stage -> the name it shall serve it under, None for a copy: what it was ordered to take."""
    moving_to: int | None = None
    why: str = "placed"
    """Why it serves, or is going to serve, its stage."""
    came: str = "placed"
    """Why it came to the stage that it serves now."""
    serves: int | None = None
    """What it served before the controller came back."""
    throughput: float | None = None
    link_s: float | None = None
    """Seconds that a boundary tensor takes from a trainer to it."""


class Roster:
    """See the module; `live` are processes by name."""

    def __init__(self) -> None:
        self.peers: dict[str, Peer] = {}
        self.trainers: dict[str, str] = {}
        self.addresses: dict[str, str] = {}
        """Of trainers."""
        self.incarnations: dict[str, int] = {}
        self.leaving: dict[str, str] = {}
        """Processes that are to go -> why."""
        self.announcement = 0

    def next_name(self, process: str) -> str:
        """The name of a process's next incarnation: each stage that it serves is one."""
        self.incarnations[process] = self.incarnations.get(process, 0) + 1
        return f"{process}.{self.incarnations[process]}"

    def serving(self, stage: int) -> list[Peer]:
        """Peers of a stage, by name."""
        return sorted((peer for peer in self.peers.values() if peer.stage == stage), key=lambda peer: peer.process)

    def holders(self, stage: int, version: int) -> list[Peer]:
        """Processes that hold this version of a stage: its peers and its buddies."""
        found = [peer for peer in self.peers.values() if peer.versions.get(stage) == version]
        return sorted(found, key=lambda peer: peer.process)

    def by_name(self, name: str) -> Peer | None:
        """The peer that serves under this name now."""
        return next((peer for peer in self.peers.values() if peer.name == name and peer.stage is not None), None)

    def counts(self, num_stages: int) -> list[int]:
        """Peers that serve each stage, or are on their way to it."""
        return [
            sum(
                peer.stage == stage or (peer.stage is None and peer.taking.get(stage) is not None)
                for peer in self.peers.values()
            )
            for stage in range(num_stages)
        ]

    def assignment(self) -> dict[str, int]:
        """Process -> stage that it serves, of those that stay."""
        return {
            peer.process: peer.stage
            for peer in self.peers.values()
            if peer.stage is not None and peer.process not in self.leaving
        }

    def places(self) -> tuple[PeerPlace, ...]:
        """Everybody who serves, announced anew."""
        self.announcement += 1
        return tuple(
            PeerPlace(
                peer=peer.name,
                process=peer.process,
                nonce=peer.nonce,
                stage=peer.stage,
                address=peer.address,
                announcement=self.announcement,
            )
            for peer in sorted(self.peers.values(), key=lambda peer: peer.process)
            if peer.stage is not None
        )

    def at(self) -> dict[str, str]:
        """Transport address -> process, of everybody."""
        peers = {peer.address: peer.process for peer in self.peers.values()}
        return peers | {self.addresses[name]: name for name in self.trainers}

    def buddy_for(self, stage: int) -> Peer | None:
        """Who should keep a copy of a stage: of another stage, on another machine if possible, with fewest copies."""
        nodes = {peer.node for peer in self.serving(stage)}
        others = [peer for peer in self.peers.values() if peer.stage is not None and peer.stage != stage]
        others = [peer for peer in others if stage not in peer.taking and peer.process not in self.leaving]
        return min(others, key=lambda peer: (peer.node in nodes, len(peer.versions), peer.process), default=None)

    def buddies(self, stage: int) -> list[Peer]:
        """Processes of other stages that hold, or take, a copy of this one."""
        found = [p for p in self.peers.values() if p.stage != stage and (stage in p.versions or stage in p.taking)]
        return [p for p in found if p.stage is not None and p.process not in self.leaving]


def deal(microbatches: int, trainers: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Which microbatches are whose."""
    return {name: tuple(range(place, microbatches, len(trainers))) for place, name in enumerate(trainers)}
