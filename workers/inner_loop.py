"""The inner loop of one island: gradient accumulation, clipping, mixed precision, one optimizer step (torch only).

    InnerLoop.step(batch, progress)  =  forward_backward(batch), then apply(progress)

A strategy that contributes gradients calls the first half alone and sends what is in `parameter.grad`. On a CPU equal
seeds and batches give equal bits. One step waits for the device once, at its end.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from workers.config import TrainConfig
from workers.device import check_precision
from workers.model.errors import ModelError
from workers.model.factory import LossFn, ModelBundle
from workers.optim import InnerOptimizer
from workers.schedule import lr_at

Batch = NDArray[np.integer[Any]] | Tensor
"""Tokens (B, seq_len + 1) of any integer type."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepStats:
    """One inner step: mean loss, gradient norm before clipping, learning rate, tokens trained on, duration."""

    loss: float
    grad_norm: float
    lr: float
    num_tokens: int
    seconds: float

    @property
    def finite(self) -> bool:
        """Whether loss and gradient were finite; if not, the parameters are spoiled by now."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class InnerLoop:
    """Steps of one model with one optimizer; the model is on `device` already.

    `loss_fn` may be replaced between steps, which faults do.
    Raises ModelError where `train.precision` is not supported by the device or the batch cannot be cut.
    """

    def __init__(
        self, bundle: ModelBundle, optimizer: InnerOptimizer, train: TrainConfig, device: torch.device
    ) -> None:
        check_precision(train.precision, device)
        if train.accumulation > train.batch_size:
            raise ModelError(
                f"train.accumulation = {train.accumulation} is larger than train.batch_size = {train.batch_size}: "
                "a micro-batch needs at least one sample"
            )
        self._model, self.loss_fn = bundle.model, bundle.loss_fn
        self._optimizer, self._train, self._device = optimizer, train, device
        self._parameters = [parameter for parameter in bundle.model.parameters() if parameter.requires_grad]
        assert all(parameter.device == device for parameter in self._parameters), f"the model is not on {device}"
        self._micro_batch_size = math.ceil(train.batch_size / train.accumulation)

    def step(self, batch: Batch, *, progress: float) -> StepStats:
        """Train on one batch; `progress` sets the learning rate (committed tokens / `train.tokens`)."""
        started = time.perf_counter()
        loss = self.forward_backward(batch)
        grad_norm = self.apply(progress)
        loss_value, grad_norm_value = torch.stack([loss, grad_norm]).tolist()  # the one wait for the device
        return StepStats(
            loss=loss_value,
            grad_norm=grad_norm_value,
            lr=self.lr(progress),
            num_tokens=batch.shape[0] * (batch.shape[1] - 1),
            seconds=time.perf_counter() - started,
        )

    def forward_backward(self, batch: Batch) -> Tensor:
        """Set the gradients to those of the batch's mean loss, which is returned (scalar, detached, not waited for).

        A batch is cut into pieces of at most ceil(batch_size / accumulation) samples, weighted by their share of it.
        """
        self._optimizer.zero_grad(set_to_none=True)
        tokens_BS = _on_device(batch, self._device)
        pieces = tokens_BS.split(self._micro_batch_size)
        total: Tensor | None = None
        for piece in pieces:
            with autocast(self._train.precision, self._device):
                loss = _scalar(self.loss_fn(self._model, piece))
            if len(pieces) > 1:
                loss = loss * (len(piece) / len(tokens_BS))
            loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None, "an empty batch"
        return total.float()

    def apply(self, progress: float) -> Tensor:
        """Clip the gradients, take one optimizer step, free the gradients; returns their norm before clipping.

        Groups with a `peak_lr` get the scheduled learning rate; a foreign optimizer's groups keep their own.
        """
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm(gradients)
        if self._train.grad_clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._train.grad_clip, grad_norm)
        for group in self._optimizer.param_groups:
            if "peak_lr" in group:
                group["lr"] = self._scheduled(progress, group["peak_lr"])
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def lr(self, progress: float) -> float:
        """Return AdamW's learning rate at `progress` (a foreign optimizer's: that of its first group, now)."""
        first = self._optimizer.param_groups[0]
        return self._scheduled(progress, self._train.lr) if "peak_lr" in first else float(first["lr"])

    def _scheduled(self, progress: float, peak_lr: float) -> float:
        train = self._train
        return lr_at(progress, lr=peak_lr, warmup=train.warmup, min_ratio=train.min_lr_ratio, shape=train.schedule)


def evaluate(
    bundle: ModelBundle,
    params: Mapping[str, Tensor] | None,
    batches: Iterable[Any],
    *,
    precision: Literal["fp32", "bf16"] = "fp32",
    sizes: Sequence[int] | None = None,
) -> float:
    """Mean loss over all samples of `batches`, without gradients and in evaluation mode.

    `params` (by name) take the place of the model's parameters for the duration of the call, without a copy where
    they are on the model's device: don't train or evaluate the same model on another thread meanwhile.
    `batches` are tokens (`Batch`); with `sizes`, the samples in each, they are taken as they are: whatever the loss
    takes, on the model's device.
    Raises ModelError for a name or shape that the model does not have, or has and `params` lacks.
    """
    holder = _LossOf(bundle.model, bundle.loss_fn)
    device = next(bundle.model.parameters()).device
    substitutes = None if params is None else _substitutes(bundle.model, params, device)
    losses: list[Tensor] = []
    counts: list[int] = []
    with torch.no_grad(), _evaluation_mode(bundle.model), autocast(precision, device):
        for batch in batches:
            placed = _on_device(batch, device) if sizes is None else batch
            if substitutes is None:
                loss = holder(placed)
            else:
                loss = torch.func.functional_call(holder, substitutes, (placed,))
            losses.append(_scalar(loss).detach().float())
            counts.append(len(placed) if sizes is None else sizes[len(counts)])
    assert losses, "evaluation without a batch"
    weights = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    return float(torch.dot(torch.stack(losses).to("cpu", torch.float64), weights))


def autocast(precision: Literal["fp32", "bf16"], device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which a forward pass has this precision (fp32: none)."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


class _LossOf(nn.Module):
    """Model and loss as one module, which is what `functional_call` can substitute parameters in."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model = model
        self._loss_fn = loss_fn

    def forward(self, batch: Any) -> Tensor:
        return self._loss_fn(self.model, batch)


