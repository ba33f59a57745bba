"""SparseLoCo (arXiv 2508.15706): of each 4,096 values of a displacement the 64 largest, at 2 bits, with error feedback.

    e <- 0.95 e + D,   sent = topk(e),   e <- e - sent,   anchor <- anchor - lr sum_i c_i sent_i

Codec: `codecs/topk.py`, 0.22 bits a value. The sum is over all members with c = 1/R, as in the paper; its production
code averages each value over those that sent it. Results travel as int8: nobody keeps what they lose. The outer step
is plain SGD with learning rate 1: momentum lives in the residual.
"""

from __future__ import annotations

from collections.abc import Callable

from strategies.codecs.base import Codec
from strategies.config import CodecConfig, StrategyConfig
from strategies.diloco import build_diloco
from strategies.errors import SettingError
from strategies.strategy import Strategy


def build_sparseloco(
    config: StrategyConfig, codec_config: CodecConfig, codec: Codec, rounds: Callable[[float], int]
) -> Strategy:
    """Return SparseLoCo. Raises SettingError for another codec, and without error feedback."""
    if codec_config.name != "topk":
        raise SettingError(f"codec.name = {codec_config.name!r}: strategy 'sparseloco' sends 'topk'; set it to 'topk'")
    if not codec_config.error_feedback:
        raise SettingError(
            "codec.error_feedback = false: strategy 'sparseloco' sends one of 64 values and needs the rest later; "
            "set it to true"
        )
    return build_diloco(config, codec_config, codec, rounds)
