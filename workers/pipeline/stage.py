"""What a stage computes: forward, and backward from saved inputs with the forward run again (torch only).

Nothing is remembered between the two, so any peer of the stage can do either. Random numbers (dropout) are a function
of (seed, step, microbatch, stage): the second forward is the first one. Recomputation as in "Training Deep Nets with
Sublinear Memory Cost" (arXiv 1604.06174), with the stage as the segment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from strategies.codecs.stochastic import mix
from workers.pipeline.layers import StageModel

Loss = Callable[[Tensor, Tensor], Tensor]
"""`(output of the last stage, targets) -> mean loss of the microbatch, a scalar`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BackwardResult:
    """`gradients`: by parameter name, of this microbatch alone. `input_gradient`: None in the first stage.

    `loss` is the microbatch's, times its weight; None except in the last stage.
    """

    gradients: dict[str, Tensor]
    input_gradient: Tensor | None
    loss: Tensor | None


@contextmanager
def seeded(*, seed: int, step: int, microbatch: int, stage: int, device: torch.device) -> Iterator[None]:
    """Torch's generators hold what belongs to this microbatch in this stage, and afterwards what they held before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # 63 bits: the generators take signed numbers.
        key = mix(seed, step, microbatch, stage) >> 1
        torch.default_generator.manual_seed(key)
        if device.type == "cuda":
            torch.cuda.manual_seed(key)
        yield


@contextmanager
def evaluating(model: StageModel, yes: bool) -> Iterator[None]:
    """With `yes` the model is in evaluation mode, and each module is afterwards as it was."""
    was = [(module, module.training) for module in model.layers.modules()] if yes else []
    if yes:
        model.layers.eval()
    try:
        yield
    finally:
        for module, training in was:
            module.training = training


@torch.no_grad()
def forward(model: StageModel, x: Tensor) -> Tensor:
    """What the next stage gets; run it inside `seeded`."""
    return model(x)


def backward(model: StageModel, x: Tensor, output_gradient: Tensor) -> BackwardResult:
    """Gradients of a stage that is not the last one; run it inside `seeded`."""
    inner = x.detach().requires_grad_(x.is_floating_point())
    with torch.enable_grad():
        y = model(inner)
        if y.shape != output_gradient.shape:
            raise ValueError(
                f"the gradient of the stage's output has shape {tuple(output_gradient.shape)}, "
                f"its output {tuple(y.shape)}"
            )
    return _gradients(model, inner, y, output_gradient, None)


def backward_with_loss(
    model: StageModel, x: Tensor, targets: Tensor, loss_fn: Loss, *, weight: float
) -> BackwardResult:
    """Loss and gradients of the last stage, both times `weight` (the microbatch's share of the batch)."""
    inner = x.detach().requires_grad_(x.is_floating_point())
    with torch.enable_grad():
        loss = loss_fn(model(inner), targets) * weight
    return _gradients(model, inner, loss, None, loss.detach())


def _gradients(
    model: StageModel, inner: Tensor, y: Tensor, output_gradient: Tensor | None, loss: Tensor | None
) -> BackwardResult:
    inputs = [inner] if inner.requires_grad else []
    trained = {name: parameter for name, parameter in model.names.items() if parameter.requires_grad}
    # `grad`, not `backward`: what other microbatches left in `.grad` has nothing to do with this one.
    found = torch.autograd.grad(y, [*inputs, *trained.values()], output_gradient, allow_unused=True)
    own = found[len(inputs) :]
    gradients = {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(trained.items(), own, strict=True)
    }
    return BackwardResult(gradients=gradients, input_gradient=found[0] if inputs else None, loss=loss)
