"""How long the rows of the quality table would take on slow links: a prediction from the bytes they sent (pure).

For a model of 100 M parameters whose inner step takes a second: bytes per parameter and exchange as measured, each
exchange its bytes at the link's speed and five one-way delays. An island waits for what its strategy does not hide:
`overlap` inner steps of each round. One that waits for nobody waits for its own pushes only.

Islands of unequal speed (`train.pace_s`) have taken turns in virtual time: the run says how many steps of the quickest
it took. Islands in step would have taken as long as the slowest one.
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


def training_s(record: Mapping[str, Any], *, slowest: float = 1.0) -> float:
    """Seconds of the run's inner steps with a model of `PARAMS`, nobody waiting for a link.

    `slowest`: as if one of its islands, all of which were equally fast, needed that many times `STEP_S`.
    """
    pace_s = record["settings"].get("train.pace_s")
    if pace_s is None:
        return float(record["steps"]) * STEP_S * slowest
    if slowest != 1.0:
        raise ValueError(f"slowest = {slowest:g}: the run of {record['row']} had unequal islands already")
    return float(record["virtual_s"]) / float(pace_s) * STEP_S


def predicted_s(record: Mapping[str, Any], link: Link, *, islands: int, slowest: float = 1.0) -> float:
    """Seconds that the run of a record would take with a model of `PARAMS`; `slowest`: see `training_s`."""
    settings, steps_s = record["settings"], training_s(record, slowest=slowest)
    fragments = int(settings.get("strategy.num_fragments", 1))
    exchanges = max(int(record["exchanges"]) * fragments, 1)
    sent_bytes = record["bytes_sent"] / islands / record["params"] * PARAMS
    # What is under way at the same time shares the link: the link's work is at least the sum of all of them.
    transfer_s = sent_bytes * 8 / link.bits_per_s / exchanges + DELAYS * link.one_way_s
    awaited = exchanges / islands if settings["strategy.name"] == "async-dn" else exchanges
    waited_s = max(transfer_s - hidden_steps(settings) * STEP_S * slowest, 0.0) * awaited
    return max(steps_s + waited_s, sent_bytes * 8 / link.bits_per_s)
