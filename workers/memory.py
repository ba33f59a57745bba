"""Giving memory back to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

WORTH_BYTES = 8 << 20
"""What must have been freed before it is worth asking: a look at the heap takes milliseconds."""


def give_back(freed_bytes: int) -> None:
    """Let the C library return free heap pages to the system, after `freed_bytes` were freed.

    Payloads, activations and evaluations share a heap, in which what is freed between things that stay is kept: islands
    of 50 M parameters were 200 to 500 MB larger than what they held (glibc; malloc_trim(3)). Does nothing elsewhere.
    """
    trim = _malloc_trim()
    if trim is not None and freed_bytes >= WORTH_BYTES:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    library = ctypes.CDLL(None)
    return getattr(library, "malloc_trim", None)
