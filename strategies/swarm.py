"""Cutting a model into pipeline stages, and the memory that a pipeline needs (SWARM, arXiv 2301.11913, section 3).

A model is a list of layers with a cost each: parameters, or measured seconds. A stage is a contiguous range of them.
`split_layers` finds the cut whose dearest stage is cheapest, by dynamic programming (Linear Partition, Skiena, "The
Algorithm Design Manual", section 8.5), and among those the most even one. No torch: the command line asks, too.

What differs from the paper: the cut need not be even, and what does not fit is refused with the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from strategies.errors import SettingError

SplitBy = Literal["params", "time"]
Combine = Callable[[float, int, int], float]
"""`(cost of the stages before, first layer of the next one, its end) -> cost of all of them`."""

PARAMETER_BYTES = 4
# Gradient of the microbatch under way, two moments of Adam, and the next state (three) beside the present one, each as
# large as the parameters.
WORKING_COPIES = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCost:
    """One layer of a model: what it holds, and what a microbatch costs in it (forward and backward; 0: not measured).

    `tied_to` names the layer that owns this one's parameters (a tied embedding): they are held here as a copy.
    """

    name: str
    num_params: int
    seconds: float = 0.0
    tied_to: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Layers `first` to `end - 1`. `num_params` are held, copies included; `num_copied` of them are owned elsewhere."""

    index: int
    first: int
    end: int
    names: tuple[str, ...]
    num_params: int
    num_copied: int
    seconds: float


def split_layers(layers: Sequence[LayerCost], num_stages: int, *, by: SplitBy = "params") -> tuple[Stage, ...]:
    """Cut the layers into `num_stages` contiguous stages; see the module.

    Raises SettingError for more stages than layers, fewer than one, layers without a measured time where `by` needs it,
    and a tied matrix whose owner is not the last layer's stage.
    """
    if num_stages < 1:
        raise SettingError(f"{num_stages} stages; a pipeline has at least 1")
    if num_stages > len(layers):
        raise SettingError(
            f"{num_stages} stages, but the model has {len(layers)} layers and a stage needs at least one: "
            f"take at most {len(layers)} stages or a deeper model"
        )
    costs = [_cost(layer, by) for layer in layers]
    bounds = _best_bounds(costs, num_stages)
    stages = tuple(_stage(index, layers, first, end) for index, (first, end) in enumerate(pairwise(bounds)))
    _check_ties(layers, stages)
    return stages


def _cost(layer: LayerCost, by: SplitBy) -> float:
    if by == "params":
        return layer.num_params
    if not layer.seconds > 0:
        raise SettingError(
            f"layer {layer.name!r} has a time of {layer.seconds} s: a split by time needs every layer measured; "
            "measure it, or split by parameters"
        )
    return layer.seconds


def _best_bounds(costs: list[float], num_stages: int) -> list[int]:
    """First layer of each stage and the number of layers: dearest stage cheapest, then least sum of squares."""
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    def dearest(best: float, start: int, end: int) -> float:
        return max(best, sums[end] - sums[start])

    limit = _table(len(costs), num_stages, dearest)[0][num_stages][len(costs)]

    def squares(total: float, start: int, end: int) -> float:
        cost = sums[end] - sums[start]
        return total + cost * cost if cost <= limit else float("inf")

    _, cuts = _table(len(costs), num_stages, squares)
    bounds = [len(costs)]
    for stage in range(num_stages, 0, -1):
        bounds.append(cuts[stage][bounds[-1]])
    return bounds[::-1]


def _table(num_layers: int, num_stages: int, combine: Combine) -> tuple[list[list[float]], list[list[int]]]:
    """`values[k][n]`: least cost of the first n layers in k stages; `cuts[k][n]`: where its last stage starts."""
    infinite = float("inf")
    values = [[infinite] * (num_layers + 1) for _ in range(num_stages + 1)]
    cuts = [[0] * (num_layers + 1) for _ in range(num_stages + 1)]
    values[0][0] = 0.0
    for k in range(1, num_stages + 1):
        for end in range(k, num_layers - (num_stages - k) + 1):
            options = ((combine(values[k - 1][start], start, end), start) for start in range(k - 1, end))
            values[k][end], cuts[k][end] = min(options)
    return values, cuts


def _stage(index: int, layers: Sequence[LayerCost], first: int, end: int) -> Stage:
    part = layers[first:end]
    here = {layer.name for layer in part}
    # An owner in the same stage: the matrix is there once.
    shared = sum(layer.num_params for layer in part if layer.tied_to in here)
    copied = sum(layer.num_params for layer in part if layer.tied_to is not None and layer.tied_to not in here)
    return Stage(
        index=index,
        first=first,
        end=end,
        names=tuple(layer.name for layer in part),
        num_params=sum(layer.num_params for layer in part) - shared,
        num_copied=copied,
        seconds=sum(layer.seconds for layer in part),
    )


