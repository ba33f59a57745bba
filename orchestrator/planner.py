"""What a strategy costs on given links: bytes, seconds, utilisation, memory. Pure arithmetic, nothing is measured here.

The bytes are exact: the chunks of the run, in the sizes that the codecs announce, dealt to owners as an exchange does
(`deal_chunks`). Each member sends its pieces to the owners and, for the chunks that it owns, results to all others:
(M - 1) / M of a contribution and (M - 1) / M of a result, which is the 2 (M - 1) / M of a ring. The seconds are a model
with the constants below, each with where it was measured.

A strategy is one entry in `COSTS`; `tests/unit/config/test_planner.py` fails for a preset without one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from orchestrator.errors import UserError
from strategies.config import CodecConfig
from strategies.fragments import TensorSpec, default_chunk_values, plan_fragments

if TYPE_CHECKING:
    from orchestrator.config import RunConfig
    from strategies.codecs.base import Codec
    from workers.model.shape import DecoderShape

# Offer, order to reduce, pull of pieces, report, order to fetch, pull of results, report, commit: a pull is a round
# trip, a message half of one (docs/protocol.md, "A synchronisation, step by step").
ROUND_TRIPS = 5.0
# A stream moves about this much a round trip before it waits for acknowledgements: 225 Mbit/s at 100 ms, measured with
# Flight between two namespaces (Linux's default send buffer of 4 MiB).
WINDOW_BYTES = 2.8e6
# Of a link's rate: 92 to 94 of 100 Mbit/s, measured in the same place; the rest is headers.
LINK_SHARE = 0.92
# fp32 bytes a second of all arithmetic of an exchange (encode, decode and sum, outer step) on one core.
ARITHMETIC_BYTES_PER_S = 1e9
# A preset that keeps the processors busy for this share is good enough to be chosen for its quality.
GOOD_UTILISATION = 0.9
FP32 = 4
# Payloads that a member holds at most: its contribution, the newest result and the one before it. With two states of
# 4 bytes this is what `make bench` finds in memory beside a bare loop (benchmarks/results/memory.json, within 10 %).
PAYLOADS_HELD = 3
# What Ray, Arrow Flight and compiled kernels take in a process beside torch: 33, 38 and 121 MB, and some free heap.
PROCESS_BYTES = 200_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model on islands with equal links and equal speed.

    num_params   trained values
    tensors      their names and shapes in order; without them fragments are taken to be of equal size
    num_islands  members of an exchange
    link_bit_per_s, rtt_s   each island's rate, up and down at once, and the round trip between any two
    step_s       seconds of one inner step
    shape        of the built-in decoder, where the model is one: pipelines are cut by it
    step_samples samples of one inner step
    """

    num_params: int
    num_islands: int
    link_bit_per_s: float
    rtt_s: float
    step_s: float
    tensors: tuple[TensorSpec, ...] = ()
    shape: DecoderShape | None = None
    step_samples: int = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """What one round of a strategy sends, per member.

    exchanges       payload bytes of each exchange of the round (one for each fragment)
    values          values in each of them
    inner_steps     local steps of a round
    overlap_steps   steps that an exchange may take before anybody waits for it; 0: it is waited for
    round_trips     of latency in each exchange
    peers           members that one of them exchanges bytes with
    memory_bytes    at each member beside torch itself and activations
    """

    exchanges: tuple[int, ...]
    values: tuple[int, ...]
    inner_steps: int
    overlap_steps: int
    memory_bytes: int
    peers: int
    round_trips: float = ROUND_TRIPS


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What the planner knows of a strategy: its costs, and how far it departs from training on one machine.

    `departs` orders the choice only: of two that keep the processors busy, the one that departs less.
    """

    traffic: Callable[[Case, RunConfig], Traffic]
    departs: int
    purpose: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a preset costs in a case; `needs_bit_per_s` is bytes of a round over the time to compute it."""

    preset: str
    strategy: str
    codec: str
    inner_steps: int
    num_exchanges: int
    bytes_per_round: int
    largest_exchange_bytes: int
    exchange_s: float
    round_s: float
    utilisation: float
    needs_bit_per_s: float
    memory_bytes: int
    window_bound: bool


# ---------------------------------------------------------------- the costs of strategies


