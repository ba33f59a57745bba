"""The outer step that `[strategy]` names."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from strategies.codecs.backends import Backend
from strategies.config import StrategyConfig
from strategies.elementwise import scalar_like
from strategies.outer import Average, Nesterov, OuterStep, States
from strategies.outer_adam import OuterAdam
from strategies.outer_sgd import HeavyBall, Sgd

OUTERS: Mapping[str, Callable[[StrategyConfig, Backend], OuterStep]] = {
    "nesterov": lambda c, backend: Nesterov(lr=c.outer_lr, momentum=c.outer_momentum, backend=backend),
    "average": lambda c, backend: Average(),
    "sgd": lambda c, backend: Sgd(lr=c.outer_lr),
    "heavy-ball": lambda c, backend: HeavyBall(lr=c.outer_lr, momentum=c.outer_momentum),
    "adam": lambda c, backend: OuterAdam(lr=c.outer_lr, beta1=c.outer_momentum, beta2=c.outer_beta2, eps=c.outer_eps),
}


def mean_of_results(outer: OuterStep, states: States, where: slice) -> Tensor:
    """`(1 - mu) b`: the mean of the results so far, each newer one with 1 / mu times the weight; part of it, new."""
    if not isinstance(outer, Nesterov | HeavyBall):
        raise TypeError(f"{type(outer).__name__} keeps no mean of earlier results")
    (buffer_N,) = states
    return torch.mul(buffer_N[where], scalar_like(1.0 - outer.momentum, buffer_N))


def build_outer(config: StrategyConfig, backend: Backend = "torch") -> OuterStep:
    """Return the outer step of `strategy.outer`; `backend`: that of the run's codec."""
    return OUTERS[config.outer](config, backend)
