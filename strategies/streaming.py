"""Streaming DiLoCo (arXiv 2501.18512), algorithm 2: fragments of layers, one after the other, while training goes on.

| line of algorithm 2 | here |
|---|---|
| fragments of whole layers, strided or sequential (section 2.1) | `fragments.plan_fragments` |
| send fragment p when (t - t_p) mod H = 0 | `schedule.offset_of`: t_p = (p + 1) H / P, `staggered` |
| receive tau steps later | `overlap_steps`; late: the member waits, up to `exchange.wait_s` |
| outer step per fragment, on the anchor | its own state vectors, as every fragment has |
| theta <- alpha theta + (1 - alpha) anchor | `merge.advance_included` with kappa = alpha |
| 4 bits (E3M0), sums in fp32 | `codec.name`, `aggregate.decode_accumulate` |

What differs: a fragment's first send is after (p + 1) H / P steps, not only after H; and by default (`merge_kappa` = 1)
the tau steps made in flight are kept whole, where the paper keeps a share alpha of them. With one fragment, tau = 0,
alpha = 0 and fp32 it is DiLoCo bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from strategies.codecs.base import Codec
from strategies.config import CodecConfig, StrategyConfig
from strategies.diloco import local_training
from strategies.errors import SettingError
from strategies.strategy import Strategy, with_warmup_sync


def build_streaming(
    config: StrategyConfig, codec_config: CodecConfig, codec: Codec, rounds: Callable[[float], int]
) -> Strategy:
    """Return Streaming DiLoCo. Raises SettingError if a fragment would be sent again before its result is due."""
    if config.overlap_steps >= config.inner_steps:
        raise SettingError(
            f"strategy.overlap_steps = {config.overlap_steps}: a fragment is sent again after strategy.inner_steps = "
            f"{config.inner_steps} steps; set it to {config.inner_steps - 1} or less"
        )
    strategy = replace(
        local_training(config, codec_config, codec, rounds),
        overlap_steps=config.overlap_steps,
        staggered=True,
        merge_alpha=config.merge_alpha,
        merge_kappa=config.merge_kappa,
    )
    return with_warmup_sync(strategy, config.warmup_sync)
