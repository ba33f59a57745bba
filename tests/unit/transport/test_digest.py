"""The digest helper: fixed vectors, any buffer, and a combination that sees order and repetition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from blake3 import blake3

from workers.digest import byte_view, combine, digest


def test_is_the_first_half_of_blake3() -> None:
    # The official test vector of the empty input, cut to 128 bits.
    assert digest(b"") == "af1349b9f5f9a1a6a0404dea36dcc949"
    data = bytes(range(256)) * 100
    assert digest(data) == blake3(data).hexdigest()[:32]


def test_same_bytes_same_digest_whatever_holds_them() -> None:
    tensor = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    array = tensor.numpy()
    half = torch.arange(24, dtype=torch.bfloat16)
    assert digest(array) == digest(array.tobytes()) == digest(memoryview(array)) == digest(bytearray(array.tobytes()))
    assert digest(half.view(torch.uint8).numpy()) == digest(half.view(torch.int16).numpy().tobytes())
    assert digest(np.float32(3.0)) == digest(np.float32(3.0).tobytes())
    assert digest(np.empty((3, 0), dtype=np.float32)) == digest(b"")


def test_view_shares_memory_and_cannot_be_written_through() -> None:
    array = np.zeros(4, dtype=np.int32)
    view = byte_view(array)
    array[0] = 7
    assert view[0] == 7 and view.nbytes == 16 and view.readonly


def test_strided_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="not C-contiguous"):
        digest(np.zeros((4, 4))[:, ::2])


def test_combination_depends_on_order_number_and_kind() -> None:
    a, b = digest(b"a"), digest(b"b")
    plain = digest(bytes.fromhex(a) + bytes.fromhex(b))
    different = {combine([a, b]), combine([b, a]), combine([a]), combine([a, b, b]), combine([]), plain, a}
    assert len(different) == 7
    assert combine([a, b]) == combine((a, b))


def test_combination_refuses_what_is_no_digest() -> None:
    with pytest.raises(ValueError, match="not a digest"):
        combine([digest(b"a"), "abcd"])
