"""Two 4-bit codes to a byte, and tables that give each code its value.

Byte i of a block holds the codes of its values i (low half) and i + C (high half), C = ceil(B / 2) bytes: both halves
of a block are read and written in order, which vector units want. Suffixes: R blocks (rows), B values, C bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pack_nibbles(codes_RB: Tensor, out_RC: Tensor) -> None:
    """Pack uint8 codes 0..15 into bytes; the unused half of the last byte of an odd block is zero."""
    half = out_RC.shape[1]
    out_RC.copy_(codes_RB[:, :half])
    high = codes_RB[:, half:]
    out_RC[:, : high.shape[1]].bitwise_or_(high << 4)


def decode_nibbles(table: Sequence[float], scales_R: Tensor, codes_RC: Tensor, out_RB: Tensor) -> None:
    """Write `table[code] * scale` for every code."""
    values_16 = torch.tensor(table, dtype=torch.float32, device=out_RB.device)
    half = codes_RC.shape[1]
    low_RC, high_RC = codes_RC & 15, codes_RC[:, : out_RB.shape[1] - half] >> 4
    for place, codes in ((slice(0, half), low_RC), (slice(half, None), high_RC)):
        torch.mul(values_16[codes.int()], scales_R.unsqueeze(1), out=out_RB[:, place])


def padding_nibbles(codes_RC: Tensor) -> Tensor:
    """Return the unused halves of odd blocks."""
    return codes_RC[:, -1] >> 4
