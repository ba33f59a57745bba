"""Memory of a process of Atoll's: the C library's heap, kept between steps, and room for the blobs of an exchange."""

from __future__ import annotations

import ctypes
import functools
import mmap
import threading
import weakref
from collections import deque
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

WORTH_BYTES = 8 << 20
"""What must be free before it is worth giving back."""

KEPT_BYTES = 256 << 20
"""Free heap that stays between two steps: about the activations of a step."""

ALIGNED_BYTES = 64

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
    """Let the C library return free heap pages to the system, after `freed_bytes` were freed, if it holds many.

    Payloads, activations and evaluations share a heap, in which what is freed between things that stay is kept: islands
    of 50 M parameters were 200 to 500 MB larger than what they held (glibc; malloc_trim(3)). Does nothing elsewhere.
    """
    trim = _function("malloc_trim")
    if trim is not None and freed_bytes >= WORTH_BYTES and _free_heap_bytes() >= WORTH_BYTES:
        trim(0)


class Room:
    """Memory for blobs that come and go together, on huge pages where the system has them. Thread-safe.

    A large room is mapped by itself, and its pages wait for the next exchange once nobody holds a view of it any more,
    as the buckets of data parallel training do. As pieces of the heap the payloads of 50 M parameters cost a page fault
    per 4 KiB in each round, and 70 ms of the training thread to be given back; on virtual machines whose host takes
    free pages back, faults made an exchange of 2.5 s up to a second longer.
    """

    LEAST_BYTES = 4 << 20
    """Smaller rooms have no memory of their own."""

    MOST_BYTES = 4 << 30
    """Larger ones neither: beyond, what was announced need not come."""

    def __init__(self, num_bytes: int, *, pages: Pages | None = None) -> None:
        """Room for `num_bytes`; what does not fit has memory of its own. Pages count from their first use."""
        self._lock = threading.Lock()
        self._num_taken = 0
        self._all: NDArray[np.uint8] | None = None
        if self.LEAST_BYTES <= num_bytes <= self.MOST_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
            self._all = (PAGES if pages is None else pages).lend(num_bytes)

    def take(self, num_bytes: int) -> NDArray[np.uint8]:
        """Uninitialised memory, aligned to a cache line."""
        with self._lock:
            if self._all is not None and self._num_taken + num_bytes <= self._all.nbytes:
                start = self._num_taken
                self._num_taken += -(-num_bytes // ALIGNED_BYTES) * ALIGNED_BYTES
                return self._all[start : start + num_bytes]
        return np.empty(num_bytes, dtype=np.uint8)

    def keep(self, values: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The same bytes in here: a copy, unless this room has no memory of its own."""
        if self._all is None:
            return values
        kept = self.take(values.nbytes)
        kept[:] = values
        return kept


class Pages:
    """Mappings that are lent and come back by themselves. Thread-safe.

    No more are kept than were lent at one time in this or the last round; a round ends when all have come back.
    """

    def __init__(self) -> None:
        """Nothing is mapped."""
        self._lock = threading.Lock()
        self._back: deque[mmap.mmap] = deque()  # finalizers append here: they may run anywhere, and must not wait
        self._free: list[mmap.mmap] = []  # the longest unused first
        self._lent_bytes = self._most_bytes = self._most_before_bytes = 0

    @property
    def free_bytes(self) -> int:
        """What is mapped and not lent."""
        with self._lock:
            self._take_back()
            return sum(map(len, self._free))

    def lend(self, num_bytes: int) -> NDArray[np.uint8] | None:
        """At least `num_bytes`, with what was written there before; None if the system has no more."""
        with self._lock:
            self._take_back()
            fits = [pages for pages in self._free if num_bytes <= len(pages) <= 2 * num_bytes]
            if fits:
                pages = min(fits, key=len)
                self._free.remove(pages)
            else:
                try:
                    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                except OSError:  # a system that counts pages before their first use may refuse: each blob for itself
                    return None
                with suppress(OSError):  # a kernel that knows no huge pages
                    pages.madvise(mmap.MADV_HUGEPAGE)
            self._lent_bytes += len(pages)
            self._most_bytes = max(self._most_bytes, self._lent_bytes)
            lent = np.frombuffer(pages, dtype=np.uint8)
            weakref.finalize(lent, self._back.append, pages).atexit = False
            return lent

    def _take_back(self) -> None:
        while self._back:
            pages = self._back.popleft()
            self._lent_bytes -= len(pages)
            self._free.append(pages)
            if self._lent_bytes == 0:
                self._most_before_bytes, self._most_bytes = self._most_bytes, 0
        spare_bytes = self._lent_bytes + sum(map(len, self._free)) - max(self._most_bytes, self._most_before_bytes)
        while spare_bytes > 0 and self._free:
            spare_bytes -= len(self._free.pop(0))


PAGES = Pages()
"""Those of this process."""


class _Mallinfo2(ctypes.Structure):
    """<malloc.h>"""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def _free_heap_bytes() -> int:
    """Bytes that the heap holds and nobody uses; enough to look for where the C library cannot tell (glibc < 2.33)."""
    mallinfo2 = _function("mallinfo2")
    if mallinfo2 is None:
        return WORTH_BYTES
    mallinfo2.restype = _Mallinfo2
    return int(mallinfo2().fordblks)


@functools.cache
def _function(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None)
