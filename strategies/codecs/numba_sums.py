"""The compiled form of `norm.SquareSum` and `aggregate.decode_accumulate`: the same bits, one pass over memory.

The order of additions is that of `norm.halving_sum`. Folding a row in half again and again adds the values that are a
multiple of `row / 2^k` apart before any others, so that the first folds of a full row can be made for a few lanes at a
time, in a core's first-level cache, and the bits stay what they are.
All of it is in one file: see `codecs.numba_tools`. Suffixes: N values, R rows, W values of a row, L lanes.
"""

from __future__ import annotations

import numpy as np

from strategies.codecs.numba_tools import Array, compiled, helper

ROW_VALUES = 32_768
"""`norm.ROW_VALUES`, which a test compares: numba takes constants from the file of the kernel only."""

NUM_LANES = 1_024
NUM_ROUNDS = ROW_VALUES // NUM_LANES
LANES_AT_ONCE = 32


@helper
def fold(sums: Array, remaining: int) -> float:
    """`norm.halving_sum` of the first `remaining` values of fp64 `sums`, which are overwritten."""
    while remaining > 1:
        kept = (remaining + 1) // 2
        low, high = sums[: remaining - kept], sums[kept:remaining]
        for i in range(high.size):
            low[i] += high[i]
        remaining = kept
    return float(sums[0])


@helper
def squares_of_row(x_W: Array, sums: Array, folded: Array) -> float:
    """Sum of squares of one row, of any length up to `ROW_VALUES`; scratch: one fp64 row, `NUM_ROUNDS` groups."""
    if x_W.size != ROW_VALUES:
        for i in range(x_W.size):
            value = np.float64(x_W[i])
            sums[i] = value * value
        return fold(sums, x_W.size)
    for lane in range(0, NUM_LANES, LANES_AT_ONCE):
        half = NUM_ROUNDS // 2
        for k in range(half):
            low = x_W[k * NUM_LANES + lane : k * NUM_LANES + lane + LANES_AT_ONCE]
            high = x_W[(k + half) * NUM_LANES + lane : (k + half) * NUM_LANES + lane + LANES_AT_ONCE]
            into = folded[k * LANES_AT_ONCE : (k + 1) * LANES_AT_ONCE]
            for i in range(LANES_AT_ONCE):
                a, b = np.float64(low[i]), np.float64(high[i])
                into[i] = a * a + b * b
        while half > 1:
            half //= 2
            into, other = folded[: half * LANES_AT_ONCE], folded[half * LANES_AT_ONCE : 2 * half * LANES_AT_ONCE]
            for i in range(other.size):
                into[i] += other[i]
        lanes = sums[lane : lane + LANES_AT_ONCE]
        for i in range(LANES_AT_ONCE):
            lanes[i] = folded[i]
    return fold(sums, NUM_LANES)


@compiled
def squares_of_rows(x_N: Array, sums_R: Array) -> None:
    """Sums of squares of consecutive rows of `ROW_VALUES`; the last one may be shorter."""
    scratch, folded = np.empty(min(x_N.size, ROW_VALUES), np.float64), np.empty(ROW_VALUES // 2, np.float64)
    for r in range(sums_R.size):
        sums_R[r] = squares_of_row(x_N[r * ROW_VALUES : min((r + 1) * ROW_VALUES, x_N.size)], scratch, folded)


@compiled
def begin_weighted(x_N: Array, weight: float, total_N: Array, sums_R: Array) -> None:
    """`total = weight x`, and the sums of squares of the rows of x."""
    scratch, folded = np.empty(min(x_N.size, ROW_VALUES), np.float64), np.empty(ROW_VALUES // 2, np.float64)
    for r in range(sums_R.size):
        start, stop = r * ROW_VALUES, min((r + 1) * ROW_VALUES, x_N.size)
        x_W, total_W = x_N[start:stop], total_N[start:stop]
        sums_R[r] = squares_of_row(x_W, scratch, folded)
        for i in range(x_W.size):
            total_W[i] = np.float32(x_W[i] * np.float32(weight))


@compiled
def add_weighted(x_N: Array, weight: float, total_N: Array, sums_R: Array) -> None:
    """`total += weight x`, each product and each sum rounded, and the sums of squares of the rows of x."""
    scratch, folded = np.empty(min(x_N.size, ROW_VALUES), np.float64), np.empty(ROW_VALUES // 2, np.float64)
    for r in range(sums_R.size):
        start, stop = r * ROW_VALUES, min((r + 1) * ROW_VALUES, x_N.size)
        x_W, total_W = x_N[start:stop], total_N[start:stop]
        sums_R[r] = squares_of_row(x_W, scratch, folded)
        for i in range(x_W.size):
            total_W[i] += np.float32(x_W[i] * np.float32(weight))
