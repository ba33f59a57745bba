"""The compiled form of sign and top-k: the same bytes as their torch forms, which say what they mean.

Encoders and the decoder of top-k return whether all was well; where not, the torch form is called to say why. All of it
is in one file: see `numba_tools`. Suffixes: N values, R blocks (rows), B values of a block, K kept ones, C bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from strategies.codecs.numba_tools import (
    Array,
    as_bits,
    as_float,
    compiled,
    decoder_views,
    encoder_views,
    helper,
    is_scale,
)

MAGNITUDE = np.int32(0x7FFFFFFF)
INFINITY = np.int32(0x7F800000)
SIGN = np.int32(-(1 << 31))
SIGN_SHIFT = np.int32(31)


@helper
def halving_sum(values_W: Array) -> Any:
    """`norm.halving_sum` of one row, in place."""
    remaining = values_W.size
    while remaining > 1:
        kept = (remaining + 1) // 2
        first, second = values_W[: remaining - kept], values_W[kept:remaining]
        for i in range(first.size):
            first[i] += second[i]
        remaining = kept
    return values_W[0]


# ------------------------------------------------------------ sign


@helper
def mean_magnitude(x_B: Array, scratch: Array) -> Any:
    """Mean of |x| by halving in fp64; the first halving is part of the conversion."""
    kept = (x_B.size + 1) // 2
    first, second, sums = x_B[:kept], x_B[kept:], scratch[:kept]
    for i in range(second.size):
        sums[i] = np.float64(abs(first[i])) + np.float64(abs(second[i]))
    if second.size < kept:
        sums[kept - 1] = np.float64(abs(first[kept - 1]))
    return np.float32(halving_sum(sums) / np.float64(x_B.size))


@helper
def pack_signs(bits_B: Array, codes_C: Array) -> None:
    """Bit k of byte j is the sign of value j + k C."""
    width, c = bits_B.size, codes_C.size
    b0, b1, b2, b3 = bits_B[:c], bits_B[c : 2 * c], bits_B[2 * c : 3 * c], bits_B[3 * c : 4 * c]
    b4, b5, b6, b7 = bits_B[4 * c : 5 * c], bits_B[5 * c : 6 * c], bits_B[6 * c : 7 * c], bits_B[7 * c :]
    if width == 8 * c:
        for j in range(c):
            low = ((b0[j] >> SIGN_SHIFT) & 1) | ((b1[j] >> SIGN_SHIFT) & 2)
            low |= ((b2[j] >> SIGN_SHIFT) & 4) | ((b3[j] >> SIGN_SHIFT) & 8)
            high = ((b4[j] >> SIGN_SHIFT) & 16) | ((b5[j] >> SIGN_SHIFT) & 32)
            high |= ((b6[j] >> SIGN_SHIFT) & 64) | ((b7[j] >> SIGN_SHIFT) & 128)
            codes_C[j] = np.uint8(low | high)
        return
    codes_C[:] = 0
    for i in range(width):
        codes_C[i % c] |= np.uint8(((bits_B[i] >> SIGN_SHIFT) & 1) << (i // c))


@compiled
def sign_encode(x_N: Array, payload: Array, block: int, limits: Any) -> bool:
    """Signs, and the mean magnitude as the scale."""
    bits_N, row_bytes, smallest = x_N.view(np.int32), (block + 7) // 8, limits[3]
    scales_R, codes = encoder_views(payload, x_N.size, block)
    scratch = np.empty((min(block, x_N.size) + 1) // 2, np.float64)
    for r in range(scales_R.size):
        start, stop = r * block, min((r + 1) * block, x_N.size)
        mean = mean_magnitude(x_N[start:stop], scratch)
        if not np.isfinite(mean):
            return False
        scales_R[r] = mean if mean >= np.float32(smallest) else np.float32(0)
        pack_signs(bits_N[start:stop], codes[r * row_bytes : r * row_bytes + (stop - start + 7) // 8])
    return True


@compiled
def sign_decode(payload: Array, num_values: int, block: int, highest: float, first: int, out_N: Array) -> bool:
    """The scale with the sign that the bit says."""
    bits_N, row_bytes = out_N.view(np.int32), (block + 7) // 8
    scales_R, codes = decoder_views(payload, num_values, block, row_bytes, first, out_N.size)
    for r in range(scales_R.size):
        start, stop = r * block, min((r + 1) * block, out_N.size)
        row, c = bits_N[start:stop], (stop - start + 7) // 8
        scale, codes_C = as_bits(scales_R[r]), codes[r * row_bytes : r * row_bytes + c]
        if not is_scale(scales_R[r], highest):
            return False
        for i in range(row.size, 8 * c):
            if (codes_C[i % c] >> (i // c)) & 1:
                return False
        for k in range(8):
            part, shift = row[min(k * c, row.size) : min((k + 1) * c, row.size)], np.int32(31 - k)
            for j in range(part.size):
                part[j] = scale | ((np.int32(codes_C[j]) << shift) & SIGN)
    return True


# ------------------------------------------------------------ top-k


@helper
def kth_largest(magnitudes_B: Array, k: int) -> Any:
    """Bits that exactly the k largest reach, or those of the k-th: by bisection, as counting is vector code.

    -1 for NaN and infinity.
    """
    largest = np.int32(0)
    for i in range(magnitudes_B.size):
        largest = max(largest, magnitudes_B[i])
    if largest >= INFINITY:
        return np.int32(-1)
    low, high = np.int32(0), np.int32(largest + 1)
    while high - low > 1:
        middle = np.int32(low + (high - low) // 2)
        count = np.int32(0)
        for i in range(magnitudes_B.size):
            count += np.int32(magnitudes_B[i] >= middle)
        if count == k:
            return middle
        if count > k:
            low = middle
        else:
            high = middle
    return low


@helper
def keep_largest(magnitudes_B: Array, threshold: Any, index_K: Array) -> None:
    """Places of the k largest in ascending order; of those at the threshold the first ones."""
    above = 0
    for i in range(magnitudes_B.size):
        above += magnitudes_B[i] > threshold
    equal, n = index_K.size - above, 0
    for i in range(magnitudes_B.size):
        if magnitudes_B[i] >= threshold:
            if magnitudes_B[i] == threshold:
                if equal == 0:
                    continue
                equal -= 1
            index_K[n] = i
            n += 1


@helper
def mean_level(members_K: Array, count: int, limits: Any) -> Any:
    """`topk._level` of one block; `members_K` (0 for the others) is overwritten."""
    shift, lowest, highest = limits
    mean = np.float32(halving_sum(members_K) / np.float64(max(count, 1)))
    level = min((np.int64(as_bits(mean)) + (1 << (shift - 1))) >> shift, highest)
    return level if level >= lowest else 0


@helper
def choose(bits_B: Array, scratch_B: Array, index_K: Array, level_K: Array, limits: Any) -> Any:
    """`topk.keep_largest` of one block. Returns the highest level, -1 for NaN and infinity."""
    for i in range(bits_B.size):
        scratch_B[i] = bits_B[i] & MAGNITUDE
    threshold = kth_largest(scratch_B, index_K.size)
    if threshold < 0:
        return -1
    keep_largest(scratch_B, threshold, index_K)
    magnitude_K, upper_K = np.empty(index_K.size, np.float64), np.empty(index_K.size, np.float64)
    lower_K = np.empty(index_K.size, np.float64)
    smallest, largest = np.inf, 0.0
    for i in range(index_K.size):
        magnitude_K[i] = np.float64(as_float(np.int32(scratch_B[index_K[i]])))
        largest = max(largest, magnitude_K[i])
        if magnitude_K[i] > 0:
            smallest = min(smallest, magnitude_K[i])
    middle, num_upper, num_lower = (largest + smallest) * 0.5, 0, 0
    for i in range(index_K.size):
        is_upper, is_lower = magnitude_K[i] > middle, 0 < magnitude_K[i] <= middle
        upper_K[i], lower_K[i] = magnitude_K[i] * is_upper, magnitude_K[i] * is_lower
        num_upper, num_lower = num_upper + is_upper, num_lower + is_lower
    upper, lower = mean_level(upper_K, num_upper, limits), mean_level(lower_K, num_lower, limits)
    for i in range(index_K.size):
        level_K[i] = upper if magnitude_K[i] > middle else (lower if magnitude_K[i] > 0 else 0)
    return max(upper, lower)


@helper
def name_entries(bits_B: Array, index_K: Array, level_K: Array, code_K: Array, base: int, names_2: Array) -> None:
    """`topk.name_levels` of one block: the entries that are sent to the front, the last of them into the rest."""
    low, high = 256, 0
    for i in range(index_K.size):
        level_K[i] = max(level_K[i] - base + 255, 0) if level_K[i] > 0 else 0
        if level_K[i] > 0:
            low, high = min(low, level_K[i]), max(high, level_K[i])
    low = min(low, high)
    n = 0
    for i in range(index_K.size):
        if level_K[i] > 0:
            index_K[n] = index_K[i]
            code_K[n] = np.uint8(level_K[i] > low) | (np.uint8(bits_B[index_K[i]] < 0) << 1)
            n += 1
    for i in range(n, index_K.size):
        index_K[i] = index_K[n - 1] if n else 0
        code_K[i] = code_K[n - 1] if n else 0
    names_2[0], names_2[1] = low, high if high > low else 0


@helper
def pack_entries(index_K: Array, code_K: Array, packed_C: Array) -> None:
    """`topk.pack` of one block."""
    packed_C[:] = 0
    for i in range(index_K.size):
        place, index = i // 2 * 3 + i % 2, index_K[i]
        if i % 2 == 0:
            packed_C[place] = index & 255
            packed_C[place + 1] = index >> 8
        else:
            packed_C[place] |= (index & 15) << 4
            packed_C[place + 1] = index >> 4
    codes_Q = packed_C[(index_K.size * 12 + 7) // 8 :]
    for i in range(code_K.size):
        codes_Q[i // 4] |= code_K[i] << (i % 4 * 2)


@compiled
def topk_encode(x_N: Array, block: int, names_R2: Array, packed: Array, limits: Any) -> int:
    """Write levels and entries; `limits`: shift, lowest and highest level. Returns the base, -1 if it cannot."""
    bits_N, kept = x_N.view(np.int32), (block + 63) // 64
    num_rows = names_R2.shape[0]
    index_RK, level_RK = np.empty((num_rows, kept), np.int32), np.empty((num_rows, kept), np.int32)
    scratch_B, code_K = np.empty(block, np.int32), np.empty(kept, np.uint8)
    base = 0
    for r in range(num_rows):
        row = bits_N[r * block : min((r + 1) * block, x_N.size)]
        k = (row.size + 63) // 64
        highest = choose(row, scratch_B[: row.size], index_RK[r, :k], level_RK[r, :k], limits)
        if highest < 0:
            return -1
        base = max(base, highest)
    row_bytes = (kept * 12 + 7) // 8 + (kept + 3) // 4
    for r in range(num_rows):
        row = bits_N[r * block : min((r + 1) * block, x_N.size)]
        k = (row.size + 63) // 64
        name_entries(row, index_RK[r, :k], level_RK[r, :k], code_K[:k], base, names_R2[r])
        end = r * row_bytes + (k * 12 + 7) // 8 + (k + 3) // 4
        pack_entries(index_RK[r, :k], code_K[:k], packed[r * row_bytes : end])
    return base


@helper
def entries_are_good(index_K: Array, code_K: Array, width: int, low: Any, high: Any) -> bool:
    """`topk._check_entries` of one block, but for unused bits."""
    for i in range(index_K.size):
        if index_K[i] >= width or (code_K[i] & 1 and high == 0):
            return False
        if low == 0 and (index_K[i] > 0 or code_K[i] > 0 or high > 0):
            return False
        if i == 0:
            continue
        if index_K[i] < index_K[i - 1] or (index_K[i] == index_K[i - 1] and code_K[i] != code_K[i - 1]):
            return False
        if i > 1 and index_K[i - 1] == index_K[i - 2] and index_K[i] != index_K[i - 1]:
            return False
    return True


@compiled
def topk_decode(names_R2: Array, packed_RC: Array, base: int, shift: int, out_RW: Array) -> bool:
    """Write the values of blocks of equal width. Returns False for entries that no encoder writes."""
    num_rows, width = out_RW.shape
    kept = (width + 63) // 64
    index_K, code_K = np.empty(kept, np.int32), np.empty(kept, np.uint8)
    repacked_C = np.empty(packed_RC.shape[1], np.uint8)
    for r in range(num_rows):
        packed_C, low, high = packed_RC[r], np.int32(names_R2[r, 0]), np.int32(names_R2[r, 1])
        codes_Q = packed_C[(kept * 12 + 7) // 8 :]
        for i in range(kept):
            place = i // 2 * 3 + i % 2
            first, second = np.int32(packed_C[place]), np.int32(packed_C[place + 1])
            index_K[i] = (first | ((second & 15) << 8)) if i % 2 == 0 else ((first >> 4) | (second << 4))
            code_K[i] = (codes_Q[i // 4] >> (i % 4 * 2)) & 3
        pack_entries(index_K, code_K, repacked_C)
        for i in range(packed_C.size):
            if repacked_C[i] != packed_C[i]:
                return False
        if not entries_are_good(index_K, code_K, width, low, high):
            return False
        row = out_RW[r].view(np.int32)
        row[:] = 0
        for i in range(kept):
            name = high if code_K[i] & 1 else low
            bits = np.int32((name + base - 255) << shift) if name else np.int32(0)
            row[index_K[i]] = bits | (SIGN if code_K[i] > 1 else np.int32(0))
    return True
