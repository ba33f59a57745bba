"""One-step delay: the contribution of a round travels during the next one and is applied at its end.

Sources: PCCL's asynchronous DiLoCo example, and the delay of DiLoCoX (arXiv 2506.21263), without its compression:

    at the end of round t:   anchor <- outer(anchor, D^(t-1)),   send D^(t),   theta <- anchor

D^(t) is what round t moved, measured before the anchor moves. A contribution stays aside while it is under way
(`in_flight` = "restart") and is offered again with the next one where a commit did not have it. On a loss whose
gradients do not depend on the parameters this is DiLoCo one round later, momentum included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from strategies.codecs.base import Codec
from strategies.config import CodecConfig, StrategyConfig
from strategies.diloco import local_training
from strategies.errors import SettingError
from strategies.strategy import InFlight, Strategy


def build_delayed(
    config: StrategyConfig, codec_config: CodecConfig, codec: Codec, rounds: Callable[[float], int]
) -> Strategy:
    """Return DiLoCo with a delay of one round; fragments are staggered as in Streaming DiLoCo."""
    return one_round_later(local_training(config, codec_config, codec, rounds), config, in_flight="restart")


def one_round_later(strategy: Strategy, config: StrategyConfig, *, in_flight: InFlight) -> Strategy:
    """Return the strategy with results due when their fragment is sent again.

    Raises SettingError for a synchronous warm-up, which has no round to hide an exchange in.
    """
    if config.warmup_sync > 0:
        raise SettingError(
            f"strategy.warmup_sync = {config.warmup_sync}: strategy {config.name!r} has a round of delay, with rounds "
            "of one step each would be a step late; set it to 0"
        )
    longest = max(config.inner_steps, config.qsr_max_steps if config.qsr_alpha else 0)
    return replace(strategy, overlap_steps=longest, in_flight=in_flight, staggered=True)
