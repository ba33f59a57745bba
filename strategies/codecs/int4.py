"""Blockwise int4: one scale for `block` values, code = value / scale rounded to an integer in -7..7.

Source: linear absmax quantisation, as in 4-bit Optimizers (arXiv 2309.01507), symmetric: scale = absmax / 7. What
differs: the scale is cut to 21 significant bits, so that code * scale is exact in fp32 (`blockwise.py`), and the
largest value of a block is never under 7 scales and always sent as 7. Relative rms error on Gaussian values 0.127.

Body: one fp32 scale per block, then codes in two's complement, two to a byte (`nibbles.py`). Nearest and stochastic
rounding (`stochastic.py`) write the same bytes: one decoder reads them. Suffixes: R blocks (rows), B values, C bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from strategies.codecs.blockwise import divisors
from strategies.codecs.nibbles import Nibbles
from strategies.codecs.stochastic import key_words, round_randomly

LEVELS = 7
VALUES = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0)


@dataclass(frozen=True, slots=True)
class Int4(Nibbles):
    """Half a byte a value and 4 bytes a block, rounded to nearest even: an error of at most half a scale."""

    name: ClassVar[str] = "int4"
    codec_id: ClassVar[int] = 4
    table: ClassVar[tuple[float, ...]] = VALUES
    levels: ClassVar[float] = float(LEVELS)
    dropped_bits: ClassVar[int] = 3
    min_scale: ClassVar[float] = 2.0**-126
    # Its product with any code, -8 included, is finite in fp32.
    max_scale: ClassVar[float] = (2.0 - 2.0**-23) * 2.0**124
    encode_kernel: ClassVar[str] = "int4_encode"
    decode_kernel: ClassVar[str] = "int4_decode"
    triton: ClassVar[str] = "int4"

    def _codes(self, x_RB: Tensor, scales_R: Tensor, first: int) -> Tensor:
        rounded_RB = self._rounded(torch.div(x_RB, divisors(scales_R)), first)
        return rounded_RB.to(torch.int8).view(torch.uint8).bitwise_and_(15)

    def _rounded(self, quotient_RB: Tensor, first: int) -> Tensor:
        return quotient_RB.round_()


@dataclass(frozen=True, slots=True)
class Int4Stochastic(Int4):
    """Int4 rounded up or down at random, right on average: an error of less than the scale of the block."""

    key: int = 0

    name: ClassVar[str] = "int4-stochastic"
    encode_kernel: ClassVar[str] = "int4_encode_randomly"
    triton_encodes: ClassVar[bool] = False

    def _rounded(self, quotient_RB: Tensor, first: int) -> Tensor:
        return round_randomly(quotient_RB, largest=LEVELS, key=self.key, first=first)

    def _encode_arguments(self) -> tuple[float, ...]:
        return key_words(self.key)
