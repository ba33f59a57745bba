"""Data parallel: the gradients of all members are averaged after every step, and everyone applies the same AdamW.

The baseline to which the others are compared. It uses the same exchange; the optimizer is the outer step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from strategies.codecs.base import Codec
from strategies.config import CodecConfig, StrategyConfig
from strategies.errors import SettingError
from strategies.outer import OuterAdamW
from strategies.strategy import Strategy


class InnerSettings(Protocol):
    """What data parallel needs of `[train]`."""

    @property
    def optimizer(self) -> str:
        """Must be "adamw"."""
        ...

    @property
    def beta1(self) -> float:
        """Decay of the first moment."""
        ...

    @property
    def beta2(self) -> float:
        """Decay of the second moment."""
        ...

    @property
    def eps(self) -> float:
        """Added to the denominator."""
        ...

    @property
    def weight_decay(self) -> float:
        """Decoupled weight decay of matrices."""
        ...

    @property
    def warmup(self) -> float:
        """Share of progress in which the learning rate rises."""
        ...

    @property
    def grad_clip(self) -> float:
        """Largest norm of the averaged gradient; 0 switches clipping off."""
        ...


def build_ddp(
    config: StrategyConfig,
    codec_config: CodecConfig,
    codec: Codec,
    *,
    lr_at: Callable[[float], float],
    train: InnerSettings,
) -> Strategy:
    """Return data parallel; `inner_steps` and the `outer` settings do not apply to it.

    Raises SettingError for settings it would have to ignore to the user's harm: another optimizer, several fragments
    (clipping is by the norm of the whole gradient), a synchronous warm-up.
    """
    if train.optimizer != "adamw":
        raise SettingError(f"train.optimizer = {train.optimizer!r}: strategy 'ddp' steps with AdamW; set it to 'adamw'")
    if config.num_fragments != 1:
        raise SettingError(
            f"strategy.num_fragments = {config.num_fragments}: strategy 'ddp' clips by the norm of the whole gradient; "
            "set it to 1"
        )
    if config.warmup_sync > 0:
        raise SettingError(
            f"strategy.warmup_sync = {config.warmup_sync}: strategy 'ddp' is synchronous throughout; set it to 0"
        )
    outer = OuterAdamW(
        lr_at=lr_at,
        beta1=train.beta1,
        beta2=train.beta2,
        eps=train.eps,
        weight_decay=train.weight_decay,
        clip=train.grad_clip,
    )
    return Strategy(
        name="ddp",
        contribution="gradient",
        inner_steps=lambda progress: 1,
        outer_at=lambda progress: outer,
        codec=codec,
        error_feedback=codec_config.error_feedback and codec.lossy,
        feedback_decay=codec_config.feedback_decay,
        num_fragments=1,
        pattern=config.pattern,
    )
