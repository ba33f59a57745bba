"""Blockwise fp4: E2M1 values {0, 0.5, 1, 1.5, 2, 3, 4, 6} with a sign, times one fp32 scale = absmax / 6 per block.

Source: the element type of OCP Microscaling Formats (MX) 1.0. What differs: the scale is fp32, not a power of
two, and is shared by `block` values instead of 32. It is cut to 21 significant bits, so that the seven middles
between neighbours of the grid are exact in fp32 as well as all decoded values: rounding is to nearest, middles to the
even code, without any error of a division.

Body: one fp32 scale per block, then codes, sign and index into the grid, two to a byte (`nibbles.py`). Small negative
values decode to -0. Suffixes: R blocks (rows), B values of a block, C bytes of the codes of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from strategies.codecs.nibbles import Nibbles
from strategies.elementwise import scalar_like

GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = (*GRID, *(-value for value in GRID))
# Between code k and k + 1; a value in the middle takes the even one of the two.
MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
# Stands for the scale of a block of zeros: nothing in it reaches a quarter of this.
FAR = 2.0**120


@dataclass(frozen=True, slots=True)
class Fp4(Nibbles):
    """Half a byte a value and 4 bytes a block; finer near zero than int4: rms error 0.11 on Gaussian values."""

    name: ClassVar[str] = "fp4"
    codec_id: ClassVar[int] = 5
    table: ClassVar[tuple[float, ...]] = VALUES
    levels: ClassVar[float] = GRID[-1]
    dropped_bits: ClassVar[int] = 3
    # A quarter of it is the smallest number that is computed, and must be normal.
    min_scale: ClassVar[float] = 2.0**-124
    # (4/3 - 2^-20/3) 2^125, the largest of 21 significant bits whose sixfold is finite in fp32.
    max_scale: ClassVar[float] = (1 + 0x55555 * 2.0**-20) * 2.0**125
    encode_kernel: ClassVar[str] = "fp4_encode"
    decode_kernel: ClassVar[str] = "fp4_decode"
    triton: ClassVar[str] = "fp4"

    def _codes(self, x_RB: Tensor, scales_R: Tensor, first: int) -> Tensor:
        magnitude_RB = x_RB.abs()
        codes_RB = torch.signbit(x_RB).to(torch.uint8).mul_(8)
        scales_R1 = torch.where(scales_R == 0, torch.full_like(scales_R, FAR), scales_R).unsqueeze(1)
        for code, middle in enumerate(MIDDLES):
            beyond = torch.gt if code % 2 == 0 else torch.ge
            codes_RB.add_(beyond(magnitude_RB, torch.mul(scales_R1, scalar_like(middle, scales_R1))))
        return codes_RB

    def _encode_arguments(self) -> tuple[float, ...]:
        return (FAR,)
