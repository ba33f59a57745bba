"""How the compiled form of the codecs is compiled, and the two operations that numba lacks.

A kernel runs on one thread and holds no lock (`nogil`): chunks are encoded side by side by threads of the caller. No
`fastmath`, so LLVM neither fuses nor reorders; quotients are quotients, not products with a reciprocal. The code is
kept in numba's cache, which is renewed when the file of a kernel changes, and not when this one does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

HEADER_BYTES = 16

Array = np.ndarray[Any, Any]
F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compile at the first call, or take the code from numba's cache."""
    return cast("F", numba.njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)(function))


def helper(function: F) -> F:
    """Compile as a part of the kernels that call it: it cannot be called from Python, and is not in the cache."""
    # Two options that numba's annotations do not know: nothing outside of compiled code calls it.
    no_wrappers: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return cast("F", numba.njit(nogil=True, error_model="numpy", boundscheck=False, **no_wrappers)(function))


def _as_float(context: Any, bits: Any) -> Any:
    """The fp32 number with these bits."""
    return types.float32(types.int32), _bitcast(types.float32)


def _as_bits(context: Any, number: Any) -> Any:
    """The bits of an fp32 number, as int32."""
    return types.int32(types.float32), _bitcast(types.int32)


def _bitcast(wanted: Any) -> Callable[..., Any]:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(wanted))

    return generate


as_float: Callable[..., Any] = intrinsic(_as_float)
as_bits: Callable[..., Any] = intrinsic(_as_bits)


@helper
def encoder_views(payload: Array, num_values: int, block: int) -> Any:
    """Scales and codes of a blockwise payload (`blockwise.Body`)."""
    codes_start = HEADER_BYTES + 4 * ((num_values + block - 1) // block)
    return payload[HEADER_BYTES:codes_start].view(np.float32), payload[codes_start:]


@helper
def decoder_views(payload: Array, num_values: int, block: int, row_bytes: int, first: int, num_decoded: int) -> Any:
    """Those of `num_decoded` values from number `first` on, which starts a block."""
    scales_R, codes = encoder_views(payload, num_values, block)
    row, last_row = first // block, (first + num_decoded + block - 1) // block
    return scales_R[row:last_row], codes[row * row_bytes :]


@helper
def is_scale(scale: Any, highest: float) -> Any:
    """Whether an encoder can have written it; not so for NaN."""
    return np.float32(0) <= scale <= np.float32(highest)
