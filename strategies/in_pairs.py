"""Gossip between full merges: NoLoCo (gensyn, 2025) or D-SGD (arXiv 1705.09056) on pairs or groups.

Members meet after every `inner_steps` of their own, and move their live parameters and an anchor of their own; after
`merge_every` such rounds all take part in one ordinary exchange whose outcome is the average of their parameters: the
full merge. That is the anchor of the run, which is evaluated, saved and sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from strategies.codecs.base import Codec
from strategies.config import CodecConfig, StrategyConfig
from strategies.diloco import local_training
from strategies.outer import Average
from strategies.strategy import Strategy


def build_in_pairs(
    config: StrategyConfig, codec_config: CodecConfig, codec: Codec, rounds: Callable[[float], int]
) -> Strategy:
    """Return the strategy of the full merges; what pairs do is in `workers/pair_sync.py`."""
    average = Average()
    return replace(local_training(config, codec_config, codec, rounds), outer_at=lambda progress: average)
