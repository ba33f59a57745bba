"""Blockwise int8: one scale for `block` values, code = value / scale rounded to an integer in -127..127.

Source: blockwise absmax quantisation as in 8-bit Optimizers (arXiv 2110.02861), section 2.1, but linear and symmetric.
What differs: the scale absmax / 127 is rounded to 17 significant bits, so that code * scale (7 + 17 bits) is exact in
fp32 (`blockwise.py`). With stochastic rounding (`stochastic.py`) it is cut to 17 bits, so that the largest value of
a block is never under 127 scales and always sent as 127. Both forms have the same bytes: one decoder reads them.

Body: one fp32 scale per block, then one int8 code per value. Suffixes: N values, R blocks (rows), B values of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from strategies.codecs.blockwise import Blockwise, cut_scales, divisors
from strategies.codecs.stochastic import key_words, round_randomly
from strategies.elementwise import scalar_like

LEVELS = 127
DROPPED_BITS = 7
MIN_SCALE = 2.0**-126
# Largest scale whose product with any int8 code, -128 included, is finite in fp32.
MAX_SCALE = (2.0 - 2.0**-23) * 2.0**120


@dataclass(frozen=True, slots=True)
class Int8(Blockwise):
    """1 byte a value and 4 bytes a block, rounded to nearest even: an error of at most half the scale of the block."""

    block: int = 4096

    name: ClassVar[str] = "int8"
    codec_id: ClassVar[int] = 3
    values_per_byte: ClassVar[int] = 1
    min_scale: ClassVar[float] = MIN_SCALE
    max_scale: ClassVar[float] = MAX_SCALE

    def _scales(self, magnitudes_R: Tensor) -> Tensor:
        scales_R = torch.div(magnitudes_R, scalar_like(LEVELS, magnitudes_R))
        # Half of the lowest kept bit is added.
        scales_R.view(torch.int32).add_(1 << (DROPPED_BITS - 1))
        return cut_scales(scales_R, dropped_bits=DROPPED_BITS)

    def _encode_rows(self, x_RB: Tensor, scales_R: Tensor, codes_RC: Tensor, *, first: int) -> None:
        codes_RC.view(torch.int8).copy_(torch.div(x_RB, divisors(scales_R)).round_())

    def _decode_rows(self, scales_R: Tensor, codes_RC: Tensor, out_RB: Tensor) -> None:
        out_RB.copy_(codes_RC.view(torch.int8)).mul_(scales_R.unsqueeze(1))

    def _run_encode_kernel(self, kernels: ModuleType, x_N: Any, scales_R: Any, codes: Any) -> bool:
        return bool(kernels.int8_encode(x_N, scales_R, codes.view("i1"), self.block))

    def _decode_kernel(self, kernels: ModuleType) -> Any:
        return kernels.int8_decode


@dataclass(frozen=True, slots=True)
class Int8Stochastic(Int8):
    """Int8 rounded up or down at random, right on average: an error of less than the scale of the block."""

    key: int = 0

    name: ClassVar[str] = "int8-stochastic"

    def _scales(self, magnitudes_R: Tensor) -> Tensor:
        return cut_scales(torch.div(magnitudes_R, scalar_like(LEVELS, magnitudes_R)), dropped_bits=DROPPED_BITS)

    def _encode_rows(self, x_RB: Tensor, scales_R: Tensor, codes_RC: Tensor, *, first: int) -> None:
        quotient_RB = torch.div(x_RB, divisors(scales_R))
        codes_RC.view(torch.int8).copy_(round_randomly(quotient_RB, largest=LEVELS, key=self.key, first=first))

    def _run_encode_kernel(self, kernels: ModuleType, x_N: Any, scales_R: Any, codes: Any) -> bool:
        return bool(
            kernels.int8_encode_randomly(x_N, scales_R, codes.view("i1"), self.block, *key_words(self.key))
        )
