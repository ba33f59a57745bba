"""Blockwise int8: one scale for `block` values, code = nearest integer to value / scale, in -127..127.

Source: blockwise absmax quantisation as in 8-bit Optimizers (arXiv 2110.02861), section 2.1, but linear and symmetric.
What differs: the scale absmax / 127 is rounded to 17 significant bits. Then code * scale (7 + 17 bits) is *exact* in
fp32, so decoding has no rounding at all, and encoding what was decoded gives the same bytes (idempotent).
A block whose scale would be subnormal (absmax under about 1.5e-36) is sent as zeros: some devices flush subnormals.

Body: one fp32 scale per block, then one int8 code per value. Suffixes: N values, R blocks (rows), B values of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from strategies.codecs.base import (
    HEADER_BYTES,
    NonFiniteError,
    PayloadError,
    check_values,
    largest_magnitude,
    new_payload,
    open_payload,
    output_for,
)
from strategies.elementwise import scalar_like, values_per_pass

LEVELS = 127
MIN_SCALE = 2.0**-126
# Largest scale whose product with any int8 code, -128 included, is finite in fp32.
MAX_SCALE = (2.0 - 2.0**-23) * 2.0**120


@dataclass(frozen=True, slots=True)
class Int8:
    """1 byte a value and 4 bytes a block; error of a value at most half the scale of its block."""

    block: int = 4096

    name: ClassVar[str] = "int8"
    codec_id: ClassVar[int] = 3
    lossy: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the block size."""
        if not 1 <= self.block < 1 << 32:
            raise ValueError(f"codec.block = {self.block}; it must lie between 1 and {(1 << 32) - 1}")

    def num_blocks(self, num_values: int) -> int:
        """ceil(N / block)."""
        return -(-num_values // self.block)

    def num_bytes(self, num_values: int) -> int:
        """16 + 4 ceil(N / block) + N."""
        return HEADER_BYTES + 4 * self.num_blocks(num_values) + num_values

    def encode(self, values_N: Tensor) -> Tensor:
        """See `Codec.encode`. Raises NonFiniteError if a block holds NaN, infinity or a number within a hair of it."""
        check_values(values_N)
        scales_R = self._scales(values_N)
        payload = new_payload(self, values_N)
        payload_scales_R, codes_N = self._parts(payload[HEADER_BYTES:], values_N.numel())
        payload_scales_R.copy_(scales_R)
        # x / inf = 0: an all-zero block needs no branch.
        divisors_R = torch.where(scales_R == 0, scalar_like(math.inf, scales_R), scales_R)
        scratch = values_N.new_empty(min(max(values_per_pass(values_N), self.block), values_N.numel()))
        for values, blocks, width in self._passes(values_N):
            x_RB = values_N[values].view(-1, width)
            code_RB = scratch[: x_RB.numel()].view(-1, width)
            torch.div(x_RB, divisors_R[blocks].unsqueeze(1), out=code_RB).round_()
            codes_N[values].view(-1, width).copy_(code_RB)
        return payload

    def decode(self, payload: Tensor, *, num_values: int, out: Tensor | None = None) -> Tensor:
        """See `Codec.decode`. Scales that no encoder writes are refused, so the values are always finite."""
        scales_R, codes_N = self._parts(open_payload(self, payload, num_values), num_values)
        self._check_scales(scales_R)
        out_N = output_for(payload, num_values, out)
        for values, blocks, width in self._passes(out_N):
            out_RB = out_N[values].view(-1, width)
            out_RB.copy_(codes_N[values].view(-1, width)).mul_(scales_R[blocks].unsqueeze(1))
        return out_N

    def _parts(self, body: Tensor, num_values: int) -> tuple[Tensor, Tensor]:
        scale_bytes = 4 * self.num_blocks(num_values)
        return body[:scale_bytes].view(torch.float32), body[scale_bytes:].view(torch.int8)

    def _passes(self, values_N: Tensor) -> Iterator[tuple[slice, slice, int]]:
        """Yield ranges of values and of their blocks, and the width of these blocks; the short last block by itself."""
        num_values = values_N.numel()
        whole = num_values // self.block
        rows = max(values_per_pass(values_N) // self.block, 1)
        for first in range(0, whole, rows):
            last = min(first + rows, whole)
            yield slice(first * self.block, last * self.block), slice(first, last), self.block
        if whole * self.block < num_values:
            yield slice(whole * self.block, num_values), slice(whole, whole + 1), num_values - whole * self.block

    def _scales(self, values_N: Tensor) -> Tensor:
        absmax_R = torch.empty(self.num_blocks(values_N.numel()), dtype=torch.float32, device=values_N.device)
        for values, blocks, width in self._passes(values_N):
            x_RB = values_N[values].view(-1, width)
            # amax and amin, which keep a NaN, are ten times as fast here as aminmax or an infinity norm.
            absmax_R[blocks] = torch.maximum(x_RB.amax(1), x_RB.amin(1).neg_())
        largest = largest_magnitude(absmax_R)
        if not math.isfinite(largest):
            block = int((~torch.isfinite(absmax_R)).nonzero()[0])
            raise NonFiniteError(f"codec 'int8': block {block} of {self.block} values holds {absmax_R[block].item()}")
        scales_R = torch.div(absmax_R, scalar_like(LEVELS, absmax_R))
        # Round the significand from 24 to 17 bits: half of the lowest kept bit is added, 7 bits are cut.
        scales_R = scales_R.view(torch.int32).add_(64).bitwise_and_(~127).view(torch.float32)
        scales_R.masked_fill_(scales_R < MIN_SCALE, 0.0)
        if largest_magnitude(scales_R) > MAX_SCALE:
            raise NonFiniteError(f"codec 'int8': the largest magnitude is {largest}, too near the end of fp32")
        return scales_R

    @staticmethod
    def _check_scales(scales_R: Tensor) -> None:
        if scales_R.numel() == 0:
            return
        low, high = (float(bound) for bound in torch.aminmax(scales_R))
        if not (low >= 0.0 and high <= MAX_SCALE):
            raise PayloadError(
                f"payload for codec 'int8': scales lie between {low} and {high}, which no encoder writes"
            )
