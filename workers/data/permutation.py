"""The keyed order of samples: position in the run -> sample id, without a table.

A permutation of `range(size)` is an alternating Feistel network over the smallest power of two that holds `size`,
with cycle walking (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002,
https://eprint.iacr.org/2001/012, methods 2 and 3): a value that lands outside `range(size)` is permuted again until
it is inside. What differs: the halves may have unequal widths, so that the domain is less than twice `size`; and the
round function is the finaliser of SplitMix64 (https://prng.di.unimi.it/splitmix64.c): well mixed, but no protection
against somebody who wants to guess the order.

Only integer arithmetic modulo 2**64: the same numbers on every machine and in every version. Changing anything here
changes what a resumed run reads; golden values in the tests hold it.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from workers.data.errors import DataError

Ints: TypeAlias = NDArray[np.int64]
_Words: TypeAlias = NDArray[np.uint64]

MAX_SIZE = 1 << 62
_ROUNDS = 12  # with 8, pairs of outputs are visibly uneven where size is about 8 (measured); with 12 they are not
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: the step of SplitMix64
_FACTOR_1 = 0xBF58476D1CE4E5B9
_FACTOR_2 = 0x94D049BB133111EB
_U27, _U30, _U31, _U1, _U2 = (np.uint64(value) for value in (27, 30, 31, _FACTOR_1, _FACTOR_2))


def epoch_key(seed: int, epoch: int) -> int:
    """Return the 64-bit key of one epoch of the run with this seed; both are integers of at least 0."""
    return _mix_int((_mix_int(seed & _MASK) + epoch * _GOLDEN) & _MASK)


def permute(positions: Ints, *, size: int, key: int) -> Ints:
    """Map each position to its place under the permutation of `range(size)` that `key` selects.

    `positions` has any shape; the result has the same. For one key the map is one to one. Raises `DataError` for a
    size outside 1..2**62 or a position outside `range(size)`.
    """
    if not 1 <= size <= MAX_SIZE:
        raise DataError(f"size of the permutation: {size} is not between 1 and 2**62")
    flat = np.asarray(positions, dtype=np.int64).reshape(-1)
    if flat.size and not (0 <= int(flat.min()) and int(flat.max()) < size):
        raise DataError(f"position {int(flat.min())} or {int(flat.max())} is outside 0..{size - 1}")
    bits = max(1, (size - 1).bit_length())
    round_keys = _round_keys(key)
    values = _feistel(flat.astype(np.uint64), bits, round_keys)
    outside = np.flatnonzero(values >= np.uint64(size))
    while outside.size:
        values[outside] = _feistel(values[outside], bits, round_keys)
        outside = outside[values[outside] >= np.uint64(size)]
    return values.astype(np.int64).reshape(np.shape(positions))


def sample_ids(positions: Ints, *, size: int, seed: int) -> Ints:
    """Map global positions of a run to sample ids of a split with `size` samples.

    Position p belongs to epoch p // size; each epoch visits each sample once, in its own order. Any shape. Raises
    `DataError` for negative positions or a size out of range.
    """
    if not 1 <= size <= MAX_SIZE:
        raise DataError(f"number of samples: {size} is not between 1 and 2**62")
    wanted = np.asarray(positions, dtype=np.int64)
    if wanted.size and int(wanted.min()) < 0:
        raise DataError(f"position {int(wanted.min())} is negative")
    epochs, offsets = np.divmod(wanted, np.int64(size))
    ids = np.empty_like(wanted)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        ids[here] = permute(offsets[here], size=size, key=epoch_key(seed, int(epoch)))
    return ids


def _feistel(values: _Words, bits: int, round_keys: list[int]) -> _Words:
    """One pass through the network on `bits`-bit numbers: each round changes one half by a function of the other."""
    low_bits = (bits + 1) // 2
    shift = np.uint64(low_bits)
    low_mask = np.uint64((1 << low_bits) - 1)
    high_mask = np.uint64((1 << (bits - low_bits)) - 1)
    high, low = values >> shift, values & low_mask
    for index, round_key in enumerate(round_keys):
        if index % 2 == 0:
            high ^= _mix(low, round_key) & high_mask
        else:
            low ^= _mix(high, round_key) & low_mask
    return (high << shift) | low


def _round_keys(key: int) -> list[int]:
    return [_mix_int((key + (index + 1) * _GOLDEN) & _MASK) for index in range(_ROUNDS)]


def _mix(values: _Words, round_key: int) -> _Words:
    mixed = values + np.uint64(round_key)
    mixed ^= mixed >> _U30
    mixed *= _U1
    mixed ^= mixed >> _U27
    mixed *= _U2
    mixed ^= mixed >> _U31
    return mixed


def _mix_int(value: int) -> int:
    value = ((value ^ (value >> 30)) * _FACTOR_1) & _MASK
    value = ((value ^ (value >> 27)) * _FACTOR_2) & _MASK
    return value ^ (value >> 31)
