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

Array = np.ndarray[Any, Any]
F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compile at the first call, or take the code from numba's cache."""
    return cast("F", numba.njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)(function))


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


as_float = intrinsic(_as_float)
as_bits = intrinsic(_as_bits)
