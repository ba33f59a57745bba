"""A model that is given as a list of layers, for tests: nothing of it is known to the project."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mixer(nn.Module):
    """Mixes what came before with what is there: a running mean, a wide layer, dropout."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(2 * width, 3 * width), nn.Linear(3 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        steps = torch.arange(1, x.shape[1] + 1, dtype=x.dtype).view(1, -1, 1)
        before = y.cumsum(1) / steps
        return x + self.dropout(self.down(torch.tanh(self.up(torch.cat([y, before], -1)))))


def build(options: dict[str, Any]) -> list[Any]:
    """Functions that build a layer each; with `whole` the layers themselves."""
    width, vocab, dropout = options["width"], options["vocab"], options.get("dropout", 0.0)
    layers = [
        lambda: nn.Embedding(vocab, width),
        *[lambda: Mixer(width, dropout)] * options.get("depth", 3),
        lambda: nn.Linear(width, vocab),
    ]
    return [layer() for layer in layers] if options.get("whole") else layers


def with_loss(options: dict[str, Any]) -> tuple[list[Any], Any]:
    """The same with a loss of its own: label smoothing."""

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1)

    return build(options), loss


def broken(options: dict[str, Any]) -> list[Any]:
    """The second layer cannot take what the first one gives."""
    return [lambda: nn.Embedding(options["vocab"], 8), lambda: nn.Linear(9, 4), lambda: nn.Linear(4, 4)]


def shared(options: dict[str, Any]) -> list[Any]:
    """Two layers with one matrix."""
    first, last = nn.Embedding(options["vocab"], 8), nn.Linear(8, options["vocab"], bias=False)
    last.weight = first.weight
    return [first, nn.Linear(8, 8), last]


def nothing(options: dict[str, Any]) -> int:
    """No list."""
    return 3
