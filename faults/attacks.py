"""Wrong contributions on purpose, to test robust rules with: pure functions on what a member was going to send.

Gross: sign flip, scale, noise, NaN, lying owner. Stealthy: a little is enough (Baruch et al. 2019), inner product
manipulation (Xie et al. 2019), copy-cat, label flip. An attack that knows the honest contributions gets them: the worst
case, as in the papers. Noise comes from a generator that is handed in.
Suffixes: P contributions, N values.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor

GROSS = ("sign_flip", "scale", "noise", "nan", "lying_owner")
STEALTHY = ("little_is_enough", "inner_product", "copy_cat", "label_flip")

FLIP_TIMES, SCALE_TIMES, NOISE_TIMES = 10.0, 100.0, 10.0


def sign_flip(update_N: Tensor, times: float = FLIP_TIMES) -> Tensor:
    """The opposite, ten times as long: it climbs."""
    return torch.mul(update_N, -times)


def scale(update_N: Tensor, times: float = SCALE_TIMES) -> Tensor:
    """The right direction, a hundred times as long."""
    return torch.mul(update_N, times)


def noise(update_N: Tensor, generator: torch.Generator, times: float = NOISE_TIMES) -> Tensor:
    """Gaussian noise of ten times the norm of what is honest, in place of it."""
    drawn_N = torch.empty_like(update_N).normal_(generator=generator)
    return torch.mul(drawn_N, times * update_N.norm() / drawn_N.norm())


def nan(update_N: Tensor, at: int = 0) -> Tensor:
    """A single value that is not a number."""
    out_N = update_N.clone()
    out_N[at] = float("nan")
    return out_N


def lying_owner(result_N: Tensor, times: float = FLIP_TIMES) -> Tensor:
    """What an owner reduced, turned round: contributions were right, its part of the result is not."""
    return torch.mul(result_N, -times)


def little_z(num: int, num_wrong: int) -> float:
    """How many deviations the attackers may be off so that enough honest members are further out than they.

    Baruch et al., section 3: s = floor(n / 2 + 1) - f of the n - f honest ones must be won. Raises ValueError where
    attackers have a majority already, or would have to win everybody.
    """
    honest = num - num_wrong
    needed = num // 2 + 1 - num_wrong
    if num_wrong < 1 or not 0 < needed < honest:
        raise ValueError(f"a little is enough with {num_wrong} attackers of {num}: there must be some, and a minority")
    return max(NormalDist().inv_cdf((honest - needed) / honest), 0.0)


def little_is_enough(honest_PN: Sequence[Tensor], num_wrong: int, z: float | None = None) -> Tensor:
    """`mean - z std` of the honest contributions, coordinate by coordinate: inside their spread, always to one side."""
    stacked_PN = torch.stack(list(honest_PN))
    z = little_z(len(honest_PN) + num_wrong, num_wrong) if z is None else z
    return stacked_PN.mean(0) - z * stacked_PN.std(0, correction=0)


def inner_product(honest_PN: Sequence[Tensor], epsilon: float = 0.1) -> Tensor:
    """`-epsilon mean`: short enough to pass as honest, and against all of them together."""
    return torch.stack(list(honest_PN)).mean(0) * -epsilon


def copy_cat(honest_PN: Sequence[Tensor], victim: int = 0) -> Tensor:
    """A copy of an honest contribution: nothing wrong with it, but it counts twice, and distances take it for truth."""
    return honest_PN[victim].clone()


def label_flip(targets: Tensor, vocab_size: int) -> Tensor:
    """Targets `y` become `vocab_size - 1 - y`; negative ones (ignored by the loss) stay. Training on them is honest."""
    return torch.where(targets < 0, targets, vocab_size - 1 - targets)
