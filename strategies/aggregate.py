"""The weighted sum of contributions: `acc = sum_i c_i u_i`, in the order of the roster, fp32.

Source: DiLoCo (arXiv 2311.08105), algorithm 1, line 12, with the coefficients of the exchange protocol, section 1.6.
Multiply and add are separate operations, each rounded once, so that all owners get the same bits for the same roster
order; another order gives another rounding. Suffix: N = values of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from strategies.elementwise import new_scratch, passes, scalar_like


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


def weighted_sum(decoded: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Return the sum of the contributions, each times its coefficient, in order. Raises ValueError if there is none."""
    acc: Tensor | None = None
    for decoded_N, coefficient in zip(decoded, coefficients, strict=True):
        acc = accumulate(acc, decoded_N, coefficient)
    if acc is None:
        raise ValueError("there is no contribution to sum")
    return acc
