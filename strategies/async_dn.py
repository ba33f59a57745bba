"""Asynchronous local SGD with delayed Nesterov momentum (arXiv 2401.09135), algorithm 3.

Members push when they have made their steps and wait for nobody; the journal orders the pushes. Of push t, g:

    D <- D + g
    every N-th push:  m <- beta m + D,   A <- A - lr ((1 - c (N - 1)) beta m + g),   D <- 0
    else:                                A <- A - lr (c beta m + g)

Written after the code of HALoS (utnslab/halos), the published release of the method has none of it. What differs: g is
divided there by N, here by the fleet: its coefficient has the tokens of all live members as divisor, so that a change
of the number of members is no change of the learning rate. With N equal members it is the published step. N counts
versions: pushes that were gathered in one (`orchestrator/closing.py`) are one g. Suffix: N = values of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from strategies.codecs.base import Codec
from strategies.config import CodecConfig, StrategyConfig
from strategies.diloco import local_training
from strategies.elementwise import new_scratch, passes, scalar_like
from strategies.errors import SettingError
from strategies.fragments import FragmentSpec
from strategies.outer import States, Stepped
from strategies.strategy import Strategy


def build_async_dn(
    config: StrategyConfig, codec_config: CodecConfig, codec: Codec, rounds: Callable[[float], int]
) -> Strategy:
    """Return the asynchronous strategy. Raises SettingError for another outer step, a warm-up in step, a bad c."""
    if config.outer != "nesterov":
        raise SettingError(
            f"strategy.outer = {config.outer!r}: strategy 'async-dn' has a Nesterov momentum of its own; remove the key"
        )
    if config.warmup_sync > 0:
        raise SettingError(
            f"strategy.warmup_sync = {config.warmup_sync}: members of strategy 'async-dn' wait for nobody; set it to 0"
        )
    if config.momentum_spread * config.momentum_every > 1:
        raise SettingError(
            f"strategy.momentum_spread = {config.momentum_spread}: with strategy.momentum_every = "
            f"{config.momentum_every} it can be {1 / config.momentum_every:g} at most"
        )
    outer = DelayedNesterov(
        lr=config.outer_lr,
        momentum=config.outer_momentum,
        every=config.momentum_every,
        spread=config.momentum_spread,
    )
    training = local_training(config.model_copy(update={"outer": "nesterov"}), codec_config, codec, rounds)
    return replace(training, outer_at=lambda progress: outer, own_pace=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class DelayedNesterov:
    """Nesterov whose momentum is taken every `every` versions, with weight `spread` in between; two states.

    States: momentum m, and the sum D since it was last taken. `every` = 1 is `outer.Nesterov` bit for bit.
    """

    lr: float
    momentum: float
    every: int
    spread: float = 0.0

    @property
    def num_states(self) -> int:
        """Momentum, and what has come since it was last taken."""
        return 2

    def prepare(self, chunks: Iterable[Tensor]) -> Tensor | None:
        """Nothing to prepare."""
        return None

    def takes_momentum(self, version: int) -> bool:
        """Whether the step from `version` to the next one takes the momentum: a function of the version alone."""
        return (version + 1) % self.every == 0

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
        momentum_N, sum_N = states
        next_N, (next_momentum_N, next_sum_N) = out or (torch.empty_like(g_N), tuple(map(torch.empty_like, states)))
        takes = self.takes_momentum(version)
        share = (1.0 - self.spread * (self.every - 1) if takes else self.spread) * self.momentum
        lr, weight, scratch = scalar_like(self.lr, g_N), scalar_like(share, g_N), new_scratch(g_N)
        beta = scalar_like(self.momentum, g_N)
        for part in passes(g_N):
            g = g_N[part]
            total = torch.add(sum_N[part], g, out=next_sum_N[part])
            if takes:
                momentum = torch.mul(momentum_N[part], beta, out=next_momentum_N[part]).add_(total)
                total.zero_()
            else:
                momentum = next_momentum_N[part].copy_(momentum_N[part])
            update = torch.mul(momentum, weight, out=scratch[: g.numel()]).add_(g).mul_(lr)
            torch.sub(anchor_N[part], update, out=next_N[part])
        return next_N, (next_momentum_N, next_sum_N)
