"""Blockwise E3M0: a sign and three exponent bits. Level L = 0 is 0, levels 1..7 are 2^(L-7) * absmax of the block.

Source: the 4-bit outer gradients of Streaming DiLoCo (arXiv 2501.18512), rounded to nearest in log space. Not an MX
type. For heavy-tailed values; on Gaussian ones its rms error (0.204) is larger than that
of int4 and fp4, and magnitudes grow by 2.4 % on average: use error feedback.

The border between two levels is sqrt(1/2) of the upper one. Halving an fp32 number takes 1 from its exponent, so
`L = 7 + floor((bits of |x| - bits of the highest border) / 2^23)`, all in integers. Decoding is exact.

Body: one fp32 scale (absmax) per block, then codes, sign and level, two to a byte (`nibbles.py`). Small negative
values decode to -0. Suffixes: R blocks (rows), B values of a block, C bytes of the codes of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from strategies.codecs.blockwise import FP32_MAX
from strategies.codecs.nibbles import Nibbles
from strategies.elementwise import scalar_like

LEVELS = (0.0, *(2.0 ** (level - 7) for level in range(1, 8)))
VALUES = (*LEVELS, *(-value for value in LEVELS))
# sqrt(1/2), rounded to fp32 when it is used.
BORDER = 0.7071067811865476
MAGNITUDE_BITS = 0x7FFFFFFF


@dataclass(frozen=True, slots=True)
class E3m0(Nibbles):
    """Half a byte a value and 4 bytes a block; what is not sent as 0 is right to a factor of sqrt(2)."""

    name: ClassVar[str] = "e3m0"
    codec_id: ClassVar[int] = 6
    table: ClassVar[tuple[float, ...]] = VALUES
    # The lowest border, 2^-6.5 of it, must be normal: below, the bits are no logarithm any more.
    min_scale: ClassVar[float] = 2.0**-119
    max_scale: ClassVar[float] = FP32_MAX
    encode_kernel: ClassVar[str] = "e3m0_encode"
    decode_kernel: ClassVar[str] = "e3m0_decode"
    triton: ClassVar[str] = "e3m0"

    def _codes(self, x_RB: Tensor, scales_R: Tensor, first: int) -> Tensor:
        borders_R = torch.mul(scales_R, scalar_like(BORDER, scales_R)).masked_fill_(scales_R == 0, torch.inf)
        level_RB = x_RB.view(torch.int32).bitwise_and(MAGNITUDE_BITS).sub_(borders_R.view(torch.int32).unsqueeze(1))
        level_RB.bitwise_right_shift_(23).add_(7).clamp_(min=0)
        return torch.signbit(x_RB).to(torch.uint8).mul_(8).bitwise_or_(level_RB.to(torch.uint8))

    def _encode_arguments(self) -> tuple[float, ...]:
        return (BORDER,)
