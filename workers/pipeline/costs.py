"""The layers of the built-in decoder with their costs (no torch: the controller cuts models, too)."""

from __future__ import annotations

import math

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