def _check_ties(layers: Sequence[LayerCost], stages: Sequence[Stage]) -> None:
    for layer in layers:
        if layer.tied_to is not None and layer.tied_to not in stages[-1].names:
            raise SettingError(
                f"layer {layer.name!r} is tied to {layer.tied_to!r}, which is not in the last stage "
                f"({', '.join(stages[-1].names)}): only the last stage may own a shared matrix"
            )


# ---------------------------------------------------------------- what a pipeline needs


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineSize:
    """What decides how much memory a pipeline takes. `boundary_bytes`: one encoded boundary tensor of a microbatch.

    `num_open_steps` is 2 with delayed parameter updates, else 1. `ordered`: peers keep the gradient of each microbatch
    until the step is committed, so that they can be added in order (docs/adr/0033). `working_copies`: vectors as long
    as the parameters that a peer has beside them; `buddy_copies`: of the largest stage, which it may keep for others.
    """

    num_microbatches: int
    max_in_flight: int
    boundary_bytes: int
    min_peers: int = 1
    num_open_steps: int = 1
    ordered: bool = True
    working_copies: int = WORKING_COPIES
    buddy_copies: int = 0


def peer_bytes(stage: Stage, size: PipelineSize, *, activation_bytes: int = 0, buddy_params: int = 0) -> int:
    """Memory of one peer of the stage when only `min_peers` of them are left.

    `activation_bytes`: of one pass; `buddy_params`: parameters of the largest stage whose copy it may keep.
    """
    kept = -(-size.num_microbatches // size.min_peers) if size.ordered else 1
    copies = 1 + size.working_copies + kept * size.num_open_steps
    buddy = buddy_params * PARAMETER_BYTES * size.buddy_copies
    # The stage's input and incoming gradient of the call under way and of the one that is fetched behind it.
    return stage.num_params * PARAMETER_BYTES * copies + activation_bytes + 4 * size.boundary_bytes + buddy


def trainer_bytes(num_stages: int, size: PipelineSize) -> int:
    """Memory of a trainer: activation and gradient at each boundary, of every microbatch of the open steps.

    They stay until the step is committed in every stage, so the bound on what is in flight does not make it less.
    """
    return 2 * (num_stages - 1) * size.boundary_bytes * size.num_microbatches * size.num_open_steps


def check_pipeline(
    stages: Sequence[Stage],
    size: PipelineSize,
    *,
    peers: dict[str, int],
    trainer_limit_bytes: int,
    activation_bytes: int = 0,
) -> None:
    """Raise SettingError, with the numbers, for what can never run. `peers`: name -> bytes of memory it has for it."""
    if size.num_microbatches < len(stages):
        raise SettingError(
            f"a batch of {size.num_microbatches} microbatches is smaller than the pipeline of {len(stages)} stages: "
            f"some stage would always wait; take at least {len(stages)} microbatches or fewer stages"
        )
    if not 1 <= size.max_in_flight <= size.num_microbatches * size.num_open_steps:
        raise SettingError(
            f"{size.max_in_flight} microbatches in flight; it must lie between 1 and the "
            f"{size.num_microbatches * size.num_open_steps} of the open steps"
        )
    needed = size.min_peers * len(stages)
    if len(peers) < needed:
        raise SettingError(
            f"{len(peers)} stage peers for {len(stages)} stages with at least {size.min_peers} each: {needed} needed"
        )
    trainer = trainer_bytes(len(stages), size)
    if trainer > trainer_limit_bytes:
        raise SettingError(
            f"a trainer keeps 2 x {len(stages) - 1} boundary tensors of {size.boundary_bytes:,} bytes for each of "
            f"{size.num_microbatches * size.num_open_steps} microbatches, {trainer:,} bytes, and may take "
            f"{trainer_limit_bytes:,}: take fewer or smaller microbatches, fewer stages, or a codec of fewer bits"
        )
    largest = max(peers.values())
    buddy_params = max(stage.num_params for stage in stages)
    for stage in stages:
        bytes_needed = peer_bytes(stage, size, activation_bytes=activation_bytes, buddy_params=buddy_params)
        if bytes_needed > largest:
            raise SettingError(
                f"stage {stage.index} ({stage.names[0]} to {stage.names[-1]}) has {stage.num_params:,} parameters and "
                f"needs {bytes_needed:,} bytes; the largest of {len(peers)} peers has {largest:,}: take more stages, "
                "fewer microbatches, or larger machines"
            )
