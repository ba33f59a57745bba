"""DiLoCo (arXiv 2311.08105), algorithm 1: H local steps, then one outer step on the averaged displacement.

With `num_fragments` > 1 each fragment has its own outer step and the sends are spread over the H steps, as in
Streaming DiLoCo (arXiv 2501.18512) with tau = 0 and alpha = 0.
"""

from __future__ import annotations

from strategies.codecs.base import Codec
from strategies.config import CodecConfig, StrategyConfig
from strategies.outer import Average, Nesterov, OuterStep
from strategies.schedule import check_divides
from strategies.strategy import Strategy, with_warmup_sync


def build_diloco(config: StrategyConfig, codec_config: CodecConfig, codec: Codec) -> Strategy:
    """Return DiLoCo; outer = "average" is local SGD with parameter averaging.

    Raises ValueError if the number of fragments does not divide `inner_steps`.
    """
    check_divides(config.inner_steps, config.num_fragments)
    outer: OuterStep = Average()
    if config.outer == "nesterov":
        outer = Nesterov(lr=config.outer_lr, momentum=config.outer_momentum)
    strategy = Strategy(
        name="diloco",
        contribution="displacement",
        inner_steps=lambda progress: config.inner_steps,
        outer_at=lambda progress: outer,
        codec=codec,
        # A residual of a codec that loses nothing is zero: it need not be kept.
        error_feedback=codec_config.error_feedback and codec.lossy,
        feedback_decay=codec_config.feedback_decay,
        num_fragments=config.num_fragments,
        pattern=config.pattern,
    )
    return with_warmup_sync(strategy, config.warmup_sync)
