"""Outer steps of stochastic gradient descent: plain, and with heavy-ball momentum, as torch.optim.SGD defines them.

Sources: torch.optim.SGD (`nesterov=False`); as outer steps in DiLoCo (arXiv 2311.08105), section 3.2.2, and "Adaptive
Federated Optimization" (arXiv 2003.00295). Heavy ball is not Nesterov: of a first contribution g it moves `lr g`,
`outer.Nesterov` moves `lr (1 + mu) g`. Suffix: N = values of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from strategies.elementwise import new_scratch, passes, scalar_like
from strategies.fragments import FragmentSpec
from strategies.outer import States, Stepped


@dataclass(frozen=True, kw_only=True, slots=True)
class Sgd:
    """`anchor <- anchor - lr g`; no state."""

    lr: float

    @property
    def num_states(self) -> int:
        """None."""
        return 0

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
        """See `OuterStep.step`."""
        next_N = torch.empty_like(anchor_N) if out is None else out[0]
        lr, scratch = scalar_like(self.lr, anchor_N), new_scratch(g_N)
        for part in passes(g_N):
            g = g_N[part]
            torch.sub(anchor_N[part], torch.mul(g, lr, out=scratch[: g.numel()]), out=next_N[part])
        return next_N, ()


@dataclass(frozen=True, kw_only=True, slots=True)
class HeavyBall:
    """`b <- mu b + g`, then `anchor <- anchor - lr b`: torch.optim.SGD without Nesterov, one state."""

    lr: float
    momentum: float

    @property
    def num_states(self) -> int:
        """The momentum buffer."""
        return 1

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
        """See `OuterStep.step`."""
        (buffer_N,) = states
        next_N, (next_buffer_N,) = out or (torch.empty_like(anchor_N), (torch.empty_like(anchor_N),))
        lr, momentum, scratch = scalar_like(self.lr, anchor_N), scalar_like(self.momentum, anchor_N), new_scratch(g_N)
        for part in passes(g_N):
            g = g_N[part]
            buffer = torch.mul(buffer_N[part], momentum, out=next_buffer_N[part]).add_(g)
            torch.sub(anchor_N[part], torch.mul(buffer, lr, out=scratch[: g.numel()]), out=next_N[part])
        return next_N, (next_buffer_N,)
