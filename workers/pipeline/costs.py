"""The decoder's layers with their costs, and what a stage sends (no torch: the controller cuts models, too)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from strategies.swarm import LayerCost
from workers.model.shape import DecoderShape, parameter_shapes
from workers.pipeline.spec import EMBEDDING, EMBEDDING_WEIGHT, HEAD


def decoder_costs(shape: DecoderShape) -> list[LayerCost]:
    """The layers of the built-in decoder by parameters: embedding, decoder layers, norm with head."""
    sizes = {name: math.prod(size) for name, size in parameter_shapes(shape).items()}
    matrix = sizes[EMBEDDING_WEIGHT]
    tied_to = HEAD if shape.tie_embeddings else None
    layers = [
        LayerCost(name=prefix[:-1], num_params=sum(size for name, size in sizes.items() if name.startswith(prefix)))
        for prefix in (f"model.layers.{index}." for index in range(shape.layers))
    ]
    return [
        LayerCost(name=EMBEDDING, num_params=matrix, tied_to=tied_to),
        *layers,
        LayerCost(name=HEAD, num_params=matrix + sizes["model.norm.weight"]),
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Boundary tensors of one microbatch that cross a peer's link."""

    sent: int
    received: int


def tensors_of(stage: int, num_stages: int) -> Traffic:
    """What a peer of a stage sends and receives for a microbatch; tokens and targets are not worth counting."""
    if num_stages == 1:
        return Traffic(sent=0, received=0)
    if stage == 0:  # its output; the gradient of it
        return Traffic(sent=1, received=1)
    if stage == num_stages - 1:  # its input, once: its backward is its forward; the gradient of it
        return Traffic(sent=1, received=1)
    return Traffic(sent=2, received=3)  # its input twice
