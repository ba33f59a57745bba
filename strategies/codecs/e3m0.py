"""Blockwise E3M0: a sign and three exponent bits. Level L = 0 is 0, levels 1..7 are 2^(L-7) * absmax of the block.

Source: Streaming DiLoCo (arXiv 2501.18512), section 3.3, and `algorithms.md` 9.6: rounding to nearest in log space.
Not an MX type. For heavy-tailed values; on Gaussian ones its rms error (0.204) is larger than that of int4 and fp4, and
magnitudes grow by 2.4 % on average: use error feedback.

The border between two levels is sqrt(1/2) of the upper one. Halving an fp32 number takes 1 from its exponent, so
`L = 7 + floor((bits of |x| - bits of the highest border) / 2^23)`, all in integers. Decoding is exact.

Body: one fp32 scale (absmax) per block, then codes, sign and level, two to a byte (`nibbles.py`). Small negative
values decode to -0. Suffixes: R blocks (rows), B values of a block, C bytes of the codes of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from strategies.codecs.blockwise import FP32_MAX, Blockwise
from strategies.codecs.nibbles import decode_nibbles, pack_nibbles, padding_nibbles
from strategies.elementwise import scalar_like

LEVELS = (0.0, *(2.0 ** (level - 7) for level in range(1, 8)))
VALUES = (*LEVELS, *(-value for value in LEVELS))
# sqrt(1/2), rounded to fp32 when it is used.
BORDER = 0.7071067811865476
MAGNITUDE_BITS = 0x7FFFFFFF


@dataclass(frozen=True, slots=True)
class E3m0(Blockwise):
    """Half a byte a value and 4 bytes a block; what is not sent as 0 is right to a factor of sqrt(2)."""

    block: int = 256

    name: ClassVar[str] = "e3m0"
    codec_id: ClassVar[int] = 6
    values_per_byte: ClassVar[int] = 2
    # The lowest border, 2^-6.5 of it, must be normal: below, the bits are no logarithm any more.
    min_scale: ClassVar[float] = 2.0**-119
    max_scale: ClassVar[float] = FP32_MAX

    def _scales(self, magnitudes_R: Tensor) -> Tensor:
        return magnitudes_R

    def _encode_rows(self, x_RB: Tensor, scales_R: Tensor, codes_RC: Tensor, *, first: int) -> None:
        borders_R = torch.mul(scales_R, scalar_like(BORDER, scales_R)).masked_fill_(scales_R == 0, torch.inf)
        level_RB = x_RB.view(torch.int32).bitwise_and(MAGNITUDE_BITS).sub_(borders_R.view(torch.int32).unsqueeze(1))
        level_RB.bitwise_right_shift_(23).add_(7).clamp_(min=0)
        codes_RB = torch.signbit(x_RB).to(torch.uint8).mul_(8).bitwise_or_(level_RB.to(torch.uint8))
        pack_nibbles(codes_RB, codes_RC)

    def _decode_rows(self, scales_R: Tensor, codes_RC: Tensor, out_RB: Tensor) -> None:
        decode_nibbles(VALUES, scales_R, codes_RC, out_RB)

    def _padding(self, codes_RC: Tensor, width: int) -> Tensor:
        return padding_nibbles(codes_RC)

    def _run_encode_kernel(self, kernels: ModuleType, x_N: Any, scales_R: Any, codes: Any) -> bool:
        return bool(kernels.e3m0_encode(x_N, scales_R, codes, self.block))

    def _decode_kernel(self, kernels: ModuleType) -> Any:
        return kernels.e3m0_decode
