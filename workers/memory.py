"""The C library's heap: kept between steps, given back after a round."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

WORTH_BYTES = 8 << 20
"""What must have been freed before it is worth asking: a look at the heap takes milliseconds."""

KEPT_BYTES = 256 << 20
"""Free heap that stays between two steps: about the activations of a step."""

_LARGEST_MMAP_THRESHOLD = 32 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # <malloc.h>


def keep_heap() -> None:
    """Keep what a step frees for the next one, instead of asking the system for the same pages in every step.

    By default glibc returns free memory at the end of the heap at once, and that of a thread's own heap in pieces of
    64 MB: an island on a training thread met 45,000 to 60,000 page faults a second and made steps that were 7 to 13 %
    longer than a bare loop's (mallopt(3)). Tensors of 32 MB and more are still mapped one by one and leave at once.
    For processes of Atoll's own: it changes the settings of the whole process. Does nothing without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)


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
