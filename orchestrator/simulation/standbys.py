"""Processes that wait to take a dead member's place, in symbols: the counterpart of `workers/standby.py`.

Who waits and who is chosen is production's `StandbyPool`. A standby follows the journal as far as it is durable, and
fetches a state of every fragment now and then from some member; it takes the state only if it is what the journal has
sealed. Whose place it takes it joins as any new process does, only that it has that state, which may be old.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.simulation.symbols import StateChunk
from orchestrator.standby import StandbyPool
from workers.record_log import RecordLog

if TYPE_CHECKING:
    from orchestrator.simulation.cluster import Cluster
    from orchestrator.simulation.island import Island

LOOK_S = 0.5
States = dict[int, list[StateChunk]]


class Standbys:
    """Those of one run; `wanted` 0 means none, and nothing happens."""

    def __init__(self, cluster: Cluster, wanted: int) -> None:
        """Nothing waits before `start`."""
        self.cluster = cluster
        self.pool = StandbyPool(wanted=wanted)
        self.logs: dict[str, RecordLog] = {}
        self.states: dict[str, States] = {}
        self._started = 0

    def start(self) -> None:
        """Start those that are wanted, and follow the run."""
        if self.pool.wanted:
            self._look()

    def _look(self) -> None:
        cluster = self.cluster
        for _ in range(self.pool.lacking()):
            self._started += 1
            nonce = f"standby#{self._started}"
            self.pool.start(nonce)
            self.logs[nonce], self.states[nonce] = RecordLog(), {}
        for nonce in list(self.pool.nonces.values()):
            self._follow(nonce)
        cluster.time.after(LOOK_S * (0.5 + cluster.rng.random()), self._look)

    def _follow(self, nonce: str) -> None:
        cluster, log, states = self.cluster, self.logs[nonce], self.states[nonce]
        coordinator = next((c.coordinator for c in cluster.controllers if c.coordinator is not None), None)
        if coordinator is not None:
            log.extend(len(log), coordinator.rows[len(log) : coordinator.flushed + 1], rewrite=True)
        donors = [island for island in cluster.processes() if not island.frozen]
        if log.genesis is None or not donors:
            return
        donor = cluster.rng.choice(donors)
        for fragment, part in enumerate(donor.replica.parts):
            chunks = [chunk for c in range(len(part.hi)) if (chunk := donor.replica.serve(fragment, c)) is not None]
            held = states[fragment][0].n if fragment in states else -1
            if chunks and chunks[0].n > held and self._is_sealed(donor, log, fragment, chunks):
                states[fragment] = chunks
        if len(states) == len(log.genesis.digests):
            self.pool.holds(nonce)

    @staticmethod
    def _is_sealed(donor: Island, log: RecordLog, fragment: int, chunks: list[StateChunk]) -> bool:
        known = log.on_path(fragment, chunks[0].chain)
        return known and donor.replica.digest_of_chunks(fragment, chunks) == log.digest(fragment, chunks[0].n)

    def waits(self) -> bool:
        """Whether somebody can take a place at once."""
        return bool(self.pool.nonces)

    def take(self) -> tuple[RecordLog, States] | None:
        """What the one who takes a place has at hand: empty if it has no whole state of the journal's history."""
        taken = self.pool.take()
        if taken is None:
            return None
        log, states = self.logs.pop(taken[1]), self.states.pop(taken[1])
        whole = log.genesis is not None and len(states) == len(log.genesis.digests)
        if not whole or not all(log.on_path(fragment, chunks[0].chain) for fragment, chunks in states.items()):
            return RecordLog(), {}
        return log, states
