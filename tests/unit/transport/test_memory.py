"""Room for the blobs of an exchange: it is used again, and no more of it is kept than was needed."""

from __future__ import annotations

import gc
import mmap

import numpy as np
import pytest
import torch

from workers import memory
from workers.memory import ALIGNED_BYTES, Pages, Room

MB = 1 << 20

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no huge pages to ask for")


def test_blobs_of_a_room_do_not_overlap_and_are_aligned() -> None:
    room = Room(8 * MB, pages=Pages())
    taken = [room.take(size) for size in (1, 63, 64, 65, 3 * MB, 0, 1000)]
    for number, blob in enumerate(taken):
        blob[:] = number
    assert all((blob == number).all() for number, blob in enumerate(taken))
    assert all(blob.ctypes.data % ALIGNED_BYTES == 0 for blob in taken if blob.size)


def test_what_does_not_fit_has_memory_of_its_own() -> None:
    room = Room(4 * MB, pages=Pages())
    first, second = room.take(3 * MB), room.take(3 * MB)
    first[:], second[:] = 1, 2
    assert (first == 1).all() and (second == 2).all()


def test_pages_come_back_with_the_last_view_and_are_lent_again() -> None:
    pages = Pages()
    room = Room(8 * MB, pages=pages)
    blob = room.take(100)
    tensor, view = torch.from_numpy(room.take(MB)), memoryview(blob)
    del room, blob
    gc.collect()
    assert pages.free_bytes == 0, "a tensor and a view still look at it"
    view.release()
    del view
    assert pages.free_bytes == 0
    del tensor
    gc.collect()
    assert pages.free_bytes == 8 * MB
    again = Room(5 * MB, pages=pages)
    assert pages.free_bytes == 0, "the same pages"
    del again
    gc.collect()
    assert pages.free_bytes == 8 * MB
    Room(40 * MB, pages=pages)
    assert pages.free_bytes <= 40 * MB, "too small to be lent for this"


def test_no_more_is_kept_than_was_needed_in_this_round_or_the_last() -> None:
    pages = Pages()
    large = [Room(16 * MB, pages=pages) for _ in range(4)]
    del large
    gc.collect()
    assert pages.free_bytes == 64 * MB
    for _ in range(3):
        small = Room(9 * MB, pages=pages)
        del small
        gc.collect()
    assert pages.free_bytes == 16 * MB, "one was enough for two rounds"


@pytest.mark.parametrize("num_bytes", [0, Room.LEAST_BYTES - 1, Room.MOST_BYTES + 1])
def test_small_and_huge_rooms_have_no_pages(num_bytes: int) -> None:
    pages = Pages()
    values = np.arange(10, dtype=np.uint8)
    assert Room(num_bytes, pages=pages).keep(values) is values
    assert pages.free_bytes == 0


def test_a_system_that_refuses_pages_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("cannot allocate memory")

    monkeypatch.setattr(memory.mmap, "mmap", refuse)
    assert Room(8 * MB, pages=Pages()).take(10).size == 10


def test_a_kernel_without_huge_pages_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(memory.mmap, "mmap", Plain)
    pages = Pages()
    room = Room(8 * MB, pages=pages)
    room.take(MB)[:] = 1
    del room
    gc.collect()
    assert pages.free_bytes == 8 * MB


def test_the_heap_is_given_back_only_where_something_of_it_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed: list[int] = []
    monkeypatch.setattr(memory, "_function", lambda name: trimmed.append)
    for freed, free, expected in ((1, 1 << 40, 0), (1 << 30, 0, 0), (1 << 30, memory.WORTH_BYTES, 1)):
        monkeypatch.setattr(memory, "_free_heap_bytes", lambda free=free: free)
        memory.give_back(freed)
        assert len(trimmed) == expected
    monkeypatch.undo()
    assert memory._free_heap_bytes() >= 0
