"""Adam as outer step (FedAdam).

Sources: "Adaptive Federated Optimization" (arXiv 2003.00295), algorithm 2; DiLoCo (arXiv 2311.08105), section 3.2.2,
needed an epsilon of 0.1. Bias correction as in Adam (arXiv 1412.6980), which FedAdam leaves out: with it the first
step is not larger than the others. Equal to torch.optim.Adam within rounding. Suffix: N = values of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from strategies.elementwise import integer_power, new_scratch, passes, scalar_like, square_root
from strategies.fragments import FragmentSpec
from strategies.outer import States, Stepped


@dataclass(frozen=True, kw_only=True, slots=True)
class OuterAdam:
    """`m <- b1 m + (1 - b1) g`, `v <- b2 v + (1 - b2) g^2`, `anchor <- anchor - lr m^ / (sqrt(v^) + eps)`."""

    lr: float
    beta1: float
    beta2: float
    eps: float

    @property
    def num_states(self) -> int:
        """First and second moment."""
        return 2

    def prepare(self, chunks: Iterable[Tensor]) -> Tensor | None:
        """Nothing to prepare."""
        return None

    def step(
        self,
        anchor_N: Tensor,
        states: States,
        g_N: Tensor,
        *,
        scale: Tensor | None,
        version: int,
        progress: float,
        spec: FragmentSpec | None = None,
        start: int = 0,
        out: Stepped | None = None,
    ) -> Stepped:
        """See `OuterStep.step`; `version` counts the steps for the bias correction."""
        first_N, second_N = states
        fresh = (torch.empty_like(anchor_N), tuple(torch.empty_like(anchor_N) for _ in states))
        next_N, (next_first_N, next_second_N) = out or fresh
        steps = version + 1
        step_size = scalar_like(self.lr / (1.0 - integer_power(self.beta1, steps)), g_N)
        correction = scalar_like(math.sqrt(1.0 - integer_power(self.beta2, steps)), g_N)
        eps, scratch, scratch2 = scalar_like(self.eps, g_N), new_scratch(g_N), new_scratch(g_N)
        keep1, take1 = scalar_like(self.beta1, g_N), scalar_like(1.0 - self.beta1, g_N)
        keep2, take2 = scalar_like(self.beta2, g_N), scalar_like(1.0 - self.beta2, g_N)
        for part in passes(g_N):
            g = g_N[part]
            one, two = scratch[: g.numel()], scratch2[: g.numel()]
            first = torch.mul(first_N[part], keep1, out=next_first_N[part]).add_(torch.mul(g, take1, out=one))
            square = torch.mul(g, g, out=one).mul_(take2)
            second = torch.mul(second_N[part], keep2, out=next_second_N[part]).add_(square)
            denominator = square_root(second, out=one).div_(correction).add_(eps)
            update = torch.div(first, denominator, out=two).mul_(step_size)
            torch.sub(anchor_N[part], update, out=next_N[part])
        return next_N, (next_first_N, next_second_N)
