"""Loops and data of a user: a small convolutional model that Atoll has never seen, on images from an integer hash."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

import atoll
from workers.digest import digest

NUM_IMAGES, NUM_CLASSES, SIZE = 300, 4, 8
Images = tuple[NDArray[np.float32], NDArray[np.int64]]

NUM_STEPS = 80
CONFIG: dict[str, Any] = {
    "run.name": "images",
    "train.tokens": 8 * NUM_STEPS,
    "train.batch_size": 8,
    "train.device": "cpu",
    "strategy.inner_steps": 5,
    "strategy.outer_lr": 0.9,
    "strategy.outer_momentum": 0.5,
    "codec.name": "fp32",
    "exchange.quorum": 1.0,
    "exchange.heartbeat_s": 0.2,
    "eval.every": 0.25,
    "eval.windows": 32,
}


def images(num: int, *, seed: int = 0) -> Images:
    """Noise with one brighter quarter, which is the class: (num, 1, 8, 8) and (num,)."""
    numbers = np.arange(num * SIZE * SIZE, dtype=np.uint64) + np.uint64(1_000_003 * seed)
    mixed = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    pixels = ((mixed >> np.uint64(40)).astype(np.float32) / 2**24).reshape(num, 1, 2, SIZE // 2, 2, SIZE // 2)
    labels = (np.arange(num) * 7 + seed) % NUM_CLASSES
    pixels[np.arange(num), 0, labels // 2, :, labels % 2, :] += 0.3
    return pixels.reshape(num, 1, SIZE, SIZE), labels.astype(np.int64)


class ConvNet(nn.Module):
    """Convolution, optional BatchNorm, pooling, linear."""

    def __init__(self, *, batch_norm: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8) if batch_norm else nn.GroupNorm(2, 8)
        self.head = nn.Linear(32, NUM_CLASSES)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in (self.conv.weight, self.head.weight):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            for bias in (self.conv.bias, self.head.bias):
                bias.zero_()

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.conv(pixels)))
        return self.head(F.adaptive_avg_pool2d(hidden, 2).flatten(1))


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross-entropy of a batch of images and labels."""
    pixels, labels = batch
    return F.cross_entropy(model(pixels), labels)


def make(*, batch_norm: bool = False, seed: int = 0) -> tuple[ConvNet, torch.optim.Optimizer]:
    """A model and its optimizer."""
    model = ConvNet(batch_norm=batch_norm, seed=seed)
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train_on(island: atoll.Island, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """The user's loop; returns the losses."""
    losses = []
    for batch in island.batches():
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        island.step(loss)
        losses.append(loss.item())
    return losses


def train_images() -> None:
    """What `train.loop` names: every island trains, and leaves the digest of its model behind."""
    model, optimizer = make()
    data = {"dataset": images(NUM_IMAGES), "val_dataset": images(64, seed=1)}
    with atoll.Island(model, optimizer, loss_fn=loss_of, **data) as island:
        losses = train_on(island, model, optimizer)
    (island.run_dir / f"end-{island.name}.txt").write_text(f"{digest_of(model)} {len(losses)}")


def leave_early() -> None:
    """A loop that forgets to go on to the end."""
    model, optimizer = make()
    with atoll.Island(model, optimizer, dataset=images(NUM_IMAGES)) as island:
        next(iter(island.batches()))


def digest_of(model: nn.Module) -> str:
    """One digest of all parameters."""
    values = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return digest(values.numpy())
