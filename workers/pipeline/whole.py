"""The whole model out of the files of its stages, for samples and exports."""

from __future__ import annotations

import math
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from workers.pipeline.spec import PipelineSpec
from workers.pipeline.state import PARAMS


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
