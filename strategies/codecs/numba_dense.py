"""The compiled form of int8, int4, fp4 and e3m0: the same bytes as their torch forms, which say what they mean.

One pass over memory: each block is read once, and the second loop over it finds it in the first-level cache. Loops run
over slices, whose bounds LLVM sees, and so become vector code. Encoders return whether they could encode everything;
where not, the torch form is called to say why. All of it is in one file: see `numba_tools`.

`limits` is `Blockwise.limits`. Suffixes: N values, R blocks (rows), B values of a block, C bytes of its codes.
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
EXPONENT_SHIFT = np.int32(23)
REFUSED = np.float32(-1)


@helper
def block_scale(bits_B: Array, limits: Any) -> Any:
    """Return the scale of a block, `REFUSED` for values that cannot be sent."""
    levels, rounding, kept_bits, smallest, highest = limits
    # Integers, because LLVM does not reorder a maximum of floats; NaN is above infinity.
    largest = np.int32(0)
    for i in range(bits_B.size):
        largest = max(largest, bits_B[i] & MAGNITUDE)
    if largest >= INFINITY:
        return REFUSED
    quotient = as_bits(as_float(np.int32(largest)) / np.float32(levels))
    scale = as_float(np.int32((quotient + np.int32(rounding)) & np.int32(kept_bits)))
    if scale < np.float32(smallest):
        return np.float32(0)
    return scale if scale <= np.float32(highest) else REFUSED


@helper
def nothing_behind(codes_C: Array, num_high: int) -> bool:
    """Whether the half byte behind the last code of an odd block is 0."""
    return num_high == codes_C.size or codes_C[codes_C.size - 1] >> 4 == 0


@helper
def divisor_of(scale: Any) -> Any:
    """x / inf = 0: a block of zeros needs no branch."""
    return scale if scale != np.float32(0) else np.float32(np.inf)


# ------------------------------------------------------------ random numbers: see `stochastic.py`


@helper
def scramble(h: Any) -> Any:
    """`lowbias32`."""
    h = np.uint32(np.uint32(h ^ (h >> np.uint32(16))) * np.uint32(0x7FEB352D))
    h = np.uint32(np.uint32(h ^ (h >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(h ^ (h >> np.uint32(16)))


@helper
def rounded_randomly(x: Any, position: Any, low: Any, high: Any, largest: Any) -> Any:
    """`round_randomly` for one value."""
    h = scramble(np.uint32(scramble(np.uint32(np.uint32(position) ^ low)) ^ high))
    u = np.float32(np.int32(h >> np.uint32(8))) * np.float32(2.0**-24)
    magnitude = abs(x)
    floor = np.floor(magnitude)
    code = min(np.int32(floor) + np.int32(u < magnitude - floor), np.int32(largest))
    return -code if x < np.float32(0) else code


# ------------------------------------------------------------ int8


@compiled
def int8_encode(x_N: Array, payload: Array, block: int, limits: Any) -> bool:
    """Nearest even."""
    scales_R, codes_N = encoder_views(payload, x_N.size, block)
    bits_N, signed_N = x_N.view(np.int32), codes_N.view(np.int8)
    for r in range(scales_R.size):
        start, stop = r * block, min((r + 1) * block, x_N.size)
        scale = block_scale(bits_N[start:stop], limits)
        if scale < 0:
            return False
        scales_R[r], divisor = scale, divisor_of(scale)
        x_B, codes_B = x_N[start:stop], signed_N[start:stop]
        for i in range(x_B.size):
            codes_B[i] = np.int8(np.rint(x_B[i] / divisor))
    return True


@compiled
def int8_encode_randomly(x_N: Array, payload: Array, block: int, limits: Any, low: int, high: int) -> bool:
    """Stochastic."""
    scales_R, codes_N = encoder_views(payload, x_N.size, block)
    bits_N, signed_N = x_N.view(np.int32), codes_N.view(np.int8)
    low_word, high_word = np.uint32(low), np.uint32(high)
    for r in range(scales_R.size):
        start, stop = r * block, min((r + 1) * block, x_N.size)
        scale = block_scale(bits_N[start:stop], limits)
        if scale < 0:
            return False
        scales_R[r], divisor = scale, divisor_of(scale)
        x_B, codes_B = x_N[start:stop], signed_N[start:stop]
        for i in range(x_B.size):
            codes_B[i] = np.int8(rounded_randomly(x_B[i] / divisor, start + i, low_word, high_word, limits[0]))
    return True


@compiled
def int8_decode(payload: Array, num_values: int, block: int, highest: float, first: int, out_N: Array) -> bool:
    """Code times scale."""
    scales_R, codes_N = decoder_views(payload, num_values, block, block, first, out_N.size)
    signed_N = codes_N.view(np.int8)
    for r in range(scales_R.size):
        start, stop = r * block, min((r + 1) * block, out_N.size)
        scale, codes_B, out_B = scales_R[r], signed_N[start:stop], out_N[start:stop]
        if not is_scale(scale, highest):
            return False
        for i in range(out_B.size):
            out_B[i] = np.float32(codes_B[i]) * scale
    return True


# ------------------------------------------------------------ int4


@compiled
def int4_encode(x_N: Array, payload: Array, block: int, limits: Any) -> bool:
    """Nearest even."""
    scales_R, codes = encoder_views(payload, x_N.size, block)
    bits_N, row_bytes = x_N.view(np.int32), (block + 1) // 2
    for r in range(scales_R.size):
        start, stop = r * block, min((r + 1) * block, x_N.size)
        scale = block_scale(bits_N[start:stop], limits)
        if scale < 0:
            return False
        scales_R[r], divisor = scale, divisor_of(scale)
        half = (stop - start + 1) // 2
        low_C, high_C = x_N[start : start + half], x_N[start + half : stop]
        codes_C = codes[r * row_bytes : r * row_bytes + half]
        for i in range(high_C.size):
            low_code, high_code = np.int32(np.rint(low_C[i] / divisor)), np.int32(np.rint(high_C[i] / divisor))
            codes_C[i] = np.uint8((low_code & 15) | ((high_code & 15) << 4))
        if high_C.size < half:
            codes_C[half - 1] = np.uint8(np.int32(np.rint(low_C[half - 1] / divisor)) & 15)
    return True


@compiled
def int4_encode_randomly(x_N: Array, payload: Array, block: int, limits: Any, low: int, high: int) -> bool:
    """Stochastic."""
    scales_R, codes = encoder_views(payload, x_N.size, block)
    bits_N, row_bytes = x_N.view(np.int32), (block + 1) // 2
    low_word, high_word = np.uint32(low), np.uint32(high)
    for r in range(scales_R.size):
        start, stop = r * block, min((r + 1) * block, x_N.size)
        scale = block_scale(bits_N[start:stop], limits)
        if scale < 0:
            return False
        scales_R[r], divisor = scale, divisor_of(scale)
        half = (stop - start + 1) // 2
        middle = start + half
        low_C, high_C = x_N[start:middle], x_N[middle:stop]
        codes_C = codes[r * row_bytes : r * row_bytes + half]
        for i in range(low_C.size):
            code = rounded_randomly(low_C[i] / divisor, start + i, low_word, high_word, limits[0])
            codes_C[i] = np.uint8(code & 15)
        for i in range(high_C.size):
            code = rounded_randomly(high_C[i] / divisor, middle + i, low_word, high_word, limits[0])
            codes_C[i] |= np.uint8((code & 15) << 4)
    return True


@compiled
def int4_decode(payload: Array, num_values: int, block: int, highest: float, first: int, out_N: Array) -> bool:
    """Code times scale; (c ^ 8) - 8 is the number that c is in two's complement."""
    row_bytes = (block + 1) // 2
    scales_R, codes = decoder_views(payload, num_values, block, row_bytes, first, out_N.size)
    for r in range(scales_R.size):
        start, stop = r * block, min((r + 1) * block, out_N.size)
        half = (stop - start + 1) // 2
        low_C, high_C = out_N[start : start + half], out_N[start + half : stop]
        scale, codes_C = scales_R[r], codes[r * row_bytes : r * row_bytes + half]
        if not (is_scale(scale, highest) and nothing_behind(codes_C, high_C.size)):
            return False
        for i in range(low_C.size):
            low_C[i] = np.float32((np.int32(codes_C[i] & 15) ^ 8) - 8) * scale
        for i in range(high_C.size):
            high_C[i] = np.float32((np.int32(codes_C[i] >> 4) ^ 8) - 8) * scale
    return True


