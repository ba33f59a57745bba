"""A model as a list of layers, and one stage of it: the built-in decoder, or any `nn.Module`s in a row.

A stage of the decoder is built alone, with the bits that it has in the whole model: a machine that could not hold the
model can hold its stage. Suffixes as in `workers/model/llama.py`; X: whatever goes from one layer to the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from strategies.swarm import LayerCost, Stage
from workers.model.errors import ModelError
from workers.model.linear import linear
from workers.model.llama import Layer, rotary_tables
from workers.model.shape import DecoderShape, parameter_shapes
from workers.pipeline.costs import decoder_costs
from workers.pipeline.spec import EMBEDDING, EMBEDDING_WEIGHT, HEAD

__all__ = [
    "StageModel",
    "build_decoder_stage",
    "decoder_costs",
    "list_costs",
    "list_stage",
]


class Embedding(nn.Module):
    """First layer of the decoder: `tokens_BT -> x_BTD`."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.vocab_size, shape.dim))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Look the rows up."""
        return nn.functional.embedding(tokens_BT, self.weight)


class RotaryLayer(Layer):
    """A decoder layer that holds its tables of positions: `x_BTD -> y_BTD`."""

    cos_T1E: Tensor
    sin_T1E: Tensor

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__(shape)
        cos_T1E, sin_T1E = rotary_tables(shape.seq_len, shape.head_dim, shape.rope_theta)
        self.register_buffer("cos_T1E", cos_T1E, persistent=False)
        self.register_buffer("sin_T1E", sin_T1E, persistent=False)

    def forward(self, x_BTD: Tensor) -> Tensor:  # type: ignore[override]
        """Attention and feed-forward at positions 0 to T - 1."""
        positions = x_BTD.shape[1]
        return super().forward(x_BTD, self.cos_T1E[:positions], self.sin_T1E[:positions])


class Head(nn.Module):
    """Last layer: final norm and output matrix, `x_BTD -> logits_BTV`. With tied embeddings it owns the matrix."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        self.weight = nn.Parameter(torch.empty(shape.vocab_size, shape.dim))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Normalise and multiply."""
        return linear(self.norm(x_BTD), self.weight)


@dataclass(frozen=True, slots=True)
class StageModel:
    """The layers of one stage. `names`: name in the whole model -> parameter of this stage.

    `copy_of`: the parameter here that the last stage owns under the same name (tied embeddings), or None.
    """

    layers: nn.Sequential
    names: dict[str, nn.Parameter]
    copy_of: str | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Run all layers."""
        out: Tensor = self.layers(x)
        return out


def build_decoder_stage(shape: DecoderShape, stage: Stage, *, seed: int) -> StageModel:
    """Build one stage with the values that `Llama(shape, seed=seed)` has there.

    The numbers of the other stages are drawn as well, one tensor at a time, and thrown away: memory is the stage's and
    the largest tensor's.
    """
    modules: list[nn.Module] = []
    names: dict[str, nn.Parameter] = {}
    for name in stage.names:
        if name == EMBEDDING:
            module: nn.Module = Embedding(shape)
            names[EMBEDDING_WEIGHT] = module.get_parameter("weight")
        elif name == HEAD:
            module = Head(shape)
            names["model.norm.weight"] = module.get_parameter("norm.weight")
            if not shape.tie_embeddings:
                names["lm_head.weight"] = module.get_parameter("weight")
            elif EMBEDDING in stage.names:
                # One stage holds both: one matrix.
                module.weight = names[EMBEDDING_WEIGHT]
            else:
                names[EMBEDDING_WEIGHT] = module.get_parameter("weight")
        else:
            module = RotaryLayer(shape)
            names |= {f"{name}.{local}": parameter for local, parameter in module.named_parameters()}
        modules.append(module)
    _draw(shape, names, seed)
    copied = shape.tie_embeddings and EMBEDDING in stage.names and HEAD not in stage.names
    return StageModel(nn.Sequential(*modules), names, EMBEDDING_WEIGHT if copied else None)


@torch.no_grad()
def _draw(shape: DecoderShape, wanted: dict[str, nn.Parameter], seed: int) -> None:
    """Initialise as `Llama` does: from one generator, in the order of the whole model's parameters."""
    generator = torch.Generator().manual_seed(seed)
    residual_std = shape.init_std / math.sqrt(2 * shape.layers)
    scratch = torch.empty(0)
    for name, size in parameter_shapes(shape).items():
        if len(size) < 2:
            continue  # norms start at one
        std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else shape.init_std
        target = wanted.get(name)
        (scratch.resize_(size) if target is None else target).normal_(0.0, std, generator=generator)


def list_costs(layers: Sequence[nn.Module]) -> list[LayerCost]:
    """Costs by parameters of a model that is given as a list of layers. Raises ModelError for shared parameters."""
    seen: dict[int, str] = {}
    costs = []
    for index, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            owner = seen.setdefault(id(parameter), f"layer {index}")
            if owner != f"layer {index}":
                raise ModelError(
                    f"parameter {name!r} of layer {index} is the same as one of {owner}: only the built-in decoder can "
                    "share a matrix between stages; give each layer parameters of its own"
                )
        costs.append(LayerCost(name=f"layers.{index}", num_params=sum(p.numel() for p in layer.parameters())))
    return costs


def list_stage(layers: Sequence[nn.Module], stage: Stage) -> StageModel:
    """One stage of a model that is given as a list of layers, each `x -> y`; the modules themselves, not copies."""
    part = {f"layers.{index}": layers[index] for index in range(stage.first, stage.end)}
    names = {f"{name}.{local}": p for name, layer in part.items() for local, p in layer.named_parameters()}
    return StageModel(nn.Sequential(*part.values()), names)