def _scalar(loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"type {type(loss).__qualname__}"
        raise ModelError(
            f"the model's loss_fn returned a value of {what}; expected a scalar tensor, the batch's mean loss"
        )
    return loss.reshape(())


def _substitutes(model: nn.Module, params: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    own = dict(model.named_parameters())
    for name in own.keys() ^ params.keys():
        where = "the model has no such parameter" if name in params else "it is missing from the given parameters"
        raise ModelError(f"evaluation: {name!r}: {where}")
    for name, parameter in own.items():
        if parameter.shape != params[name].shape:
            raise ModelError(
                f"evaluation: {name!r} has shape {tuple(params[name].shape)}, the model has {tuple(parameter.shape)}"
            )
    return {f"model.{name}": tensor.detach().to(device) for name, tensor in params.items()}


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    # Per module: a user's model may keep parts of itself in evaluation mode while it trains.
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _on_device(batch: Batch, device: torch.device) -> Tensor:
    if isinstance(batch, Tensor):
        return batch.to(device, torch.int64, non_blocking=True)
    # torch shares the memory of an array, and warns where that is read-only.
    tokens = torch.from_numpy(batch if batch.flags.writeable else batch.copy())
    if device.type == "cuda":
        tokens = tokens.pin_memory()
    return tokens.to(device, torch.int64, non_blocking=True)