# ------------------------------------------------------------ fp4


@helper
def fp4_middles(scale: Any, far: float) -> Any:
    """Bits of the middles between the values of the grid (`fp4.MIDDLES`), exact."""
    s = scale if scale != np.float32(0) else np.float32(far)
    m0, m1, m2 = as_bits(s * np.float32(0.25)), as_bits(s * np.float32(0.75)), as_bits(s * np.float32(1.25))
    m3, m4, m5 = as_bits(s * np.float32(1.75)), as_bits(s * np.float32(2.5)), as_bits(s * np.float32(3.5))
    return m0, m1, m2, m3, m4, m5, as_bits(s * np.float32(5.0))


@helper
def fp4_code(bits: Any, middles: Any) -> Any:
    """Return the number of middles that the magnitude lies beyond, and the sign as the fourth bit."""
    m0, m1, m2, m3, m4, m5, m6 = middles
    a = bits & MAGNITUDE
    code = np.int32(a > m0) + np.int32(a >= m1) + np.int32(a > m2) + np.int32(a >= m3)
    code += np.int32(a > m4) + np.int32(a >= m5) + np.int32(a > m6)
    return code | ((bits >> np.int32(28)) & np.int32(8))


@compiled
def fp4_encode(x_N: Array, payload: Array, block: int, limits: Any, far: float) -> bool:
    """Nearest on the grid, middles to the even code."""
    scales_R, codes = encoder_views(payload, x_N.size, block)
    bits_N, row_bytes = x_N.view(np.int32), (block + 1) // 2
    for r in range(scales_R.size):
        start, stop = r * block, min((r + 1) * block, x_N.size)
        scale = block_scale(bits_N[start:stop], limits)
        if scale < 0:
            return False
        scales_R[r], middles = scale, fp4_middles(scale, far)
        half = (stop - start + 1) // 2
        low_C, high_C = bits_N[start : start + half], bits_N[start + half : stop]
        codes_C = codes[r * row_bytes : r * row_bytes + half]
        for i in range(high_C.size):
            codes_C[i] = np.uint8(fp4_code(low_C[i], middles) | (fp4_code(high_C[i], middles) << np.int32(4)))
        if high_C.size < half:
            codes_C[half - 1] = np.uint8(fp4_code(low_C[half - 1], middles))
    return True


