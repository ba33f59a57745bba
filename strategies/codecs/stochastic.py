"""Stochastic rounding with random numbers that are a function of (seed, round, position), not of a generator's state.

Everyone who knows the three gets the same bits, on every device, in any order and in pieces. Source of the idea:
Philox (Salmon et al., SC11); ours is cheaper: the 32-bit finaliser `lowbias32` (C. Wellons, "hash prospector", bias
0.17) applied twice, the second time after the other half of the key was mixed in. Not for secrets.

x is rounded away from zero if u < fraction of |x|, u = 24 hashed bits / 2^24: an integer stays what it is, rounding is
odd, and right on average up to 2^-24. Suffixes: R blocks (rows), B values of a block.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from strategies.elementwise import scalar_like

if TYPE_CHECKING:
    from strategies.codecs.base import Codec

MASK_64 = (1 << 64) - 1
MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
RANDOM_BITS = 24

T = TypeVar("T", bound="Codec")


def mix(key: int, *counters: int) -> int:
    """Return a 64-bit key for a counter or several (a seed, a round, a place): SplitMix64's finaliser after each."""
    for counter in counters:
        key = (key + 0x9E3779B97F4A7C15 + (counter & MASK_64)) & MASK_64
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & MASK_64
        key ^= key >> 31
    return key


def keyed(codec: T, *counters: int) -> T:
    """Return the codec with random numbers of its own for these counters; one that rounds to nearest as it is.

    The next contribution, fragment, chunk and member must have others: give all of them.
    """
    key = getattr(codec, "key", None)
    # The codecs that have a key are dataclasses; the type of the protocol does not say so.
    return codec if key is None else cast("T", replace(cast("Any", codec), key=mix(key, *counters)))


def key_words(key: int) -> tuple[int, int]:
    """Return the two 32-bit halves of a key, the lower first."""
    return key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF


def round_randomly(x_RB: Tensor, *, largest: int, key: int, first: int) -> Tensor:
    """Round fp32 values to an integer at most `largest` in magnitude; `first` is the position of the first of them.

    `x_RB` is overwritten and returned.
    """
    positions = torch.arange(first, first + x_RB.numel(), dtype=torch.int32, device=x_RB.device)
    low, high = key_words(key)
    bits = _scramble(_scramble(positions.bitwise_xor_(_signed(low))).bitwise_xor_(_signed(high)))
    u_RB = (bits >> 8).bitwise_and_((1 << RANDOM_BITS) - 1).to(torch.float32).view(x_RB.shape)
    u_RB.mul_(scalar_like(2.0**-RANDOM_BITS, u_RB))
    magnitude_RB = x_RB.abs()
    floor_RB = magnitude_RB.floor()
    # The fraction is exact, as is the comparison; adding u to the magnitude would round.
    up_RB = u_RB < magnitude_RB.sub_(floor_RB)
    return torch.copysign(floor_RB.add_(up_RB).clamp_(max=largest), x_RB, out=x_RB)


def _scramble(h: Tensor) -> Tensor:
    """`lowbias32` in place on int32, whose products wrap; a right shift drags the sign along, so it is masked."""
    for shift, multiplier in ((16, MULTIPLIERS[0]), (15, MULTIPLIERS[1])):
        h.bitwise_xor_((h >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(_signed(multiplier))
    return h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF))


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word
