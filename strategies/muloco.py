"""MuLoCo (arXiv 2505.23725): DiLoCo whose inner optimizer is Muon.

Hidden matrices by Muon (momentum, Newton-Schulz), embeddings, head and vectors by AdamW: `workers/optim.py`. Outer
step, exchange and codecs are DiLoCo's; published with H = 30, outer 0.8 to 1.0 / 0.9, 2 to 4 bits and error feedback
with decay 0.95 (`cluster_configs/runs/muloco.toml`). What differs from its code: the outer learning rate stays outside
the residual (there it is applied twice), and the sign is ours, `anchor - local`.
"""

from __future__ import annotations

from collections.abc import Callable

from strategies.codecs.base import Codec
from strategies.config import CodecConfig, StrategyConfig
from strategies.ddp import InnerSettings
from strategies.diloco import build_diloco
from strategies.errors import SettingError
from strategies.strategy import Strategy


def build_muloco(
    config: StrategyConfig,
    codec_config: CodecConfig,
    codec: Codec,
    rounds: Callable[[float], int],
    train: InnerSettings,
) -> Strategy:
    """Return MuLoCo. Raises SettingError for another inner optimizer."""
    if train.optimizer != "muon":
        raise SettingError(
            f"train.optimizer = {train.optimizer!r}: strategy 'muloco' trains with Muon; set it to 'muon'"
        )
    return build_diloco(config, codec_config, codec, rounds)
