"""The outer step that `[strategy]` names."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from strategies.config import StrategyConfig
from strategies.outer import Average, Nesterov, OuterStep
from strategies.outer_adam import OuterAdam
from strategies.outer_sgd import HeavyBall, Sgd

OUTERS: Mapping[str, Callable[[StrategyConfig], OuterStep]] = {
    "nesterov": lambda c: Nesterov(lr=c.outer_lr, momentum=c.outer_momentum),
    "average": lambda c: Average(),
    "sgd": lambda c: Sgd(lr=c.outer_lr),
    "heavy-ball": lambda c: HeavyBall(lr=c.outer_lr, momentum=c.outer_momentum),
    "adam": lambda c: OuterAdam(lr=c.outer_lr, beta1=c.outer_momentum, beta2=c.outer_beta2, eps=c.outer_eps),
}


def build_outer(config: StrategyConfig) -> OuterStep:
    """Return the outer step of `strategy.outer`."""
    return OUTERS[config.outer](config)
