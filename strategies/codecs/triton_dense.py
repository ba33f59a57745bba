"""The Triton form of the dense codecs, for CUDA: the same bytes as the torch form, in one pass over the values.

One program per block, in whole blocks: the largest magnitude, the scale, the codes. Magnitudes are compared as the
integers that their bits are, so a NaN is the largest of all. Quotients are quotients (`div_rn`), rounding to an integer
adds and takes 1.5 * 2^23, and nothing is fused: kernels are started with `enable_fp_fusion=False`. Decoding is exact.

With TRITON_INTERPRET=1 in the environment the same kernels run on CPU tensors, one block at a time: for tests.
Suffixes: N values, R blocks (rows), B values of a block, C bytes of the codes of a block.
"""

# Triton reads the annotations of a kernel's arguments: they must be values, not texts.

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

INT8, INT4, FP4, E3M0 = 0, 1, 2, 3
KINDS = {"int8": INT8, "int4": INT4, "fp4": FP4, "e3m0": E3M0}
LARGEST_BLOCK = 16_384
"""Values of a block that one program holds in registers."""


@triton.jit
def _round_even(x):
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _codes(x, scale, border, FAR: tl.constexpr, KIND: tl.constexpr):
    """The codes of values under a scale, int32; `border`: of e3m0, the bits of the highest one."""
    sign = (x.to(tl.int32, bitcast=True) >> 31) & 1
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if KIND == 3:
        level = tl.maximum(((magnitude - border) >> 23) + 7, 0)
        return sign * 8 | level
    if KIND == 2:
        size = magnitude.to(tl.float32, bitcast=True)
        unit = tl.where(scale == 0.0, FAR, scale)
        code = (size > unit * 0.25).to(tl.int32) + (size >= unit * 0.75).to(tl.int32)
        code += (size > unit * 1.25).to(tl.int32) + (size >= unit * 1.75).to(tl.int32)
        code += (size > unit * 2.5).to(tl.int32) + (size >= unit * 3.5).to(tl.int32)
        code += (size > unit * 5.0).to(tl.int32)
        return sign * 8 + code
    divisor = tl.where(scale == 0.0, float("inf"), scale)
    return _round_even(tl.div_rn(x, divisor)).to(tl.int32)


@triton.jit
def _scale(magnitude, LEVELS: tl.constexpr, ROUNDING: tl.constexpr, MASK: tl.constexpr, LEAST, MOST):
    """The scale of a block whose largest magnitude has these bits; infinity where it cannot be sent."""
    quotient = tl.div_rn(magnitude.to(tl.float32, bitcast=True), LEVELS)
    scale = ((quotient.to(tl.int32, bitcast=True) + ROUNDING) & MASK).to(tl.float32, bitcast=True)
    scale = tl.where(scale < LEAST, 0.0, scale)
    return tl.where((magnitude >= 0x7F800000) | (scale > MOST), float("inf"), scale)


@triton.jit
def _encode(
    x_ptr,
    scales_ptr,
    codes_ptr,
    width,
    row_bytes,
    least,
    most,
    LEVELS: tl.constexpr,
    ROUNDING: tl.constexpr,
    MASK: tl.constexpr,
    EXTRA: tl.constexpr,
    KIND: tl.constexpr,
    SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, SIZE)
    here = place < row_bytes
    low = tl.load(x_ptr + row * width + place, mask=here, other=0.0)
    magnitude = tl.max(low.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    if KIND != 0:
        there = place + row_bytes < width
        high = tl.load(x_ptr + row * width + row_bytes + place, mask=there, other=0.0)
        magnitude = tl.maximum(magnitude, tl.max(high.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0))
    scale = _scale(magnitude, LEVELS, ROUNDING, MASK, least, most)
    tl.store(scales_ptr + row, scale)
    border = tl.where(scale == 0.0, float("inf"), scale * EXTRA).to(tl.int32, bitcast=True)
    code = _codes(low, scale, border, EXTRA, KIND)
    if KIND != 0:
        above = _codes(high, scale, border, EXTRA, KIND) & 15
        code = (code & 15) | (tl.where(there, above, 0) << 4)
    tl.store(codes_ptr + row * row_bytes + place, (code & 255).to(tl.uint8), mask=here)


@triton.jit
def _value(code, KIND: tl.constexpr):
    """What a code of 4 bits stands for, before it is multiplied by the scale."""
    if KIND == 1:
        return (code - 2 * (code & 8)).to(tl.float32)
    level = code & 7
    if KIND == 2:
        half = (level & 1).to(tl.float32) * 0.5
        power = ((126 + (level >> 1)) << 23).to(tl.float32, bitcast=True)
        size = tl.where(level < 2, half, (1.0 + half) * power)
    else:
        size = tl.where(level == 0, 0.0, ((level + 120) << 23).to(tl.float32, bitcast=True))
    return (size.to(tl.int32, bitcast=True) | ((code & 8) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def _decode(
    scales_ptr,
    codes_ptr,
    out_ptr,
    width,
    row_bytes,
    KIND: tl.constexpr,
    SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, SIZE)
    here = place < row_bytes
    scale = tl.load(scales_ptr + row)
    code = tl.load(codes_ptr + row * row_bytes + place, mask=here, other=0).to(tl.int32)
    if KIND == 0:
        tl.store(out_ptr + row * width + place, (code - 2 * (code & 128)).to(tl.float32) * scale, mask=here)
    else:
        tl.store(out_ptr + row * width + place, _value(code & 15, KIND) * scale, mask=here)
        there = place + row_bytes < width
        tl.store(out_ptr + row * width + row_bytes + place, _value(code >> 4, KIND) * scale, mask=there)


def encode_rows(name: str, x_RB: Tensor, scales_R: Tensor, codes_RC: Tensor, limits: tuple[Any, ...]) -> None:
    """Write scales and codes of whole blocks; a scale is infinite where its block cannot be sent.

    `limits`: levels, what is added to a scale's bits, the mask of its bits, the least and the largest scale, and what
    the codec needs besides (`Blockwise._encode_arguments`).
    """
    levels, rounding, mask, least, most, *extra = limits
    num_rows, width = x_RB.shape
    if num_rows == 0:
        return
    row_bytes = codes_RC.shape[1]
    _encode[(num_rows,)](
        x_RB, scales_R, codes_RC, width, row_bytes, least, most, LEVELS=levels, ROUNDING=rounding, MASK=mask,
        EXTRA=extra[0] if extra else 1.0, KIND=KINDS[name], SIZE=triton.next_power_of_2(row_bytes),
        enable_fp_fusion=False,
    )  # fmt: skip


def decode_rows(name: str, scales_R: Tensor, codes_RC: Tensor, out_RB: Tensor) -> None:
    """Write the values of whole blocks."""
    num_rows, width = out_RB.shape
    if num_rows == 0:
        return
    row_bytes = codes_RC.shape[1]
    _decode[(num_rows,)](
        scales_R, codes_RC, out_RB, width, row_bytes, KIND=KINDS[name], SIZE=triton.next_power_of_2(row_bytes),
        enable_fp_fusion=False,
    )  # fmt: skip


def runs_on(values: Tensor) -> bool:
    """Whether these kernels take a tensor: on a GPU, and interpreted anywhere."""
    return values.is_cuda or not isinstance(_encode, triton.JITFunction)
