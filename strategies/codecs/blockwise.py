"""What codecs with one scale per block share: the body, the passes over it, the checks, the choice of the backend.

Body: one fp32 scale per block, then the codes of each block in whole bytes. A codec adds the arithmetic on the rows of
a matrix, once in torch, which is the reference and also runs on other devices, and once in `compiled.py`.

Scales are rounded or cut to fewer significant bits, so that `code * scale` is *exact* in fp32: decoding has no rounding
at all, and encoding what was decoded gives the same bytes. A block whose scale would be so small that a decoded value
is subnormal is sent as zeros: some devices flush subnormals.

Suffixes: N values, R blocks (rows), B values of a block, C bytes of the codes of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from strategies.codecs.backends import Backend, Kernels, load_kernels
from strategies.codecs.base import (
    HEADER_BYTES,
    NonFiniteError,
    PayloadError,
    check_frame,
    check_values,
    largest_magnitude,
    new_payload,
    output_for,
)
from strategies.elementwise import scalar_like, values_per_pass
from strategies.errors import SettingError
from strategies.norm import ROW_VALUES

if TYPE_CHECKING:
    import numpy as np

MAX_BLOCK = (1 << 32) - 1
FP32_MAX = (2.0 - 2.0**-23) * 2.0**127


class Body(NamedTuple):
    """Views into a payload: fp32 scales, uint8 codes."""

    scales_R: Tensor
    codes: Tensor


class Rows(NamedTuple):
    """A range of blocks of equal width: their values, their numbers, the bytes of their codes."""

    values: slice
    blocks: slice
    codes: slice
    width: int


@dataclass(frozen=True, slots=True)
class Blockwise:
    """Base of the blockwise codecs; see there for `block`, and `backends` for `backend`."""

    block: int
    backend: Backend = "torch"

    name: ClassVar[str]
    codec_id: ClassVar[int]
    lossy: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    values_per_byte: ClassVar[int]
    # scale = magnitude / levels, `rounding` added to its bits, `dropped_bits` of them cleared.
    levels: ClassVar[float] = 1.0
    rounding: ClassVar[int] = 0
    dropped_bits: ClassVar[int] = 0
    # Smaller ones are sent as 0.
    min_scale: ClassVar[float]
    # Largest scale with which every code decodes to a finite value.
    max_scale: ClassVar[float]
    # The compiled form: its file and the names of its functions.
    kernels: ClassVar[Kernels] = "numba_dense"
    encode_kernel: ClassVar[str]
    decode_kernel: ClassVar[str]
    # Its kernel in `triton_dense.py`, "" where there is none; and whether it encodes as that one does.
    triton: ClassVar[str] = ""
    triton_encodes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the block size, and that the backend is there."""
        if not 1 <= self.block <= MAX_BLOCK:
            raise SettingError(f"codec.block = {self.block}; it must lie between 1 and {MAX_BLOCK}")
        if self.backend != "torch":
            load_kernels(self.kernels if self.backend == "numba" else "triton_dense")

    def num_blocks(self, num_values: int) -> int:
        """ceil(N / block)."""
        return -(-num_values // self.block)

    def num_code_bytes(self, num_values: int) -> int:
        """Bytes of the codes: those of each block fill whole bytes."""
        whole, rest = divmod(num_values, self.block)
        return whole * self._bytes_of(self.block) + self._bytes_of(rest)

    def num_bytes(self, num_values: int) -> int:
        """16 + 4 ceil(N / block) + the codes."""
        return HEADER_BYTES + 4 * self.num_blocks(num_values) + self.num_code_bytes(num_values)

    def encode(self, values_N: Tensor) -> Tensor:
        """See `Codec.encode`. Raises NonFiniteError if a block holds NaN, infinity or a number within a hair of it."""
        check_values(values_N)
        payload = new_payload(self, values_N)
        # The torch form says what is wrong with values that the compiled one refuses.
        if not (self._runs_compiled(values_N) and self._compiled_encode(values_N, payload)):
            self._torch_encode(values_N, self._body(payload, values_N.numel()))
        return payload

    def decode(self, payload: Tensor, *, num_values: int, out: Tensor | None = None) -> Tensor:
        """See `Codec.decode`. Scales that no encoder writes are refused, so the values are always finite."""
        payload = check_frame(self, payload, num_values)
        out_N = output_for(payload, num_values, out)
        if not (self._runs_compiled(payload) and self._compiled_decode(payload, num_values, 0, out_N)):
            self._torch_decode(self._checked_body(payload, num_values), out_N)
        return out_N

    def decode_parts(self, payload: Tensor, *, num_values: int) -> Iterator[tuple[slice, Tensor]]:
        """See `Codec.decode_parts`; one part if no multiple of the block and of `ROW_VALUES` fits into a pass."""
        payload = check_frame(self, payload, num_values)
        body = self._checked_body(payload, num_values)
        length = math.lcm(self.block, ROW_VALUES)
        length *= max(values_per_pass(payload) // length, 1)
        scratch = torch.empty(min(length, num_values), dtype=torch.float32, device=payload.device)
        for start in range(0, num_values, length):
            stop = min(start + length, num_values)
            part = scratch[: stop - start]
            if not (self._runs_compiled(payload) and self._compiled_decode(payload, num_values, start, part)):
                scales_R = body.scales_R[start // self.block : self.num_blocks(stop)]
                codes = body.codes[self.num_code_bytes(start) : self.num_code_bytes(stop)]
                self._torch_decode(Body(scales_R, codes), part)
            yield slice(start, stop), part

    # ------------------------------------------------------------ frame

    def _bytes_of(self, width: int) -> int:
        return -(-width // self.values_per_byte)

    def _body(self, payload: Tensor, num_values: int) -> Body:
        scales_end = HEADER_BYTES + 4 * self.num_blocks(num_values)
        return Body(payload[HEADER_BYTES:scales_end].view(torch.float32), payload[scales_end:])

    def _checked_body(self, payload: Tensor, num_values: int) -> Body:
        body = self._body(payload, num_values)
        if body.scales_R.numel() > 0:
            low, high = (float(bound) for bound in torch.aminmax(body.scales_R))
            if not (low >= 0.0 and high <= self.max_scale):
                raise PayloadError(
                    f"payload for codec {self.name!r}: scales lie between {low} and {high}, which no encoder writes"
                )
        whole, rest = divmod(num_values, self.block)
        border = whole * self._bytes_of(self.block)
        self._check_padding(body.codes[:border], whole, self.block)
        self._check_padding(body.codes[border:], min(rest, 1), rest)
        return body

    def _check_padding(self, codes: Tensor, num_blocks: int, width: int) -> None:
        if width % self.values_per_byte and num_blocks and bool(self._padding(codes.view(num_blocks, -1), width).any()):
            raise PayloadError(f"payload for codec {self.name!r}: bits behind the last value of a block are set")

    def _rows(self, values_N: Tensor) -> Iterator[Rows]:
        """Yield ranges of whole blocks that fit into a pass; the short last block by itself."""
        num_values = values_N.numel()
        whole, row_bytes = num_values // self.block, self._bytes_of(self.block)
        rows = max(values_per_pass(values_N) // self.block, 1)
        for first in range(0, whole, rows):
            last = min(first + rows, whole)
            values = slice(first * self.block, last * self.block)
            yield Rows(values, slice(first, last), slice(first * row_bytes, last * row_bytes), self.block)
        if whole * self.block < num_values:
            values = slice(whole * self.block, num_values)
            yield Rows(values, slice(whole, whole + 1), slice(whole * row_bytes, None), num_values - values.start)

    # ------------------------------------------------------------ the torch form

    def _torch_encode(self, values_N: Tensor, body: Body) -> None:
        for rows in self._rows(values_N):
            x_RB = values_N[rows.values].view(-1, rows.width)
            if self._triton_encode(x_RB, body.scales_R[rows.blocks], body.codes[rows.codes]):
                continue
            scales_R = self._checked_scales(self._magnitudes(x_RB), rows.blocks.start)
            body.scales_R[rows.blocks] = scales_R
            codes_RC = body.codes[rows.codes].view(-1, self._bytes_of(rows.width))
            self._encode_rows(x_RB, scales_R, codes_RC, first=rows.values.start)

    def _checked_scales(self, magnitudes_R: Tensor, first_block: int) -> Tensor:
        largest = largest_magnitude(magnitudes_R)
        if not math.isfinite(largest):
            place = int((~torch.isfinite(magnitudes_R)).nonzero()[0])
            raise NonFiniteError(
                f"codec {self.name!r}: block {first_block + place} of {self.block} values holds "
                f"{magnitudes_R[place].item()}"
            )
        scales_R = torch.div(magnitudes_R, scalar_like(self.levels, magnitudes_R))
        scales_R.view(torch.int32).add_(self.rounding).bitwise_and_(-1 << self.dropped_bits)
        scales_R.masked_fill_(scales_R < self.min_scale, 0.0)
        if largest_magnitude(scales_R) > self.max_scale:
            raise NonFiniteError(f"codec {self.name!r}: the largest magnitude is {largest}, too near the end of fp32")
        return scales_R

    def _torch_decode(self, body: Body, out_N: Tensor) -> None:
        for rows in self._rows(out_N):
            codes_RC = body.codes[rows.codes].view(-1, self._bytes_of(rows.width))
            if self._runs_triton(out_N):
                values_RB = out_N[rows.values].view(-1, rows.width)
                load_kernels("triton_dense").decode_rows(self.triton, body.scales_R[rows.blocks], codes_RC, values_RB)
                continue
            self._decode_rows(body.scales_R[rows.blocks], codes_RC, out_N[rows.values].view(-1, rows.width))

    def _magnitudes(self, x_RB: Tensor) -> Tensor:
        """What the scale of each block is made of; NaN or infinity if the block holds one."""
        # amax and amin, which keep a NaN, are ten times as fast here as aminmax or an infinity norm.
        return torch.maximum(x_RB.amax(1), x_RB.amin(1).neg_())

    def _encode_rows(self, x_RB: Tensor, scales_R: Tensor, codes_RC: Tensor, *, first: int) -> None:
        raise NotImplementedError

    def _decode_rows(self, scales_R: Tensor, codes_RC: Tensor, out_RB: Tensor) -> None:
        raise NotImplementedError

    def _padding(self, codes_RC: Tensor, width: int) -> Tensor:
        """Return the codes behind the last value; only asked for if there are any."""
        raise NotImplementedError

    # ------------------------------------------------------------ the compiled form

    def _runs_compiled(self, values: Tensor) -> bool:
        return self.backend == "numba" and values.is_cpu

    def _runs_triton(self, values: Tensor) -> bool:
        if self.backend != "triton" or not self.triton:
            return False
        kernels = load_kernels("triton_dense")
        return bool(kernels.runs_on(values)) and self.block <= kernels.LARGEST_BLOCK

    def _triton_encode(self, x_RB: Tensor, scales_R: Tensor, codes: Tensor) -> bool:
        """Return whether all values could be encoded; the torch form says what is wrong with the others."""
        if not (self._runs_triton(x_RB) and self.triton_encodes):
            return False
        limits = (self.levels, self.rounding, -1 << self.dropped_bits, self.min_scale, self.max_scale)
        codes_RC = codes.view(-1, self._bytes_of(x_RB.shape[1]))
        kernels = load_kernels("triton_dense")
        kernels.encode_rows(self.triton, x_RB, scales_R, codes_RC, (*limits, *self._encode_arguments()))
        return math.isfinite(largest_magnitude(scales_R))

    def _compiled_encode(self, values_N: Tensor, payload: Tensor) -> bool:
        """Return whether all values could be encoded."""
        kernel = getattr(load_kernels(self.kernels), self.encode_kernel)
        limits = (self.levels, self.rounding, -1 << self.dropped_bits, self.min_scale, self.max_scale)
        return bool(kernel(as_array(values_N), payload.numpy(), self.block, limits, *self._encode_arguments()))

    def _compiled_decode(self, payload: Tensor, num_values: int, first: int, out_N: Tensor) -> bool:
        """Decode the values from number `first` on, the start of a block; return whether the payload is well-formed."""
        kernel = getattr(load_kernels(self.kernels), self.decode_kernel)
        return bool(kernel(payload.numpy(), num_values, self.block, self.max_scale, first, as_array(out_N)))

    def _encode_arguments(self) -> tuple[float, ...]:
        """What the compiled encoder needs beside the limits of the scales."""
        return ()


def divisors(scales_R: Tensor) -> Tensor:
    """Return the scales as a column to divide by: x / inf = 0, so an all-zero block needs no branch."""
    return torch.where(scales_R == 0, torch.full_like(scales_R, math.inf), scales_R).unsqueeze(1)


def as_array(values: Tensor) -> np.ndarray[Any, Any]:
    """Return a CPU tensor's memory as an array."""
    array: np.ndarray[Any, Any] = values.detach().numpy()
    return array
