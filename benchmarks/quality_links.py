"""How long the rows of the quality table would take on slow links: a prediction from the bytes they sent (pure).

For a model of 100 M parameters whose inner step takes a second: bytes per parameter and exchange as measured, each
exchange its bytes at the link's speed and five one-way delays. An island waits for what its strategy does not hide:
`overlap` inner steps of each round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PARAMS, STEP_S, DELAYS = 100_000_000, 1.0, 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """One direction of an island's connection."""

    name: str
    bits_per_s: float
    one_way_s: float


LINKS = (
    Link(name="1 Gbit/s, 100 ms", bits_per_s=1e9, one_way_s=0.1),
    Link(name="100 Mbit/s, 50 ms", bits_per_s=1e8, one_way_s=0.05),
    Link(name="10 Mbit/s, 50 ms", bits_per_s=1e7, one_way_s=0.05),
)


def hidden_steps(settings: Mapping[str, Any]) -> int:
    """Inner steps that an island makes while one exchange is under way."""
    if settings["strategy.name"] in ("eager", "delayed"):
        return int(settings["strategy.inner_steps"])
    return int(settings.get("strategy.overlap_steps", 0))


def predicted_s(record: Mapping[str, Any], link: Link, *, islands: int) -> float:
    """Seconds that the run of a record would take with a model of `PARAMS`."""
    settings, steps = record["settings"], int(record["steps"])
    fragments = int(settings.get("strategy.num_fragments", 1))
    exchanges = max(int(record["exchanges"]) * fragments, 1)
    sent_bytes = record["bytes_sent"] / islands / record["params"] * PARAMS
    # What is under way at the same time shares the link: the link's work is at least the sum of all of them.
    transfer_s = sent_bytes * 8 / link.bits_per_s / exchanges + DELAYS * link.one_way_s
    waited_s = max(transfer_s - hidden_steps(settings) * STEP_S, 0.0) * exchanges
    return max(steps * STEP_S + waited_s, sent_bytes * 8 / link.bits_per_s)
