"""DiLoCo (arXiv 2311.08105), algorithm 1: H local steps, then one outer step on the averaged displacement.

With `num_fragments` > 1 each fragment has its own outer step and its own exchange, after the same local step
(`strategies/streaming.py` spreads them).
"""

from __future__ import annotations

from collections.abc import Callable

from strategies.codecs.base import Codec
from strategies.config import CodecConfig, StrategyConfig
from strategies.outer_choice import build_outer
from strategies.schedule import check_divides
from strategies.strategy import Strategy, with_warmup_sync


def build_diloco(
    config: StrategyConfig, codec_config: CodecConfig, codec: Codec, rounds: Callable[[float], int]
) -> Strategy:
    """Return DiLoCo; outer = "average" is local SGD with parameter averaging.

    `rounds`: progress -> local steps of a round. Raises ValueError if the number of fragments does not divide
    `inner_steps`.
    """
    return with_warmup_sync(local_training(config, codec_config, codec, rounds), config.warmup_sync)


def local_training(
    config: StrategyConfig, codec_config: CodecConfig, codec: Codec, rounds: Callable[[float], int]
) -> Strategy:
    """Return what DiLoCo and its descendants share: displacements after `rounds` local steps, and an outer step."""
    check_divides(config.inner_steps, config.total_fragments)
    outer = build_outer(config, codec.backend)
    return Strategy(
        name=config.name,
        contribution="displacement",
        inner_steps=rounds,
        outer_at=lambda progress: outer,
        codec=codec,
        # A residual of a codec that loses nothing is zero: it need not be kept.
        error_feedback=codec_config.error_feedback and codec.lossy,
        feedback_decay=codec_config.feedback_decay,
        num_fragments=config.total_fragments,
        pattern=config.pattern,
        groups=tuple(tuple(group) for group in config.fragments),
    )
