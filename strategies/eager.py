"""Eager updates (arXiv 2502.12996), algorithm 3: overlap of a whole round, without a stale contribution of one's own.

At the end of round t member m has its own fresh D_m^(t), and of the others what they sent a round ago:

    D~_m  = c (D_m^(t) - D_m^(t-1)) + D^(t-1),        Theta_m <- outer(Theta_m, D~_m)

with c its coefficient in the sum (1/M). The members' Theta_m differ by design. Here the part that is common is kept
apart: the anchor A is driven by D^(t-1) alone, as in `strategies/delayed.py`, so that it has the same bits everywhere,
a joiner can take it over, and commits seal it. What is m's own is a private correction C with Theta_m = A + C. Every
outer step with momentum is linear, so C follows the same recursion, driven by `c (D_m^(t) - D_m^(t-1))` (`correct`).

In the first round D^(0) = D_m^(0) = 0. What was added of one's own is taken back by what was added, not by the present
c: with another number of members the terms still telescope. Refused with a non-linear outer step (Adam).
Suffix: N = values of a fragment.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from strategies.codecs.base import Codec
from strategies.config import CodecConfig, StrategyConfig
from strategies.delayed import one_round_later
from strategies.diloco import local_training
from strategies.elementwise import scalar_like
from strategies.errors import SettingError
from strategies.outer import OuterStep, States
from strategies.strategy import Strategy


def build_eager(
    config: StrategyConfig, codec_config: CodecConfig, codec: Codec, rounds: Callable[[float], int]
) -> Strategy:
    """Return DiLoCo with eager updates; fragments are staggered as in Streaming DiLoCo."""
    if config.outer == "adam":
        raise SettingError(
            "strategy.outer = 'adam': strategy 'eager' needs a linear outer step; set it to 'nesterov' or 'heavy-ball'"
        )
    return one_round_later(local_training(config, codec_config, codec, rounds), config, in_flight="eager")


class Correction:
    """What one member's own anchor has beyond the common one: C, its momentum, and what it added of its own."""

    __slots__ = ("added_N", "ahead_N", "states")

    def __init__(self, ahead_N: Tensor, states: States, added_N: Tensor) -> None:
        """`ahead_N`: C, so that the member's anchor is A + C; `added_N`: what its last step added."""
        self.ahead_N, self.states, self.added_N = ahead_N, states, added_N

    @classmethod
    def zero(cls, like_N: Tensor, num_states: int) -> Correction:
        """Before the first round: the member's anchor is the common one."""
        states = tuple(torch.zeros_like(like_N) for _ in range(num_states))
        return cls(torch.zeros_like(like_N), states, torch.zeros_like(like_N))


def correct(correction: Correction, displacement_N: Tensor, share: float, outer: OuterStep) -> None:
    """Take one outer step of the correction, in place: driven by `share * displacement_N`, less what it added last.

    `displacement_N` is everything of this member's that no commit has.
    """
    fresh_N = torch.mul(displacement_N, scalar_like(share, displacement_N))
    outer.step(
        correction.ahead_N,
        correction.states,
        torch.sub(fresh_N, correction.added_N),
        scale=None,
        version=0,  # of no meaning to a linear step
        progress=0.0,
        out=(correction.ahead_N, correction.states),
    )
    correction.added_N = fresh_N
