"""What becomes of the contributions: their weighted sum, or a robust rule in place of it. Free functions, composable.

The sum: `acc = sum_i c_i u_i`, in the order of the roster, fp32. Source: DiLoCo (arXiv 2311.08105), algorithm 1, line
12, with the coefficients of the exchange protocol, section 1.6. Multiply and add are separate operations, each rounded
once, so that all owners get the same bits for the same roster order; another order gives another rounding.
`decode_accumulate` does the same with a payload, part by part: what a contribution decodes to is never in memory as a
whole.

The robust rules. Sources: coordinate median and trimmed mean, Yin et al. 2018; multi-Krum, Blanchard et al. 2017 with
its n - f - 2 neighbours (byzfl takes n - f - 1); nearest-neighbour mixing, Allouah et al. 2023; CenteredClip with
history and bucketing, Karimireddy et al. 2021 and 2022 (arXiv 2012.10333, 2006.09365); clipping as SparseLoCo's. What
differs: clipping and distances are about whole vectors, also where a vector is reduced in parts (its norms
and distances are sums over parts, and scalars): clipping each part on its own is another rule. Radii come from medians.

Bits: fp32, one rounding per operation; scalars (norms, distances) fp64 in one order of additions. Median, trimmed mean
and Krum's choice do not depend on the order of contributions, the means only in their last bit.
What is decided from lengths and distances alone is in `robust.py`.
Every rule takes finite values only: `finite` first. Suffixes: P contributions, N values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from strategies.codecs.base import Codec
from strategies.elementwise import new_scratch, passes, scalar_like
from strategies.errors import SettingError
from strategies.norm import SquareSum, sum_of_squares
from strategies.robust import Squares, buckets, check_enough, clip_factors, krum_order, nearest

__all__ = [
    "Accumulated", "Squares", "accumulate", "bucket_means", "buckets", "centered_clip", "check_enough", "clip_factors",
    "clip_to_median", "coordinate_median", "decode_accumulate", "finite", "krum_order", "multi_krum", "nearest",
    "nearest_mixing", "norms", "pairwise_squares", "trimmed_mean", "weighted_sum",
]  # fmt: skip


class Accumulated(NamedTuple):
    """A sum of contributions, and the sum of squares of the last of them (0-dim fp64, `norm.sum_of_squares`)."""

    acc_N: Tensor
    sum_of_squares: Tensor


def accumulate(acc_N: Tensor | None, decoded_N: Tensor, coefficient: float) -> Tensor:
    """Return `acc_N + coefficient * decoded_N`, adding in place; None starts a new sum. `decoded_N` is not changed."""
    weight = scalar_like(coefficient, decoded_N)
    if acc_N is None:
        return torch.mul(decoded_N, weight)
    scratch = new_scratch(decoded_N)
    for part in passes(decoded_N):
        decoded = decoded_N[part]
        acc_N[part].add_(torch.mul(decoded, weight, out=scratch[: decoded.numel()]))
    return acc_N


def decode_accumulate(
    codec: Codec, payload: Tensor, coefficient: float, acc_N: Tensor | None, *, num_values: int
) -> Accumulated:
    """Return what `accumulate(acc_N, codec.decode(payload), coefficient)` returns, with the same bits.

    The payload is decoded into a vector that stays in a core's cache. Raises PayloadError for a malformed payload;
    `acc_N` must then not be used any more.
    """
    first = acc_N is None
    if acc_N is None:
        acc_N = torch.empty(num_values, dtype=torch.float32, device=payload.device)
    weight, squares = scalar_like(coefficient, acc_N), SquareSum(codec.backend)
    for part, decoded in codec.decode_parts(payload, num_values=num_values):
        squares.add_with_total(decoded, weight, acc_N[part], begin=first)
    return Accumulated(acc_N, squares.total())


def weighted_sum(decoded: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Return the sum of the contributions, each times its coefficient, in order. Raises ValueError if there is none."""
    acc: Tensor | None = None
    for decoded_N, coefficient in zip(decoded, coefficients, strict=True):
        acc = accumulate(acc, decoded_N, coefficient)
    if acc is None:
        raise ValueError("there is no contribution to sum")
    return acc


# ---------------------------------------------------------------- robust rules


def finite(updates: Sequence[Tensor]) -> list[bool]:
    """Of each contribution, whether all its values are finite. One that is not would poison every rule for good."""
    return [bool(torch.isfinite(update_N).all()) for update_N in updates]


# ---------------------------------------------------------------- clipping


def norms(updates: Sequence[Tensor]) -> list[float]:
    """The L2 norms, fp64."""
    return [math.sqrt(float(sum_of_squares(update_N))) for update_N in updates]


def clip_to_median(updates: Sequence[Tensor]) -> list[Tensor]:
    """The contributions, none longer than the median of their norms; those that are not clipped are not copied."""
    factors = clip_factors(norms(updates))
    return [u if k == 1.0 else torch.mul(u, scalar_like(k, u)) for u, k in zip(updates, factors, strict=True)]


# ---------------------------------------------------------------- coordinate by coordinate


