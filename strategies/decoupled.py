"""Decoupled DiLoCo (arXiv 2604.21428): fragments as in Streaming DiLoCo, a quorum of the members, radial averages.

| of the algorithm | here |
|---|---|
| fragments in turn, tau steps of overlap, blend with alpha = 0.5 | `strategies/streaming.py`, of which this is one |
| quorum of K of M learners | `exchange.quorum` or `exchange.min_members` |
| grace gamma (tau xi_step - xi_quorum - xi_sync) | `adaptive_grace_s` in `orchestrator/closing.py` |
| weights c_tokens (c_tokens / c_steps) | `direction_weight`, on directions only |
| radial-directional average (RDA) | `RadialSum`, chunk by chunk |
| a delta names the version that it was taken from | `Offer.base`, and `Offer.born` of its oldest step |

    RDA(v) = R phi(sum_i w_i phi(v_i)),   phi(x) = x / |x|, phi(0) = 0,   R = sum_i c_i |v_i|

What differs. Lengths have the coefficients c_i of every other strategy (tokens of one step, divided by those of *all*
live members): published is sum w |v| / sum w over those that came, with which a member that comes late and has made
twice the steps counts four times. Directions have no length, so there the published weight stands. And the average is
taken of each chunk by the member that owns it, which needs no second exchange (ADR 38); the published one is of a
fragment, and leaves embeddings out. Suffix: N = values of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from strategies.aggregate import accumulate, decode_accumulate
from strategies.codecs.base import Codec
from strategies.config import CodecConfig, StrategyConfig
from strategies.elementwise import scalar_like
from strategies.norm import sum_of_squares
from strategies.strategy import Strategy
from strategies.streaming import build_streaming


def build_decoupled(
    config: StrategyConfig, codec_config: CodecConfig, codec: Codec, rounds: Callable[[float], int]
) -> Strategy:
    """Return Decoupled DiLoCo. Raises SettingError if a fragment would be sent again before its result is due."""
    return replace(build_streaming(config, codec_config, codec, rounds), aggregate=config.aggregate)


def direction_weight(coefficient: float, num_samples: int) -> float:
    """Weight of a contribution's direction: `tokens * tokens / steps`, times its staleness factor, up to a factor.

    A coefficient has tokens of one step and staleness (`coefficients`), the samples are tokens up to a factor that is
    the same for all, and only ratios count.
    """
    return coefficient * num_samples


class RadialSum:
    """The radial-directional average of one chunk, of pieces that are added in roster order."""

    def __init__(self, num_values: int) -> None:
        """`num_values`: of the chunk."""
        self.num_values = num_values
        self.direction_N: Tensor | None = None
        self.radius = 0.0

    def add(self, codec: Codec, payload: Tensor, *, coefficient: float, weight: float, sumsq: float) -> Tensor:
        """Add a piece whose values have the sum of squares `sumsq`; returns the one that is found (0-dim fp64).

        Raises PayloadError for a malformed payload, ValueError for a sum that no piece can have.
        """
        if not 0.0 <= sumsq < math.inf:
            raise ValueError(f"its sum of squares is announced as {sumsq!r}")
        length = math.sqrt(sumsq)
        self.radius += coefficient * length
        share = weight / length if length > 0.0 else 0.0
        self.direction_N, squares = decode_accumulate(
            codec, payload, share, self.direction_N, num_values=self.num_values
        )
        return squares

    def result(self) -> Tensor:
        """The average: the direction of the weighted sum of directions, as long as the weighted sum of lengths."""
        assert self.direction_N is not None, "an average of nothing"
        length = math.sqrt(float(sum_of_squares(self.direction_N)))
        scale = self.radius / length if length > 0.0 else 0.0
        return torch.mul(self.direction_N, scalar_like(scale, self.direction_N))


def radial_average(values: Sequence[Tensor], coefficients: Sequence[float], weights: Sequence[float]) -> Tensor:
    """Return the average of plain vectors: what `RadialSum` gives for their payloads, for tests and for reading."""
    direction: Tensor | None = None
    radius = 0.0
    for values_N, coefficient, weight in zip(values, coefficients, weights, strict=True):
        length = math.sqrt(float(sum_of_squares(values_N)))
        radius += coefficient * length
        direction = accumulate(direction, values_N, weight / length if length > 0.0 else 0.0)
    if direction is None:
        raise ValueError("there is no contribution to average")
    length = math.sqrt(float(sum_of_squares(direction)))
    return torch.mul(direction, scalar_like(radius / length if length > 0.0 else 0.0, direction))
