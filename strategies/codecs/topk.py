"""Chunked top-k: of each block of 4,096 values the 64 largest, each with a 12-bit index and 2 bits.

Source: SparseLoCo (arXiv 2508.15706): 64 (12 + 2) bits per 4,096 values, 0.219 a value. For contributions, with
error feedback (decay 0.95): a result must not be sent so (`Codec.elementwise`). What differs: the two bits are the sign
and one of two levels of the *block*, the means of the kept magnitudes above and below the middle of their range
(SparseLoCo: four bucket means of a whole tensor). One byte per level, an exponent and 3 bits of significand below the
largest of the payload: 114 bytes per 4,096 values, 1.8 % over the 14 bits per kept value.

Of equal magnitudes those with the lowest index are kept. Zeros, and values whose level is too small to be named, are
not sent: the last entry is repeated in their place. A block with one level sends it as the low one. So the same
values always have the same bytes, and encoding what was decoded gives them again.

Body: int32 base; per block two uint8 levels, low and high; per block k indices, ascending, two in three bytes, then k
codes (bit 0 the level, bit 1 the sign), four in a byte. A short last block of W values has k = ceil(W / 64).
A level c > 0 is the fp32 number whose upper 12 bits are c + base - 255; 0 is no level.
Suffixes: N values, R blocks (rows), W values of a block, K kept ones, C bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from strategies.codecs.backends import Backend, load_kernels
from strategies.codecs.base import (
    HEADER_BYTES,
    NonFiniteError,
    PayloadError,
    check_values,
    largest_magnitude,
    new_payload,
    open_payload,
    output_for,
)
from strategies.codecs.blockwise import as_array
from strategies.elementwise import values_per_pass
from strategies.errors import SettingError
from strategies.norm import ROW_VALUES, halving_sum

VALUES_PER_KEPT = 64
INDEX_BITS = 12
MAGNITUDE_BITS = 0x7FFFFFFF
# The upper 12 bits of an fp32 number: of the smallest normal one, and of the largest finite one.
LEVEL_SHIFT = 20
MIN_LEVEL, MAX_LEVEL = 0x008, 0x7F7
HIGHEST_CODE = 255


class Group(NamedTuple):
    """Blocks of equal width: their values, their levels and their packed entries in the body of a payload."""

    values: slice
    width: int
    levels_R2: Tensor
    packed_RC: Tensor


class Kept(NamedTuple):
    """The largest values of each block: place (ascending), level (0: not to be sent), whether negative."""

    index_RK: Tensor
    level_RK: Tensor
    negative_RK: Tensor


class Entries(NamedTuple):
    """What is sent for each block: indices and two-bit codes."""

    index_RK: Tensor
    code_RK: Tensor


@dataclass(frozen=True, slots=True)
class TopK:
    """0.223 bits a value; decodes to zeros but for the largest value of every 64."""

    block: int = 4096
    backend: Backend = "torch"

    name: ClassVar[str] = "topk"
    codec_id: ClassVar[int] = 8
    lossy: ClassVar[bool] = True
    elementwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the block size, and that the backend is there."""
        if not 0 < self.block <= 1 << INDEX_BITS or self.block % VALUES_PER_KEPT:
            raise SettingError(
                f"codec.block = {self.block}: codec 'topk' needs a multiple of {VALUES_PER_KEPT} up to "
                f"{1 << INDEX_BITS}"
            )
        if self.backend == "numba":
            load_kernels("numba_sparse")

    def num_bytes(self, num_values: int) -> int:
        """16 + 4 + (2 + 1.75 k) per block."""
        return HEADER_BYTES + 4 + 2 * self._num_blocks(num_values) + self._packed_bytes(num_values)

    def encode(self, values_N: Tensor) -> Tensor:
        """See `Codec.encode`. Raises NonFiniteError for NaN and infinity."""
        check_values(values_N)
        payload = new_payload(self, values_N)
        body = payload[HEADER_BYTES:]
        # The torch form says what is wrong with values that the compiled one refuses.
        if not (self._runs_compiled(values_N) and self._compiled_encode(values_N, body)):
            self._torch_encode(values_N, body)
        return payload

    def decode(self, payload: Tensor, *, num_values: int, out: Tensor | None = None) -> Tensor:
        """See `Codec.decode`. Indices, levels and codes that no encoder writes are refused."""
        body = open_payload(self, payload, num_values)
        base = self._base(body, num_values)
        out_N = output_for(payload, num_values, out)
        self._decode(body, base, slice(0, num_values), num_values, out_N)
        return out_N

    def decode_parts(self, payload: Tensor, *, num_values: int) -> Iterator[tuple[slice, Tensor]]:
        """See `Codec.decode_parts`; a malformed block is found when its part is asked for."""
        body = open_payload(self, payload, num_values)
        base = self._base(body, num_values)
        length = math.lcm(self.block, ROW_VALUES)
        length *= max(values_per_pass(payload) // length, 1)
        scratch = torch.empty(min(length, num_values), dtype=torch.float32, device=payload.device)
        for start in range(0, num_values, length):
            part = slice(start, min(start + length, num_values))
            yield part, self._decode(body, base, part, num_values, scratch[: part.stop - start])

    # ------------------------------------------------------------ frame

    def _num_blocks(self, num_values: int) -> int:
        return -(-num_values // self.block)

    def _packed_bytes(self, num_values: int) -> int:
        whole, rest = divmod(num_values, self.block)
        return whole * bytes_of(self.block) + bytes_of(rest)

    def _base(self, body: Tensor, num_values: int) -> int:
        """Return the base after checking it against the levels of all blocks."""
        base = int(body[:4].view(torch.int32)[0])
        levels_R2 = body[4 : 4 + 2 * self._num_blocks(num_values)].view(-1, 2).int()
        low_R, high_R = levels_R2.unbind(1)
        largest = int(levels_R2.max()) if levels_R2.numel() else 0
        smallest = int(torch.where(low_R == 0, HIGHEST_CODE, low_R).min()) if levels_R2.numel() else HIGHEST_CODE
        fits = largest == HIGHEST_CODE and smallest + base - HIGHEST_CODE >= MIN_LEVEL and base <= MAX_LEVEL
        if not (fits or (base == 0 and largest == 0)) or bool(((high_R > 0) & (high_R <= low_R)).any()):
            raise PayloadError(
                f"payload for codec {self.name!r}: base {base} and levels are not what an encoder writes"
            )
        return base

    def _groups(self, body: Tensor, part: slice, num_values: int) -> Iterator[Group]:
        """Yield the whole blocks of a part that starts at a block, and the short last block by itself."""
        levels_R2 = body[4 : 4 + 2 * self._num_blocks(num_values)].view(-1, 2)
        packed = body[4 + levels_R2.numel() :]
        whole = part.start + (part.stop - part.start) // self.block * self.block
        for values, width in ((slice(part.start, whole), self.block), (slice(whole, part.stop), part.stop - whole)):
            if values.start < values.stop:
                blocks = slice(values.start // self.block, self._num_blocks(values.stop))
                places = slice(self._packed_bytes(values.start), self._packed_bytes(values.stop))
                yield Group(values, width, levels_R2[blocks], packed[places].view(-1, bytes_of(width)))

    # ------------------------------------------------------------ both forms

    def _torch_encode(self, values_N: Tensor, body: Tensor) -> None:
        groups = list(self._groups(body, slice(0, values_N.numel()), values_N.numel()))
        kept = [keep_largest(self._checked(values_N[g.values].view(-1, g.width), g)) for g in groups]
        base = max((int(k.level_RK.max()) for k in kept), default=0)
        body[:4].view(torch.int32).fill_(base)
        for group, largest in zip(groups, kept, strict=True):
            levels_R2, entries = name_levels(largest, base)
            group.levels_R2.copy_(levels_R2)
            group.packed_RC.copy_(pack(entries))

    def _checked(self, x_RW: Tensor, group: Group) -> Tensor:
        largest_R = x_RW.abs().amax(1)
        if not math.isfinite(largest_magnitude(largest_R)):
            place = int((~torch.isfinite(largest_R)).nonzero()[0])
            raise NonFiniteError(
                f"codec {self.name!r}: block {group.values.start // self.block + place} of {self.block} values holds "
                f"{largest_R[place].item()}"
            )
        return x_RW

    def _decode(self, body: Tensor, base: int, part: slice, num_values: int, out_N: Tensor) -> Tensor:
        for group in self._groups(body, part, num_values):
            out_RW = out_N[group.values.start - part.start : group.values.stop - part.start].view(-1, group.width)
            if not (self._runs_compiled(out_N) and self._compiled_decode(group, base, out_RW)):
                decode_group(group, base, out_RW)
        return out_N

    def _runs_compiled(self, values_N: Tensor) -> bool:
        return self.backend == "numba" and values_N.device.type == "cpu"

    def _compiled_encode(self, values_N: Tensor, body: Tensor) -> bool:
        """Return whether all values could be encoded."""
        num_blocks = self._num_blocks(values_N.numel())
        levels, packed = body[4 : 4 + 2 * num_blocks].view(-1, 2), body[4 + 2 * num_blocks :]
        limits = (LEVEL_SHIFT, MIN_LEVEL, MAX_LEVEL)
        kernel = load_kernels("numba_sparse").topk_encode
        base = kernel(as_array(values_N), self.block, as_array(levels), as_array(packed), limits)
        body[:4].view(torch.int32).fill_(max(base, 0))
        return bool(base >= 0)

    def _compiled_decode(self, group: Group, base: int, out_RW: Tensor) -> bool:
        """Return whether the entries were well-formed."""
        kernel = load_kernels("numba_sparse").topk_decode
        return bool(kernel(as_array(group.levels_R2), as_array(group.packed_RC), base, LEVEL_SHIFT, as_array(out_RW)))


def num_kept(width: int) -> int:
    """ceil(W / 64)."""
    return -(-width // VALUES_PER_KEPT)


def bytes_of(width: int) -> int:
    """Bytes of the indices and codes of a block."""
    kept = num_kept(width)
    return -(-kept * INDEX_BITS // 8) + -(-kept // 4)


def keep_largest(x_RW: Tensor) -> Kept:
    """Choose the k largest magnitudes of each row and their levels: the means of the upper and the lower ones."""
    width = x_RW.shape[1]
    last = (1 << INDEX_BITS) - 1
    # Magnitude first, then the lower index: no two keys are equal, so any algorithm finds the same ones.
    bits_RW = x_RW.view(torch.int32).bitwise_and(MAGNITUDE_BITS).long()
    keys_RW = (bits_RW << INDEX_BITS) + torch.arange(last, last - width, -1, device=x_RW.device)
    top_RK = keys_RW.topk(num_kept(width), dim=1, sorted=False).values
    index_RK = (last - (top_RK & last)).sort(dim=1).values
    value_RK = x_RW.gather(1, index_RK)
    magnitude_RK = value_RK.abs().double()
    sent_RK = magnitude_RK > 0
    smallest_R = torch.where(sent_RK, magnitude_RK, torch.inf).amin(1)
    middle_R = (magnitude_RK.amax(1) + smallest_R).mul_(0.5)
    upper_RK = magnitude_RK > middle_R.unsqueeze(1)
    level_RK = torch.where(upper_RK, _level(magnitude_RK, upper_RK), _level(magnitude_RK, sent_RK & ~upper_RK))
    return Kept(index_RK, level_RK.masked_fill_(~sent_RK, 0), torch.signbit(value_RK))


def _level(magnitude_RK: Tensor, members_RK: Tensor) -> Tensor:
    """Return the mean magnitude of the members as a column: upper 12 bits of fp32, rounded; 0 if there is none."""
    sums_R = halving_sum(torch.where(members_RK, magnitude_RK, 0.0))
    counts_R = halving_sum(members_RK.double())
    means_R = torch.div(sums_R, counts_R.clamp_(min=1.0)).float()
    levels_R = means_R.view(torch.int32).add_(1 << (LEVEL_SHIFT - 1)).bitwise_right_shift_(LEVEL_SHIFT)
    return levels_R.clamp_(max=MAX_LEVEL).masked_fill_(levels_R < MIN_LEVEL, 0).unsqueeze(1)


def name_levels(kept: Kept, base: int) -> tuple[Tensor, Entries]:
    """Return the bytes of the levels of each block, and its entries with those that cannot be named replaced."""
    level_RK = torch.where(kept.level_RK == 0, 0, (kept.level_RK - base + HIGHEST_CODE).clamp_(min=0))
    sent_RK = level_RK > 0
    high_R = level_RK.amax(1)
    low_R = torch.where(sent_RK, level_RK, HIGHEST_CODE + 1).amin(1).minimum(high_R)
    code_RK = (level_RK > low_R.unsqueeze(1)).long() + 2 * kept.negative_RK.long()
    # The entries that are sent come first, in order; the last of them fills the rest.
    beyond = 1 << INDEX_BITS
    order_RK = torch.where(sent_RK, kept.index_RK, beyond).sort(dim=1).indices
    counts_R = halving_sum(sent_RK.double()).long()
    slots_K = torch.arange(order_RK.shape[1], device=order_RK.device)
    order_RK = order_RK.gather(1, torch.minimum(slots_K, (counts_R - 1).clamp_(min=0).unsqueeze(1)))
    empty_R1 = (counts_R == 0).unsqueeze(1)
    index_RK, code_RK = (a.gather(1, order_RK).masked_fill_(empty_R1, 0) for a in (kept.index_RK, code_RK))
    high_R = torch.where(high_R > low_R, high_R, 0)
    return torch.stack([low_R, high_R], 1), Entries(index_RK, code_RK)


def pack(entries: Entries) -> Tensor:
    """Return the bytes of the entries: 12-bit indices, two in three bytes, then 2-bit codes, four in a byte."""
    num_rows, kept = entries.index_RK.shape
    first_RP, second_RP = _padded(entries.index_RK, 2).view(num_rows, -1, 2).unbind(2)
    triples = torch.stack([first_RP & 255, (first_RP >> 8) | ((second_RP & 15) << 4), second_RP >> 4], 2)
    four_RQ4 = _padded(entries.code_RK, 4).view(num_rows, -1, 4)
    codes_RQ = four_RQ4[..., 0] | (four_RQ4[..., 1] << 2) | (four_RQ4[..., 2] << 4) | (four_RQ4[..., 3] << 6)
    indices = triples.view(num_rows, -1)[:, : -(-kept * INDEX_BITS // 8)]
    return torch.cat([indices, codes_RQ], 1).to(torch.uint8)


def unpack(packed_RC: Tensor, kept: int) -> Entries:
    """Return the entries that `pack` packed."""
    num_rows = packed_RC.shape[0]
    wide_RC = packed_RC.long()
    index_bytes = -(-kept * INDEX_BITS // 8)
    a, b, c = _padded(wide_RC[:, :index_bytes], 3).view(num_rows, -1, 3).unbind(2)
    index_RK = torch.stack([a | ((b & 15) << 8), (b >> 4) | (c << 4)], 2).view(num_rows, -1)[:, :kept]
    shifts_4 = torch.arange(0, 8, 2, device=packed_RC.device)
    code_RK = ((wide_RC[:, index_bytes:].unsqueeze(2) >> shifts_4) & 3).view(num_rows, -1)[:, :kept]
    return Entries(index_RK, code_RK)


def _padded(values_RK: Tensor, multiple: int) -> Tensor:
    missing = -values_RK.shape[1] % multiple
    return torch.nn.functional.pad(values_RK, (0, missing)).contiguous()


def decode_group(group: Group, base: int, out_RW: Tensor) -> None:
    """Write the values of a group. Raises PayloadError for entries that no encoder writes."""
    entries = unpack(group.packed_RC, num_kept(group.width))
    _check_entries(group, entries)
    levels_R2 = group.levels_R2.int()
    names_R2 = torch.where(levels_R2 == 0, 0, levels_R2 + (base - HIGHEST_CODE))
    level_RK = names_R2.gather(1, entries.code_RK & 1)
    values_RK = (level_RK << LEVEL_SHIFT).view(torch.float32)
    values_RK = torch.where(entries.code_RK > 1, -values_RK, values_RK)
    # A repeated index comes with the same value each time.
    out_RW.zero_().scatter_(1, entries.index_RK, values_RK)


def _check_entries(group: Group, entries: Entries) -> None:
    index_RK, code_RK = entries
    low_R1, high_R1 = group.levels_R2.unsqueeze(2).unbind(1)
    step_RK = index_RK[:, 1:] - index_RK[:, :-1]
    repeats_RK = step_RK == 0
    wrong = (
        bool((step_RK < 0).any()),
        int(index_RK.max()) >= group.width,
        bool((repeats_RK[:, :-1] & ~repeats_RK[:, 1:]).any()),
        bool((repeats_RK & (code_RK[:, 1:] != code_RK[:, :-1])).any()),
        bool(((code_RK & 1 > 0) & (high_R1 == 0)).any()),
        bool(((low_R1 == 0) & ((index_RK > 0) | (code_RK > 0) | (high_R1 > 0))).any()),
        not torch.equal(pack(entries), group.packed_RC),
    )
    if any(wrong):
        first = group.values.start
        raise PayloadError(f"payload for codec 'topk': entries behind value {first} are not what an encoder writes")