def coordinate_median(updates: Sequence[Tensor]) -> Tensor:
    """The median of each coordinate; of an even number the mean of the middle two."""
    sorted_PN, num = _sorted(updates), len(updates)
    if num % 2:
        return sorted_PN[num // 2].clone()
    half = scalar_like(0.5, sorted_PN)
    # Halved before they are added: the sum of two large values would overflow.
    return torch.mul(sorted_PN[num // 2 - 1], half).add_(torch.mul(sorted_PN[num // 2], half))


def trimmed_mean(updates: Sequence[Tensor], num_wrong: int) -> Tensor:
    """Of each coordinate the mean without its `num_wrong` lowest and highest values, added from low to high."""
    check_enough("trimmed_mean", len(updates), num_wrong)
    kept_PN = _sorted(updates)[num_wrong : len(updates) - num_wrong]
    mean_N = weighted_sum(list(kept_PN), [1.0 / len(kept_PN)] * len(kept_PN))
    # Rounding of the mean must not lead out of what was kept.
    return torch.clamp(mean_N, min=kept_PN[0], max=kept_PN[-1])


# ---------------------------------------------------------------- by distances


def pairwise_squares(updates: Sequence[Tensor]) -> Squares:
    """Squared distances between all contributions, fp64."""
    num = len(updates)
    squares = [[0.0] * num for _ in range(num)]
    for i in range(num):
        for j in range(i):
            squares[i][j] = squares[j][i] = float(sum_of_squares(torch.sub(updates[i], updates[j])))
    return squares


def multi_krum(
    updates: Sequence[Tensor], num_wrong: int, *, num_kept: int | None = None, squares: Squares | None = None
) -> Tensor:
    """The mean of the `num_kept` (n - f) most central contributions. `squares`: of the whole vectors, for parts."""
    num_kept = len(updates) - num_wrong if num_kept is None else num_kept
    order = krum_order(squares or pairwise_squares(updates), num_wrong)
    if not 1 <= num_kept <= len(updates) - num_wrong:
        raise SettingError(
            f"num_kept = {num_kept}; multi-Krum keeps at least 1 and at most n - f = {len(updates) - num_wrong}"
        )
    return _mean([updates[i] for i in sorted(order[:num_kept])])


def nearest_mixing(updates: Sequence[Tensor], num_wrong: int, *, squares: Squares | None = None) -> list[Tensor]:
    """Each contribution replaced by the mean of its n - f nearest (itself included); then any rule."""
    rows = nearest(squares or pairwise_squares(updates), num_wrong)
    return [_mean([updates[j] for j in row]) for row in rows]


def centered_clip(
    updates: Sequence[Tensor], *, center_N: Tensor | None = None, radius: float | None = None, iterations: int = 3
) -> Tensor:
    """`v <- v + 1/n sum_i (x_i - v) min(1, radius / |x_i - v|)`, so many times; the result is the next `center_N`.

    `center_N`: the aggregate before (history), the coordinate median if there is none. `radius`: the median distance
    from v, taken anew in each iteration, unless given. Raises ValueError for a centre that is not finite: kept as
    history it would poison every later exchange.
    """
    if iterations < 1:
        raise SettingError(f"iterations = {iterations}; CenteredClip makes at least 1")
    _need_some(updates)
    if center_N is not None and not finite([center_N])[0]:
        raise ValueError("the centre of CenteredClip is not finite; begin from the coordinate median")
    value_N = coordinate_median(updates) if center_N is None else center_N
    for _ in range(iterations):
        offsets = [torch.sub(update_N, value_N) for update_N in updates]
        lengths = norms(offsets)
        limit = median(lengths) if radius is None else radius
        factors = [min(1.0, limit / length) if length > 0.0 else 1.0 for length in lengths]
        value_N = torch.add(value_N, weighted_sum(offsets, [factor / len(updates) for factor in factors]))
    return value_N


# ---------------------------------------------------------------- buckets


def bucket_means(updates: Sequence[Tensor], size: int, *, seed: int, num_wrong: int = 0) -> list[Tensor]:
    """The means of random buckets, for a rule to go on with: `num_wrong` wrong ones spoil as many buckets at most.

    Raises SettingError if they could spoil half of the buckets.
    """
    dealt = buckets(len(updates), size, seed=seed)
    if len(dealt) <= 2 * num_wrong:
        raise SettingError(
            f"{len(updates)} contributions in buckets of {size} are {len(dealt)} buckets, and {num_wrong} wrong "
            f"contributions could spoil half of them; at most {(len(dealt) - 1) // 2}, or smaller buckets"
        )
    return [_mean([updates[i] for i in ranks]) for ranks in dealt]


def _mean(updates: Sequence[Tensor]) -> Tensor:
    return weighted_sum(updates, [1.0 / len(updates)] * len(updates))


def _sorted(updates: Sequence[Tensor]) -> Tensor:
    _need_some(updates)
    stacked_PN = torch.stack(list(updates))
    # -0 becomes 0: equal values must not differ by the order in which they came.
    return torch.sort(torch.add(stacked_PN, scalar_like(0.0, stacked_PN)), dim=0).values


def _need_some(updates: Sequence[Tensor]) -> None:
    if not updates:
        raise ValueError("there is no contribution to aggregate")
