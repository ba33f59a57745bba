"""What the 4-bit codecs share: two codes to a byte, and a table that gives each code its value.

Byte i of a block holds the codes of its values i (low half) and i + C (high half), C = ceil(B / 2) bytes: both halves
of a block are read and written in order, which vector units want. The unused half of the last byte of an odd block is
zero. Suffixes: R blocks (rows), B values of a block, C bytes of the codes of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from strategies.codecs.blockwise import Blockwise


@dataclass(frozen=True, slots=True)
class Nibbles(Blockwise):
    """Base of the 4-bit codecs: half a byte a value and 4 bytes a block."""

    block: int = 256

    values_per_byte: ClassVar[int] = 2
    # What each of the 16 codes decodes to, before it is multiplied by the scale of its block; the product is exact.
    table: ClassVar[tuple[float, ...]]

    def _codes(self, x_RB: Tensor, scales_R: Tensor, first: int) -> Tensor:
        """Return the codes as uint8."""
        raise NotImplementedError

    def _encode_rows(self, x_RB: Tensor, scales_R: Tensor, codes_RC: Tensor, *, first: int) -> None:
        codes_RB, half = self._codes(x_RB, scales_R, first), codes_RC.shape[1]
        codes_RC.copy_(codes_RB[:, :half])
        codes_RC[:, : codes_RB.shape[1] - half].bitwise_or_(codes_RB[:, half:] << 4)

    def _decode_rows(self, scales_R: Tensor, codes_RC: Tensor, out_RB: Tensor) -> None:
        table_16 = torch.tensor(self.table, dtype=torch.float32, device=out_RB.device)
        # What the low and the high half of each of the 256 bytes stand for.
        low_256, high_256 = table_16.repeat(16), table_16.repeat_interleave(16)
        half, bytes_N = codes_RC.shape[1], codes_RC.int().view(-1)
        low_RC = low_256.index_select(0, bytes_N).view(codes_RC.shape)
        high_RC = high_256.index_select(0, bytes_N).view(codes_RC.shape)[:, : out_RB.shape[1] - half]
        torch.mul(low_RC, scales_R.unsqueeze(1), out=out_RB[:, :half])
        torch.mul(high_RC, scales_R.unsqueeze(1), out=out_RB[:, half:])

    def _padding(self, codes_RC: Tensor, width: int) -> Tensor:
        return codes_RC[:, -1] >> 4