@helper
def fp4_value(code: Any, half_scale: Any) -> Any:
    """Bits of grid * scale: twice the grid is 0 1 2 3 4 6 8 12, a line with two bends."""
    c = code & np.int32(7)
    doubled = c + max(c - np.int32(4), np.int32(0)) + (max(c - np.int32(6), np.int32(0)) << np.int32(1))
    return as_bits(np.float32(doubled) * half_scale) | ((code & np.int32(8)) << np.int32(28))


@compiled
def fp4_decode(payload: Array, num_values: int, block: int, highest: float, first: int, out_N: Array) -> bool:
    """Grid times scale."""
    bits_N, row_bytes = out_N.view(np.int32), (block + 1) // 2
    scales_R, codes = decoder_views(payload, num_values, block, row_bytes, first, out_N.size)
    for r in range(scales_R.size):
        start, stop = r * block, min((r + 1) * block, out_N.size)
        half = (stop - start + 1) // 2
        low_C, high_C = bits_N[start : start + half], bits_N[start + half : stop]
        half_scale, codes_C = scales_R[r] * np.float32(0.5), codes[r * row_bytes : r * row_bytes + half]
        if not (is_scale(scales_R[r], highest) and nothing_behind(codes_C, high_C.size)):
            return False
        for i in range(low_C.size):
            low_C[i] = fp4_value(np.int32(codes_C[i] & 15), half_scale)
        for i in range(high_C.size):
            high_C[i] = fp4_value(np.int32(codes_C[i] >> 4), half_scale)
    return True


# ------------------------------------------------------------ e3m0


@helper
def e3m0_code(bits: Any, border: Any) -> Any:
    """Return the level by the distance of the bits from the highest border, and the sign as the fourth bit."""
    level = max(np.int32(7) + (((bits & MAGNITUDE) - border) >> EXPONENT_SHIFT), np.int32(0))
    return level | ((bits >> np.int32(28)) & np.int32(8))


@compiled
def e3m0_encode(x_N: Array, payload: Array, block: int, limits: Any, border: float) -> bool:
    """Nearest in log space."""
    scales_R, codes = encoder_views(payload, x_N.size, block)
    bits_N, row_bytes = x_N.view(np.int32), (block + 1) // 2
    for r in range(scales_R.size):
        start, stop = r * block, min((r + 1) * block, x_N.size)
        scale = block_scale(bits_N[start:stop], limits)
        if scale < 0:
            return False
        scales_R[r] = scale
        highest = as_bits(scale * np.float32(border)) if scale != np.float32(0) else INFINITY
        half = (stop - start + 1) // 2
        low_C, high_C = bits_N[start : start + half], bits_N[start + half : stop]
        codes_C = codes[r * row_bytes : r * row_bytes + half]
        for i in range(high_C.size):
            codes_C[i] = np.uint8(e3m0_code(low_C[i], highest) | (e3m0_code(high_C[i], highest) << np.int32(4)))
        if high_C.size < half:
            codes_C[half - 1] = np.uint8(e3m0_code(low_C[half - 1], highest))
    return True


@helper
def e3m0_value(code: Any, scale: Any) -> Any:
    """Bits of 2^(L - 7) * scale; 0 for level 0, and for every level of a block of zeros."""
    level = code & np.int32(7)
    bits = max(scale + ((level - np.int32(7)) << EXPONENT_SHIFT), np.int32(0))
    if level == 0:
        bits = np.int32(0)
    return bits | ((code & np.int32(8)) << np.int32(28))


@compiled
def e3m0_decode(payload: Array, num_values: int, block: int, highest: float, first: int, out_N: Array) -> bool:
    """Power of two times scale."""
    bits_N, row_bytes = out_N.view(np.int32), (block + 1) // 2
    scales_R, codes = decoder_views(payload, num_values, block, row_bytes, first, out_N.size)
    for r in range(scales_R.size):
        start, stop = r * block, min((r + 1) * block, out_N.size)
        half = (stop - start + 1) // 2
        low_C, high_C = bits_N[start : start + half], bits_N[start + half : stop]
        scale, codes_C = as_bits(scales_R[r]), codes[r * row_bytes : r * row_bytes + half]
        if not (is_scale(scales_R[r], highest) and nothing_behind(codes_C, high_C.size)):
            return False
        for i in range(low_C.size):
            low_C[i] = e3m0_value(np.int32(codes_C[i] & 15), scale)
        for i in range(high_C.size):
            high_C[i] = e3m0_value(np.int32(codes_C[i] >> 4), scale)
    return True
