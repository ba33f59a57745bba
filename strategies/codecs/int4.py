"""Blockwise int4: one scale for `block` values, code = value / scale rounded to an integer in -7..7.

Source: `algorithms.md` 9.4, absmax / 7, as in 4-bit Optimizers (arXiv 2309.01507) without the zero point. What
differs: the scale is cut to 21 significant bits, so that code * scale is exact in fp32 (`blockwise.py`), and the
largest value of a block is never under 7 scales and always sent as 7. Relative rms error on Gaussian values 0.127.

Body: one fp32 scale per block, then codes in two's complement, two to a byte (`nibbles.py`). Nearest and stochastic
rounding (`stochastic.py`) write the same bytes: one decoder reads them. Suffixes: R blocks (rows), B values, C bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from strategies.codecs.blockwise import Blockwise, cut_scales, divisors
from strategies.codecs.nibbles import decode_nibbles, pack_nibbles, padding_nibbles
from strategies.codecs.stochastic import key_words, round_randomly
from strategies.elementwise import scalar_like

LEVELS = 7
DROPPED_BITS = 3
VALUES = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0)


@dataclass(frozen=True, slots=True)
class Int4(Blockwise):
    """Half a byte a value and 4 bytes a block, rounded to nearest even: an error of at most half a scale."""

    block: int = 256

    name: ClassVar[str] = "int4"
    codec_id: ClassVar[int] = 4
    values_per_byte: ClassVar[int] = 2
    min_scale: ClassVar[float] = 2.0**-126
    # Its product with any code, -8 included, is finite in fp32.
    max_scale: ClassVar[float] = (2.0 - 2.0**-23) * 2.0**124

    def _scales(self, magnitudes_R: Tensor) -> Tensor:
        return cut_scales(torch.div(magnitudes_R, scalar_like(LEVELS, magnitudes_R)), dropped_bits=DROPPED_BITS)

    def _encode_rows(self, x_RB: Tensor, scales_R: Tensor, codes_RC: Tensor, *, first: int) -> None:
        rounded_RB = self._rounded(torch.div(x_RB, divisors(scales_R)), first)
        pack_nibbles(rounded_RB.to(torch.int8).view(torch.uint8).bitwise_and_(15), codes_RC)

    def _rounded(self, quotient_RB: Tensor, first: int) -> Tensor:
        return quotient_RB.round_()

    def _decode_rows(self, scales_R: Tensor, codes_RC: Tensor, out_RB: Tensor) -> None:
        decode_nibbles(VALUES, scales_R, codes_RC, out_RB)

    def _padding(self, codes_RC: Tensor, width: int) -> Tensor:
        return padding_nibbles(codes_RC)

    def _run_encode_kernel(self, kernels: ModuleType, x_N: Any, scales_R: Any, codes: Any) -> bool:
        return bool(kernels.int4_encode(x_N, scales_R, codes, self.block))

    def _decode_kernel(self, kernels: ModuleType) -> Any:
        return kernels.int4_decode


@dataclass(frozen=True, slots=True)
class Int4Stochastic(Int4):
    """Int4 rounded up or down at random, right on average: an error of less than the scale of the block."""

    key: int = 0

    name: ClassVar[str] = "int4-stochastic"

    def _rounded(self, quotient_RB: Tensor, first: int) -> Tensor:
        return round_randomly(quotient_RB, largest=LEVELS, key=self.key, first=first)

    def _run_encode_kernel(self, kernels: ModuleType, x_N: Any, scales_R: Any, codes: Any) -> bool:
        return bool(kernels.int4_encode_randomly(x_N, scales_R, codes, self.block, *key_words(self.key)))
