"""Boundary tensors as bytes: activations forward, their gradients backward, in the codecs of the exchange.

Blockwise int8 as in SWARM (arXiv 2301.11913, section 3.4, with blocks of 4096), 4 bits in blocks of 256. Encoding is
a function of the values and of (step, microbatch, stage, direction): codecs that round at random get their key from
these, so the bits do not depend on the peer that encodes. The gradient passes through the rounding unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strategies.codecs.base import NonFiniteError
from strategies.codecs.stochastic import keyed, mix
from strategies.config import CodecConfig
from strategies.errors import SettingError
from strategies.registry import build_codec, decode_payload

# Nearest rounding loses small gradients of a block with one large value for good; at random they arrive on average.
CHOICES = {
    "fp32": ("fp32", "fp32"),
    "bf16": ("bf16", "bf16"),
    "int8": ("int8", "int8"),
    "int4": ("int4", "int4-stochastic"),
}


class BoundaryError(ValueError):
    """A boundary tensor that cannot be sent: NaN, infinity, or a type that is not fp32."""


@dataclass(frozen=True, slots=True)
class Boundary:
    """Encoder and decoder of one pipeline. `name`: fp32, bf16, int8 or int4."""

    name: str
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the name."""
        if self.name not in CHOICES:
            raise SettingError(f"boundary codec {self.name!r} is not known; known are {', '.join(CHOICES)}")

    def encode(self, x: Tensor, *, step: int, microbatch: int, stage: int, gradient: bool) -> NDArray[np.uint8]:
        """Bytes of an activation that leaves `stage`, or of the gradient of its input. Raises BoundaryError."""
        if x.dtype != torch.float32:
            raise BoundaryError(f"stage {stage} gives {x.dtype}; boundary tensors are float32")
        config = CodecConfig.model_validate({"name": CHOICES[self.name][gradient]})
        codec = keyed(build_codec(config, key=mix(self.seed, gradient)), step, microbatch, stage)
        values_N = x.detach().contiguous().view(-1)
        what = "gradient of the input" if gradient else "output"
        try:
            payload = codec.encode(values_N)
        except NonFiniteError as error:
            raise BoundaryError(f"step {step}, microbatch {microbatch}: {what} of stage {stage}: {error}") from error
        array: NDArray[np.uint8] = payload.cpu().numpy()
        return array

    def decode(self, payload: NDArray[Any], shape: tuple[int, ...], device: torch.device) -> Tensor:
        """The tensor, with the same bits everywhere. Raises PayloadError for other bytes than `encode` writes."""
        num_values = int(np.prod(shape))
        values_N = decode_payload(torch.from_numpy(payload), num_values=num_values)
        return values_N.view(shape).to(device)

    def num_bytes(self, num_values: int) -> int:
        """Length of the payload, the longer of the two directions."""
        codecs = (build_codec(CodecConfig.model_validate({"name": name})) for name in CHOICES[self.name])
        return max(codec.num_bytes(num_values) for codec in codecs)
