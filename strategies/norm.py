"""Sums and norms that have the same bits everywhere.

`torch.sum` adds in an order that depends on the vector width of the CPU. A sum by halving (the second half added to
the first, elementwise, until one value is left) has one order, one rounding per addition, and an error that grows
with log2 N only. Squares of fp32 values are exact in fp64 and cannot overflow there.
Suffixes: N values, R rows, W values of a row.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from strategies.codecs.backends import Backend, load_kernels
from strategies.elementwise import scalar_like, square_root, values_per_pass

CLIP_EPS = 1e-6
# Part of the definition of the sum, the same on every device: another width is another order of additions.
ROW_VALUES = 32_768


def halving_sum(values_RW: Tensor) -> Tensor:
    """Return the sums of the rows of a tensor (a view of its first column); `values_RW` is overwritten. W >= 1."""
    remaining = values_RW.shape[-1]
    while remaining > 1:
        kept = (remaining + 1) // 2
        values_RW[..., : remaining - kept].add_(values_RW[..., kept:remaining])
        remaining = kept
    return values_RW[..., 0]


class SquareSum:
    """The sum of squares of a vector that arrives in consecutive parts; the bits do not depend on how it is cut.

    With `backend` "numba" the sums of parts on a CPU are made by compiled code (`codecs.numba_sums`): the same bits.
    """

    def __init__(self, backend: Backend = "torch") -> None:
        self._kernels = load_kernels("numba_sums") if backend == "numba" else None
        self._sums: list[Tensor] = []
        self._complete = False

    def add(self, values_N: Tensor) -> None:
        """Add the next part. All but the last must have a multiple of `ROW_VALUES` values."""
        num_rows, rest = self._rows_of(values_N)
        if self._kernels is not None and values_N.is_cpu:
            sums_R = torch.empty(num_rows + (rest > 0), dtype=torch.float64)
            self._kernels.squares_of_rows(values_N.numpy(), sums_R.numpy())
            self._sums.append(sums_R)
            return
        rows_RW = values_N[: num_rows * ROW_VALUES].view(num_rows, ROW_VALUES)
        stride = max(values_per_pass(values_N) // ROW_VALUES, 1)
        parts = [rows_RW[first : first + stride] for first in range(0, num_rows, stride)]
        if rest:
            parts.append(values_N[-rest:].view(1, rest))
        # clone: the sums alone are kept, not the squares they are views of.
        self._sums.extend(halving_sum(_squares(part)).clone() for part in parts)

    def add_with_total(self, values_N: Tensor, weight: Tensor, total_N: Tensor, *, begin: bool) -> None:
        """`add`, and `total_N += weight * values_N` (`begin`: `=` instead of `+=`), each operation rounded once."""
        if self._kernels is None or not values_N.is_cpu:
            self.add(values_N)
            if begin:
                torch.mul(values_N, weight, out=total_N)
            else:
                total_N.add_(torch.mul(values_N, weight))
            return
        num_rows, rest = self._rows_of(values_N)
        sums_R = torch.empty(num_rows + (rest > 0), dtype=torch.float64)
        kernel = self._kernels.begin_weighted if begin else self._kernels.add_weighted
        kernel(values_N.numpy(), float(weight), total_N.numpy(), sums_R.numpy())
        self._sums.append(sums_R)

    def _rows_of(self, values_N: Tensor) -> tuple[int, int]:
        assert not self._complete, f"a part follows one whose length is no multiple of {ROW_VALUES}"
        num_rows, rest = divmod(values_N.numel(), ROW_VALUES)
        self._complete = rest > 0
        return num_rows, rest

    def total(self) -> Tensor:
        """Return the sum as a 0-dim fp64 tensor."""
        if not self._sums:
            return torch.zeros((), dtype=torch.float64)
        return halving_sum(torch.cat(self._sums)).clone()


def sum_of_squares(values_N: Tensor, *, backend: Backend = "torch") -> Tensor:
    """Return the sum of squares of a flat tensor as a 0-dim fp64 tensor, with the same bits on every device."""
    total = SquareSum(backend)
    total.add(values_N)
    return total.total().to(values_N.device)


def _squares(values: Tensor) -> Tensor:
    wide = values.to(torch.float64)
    return wide.mul_(wide)


def clip_scale(chunks: Iterable[Tensor], max_norm: float) -> Tensor | None:
    """Return the factor that brings the norm of all chunks together to at most `max_norm`, 0-dim fp32.

    As `torch.nn.utils.clip_grad_norm_`: min(1, max_norm / (norm + 1e-6)). None when there is no chunk.
    """
    total: Tensor | None = None
    for chunk in chunks:
        squares = sum_of_squares(chunk)
        total = squares if total is None else torch.add(total, squares)
    if total is None:
        return None
    norm = torch.add(square_root(total), scalar_like(CLIP_EPS, total))
    factor = torch.div(scalar_like(max_norm, total), norm)
    return torch.minimum(factor, scalar_like(1.0, total)).to(torch.float32)
