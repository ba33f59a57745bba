"""Codecs that send values as they are (fp32) or with their lower half cut off (bf16, rounded to nearest even)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from strategies.codecs.backends import Backend
from strategies.codecs.base import (
    HEADER_BYTES,
    NonFiniteError,
    check_values,
    largest_magnitude,
    new_payload,
    open_payload,
    output_for,
)
from strategies.elementwise import passes


@dataclass(frozen=True, slots=True)
class Fp32:
    """4 bytes a value, exact."""

    name: ClassVar[str] = "fp32"
    codec_id: ClassVar[int] = 1
    lossy: ClassVar[bool] = False
    block: ClassVar[int] = 1
    elementwise: ClassVar[bool] = True
    backend: Backend = "torch"  # of what is computed beside it: there is nothing to compile here

    def num_bytes(self, num_values: int) -> int:
        """16 + 4 N."""
        return HEADER_BYTES + 4 * num_values

    def encode(self, values_N: Tensor) -> Tensor:
        """See `Codec.encode`."""
        return _encode(self, values_N, torch.float32)

    def decode(self, payload: Tensor, *, num_values: int, out: Tensor | None = None) -> Tensor:
        """See `Codec.decode`. NaN and infinity in the payload are returned as such: the caller looks for them."""
        return _decode(self, payload, num_values, out, torch.float32)

    def decode_parts(self, payload: Tensor, *, num_values: int) -> Iterator[tuple[slice, Tensor]]:
        """See `Codec.decode_parts`."""
        return _decode_parts(self, payload, num_values, torch.float32)


@dataclass(frozen=True, slots=True)
class Bf16:
    """2 bytes a value, relative error at most 2^-8 / (1 + 2^-8) of normal numbers; finite values stay finite."""

    name: ClassVar[str] = "bf16"
    codec_id: ClassVar[int] = 2
    lossy: ClassVar[bool] = True
    block: ClassVar[int] = 1
    elementwise: ClassVar[bool] = True
    backend: Backend = "torch"  # of what is computed beside it: there is nothing to compile here

    def num_bytes(self, num_values: int) -> int:
        """16 + 2 N."""
        return HEADER_BYTES + 2 * num_values

    def encode(self, values_N: Tensor) -> Tensor:
        """See `Codec.encode`; also raises NonFiniteError for values that bf16 rounds to infinity (above 3.39e38)."""
        return _encode(self, values_N, torch.bfloat16)

    def decode(self, payload: Tensor, *, num_values: int, out: Tensor | None = None) -> Tensor:
        """See `Codec.decode`. NaN and infinity in the payload are returned as such: the caller looks for them."""
        return _decode(self, payload, num_values, out, torch.bfloat16)

    def decode_parts(self, payload: Tensor, *, num_values: int) -> Iterator[tuple[slice, Tensor]]:
        """See `Codec.decode_parts`."""
        return _decode_parts(self, payload, num_values, torch.bfloat16)


def _encode(codec: Fp32 | Bf16, values_N: Tensor, dtype: torch.dtype) -> Tensor:
    check_values(values_N)
    largest = largest_magnitude(values_N)
    # Rounding is monotone: if the largest magnitude stays finite in the wire's type, all do.
    if not math.isfinite(float(torch.tensor(largest, dtype=torch.float32).to(dtype))):
        raise NonFiniteError(f"codec {codec.name!r}: the largest magnitude is {largest}, which cannot be sent")
    payload = new_payload(codec, values_N)
    payload[HEADER_BYTES:].view(dtype).copy_(values_N)
    return payload


def _decode(codec: Fp32 | Bf16, payload: Tensor, num_values: int, out: Tensor | None, dtype: torch.dtype) -> Tensor:
    body = open_payload(codec, payload, num_values)
    return output_for(payload, num_values, out).copy_(body.view(dtype))


def _decode_parts(
    codec: Fp32 | Bf16, payload: Tensor, num_values: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    values_N = open_payload(codec, payload, num_values).view(dtype)
    return ((part, values_N[part].to(torch.float32)) for part in passes(values_N))
