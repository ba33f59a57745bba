"""Blockwise int8: one scale for `block` values, code = value / scale rounded to an integer in -127..127.

Source: blockwise absmax quantisation as in 8-bit Optimizers (arXiv 2110.02861), section 2.1, but linear and symmetric.
What differs: the scale absmax / 127 is rounded to 17 significant bits, so that code * scale (7 + 17 bits) is exact in
fp32 (`blockwise.py`). With stochastic rounding (`stochastic.py`) it is cut to 17 bits, so that the largest value of
a block is never under 127 scales and always sent as 127. Both forms have the same bytes: one decoder reads them.

Body: one fp32 scale per block, then one int8 code per value. Suffixes: N values, R blocks (rows), B values of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from strategies.codecs.blockwise import Blockwise, divisors
from strategies.codecs.stochastic import key_words, round_randomly

LEVELS = 127
# Largest scale whose product with any int8 code, -128 included, is finite in fp32.
MAX_SCALE = (2.0 - 2.0**-23) * 2.0**120


@dataclass(frozen=True, slots=True)
class Int8(Blockwise):
    """1 byte a value and 4 bytes a block, rounded to nearest even: an error of at most half the scale of the block."""

    block: int = 4096

    name: ClassVar[str] = "int8"
    codec_id: ClassVar[int] = 3
    values_per_byte: ClassVar[int] = 1
    levels: ClassVar[float] = float(LEVELS)
    dropped_bits: ClassVar[int] = 7
    # Half of the lowest bit that is kept.
    rounding: ClassVar[int] = 1 << 6
    min_scale: ClassVar[float] = 2.0**-126
    max_scale: ClassVar[float] = MAX_SCALE
    encode_kernel: ClassVar[str] = "int8_encode"
    decode_kernel: ClassVar[str] = "int8_decode"
    triton: ClassVar[str] = "int8"

    def _encode_rows(self, x_RB: Tensor, scales_R: Tensor, codes_RC: Tensor, *, first: int) -> None:
        codes_RC.view(torch.int8).copy_(torch.div(x_RB, divisors(scales_R)).round_())

    def _decode_rows(self, scales_R: Tensor, codes_RC: Tensor, out_RB: Tensor) -> None:
        out_RB.copy_(codes_RC.view(torch.int8)).mul_(scales_R.unsqueeze(1))


@dataclass(frozen=True, slots=True)
class Int8Stochastic(Int8):
    """Int8 rounded up or down at random, right on average: an error of less than the scale of the block."""

    key: int = 0

    name: ClassVar[str] = "int8-stochastic"
    rounding: ClassVar[int] = 0
    encode_kernel: ClassVar[str] = "int8_encode_randomly"
    triton_encodes: ClassVar[bool] = False

    def _encode_rows(self, x_RB: Tensor, scales_R: Tensor, codes_RC: Tensor, *, first: int) -> None:
        quotient_RB = torch.div(x_RB, divisors(scales_R))
        codes_RC.view(torch.int8).copy_(round_randomly(quotient_RB, largest=LEVELS, key=self.key, first=first))

    def _encode_arguments(self) -> tuple[float, ...]:
        return key_words(self.key)
