"""What every codec promises, and the frame its payloads share.

A payload is a flat uint8 tensor: 16 bytes of header that name the decoder, its block size and the number of values,
then a body whose length the header determines. Everything is little-endian. Decoding has the same bits on every
member; a payload from the network is checked before it is used and refused with `PayloadError`.

Neither direction hides a non-finite number: `encode` raises `NonFiniteError`. Suffix: N = number of values.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from strategies.codecs.backends import Backend

HEADER_BYTES = 16
_FRAME = struct.Struct("<3sBIQ")
_MAGIC = b"ATL"


class PayloadError(ValueError):
    """A payload that no codec of ours wrote, or that was cut, padded or damaged."""


class NonFiniteError(ValueError):
    """Values that hold NaN or infinity, or are too large for the codec: they must not be sent."""


class Header(NamedTuple):
    """First 16 bytes of a payload."""

    codec_id: int
    block: int
    num_values: int


class Codec(Protocol):
    """Turns fp32 values into bytes and back. Stateless: one object serves all threads."""

    @property
    def name(self) -> str:
        """Name in the configuration."""
        ...

    @property
    def codec_id(self) -> int:
        """Number in the header of a payload: it names what decodes it, and is never given to another format."""
        ...

    @property
    def lossy(self) -> bool:
        """Whether decoding can differ from what was encoded."""
        ...

    @property
    def block(self) -> int:
        """Values that share one scale; chunks should be a multiple of it. 1 for codecs without blocks."""
        ...

    @property
    def elementwise(self) -> bool:
        """Whether each value arrives with a small error of its own: what the result of a part needs."""
        ...

    @property
    def backend(self) -> Backend:
        """Which implementation runs on the CPU; the bytes do not depend on it."""
        ...

    def num_bytes(self, num_values: int) -> int:
        """Return the length of the payload of `num_values` values, header included."""
        ...

    def encode(self, values_N: Tensor) -> Tensor:
        """Return the payload (uint8, flat, on the same device) of flat contiguous fp32 values.

        Raises NonFiniteError for NaN, infinity and numbers that overflow the codec's range.
        """
        ...

    def decode(self, payload: Tensor, *, num_values: int, out: Tensor | None = None) -> Tensor:
        """Return the `num_values` fp32 values of a payload, in `out` if given. The payload is not kept or changed.

        Raises PayloadError if the payload is not a well-formed one of this codec with that many values.
        """
        ...

    def decode_parts(self, payload: Tensor, *, num_values: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield what `decode` returns in consecutive parts, each with its place, without all of it in memory at once.

        Every part but the last has a multiple of `norm.ROW_VALUES` values. A part is valid until the next is asked for.
        Raises PayloadError as `decode` does, before the first part.
        """
        ...


def require_little_endian() -> None:
    """Raise RuntimeError on a big-endian machine, where payloads would be read wrongly."""
    if sys.byteorder != "little":
        raise RuntimeError("payloads are little-endian; this machine is big-endian and not supported")


def check_values(values_N: Tensor) -> None:
    """Raise ValueError unless `values_N` is what `encode` takes."""
    if values_N.dtype != torch.float32 or values_N.dim() != 1 or not values_N.is_contiguous():
        raise ValueError(
            f"encode takes flat contiguous float32 values, got {values_N.dtype} of shape {tuple(values_N.shape)}"
        )


def largest_magnitude(values_N: Tensor) -> float:
    """Return max |x| (0 if empty); NaN or infinity if the values hold one. One pass at memory speed."""
    if values_N.numel() == 0:
        return 0.0
    low, high = (float(bound) for bound in torch.aminmax(values_N))
    # Python's max could drop a NaN, but aminmax returns two if there is one.
    return max(-low, high)


def is_finite(values_N: Tensor) -> bool:
    """Return whether all values are finite; ten times as fast as `torch.isfinite(x).all()`."""
    return math.isfinite(largest_magnitude(values_N))


def new_payload(codec: Codec, values_N: Tensor) -> Tensor:
    """Return an uninitialised payload for `values_N` with its header written."""
    require_little_endian()
    num_values = values_N.numel()
    payload = torch.empty(codec.num_bytes(num_values), dtype=torch.uint8, device=values_N.device)
    header = payload if payload.is_cpu else torch.empty(HEADER_BYTES, dtype=torch.uint8)
    _FRAME.pack_into(header.numpy().data, 0, _MAGIC, codec.codec_id, codec.block, num_values)
    if header is not payload:
        payload[:HEADER_BYTES].copy_(header)
    return payload


def read_header(payload: Tensor) -> Header:
    """Return the header of a payload. Raises PayloadError if there is none."""
    if payload.dtype != torch.uint8 or payload.dim() != 1 or not payload.is_contiguous():
        raise PayloadError(f"a payload is flat contiguous uint8, got {payload.dtype} of shape {tuple(payload.shape)}")
    if payload.numel() < HEADER_BYTES:
        raise PayloadError(f"payload of {payload.numel()} bytes; its header alone has {HEADER_BYTES}")
    header = payload if payload.is_cpu else payload[:HEADER_BYTES].cpu()
    magic, codec_id, block, num_values = _FRAME.unpack_from(header.numpy().data)
    if magic != _MAGIC:
        raise PayloadError(f"payload starts with {magic!r} instead of {_MAGIC!r}")
    return Header(codec_id, block, num_values)


def check_frame(codec: Codec, payload: Tensor, num_values: int) -> Tensor:
    """Check frame and length of a payload against the codec and return it, aligned to 4 bytes (a copy if need be).

    Raises PayloadError saying what differs.
    """
    require_little_endian()
    header = read_header(payload)
    for what, found, wanted in (
        ("codec id", header.codec_id, codec.codec_id),
        ("block size", header.block, codec.block),
        ("number of values", header.num_values, num_values),
        ("length in bytes", payload.numel(), codec.num_bytes(num_values)),
    ):
        if found != wanted:
            raise PayloadError(f"payload for codec {codec.name!r}: {what} is {found}, expected {wanted}")
    # A payload cut out of a network buffer may start anywhere; fp32 views need its alignment.
    return payload if payload.storage_offset() % 4 == 0 and payload.data_ptr() % 4 == 0 else payload.clone()


def open_payload(codec: Codec, payload: Tensor, num_values: int) -> Tensor:
    """Check a payload as `check_frame` does and return its body."""
    return check_frame(codec, payload, num_values)[HEADER_BYTES:]


def output_for(payload: Tensor, num_values: int, out: Tensor | None) -> Tensor:
    """Return `out` after checking it, or a new fp32 tensor beside the payload."""
    if out is None:
        return torch.empty(num_values, dtype=torch.float32, device=payload.device)
    if out.dtype != torch.float32 or out.shape != (num_values,) or not out.is_contiguous():
        raise ValueError(
            f"out must be flat contiguous float32 of {num_values} values, got {out.dtype} of shape {tuple(out.shape)}"
        )
    return out
