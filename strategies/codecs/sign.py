"""One bit a value: its sign, times one scale = mean of |x| per block.

Source: scaled sign compression, EF-SGD (arXiv 1901.09847): s = (|x|_1 / d) sign(x), here per block. Made
for contributions with error feedback: a result must not be sent so, since zeros become +-scale (`Codec.elementwise`).

The mean is a sum by halving in fp64 (`norm.py`), divided there and rounded to fp32 once: the same bits everywhere,
and the mean of decoded values is their scale exactly. A zero is sent by its own sign bit, so encoding is odd.

Body: one fp32 scale per block, then sign bits: bit k of byte j of a block is that of value j + k C, C = ceil(B / 8).
Suffixes: R blocks (rows), B values of a block, C bytes of the codes of a block, P = 8 C.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from strategies.codecs.backends import Kernels
from strategies.codecs.blockwise import FP32_MAX, Blockwise
from strategies.elementwise import scalar_like
from strategies.norm import halving_sum


@dataclass(frozen=True, slots=True)
class Sign(Blockwise):
    """1 bit a value and 4 bytes a block."""

    block: int = 4096

    name: ClassVar[str] = "sign"
    codec_id: ClassVar[int] = 7
    elementwise: ClassVar[bool] = False
    values_per_byte: ClassVar[int] = 8
    min_scale: ClassVar[float] = 2.0**-126
    max_scale: ClassVar[float] = FP32_MAX
    kernels: ClassVar[Kernels] = "numba_sparse"
    encode_kernel: ClassVar[str] = "sign_encode"
    decode_kernel: ClassVar[str] = "sign_decode"

    def _magnitudes(self, x_RB: Tensor) -> Tensor:
        sums_R = halving_sum(x_RB.to(torch.float64).abs_())
        return torch.div(sums_R, scalar_like(x_RB.shape[1], sums_R)).to(torch.float32)

    def _encode_rows(self, x_RB: Tensor, scales_R: Tensor, codes_RC: Tensor, *, first: int) -> None:
        num_rows, width = x_RB.shape
        bits_RP = torch.zeros(num_rows, 8 * codes_RC.shape[1], dtype=torch.uint8, device=x_RB.device)
        bits_RP[:, :width] = torch.signbit(x_RB)
        codes_RC.zero_()
        for k, bits_RC in enumerate(bits_RP.view(num_rows, 8, -1).unbind(1)):
            codes_RC.bitwise_or_(bits_RC << k)

    def _decode_rows(self, scales_R: Tensor, codes_RC: Tensor, out_RB: Tensor) -> None:
        scales_R1, wide_RC = scales_R.view(torch.int32).unsqueeze(1), codes_RC.int()
        for k, out_RC in enumerate(out_RB.view(torch.int32).split(codes_RC.shape[1], dim=1)):
            torch.bitwise_left_shift(wide_RC[:, : out_RC.shape[1]], 31 - k, out=out_RC)
            out_RC.bitwise_and_(-(1 << 31)).bitwise_or_(scales_R1)

    def _padding(self, codes_RC: Tensor, width: int) -> Tensor:
        bits_RP = torch.stack([(codes_RC >> k) & 1 for k in range(8)], dim=1).view(codes_RC.shape[0], -1)
        return bits_RP[:, width:]