def all_reduce(case: Case, config: RunConfig) -> Traffic:
    """Every member's displacement or gradient to owners, their results to all: `diloco`, `ddp` and what they are in."""
    fragments = fragment_values(case, config)
    contribution, result = codecs_of(config.codec)
    sizes = [(payload_bytes(contribution, n, chunk), payload_bytes(result, n, chunk)) for n, chunk in fragments]
    members, owners = case.num_islands, 2 if config.robust.verify else 1
    steps = config.strategy.inner_steps_at(1.0)
    return Traffic(
        exchanges=tuple(
            -(-(owners * pieces * (members - 1) + results * (members - owners)) // members) for pieces, results in sizes
        ),
        values=tuple(n for n, _ in fragments),
        inner_steps=steps,
        overlap_steps=overlap_of(config),
        memory_bytes=memory_bytes(case, config, payloads=PAYLOADS_HELD * max(map(sum, sizes)) // 2),
        peers=members - 1,
    )


def pushes(case: Case, config: RunConfig) -> Traffic:
    """A push of every member for each of its rounds: its displacement to owners, and each push's result to all.

    A member sends (M - 1) / M of a contribution and, as an owner of an equal part of M pushes, M - 1 results. It waits
    for its own push alone: on average half of the others' stand before it in the queue.
    """
    fragments = fragment_values(case, config)
    contribution, result = codecs_of(config.codec)
    sizes = [(payload_bytes(contribution, n, chunk), payload_bytes(result, n, chunk)) for n, chunk in fragments]
    members = case.num_islands
    return Traffic(
        exchanges=tuple(-(-pieces * (members - 1) // members) + results * (members - 1) for pieces, results in sizes),
        values=tuple(n for n, _ in fragments),
        inner_steps=config.strategy.inner_steps_at(1.0),
        overlap_steps=0,
        memory_bytes=memory_bytes(case, config, payloads=PAYLOADS_HELD * max(map(sum, sizes)) // 2),
        peers=members - 1,
    )


def pairs(case: Case, config: RunConfig) -> Traffic:
    """What a member of a group sends between two full merges, at their mean (fp32): parameters, or two vectors.

    The merge itself is one exchange of all in `strategy.merge_every` rounds.
    """
    merge = all_reduce(case, config)
    strategy, values = config.strategy, sum(merge.values)
    every = strategy.merge_every
    each = (4 if strategy.name == "gossip" else 8) * values
    sent = each * (strategy.group_size - 1) * (every - 1) * strategy.gossip_steps
    return replace(
        merge,
        exchanges=(-(-(sum(merge.exchanges) + sent) // every),),
        values=(values,),
        inner_steps=strategy.inner_steps,
        memory_bytes=merge.memory_bytes + 12 * values * (strategy.group_size + 1),
        peers=strategy.group_size - 1,
    )


COSTS: Mapping[str, Entry] = {
    "ddp": Entry(traffic=all_reduce, departs=0, purpose="gradients averaged after every step: one machine's training"),
    "diloco": Entry(traffic=all_reduce, departs=1, purpose="one outer step for H local ones"),
    "muloco": Entry(traffic=all_reduce, departs=2, purpose="DiLoCo with Muon inside, which stands fewer bits"),
    "streaming": Entry(traffic=all_reduce, departs=2, purpose="DiLoCo in fragments, sent while training goes on"),
    "eager": Entry(traffic=all_reduce, departs=3, purpose="a whole round to send in, own work counted at once"),
    "delayed": Entry(traffic=all_reduce, departs=4, purpose="a whole round to send in, applied one round late"),
    "decoupled": Entry(traffic=all_reduce, departs=3, purpose="streaming with whoever is there: nobody is waited for"),
    "async-dn": Entry(traffic=pushes, departs=4, purpose="each island at its own pace, every push a version"),
    "noloco": Entry(traffic=pairs, departs=5, purpose="pairs that pull towards each other, merged now and then"),
    "gossip": Entry(traffic=pairs, departs=5, purpose="pairs that average, merged now and then"),
    "sparseloco": Entry(traffic=all_reduce, departs=4, purpose="one value of 64 is sent, the rest is kept for later"),
}
# Their results are due when the next contribution is made, whatever `overlap_steps` says.
WHOLE_ROUND = frozenset({"eager", "delayed"})
OUTER_STATES = {"average": 0, "sgd": 0, "adam": 2}


def overlap_of(config: RunConfig) -> int:
    """Inner steps that a result may take (`Strategy.overlap_steps`)."""
    if config.strategy.name in WHOLE_ROUND:
        return config.strategy.inner_steps_at(1.0)
    value = config.strategy.model_dump().get("overlap_steps", 0)
    return int(value)


def memory_bytes(case: Case, config: RunConfig, *, payloads: int) -> int:
    """What one island holds beside torch itself and activations.

    Parameters, gradients, moments, anchor, outer states, payloads, and what else the process needs.
    """
    moments = {"adamw": 2, "muon": 1}[config.train.optimizer]
    if config.strategy.name == "ddp":
        vectors = 2 + 1 + 2  # parameters and gradients; the anchor; the moments are outer states
    else:
        vectors = 2 + moments + 1 + OUTER_STATES.get(config.strategy.outer, 1)
        vectors += config.strategy.own_pace  # what came since the momentum was taken
        vectors += config.strategy.name in WHOLE_ROUND  # the contribution that is under way
    feedback = 2 if config.codec.error_feedback else 0  # the residual, and the one that the open exchange may make
    return FP32 * case.num_params * (vectors + feedback) + payloads + PROCESS_BYTES


def codecs_of(config: CodecConfig) -> tuple[Codec, Codec]:
    """Codec of contributions, codec of results."""
    from strategies.registry import build_codec
    from strategies.strategy import result_codec_of

    codec = build_codec(config.model_copy(update={"backend": "torch"}))
    return codec, result_codec_of(codec)


def payload_bytes(codec: Codec, num_values: int, chunk_values: int) -> int:
    """Bytes of a fragment on the wire, chunk by chunk."""
    whole, rest = divmod(num_values, chunk_values)
    return whole * codec.num_bytes(chunk_values) + (codec.num_bytes(rest) if rest else 0)


def fragment_values(case: Case, config: RunConfig) -> list[tuple[int, int]]:
    """Values and chunk size of every fragment."""
    strategy, block, chunk = config.strategy, config.codec.values_per_block, config.exchange.chunk_values
    if case.tensors:
        specs = plan_fragments(
            case.tensors,
            num_fragments=strategy.num_fragments,
            pattern=strategy.pattern,
            chunk_values=chunk,
            block=block,
        )
        return [(spec.numel, spec.chunk_values) for spec in specs]
    cuts = [case.num_params * p // strategy.num_fragments for p in range(strategy.num_fragments + 1)]
    sizes = [stop - start for start, stop in pairwise(cuts)]
    return [(size, chunk or default_chunk_values(size, block)) for size in sizes]


# ---------------------------------------------------------------- from traffic to time


def exchange_s(case: Case, num_bytes: int, num_values: int, traffic: Traffic, connections: int) -> float:
    """Seconds from the offer to the commit of one exchange."""
    if not num_bytes:
        return 0.0
    rate = min(case.link_bit_per_s * LINK_SHARE, _window_rate(case, traffic, connections))
    return traffic.round_trips * case.rtt_s + 8 * num_bytes / rate + FP32 * num_values / ARITHMETIC_BYTES_PER_S


def _window_rate(case: Case, traffic: Traffic, connections: int) -> float:
    """Bits a second of all streams of a member together, by round trips alone."""
    return 8 * WINDOW_BYTES * connections * max(traffic.peers, 1) / max(case.rtt_s, 1e-6)


def cost_of(preset: str, config: RunConfig, case: Case) -> Cost:
    """The costs of one configuration in a case.

    Raises:
        UserError: the table has no entry for its strategy, or its settings do not fit the model.
    """
    entry = entry_of(config)
    traffic = entry.traffic(case, config)
    connections = config.exchange.connections
    each = [
        exchange_s(case, size, values, traffic, connections)
        for size, values in zip(traffic.exchanges, traffic.values, strict=True)
    ]
    compute_s = traffic.inner_steps * case.step_s
    waits = sum(max(seconds - traffic.overlap_steps * case.step_s, 0.0) for seconds in each)
    # Hidden behind computing or not, a link carries one round's bytes in a round.
    busy_s = sum(each) - len(each) * traffic.round_trips * case.rtt_s if sum(traffic.exchanges) else 0.0
    round_s = max(compute_s + waits, busy_s)
    total = sum(traffic.exchanges)
    return Cost(
        preset=preset,
        strategy=config.strategy.name,
        codec=config.codec.name,
        inner_steps=traffic.inner_steps,
        num_exchanges=len(traffic.exchanges),
        bytes_per_round=total,
        largest_exchange_bytes=max(traffic.exchanges),
        exchange_s=max(each),
        round_s=round_s,
        utilisation=compute_s / round_s,
        needs_bit_per_s=8 * total / compute_s,
        memory_bytes=traffic.memory_bytes,
        window_bound=total > 0 and _window_rate(case, traffic, connections) < LINK_SHARE * case.link_bit_per_s,
    )


def entry_of(config: RunConfig) -> Entry:
    """The planner's entry for a configuration's strategy. Raises UserError where there is none."""
    entry = COSTS.get(config.strategy.name)
    if entry is None:
        raise UserError(
            f"strategy.name = {config.strategy.name!r} has no entry in the planner's table of costs",
            remedy="one line in COSTS of orchestrator/planner.py",
        )
    return entry


def choose(costs: Sequence[Cost]) -> Cost:
    """The one to start from: of those that keep the processors busy the one that departs least from one machine.

    Where none does: the one that keeps them busiest.
    """
    good = [cost for cost in costs if cost.utilisation >= GOOD_UTILISATION]
    if not good:
        return max(costs, key=lambda cost: cost.utilisation)
    return min(good, key=lambda cost: (COSTS[cost.strategy].departs, -cost.bytes_per_round))


def steps_for(cost: Cost, case: Case, share: float = GOOD_UTILISATION) -> int:
    """Inner steps of a round that would keep the processors busy for `share`; what it waits for stays the same."""
    waits = cost.round_s - cost.inner_steps * case.step_s
    return max(-int(-waits * share / (1 - share) // case.step_s), 1)
