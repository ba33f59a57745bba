"""Processes that wait to take a dead island's place: who waits where, who is chosen, how many are lacking. Pure.

A standby is no member: it has no incarnation, no leases and no vote, and the journal does not know it. It becomes the
next incarnation of an island by joining like any new process, only that everything slow is behind it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import count

PREFIX = "standby-"


def is_standby(name: str) -> bool:
    """Whether a process was started to wait."""
    return name.startswith(PREFIX)


@dataclass(kw_only=True, slots=True)
class StandbyPool:
    """`wanted` processes that wait, by name; `ready` are those that have built the model and hold an anchor."""

    wanted: int
    nonces: dict[str, str] = field(default_factory=dict)
    nodes: dict[str, str] = field(default_factory=dict)
    ready: set[str] = field(default_factory=set)
    _numbers: count[int] = field(default_factory=count)

    def lacking(self) -> int:
        """How many are to be started."""
        return max(self.wanted - len(self.nonces), 0)

    def start(self, nonce: str) -> str:
        """A process is started; its name. Names are not used twice."""
        name = f"{PREFIX}{next(self._numbers)}"
        self.nonces[name] = nonce
        return name

    def here(self, name: str, node: str) -> None:
        """It runs on a node."""
        if name in self.nonces:
            self.nodes[name] = node

    def holds(self, nonce: str) -> None:
        """A process says that it is built and holds an anchor."""
        self.ready.update(name for name, own in self.nonces.items() if own == nonce)

    def gone(self, name: str) -> None:
        """It died, or is ended."""
        self.nonces.pop(name, None)
        self.nodes.pop(name, None)
        self.ready.discard(name)

    def take(self, near: str | None = None, avoid: Collection[str] = ()) -> tuple[str, str, str | None] | None:
        """`(name, nonce, node)` of who takes a place: one that is ready, on the node `near` if there is one there.

        One that is not ready yet is ahead of a process that has not been started. None where nobody waits; who waits on
        a node of `avoid`, which goes, goes with it.
        """
        staying = [name for name in self.nonces if self.nodes.get(name) not in avoid]
        if not staying:
            return None
        order = sorted(staying, key=lambda name: (name not in self.ready, self._distance(name, near), name))
        name = order[0]
        nonce, node = self.nonces[name], self.nodes.get(name)
        self.gone(name)
        return name, nonce, node

    def _distance(self, name: str, near: str | None) -> int:
        return 0 if near is not None and self.nodes.get(name) == near else 1


def status_of(pool: StandbyPool) -> Mapping[str, str]:
    """For whoever watches: name -> ready or starting."""
    return {name: "ready" if name in pool.ready else "starting" for name in sorted(pool.nonces)}
