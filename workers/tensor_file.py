"""Writing safetensors files without a copy of the tensors in memory.

The library's writer turns every tensor into bytes before it writes the first: a snapshot would need as much memory
again as the anchor. The format is a length, a JSON header and the raw values, so tensors are written one by one;
reading uses the library. Format: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path

import torch
from blake3 import blake3
from torch import Tensor

from workers.digest import DIGEST_BYTES

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGN = 8


def serialised(tensors: Mapping[str, Tensor]) -> bytes:
    """What `save_tensors` would write. Raises ValueError for other dtypes."""
    return b"".join(_pieces(tensors, None))


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, flush: bool = True
) -> str:
    """Write `tensors` to `path`, flush it if `flush`, and return its digest. Raises ValueError for other dtypes.

    `metadata`: what the file says of itself; `transformers` wants {"format": "pt"}.
    """
    hasher = blake3()
    pieces = _pieces(tensors, metadata)
    first = next(pieces)  # tensors that cannot be written are refused before a file is there
    with path.open("wb") as out:
        for piece in chain((first,), pieces):
            out.write(piece)
            hasher.update(piece)
        out.flush()
        if flush:
            os.fsync(out.fileno())
    return hasher.hexdigest(length=DIGEST_BYTES)


def _pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> Iterator[bytes | memoryview]:
    """Header, then the raw values of one tensor after another."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise ValueError(f"tensor {name!r} is {tensor.dtype}, which a safetensors file cannot hold")
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGN)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
