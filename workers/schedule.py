"""Learning rate as a function of progress (pure; no torch).

Progress is committed tokens over `train.tokens`, so that islands of unequal speed agree on the learning rate.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from workers.config import TrainConfig

Shape = Literal["cosine", "constant", "linear"]

WARMUP_START = 0.1
"""Share of the peak at progress 0. Not 0: progress moves only with commits, so a whole first round would be idle."""


def lr_at(progress: float, *, lr: float, warmup: float, min_ratio: float, shape: Shape) -> float:
    """Return the learning rate at `progress`.

    Rises linearly from `WARMUP_START * lr` to `lr` over the share `warmup` of progress, then falls to
    `min_ratio * lr` at progress 1 along a half cosine or a line, or stays (`constant` ignores `min_ratio`).
    Progress above 1 counts as 1: the last leases may pass the end. Raises ValueError for a negative or
    non-finite progress and for an unknown shape.
    """
    if not (math.isfinite(progress) and progress >= 0):
        raise ValueError(f"progress = {progress}: it must be a finite number of at least 0")
    progress = min(progress, 1.0)
    if progress < warmup:
        return lr * (WARMUP_START + (1.0 - WARMUP_START) * progress / warmup)
    done = (progress - warmup) / (1.0 - warmup) if warmup < 1.0 else 0.0
    if shape == "constant":
        return lr
    if shape == "linear":
        height = 1.0 - done
    elif shape == "cosine":
        height = 0.5 * (1.0 + math.cos(math.pi * done))
    else:
        raise ValueError(f"unknown learning-rate shape {shape!r}; known: cosine, constant, linear")
    return lr * (min_ratio + (1.0 - min_ratio) * height)


def agreed_rate(progress: float, *, train: TrainConfig) -> float:
    """Return the learning rate of `[train]` at `progress`, for what all members and the controller must agree on.

    Nine digits: the cosine of two machines may differ in the last bit, and an outer step may use this rate.
    """
    value = lr_at(progress, lr=train.lr, warmup=train.warmup, min_ratio=train.min_lr_ratio, shape=train.schedule)
    return float(f"{value:.9e}")
