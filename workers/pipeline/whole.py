"""The whole model out of the files of its stages, for samples and exports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from workers.pipeline.spec import PipelineSpec
from workers.pipeline.state import PARAMS
from workers.pipeline.user_layers import load_layers


def load_whole(spec: PipelineSpec, folder: Path) -> dict[str, Tensor]:
    """Parameters by name from a snapshot of all stages. Raises OSError where a stage's file is missing."""
    found: dict[str, Tensor] = {}
    for stage in range(spec.num_stages):
        flats = load_file(folder / f"stage-{stage}.safetensors")
        for unit in spec.units_of(stage):
            start = 0
            for name, shape in spec.slots(unit).items():
                size = math.prod(shape)
                found[name] = flats[f"{unit}/{PARAMS}"][start : start + size].view(shape)
                start += size
    return found


class LayeredModel(nn.Module):
    """A model of the user's, all of its layers one after the other; its parameters have the names of its snapshots."""

    def __init__(self, layers: Sequence[nn.Module], *, seq_len: int) -> None:
        """`seq_len`: the context that it was trained with."""
        super().__init__()
        self.layers, self.seq_len = nn.Sequential(*layers), seq_len

    def forward(self, tokens: Tensor) -> Tensor:
        """What the last layer gives: logits (B, T, V), unless the factory brings a loss of something else."""
        output: Tensor = self.layers(tokens)
        return output


def build_whole(spec: PipelineSpec) -> LayeredModel:
    """The whole model of `model.factory`, with the values that it begins with. Raises ModelError."""
    assert spec.factory is not None, "the built-in decoder is `Llama`"
    builders, _ = load_layers(spec.factory, spec.options, seed=spec.train.seed, source_digest=spec.factory_digest)
    return LayeredModel([build() for build in builders], seq_len=spec.shape.seq_len)
