"""Tools for arithmetic that must have the same bits on every member: scalars, powers, and passes over long vectors."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

# Values per pass on a CPU: a few vectors of this length stay in a core's second-level cache, and the allocator reuses
# temporaries of this size. Larger ones are given back to the system and cost a page fault per 4 KiB each time
# (measured: a Nesterov step of 1 MiB chunks runs at 0.8 GB/s in one pass, at 7 GB/s in passes).
PASS_VALUES = 65_536


def scalar_like(value: float, like: Tensor) -> Tensor:
    """Return `value` rounded to the type of `like`, as a 0-dim tensor on its device.

    A Python number as an operand is not enough: CUDA divides by one through its reciprocal.
    """
    return torch.full((), value, dtype=like.dtype, device=like.device)


def integer_power(base: float, exponent: int) -> float:
    """Return `base ** exponent` (exponent >= 0) from IEEE double multiplications alone.

    `**` calls the C library's `pow`, which is not rounded alike everywhere.
    """
    if exponent < 0:
        raise ValueError(f"exponent = {exponent}; it must be at least 0")
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def square_root(values: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the square root of each value, rounded once; `out` may be `values`.

    On CPUs by numpy, which uses the processor's own instruction: `torch.sqrt` is not the same everywhere (ADR 74).
    """
    if not values.is_cpu:
        return torch.sqrt(values, out=out)
    target = torch.empty_like(values) if out is None else out
    np.sqrt(values.numpy(), out=target.numpy())
    return target


def values_per_pass(like: Tensor) -> int:
    """Return how many values to handle at once: a cache full on a CPU, everything elsewhere."""
    return PASS_VALUES if like.device.type == "cpu" else max(like.numel(), 1)


def passes(values_N: Tensor) -> Iterator[slice]:
    """Yield ranges that cover a flat tensor, each as long as `new_scratch` at most."""
    num_values, length = values_N.numel(), values_per_pass(values_N)
    for start in range(0, num_values, length):
        yield slice(start, min(start + length, num_values))


def new_scratch(values_N: Tensor) -> Tensor:
    """Return an uninitialised vector for the temporaries of one pass over `values_N`."""
    return values_N.new_empty(min(values_N.numel(), values_per_pass(values_N)))
