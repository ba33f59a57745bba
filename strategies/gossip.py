"""Outer steps without an all-reduce: NoLoCo on pairs or groups, D-SGD mixing, several gossip steps.

Sources: NoLoCo (gensyn, 2025), modified outer momentum; D-SGD, Lian et al. 2017 (arXiv 1705.09056), algorithm 1. Each
member i has an anchor `phi_i` of its own and a displacement `D_i = phi_i - theta_i` (positive: what descent subtracts).
With b = -m of the paper, means over the group g:

    b_i   <- alpha b_i + beta mean_g(D) + gamma (phi_i - mean_g(phi))
    phi_i <- phi_i - b_i

What differs: displacements have the sign of the rest of Atoll; settings outside the stable region are refused (the
published class default alpha = 0.9, gamma = 0.7 is); a group that does not come together changes nothing at all.
One rounding per operation, sums in the order of the group: members of a group compute the same means to the bit.
Suffix: N = values of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from strategies.aggregate import accumulate, weighted_sum
from strategies.elementwise import new_scratch, passes, scalar_like
from strategies.errors import SettingError
from strategies.stability import largest_gamma, largest_lr, nearest_lr
from strategies.topology import Matrix, check_stochastic

__all__ = ["NoLoCo", "check_group", "gossip_steps", "group_mean", "largest_gamma", "mix"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NoLoCo:
    """Modified outer momentum. `alpha` momentum, `beta` learning rate, `gamma` pull towards the group's mean.

    `group_size`: of the smallest group that exchanges (with a remainder that is 2). Raises SettingError for settings
    whose members drift apart (gamma) or whose mean diverges (beta: heavy ball), with the bound.
    """

    alpha: float = 0.5
    beta: float = 0.7
    gamma: float = 0.7
    group_size: int = 2

    def __post_init__(self) -> None:
        """Refuse what cannot be stable."""
        if not 0.0 <= self.alpha < 1.0:
            raise SettingError(f"alpha = {self.alpha}; momentum lies between 0 and 1, 1 excluded")
        if self.group_size < 2:
            raise SettingError(f"group_size = {self.group_size}; an exchange needs at least 2 members")
        bound = largest_gamma(self.alpha, self.group_size)
        if not 0.0 < self.gamma < bound:
            raise SettingError(
                f"gamma = {self.gamma} with alpha = {self.alpha} in groups of {self.group_size}: members "
                f"{'never come together' if self.gamma <= 0.0 else 'drift apart'}; gamma must lie between 0 and "
                f"2 (1 - alpha^2) / (1 - alpha + 2 alpha / {self.group_size}) = {bound:.4g}, excluded; "
                f"the published pair is alpha = 0.5, gamma = 0.7"
            )
        limit = largest_lr("heavy-ball", self.alpha)
        if not 0.0 < self.beta < limit:
            raise SettingError(
                f"beta = {self.beta} with alpha = {self.alpha}: the mean of all members follows a heavy ball, which "
                f"is stable between 0 and {limit:.4g}, excluded; the nearest is {nearest_lr(limit)}"
            )

    def step(
        self,
        anchors: Sequence[Tensor],
        displacements: Sequence[Tensor],
        *,
        own: int,
        momentum_N: Tensor,
        weights: Sequence[float] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the next anchor and momentum of member `own` of a group; nothing is changed in place.

        `anchors` and `displacements`: of the whole group, in its order, fp32, flat. `weights`: of the displacements,
        equal if not given; with others the mean over all members is that of a weighted heavy ball.
        """
        check_group(anchors, displacements, own, weights)
        weights = weights or [1.0 / len(anchors)] * len(anchors)
        mean_N, pull_N = weighted_sum(displacements, weights), group_mean(anchors)
        next_N, next_momentum_N = torch.empty_like(momentum_N), torch.empty_like(momentum_N)
        scratch = new_scratch(momentum_N)
        alpha, beta, gamma = (scalar_like(value, momentum_N) for value in (self.alpha, self.beta, self.gamma))
        for part in passes(momentum_N):
            anchor = anchors[own][part]
            term = scratch[: anchor.numel()]
            momentum = torch.mul(momentum_N[part], alpha, out=next_momentum_N[part])
            momentum.add_(torch.mul(mean_N[part], beta, out=term))
            momentum.add_(torch.sub(anchor, pull_N[part], out=term).mul_(gamma))
            torch.sub(anchor, momentum, out=next_N[part])
        return next_N, next_momentum_N


def group_mean(values: Sequence[Tensor]) -> Tensor:
    """`x_1 + sum_i (x_i - x_1) / n`, in the group's order: the mean, and of equal replicas their value to the bit."""
    if not values:
        raise ValueError("a group without a member has no mean")
    first_N, *others = values
    acc_N = first_N.clone()
    for value_N in others:
        accumulate(acc_N, torch.sub(value_N, first_N), 1.0 / len(values))
    return acc_N


def mix(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`sum_j W_ij x_j`: one member's row of a mixing matrix; members of weight 0 are not touched."""
    used = [(value, weight) for value, weight in zip(values, weights, strict=True) if weight != 0.0]
    return weighted_sum([value for value, _ in used], [weight for _, weight in used])


def gossip_steps(values: Sequence[Tensor], matrices: Sequence[Matrix]) -> list[Tensor]:
    """What all members hold after several mixing steps in a row. Raises SettingError for a matrix that is not doubly
    stochastic, or not of so many members.
    """
    current = list(values)
    for matrix in matrices:
        check_stochastic(matrix)
        if len(matrix) != len(current):
            raise SettingError(f"a mixing matrix of {len(matrix)} members for {len(current)}")
        current = [mix(current, row) for row in matrix.tolist()]
    return current


def check_group(
    anchors: Sequence[Tensor], displacements: Sequence[Tensor], own: int, weights: Sequence[float] | None
) -> None:
    """Raise ValueError unless there is an anchor, a displacement and a weight of every member of a group of two up."""
    num = len(anchors)
    if num < 2 or len(displacements) != num or not 0 <= own < num:
        raise ValueError(f"a group of {num} anchors and {len(displacements)} displacements, own index {own}")
    if weights is not None and (len(weights) != num or abs(sum(weights) - 1.0) > 1e-6 or min(weights) < 0.0):
        raise ValueError(f"weights {list(weights)} of a group of {num}: one each, none negative, with sum 1")
