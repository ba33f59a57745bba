"""Content digests: BLAKE3 cut to 128 bits, written as 32 hex characters.

One digest everywhere (blobs on the wire, chunks of an offer, anchors), so that a value seen in a log can be
searched for in a journal. 128 bits are plenty against accidents and against anybody who cannot choose both inputs.

Source: https://github.com/BLAKE3-team/BLAKE3-specs/blob/master/blake3.pdf (any prefix of the output is a digest).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from blake3 import blake3

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Buffer

    # numpy declares its arrays as buffers from Python 3.12 on only.
    AnyBuffer = Buffer | np.ndarray[Any, Any] | np.generic

DIGEST_BYTES = 16
"""Length of a digest in bytes; its hexadecimal form has twice as many characters."""

_COMBINE_CONTEXT = "atoll 2025-01-01 ordered list of digests"


def byte_view(buffer: AnyBuffer) -> memoryview:
    """Return a read-only, one-dimensional view of the bytes of ``buffer``, without copying.

    Anything that supports the buffer protocol will do (bytes, numpy arrays, numpy views of torch memory).
    Raises ``ValueError`` when the memory is not C-contiguous.
    """
    view = memoryview(cast("Buffer", buffer))
    if not view.c_contiguous:
        raise ValueError(
            f"buffer of shape {view.shape} and strides {view.strides} is not C-contiguous: "
            "make it contiguous before it is stored or hashed"
        )
    if view.nbytes == 0:  # memoryview refuses to cast a shape that holds a zero
        return memoryview(b"")
    return view.cast("B").toreadonly()


def digest(buffer: AnyBuffer) -> str:
    """Return the digest of the bytes of ``buffer`` (32 hex characters); 5 to 9 GB/s on one core with AVX-512."""
    return blake3(byte_view(buffer)).hexdigest(length=DIGEST_BYTES)


def combine(digests: Sequence[str]) -> str:
    """Return one digest for an ordered list of digests, such as the chunks of a fragment.

    The list may be empty. A different order, a missing and a repeated member all give another result, and no list
    has the digest of a plain buffer: the hash runs under a context of its own.
    """
    hasher = blake3(derive_key_context=_COMBINE_CONTEXT)
    for item in digests:
        raw = bytes.fromhex(item)
        if len(raw) != DIGEST_BYTES:
            raise ValueError(f"{item!r} is not a digest: expected {2 * DIGEST_BYTES} hex characters")
        hasher.update(raw)
    return hasher.hexdigest(length=DIGEST_BYTES)


def file_digest(path: Path) -> str:
    """Digest of a file's bytes, memory-mapped."""
    return blake3().update_mmap(path).hexdigest(length=DIGEST_BYTES)
