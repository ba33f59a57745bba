"""From `[model]` to a model and its loss: the built-in decoder, or any model through a factory function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.config import ModelConfig
from workers.functions import FunctionError, load_function
from workers.model.errors import ModelError
from workers.model.flops import flops_per_token
from workers.model.hf import load_hf_tensors
from workers.model.llama import Llama
from workers.model.shape import resolve_shape
from workers.source import SourceChanged, check_source

LossFn = Callable[[nn.Module, Any], Tensor]
"""`(model, batch) -> mean loss, a scalar`; the batch is int64 tokens (B, seq_len + 1), or what an own dataset gives."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelBundle:
    """A model, its loss and what one trained token costs (forward and backward; None where unknown)."""

    model: nn.Module
    loss_fn: LossFn
    flops_per_token: float | None = None

    @property
    def num_params(self) -> int:
        """Trainable values; a shared matrix counts once."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)


def next_token_loss(model: nn.Module, tokens_BS: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each next token, in fp32; the model returns logits, or an object with `.logits`."""
    output = model(tokens_BS[:, :-1])
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        what = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(output).__qualname__}"
        raise ModelError(
            f"{type(model).__qualname__}(tokens) gave {what}; the built-in loss needs logits (B, T, vocabulary). "
            "Let the factory return (model, loss_fn), or give atoll.Island a loss_fn, to use another loss"
        )
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens_BS[:, 1:].flatten())


def build_model(
    config: ModelConfig, *, vocab_size: int, seq_len: int, seed: int, load_init: bool = True
) -> ModelBundle:
    """Build the model of `[model]` on the CPU, in fp32, from `seed` alone.

    With `model.init_from` the weights come from that folder; `load_init=False` skips reading it (a member that
    fetches the anchor from others needs no checkpoint). A factory runs with torch's CPU generator seeded by `seed`
    and restored afterwards. Raises ModelError.
    """
    if config.factory is not None:
        if config.init_from is not None:
            raise ModelError(
                f"model.init_from = {config.init_from!r} works with the built-in decoder only, and model.factory = "
                f"{config.factory!r} is set: load the weights inside the factory"
            )
        try:
            check_source(config.factory, config.factory_digest, key="model.factory")
        except SourceChanged as error:
            raise ModelError(str(error)) from error
        return _call_factory(config.factory, config.options, seed=seed)
    if config.options:
        raise ModelError(f"model.options = {config.options!r} is for model.factory, which is not set")
    shape = resolve_shape(config, vocab_size=vocab_size, seq_len=seq_len)
    model = Llama(shape, seed=seed)
    if config.init_from is not None and load_init:
        load_hf_tensors(Path(config.init_from).expanduser(), model)
    return ModelBundle(model=model, loss_fn=next_token_loss, flops_per_token=flops_per_token(shape))


def load_factory(spec: str) -> Callable[[dict[str, Any]], object]:
    """Find the function that `model.factory` names; raises ModelError that says what was looked for."""
    called = "with one argument, the table model.options"
    try:
        return load_function(spec, key="model.factory", num_arguments=1, called=called)
    except FunctionError as error:
        raise ModelError(str(error)) from error


def _call_factory(spec: str, options: dict[str, Any], *, seed: int) -> ModelBundle:
    function = load_factory(spec)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        built = function(dict(options))
    model, loss_fn = built if isinstance(built, tuple) and len(built) == 2 else (built, next_token_loss)
    if not isinstance(model, nn.Module) or not callable(loss_fn):
        kinds = (type(part).__qualname__ for part in built) if isinstance(built, tuple) else ()
        what = f"({', '.join(kinds)})" if isinstance(built, tuple) else type(built).__qualname__
        raise ModelError(
            f"model.factory = {spec!r} returned {what}; expected a torch.nn.Module, or (model, loss_fn) "
            "with loss_fn(model, tokens) -> scalar"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(f"model.factory = {spec!r} returned a {type(model).__qualname__} without trainable parameters")
    return ModelBundle(model=model, loss_fn=loss_fn)
