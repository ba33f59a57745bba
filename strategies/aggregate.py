"""The weighted sum of contributions: `acc = sum_i c_i u_i`, in the order of the roster, fp32.

Source: DiLoCo (arXiv 2311.08105), algorithm 1, line 12, with the coefficients of the exchange protocol, section 1.6.
Multiply and add are separate operations, each rounded once, so that all owners get the same bits for the same roster
order; another order gives another rounding. `decode_accumulate` does the same with a payload, part by part: what a
contribution decodes to is never in memory as a whole. Suffix: N = values of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from strategies.codecs.base import Codec
from strategies.elementwise import new_scratch, passes, scalar_like
from strategies.norm import SquareSum


class Accumulated(NamedTuple):
    """A sum of contributions, and the sum of squares of the last of them (0-dim fp64, `norm.sum_of_squares`)."""

    acc_N: Tensor
    sum_of_squares: Tensor


def accumulate(acc_N: Tensor | None, decoded_N: Tensor, coefficient: float) -> Tensor:
    """Return `acc_N + coefficient * decoded_N`, adding in place; None starts a new sum. `decoded_N` is not changed."""
    weight = scalar_like(coefficient, decoded_N)
    if acc_N is None:
        return torch.mul(decoded_N, weight)
    scratch = new_scratch(decoded_N)
    for part in passes(decoded_N):
        decoded = decoded_N[part]
        acc_N[part].add_(torch.mul(decoded, weight, out=scratch[: decoded.numel()]))
    return acc_N


def decode_accumulate(
    codec: Codec, payload: Tensor, coefficient: float, acc_N: Tensor | None, *, num_values: int
) -> Accumulated:
    """Return what `accumulate(acc_N, codec.decode(payload), coefficient)` returns, with the same bits.

    The payload is decoded into a vector that stays in a core's cache. Raises PayloadError for a malformed payload;
    `acc_N` must then not be used any more.
    """
    first = acc_N is None
    if acc_N is None:
        acc_N = torch.empty(num_values, dtype=torch.float32, device=payload.device)
    weight, squares = scalar_like(coefficient, acc_N), SquareSum()
    for part, decoded in codec.decode_parts(payload, num_values=num_values):
        squares.add(decoded)
        if first:
            torch.mul(decoded, weight, out=acc_N[part])
        else:
            acc_N[part].add_(torch.mul(decoded, weight))
    return Accumulated(acc_N, squares.total())


def weighted_sum(decoded: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Return the sum of the contributions, each times its coefficient, in order. Raises ValueError if there is none."""
    acc: Tensor | None = None
    for decoded_N, coefficient in zip(decoded, coefficients, strict=True):
        acc = accumulate(acc, decoded_N, coefficient)
    if acc is None:
        raise ValueError("there is no contribution to sum")
    return acc
