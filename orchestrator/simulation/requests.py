"""What a job of a simulated process can wait for: blobs of another process, or virtual time."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.simulation.symbols import Payload
from workers import member_events as ev

if TYPE_CHECKING:
    from orchestrator.simulation.island import Island


class FetchFailed(Exception):
    """A transport call did not bring what was asked for; or (`mismatch`) a state was not as sealed."""

    def __init__(self, why: str, *, mismatch: bool = False) -> None:
        super().__init__(why)
        self.mismatch = mismatch


@dataclass(frozen=True, slots=True)
class Fetch:
    """What a job waits for: `look(server)` on the process at `address`; None means that it lacks it.

    With `wait_s` the server waits for what is not there yet.
    """

    address: str
    look: Callable[[Island], Any]
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Busy:
    """What a job waits for: virtual seconds of work."""

    seconds: float


Job = Generator[Fetch | Busy, Any, ev.Event | None]


def busy(island: Island) -> Busy:
    """A little work."""
    return Busy(0.003 * island.cluster.rng.random())


def found(payloads: Any) -> list[Payload] | None:
    """All of them, or None if one is missing."""
    out = list(payloads)
    return None if any(payload is None for payload in out) else out
