"""Models that are given as a list of layers: the user's factory, what its layers are like, and a stage of them.

`model.factory` of a pipeline returns `layers` or `(layers, loss_fn)`: a sequence (or `nn.Sequential`) of layers, each
`x -> y`; the first gets tokens (B, T), and `loss_fn(output, targets) -> scalar` the output of the last one. A layer is
an `nn.Module`, or a function without arguments that builds one: then nobody builds more than its own stage. Each is
built with torch's generator seeded by (seed, place of the layer), so that all peers of a stage have the same values.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from strategies.codecs.stochastic import mix
from strategies.swarm import Stage
from workers.model.errors import ModelError
from workers.model.factory import load_factory
from workers.model.shape import DecoderShape
from workers.pipeline.layer_table import LayerRow, LayerTable
from workers.pipeline.layers import StageModel, build_decoder_stage, list_costs
from workers.pipeline.pieces import token_loss
from workers.pipeline.spec import PipelineSpec
from workers.pipeline.stage import Loss
from workers.source import SourceChanged, check_source

Builder = Callable[[], nn.Module]
REPEATS = 3


def load_layers(
    factory: str, options: dict[str, Any], *, seed: int, source_digest: str | None = None
) -> tuple[list[Builder], Loss]:
    """Builders of the factory's layers, and the loss. Raises ModelError."""
    try:
        check_source(factory, source_digest, key="model.factory")
    except SourceChanged as error:
        raise ModelError(str(error)) from error
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        built = load_factory(factory)(dict(options))
    layers, loss_fn = built if isinstance(built, tuple) and len(built) == 2 else (built, token_loss)
    if isinstance(layers, nn.Sequential):
        layers = list(layers)
    if not isinstance(layers, Sequence) or not layers or not callable(loss_fn):
        raise ModelError(
            f"model.factory = {factory!r} returned {type(built).__qualname__}; a pipeline needs a list of layers, or "
            "(layers, loss_fn) with loss_fn(output, targets) -> scalar"
        )
    for index, layer in enumerate(layers):
        if not callable(layer):
            raise ModelError(
                f"model.factory = {factory!r}: layer {index} is a {type(layer).__qualname__}; a layer is a "
                "torch.nn.Module, or a function without arguments that builds one"
            )
    whole = [layer for layer in layers if isinstance(layer, nn.Module)]
    list_costs(whole)  # refuses parameters that two layers share
    return [_builder(layer, factory, index, seed) for index, layer in enumerate(layers)], loss_fn


def _builder(layer: Any, factory: str, index: int, seed: int) -> Builder:
    def build() -> nn.Module:
        if isinstance(layer, nn.Module):
            return layer
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix(seed, index) >> 1)
            made = layer()
        if not isinstance(made, nn.Module):
            raise ModelError(f"model.factory = {factory!r}: layer {index} builds a {type(made).__qualname__}")
        return made

    return build


def build_stage(spec: PipelineSpec, stage: Stage) -> StageModel:
    """One stage of the run's model. Raises ModelError."""
    if spec.factory is None:
        return build_decoder_stage(spec.shape, stage, seed=spec.train.seed)
    builders, _ = _load(spec)
    part = {f"layers.{index}": builders[index]() for index in range(stage.first, stage.end)}
    names = {f"{name}.{local}": p for name, layer in part.items() for local, p in layer.named_parameters()}
    return StageModel(nn.Sequential(*part.values()), names)


def loss_of(spec: PipelineSpec) -> Loss:
    """What the last stage computes from its output and the targets."""
    return token_loss if spec.factory is None else _load(spec)[1]


def _load(spec: PipelineSpec) -> tuple[list[Builder], Loss]:
    assert spec.factory is not None, "the built-in decoder has no factory"
    return load_layers(spec.factory, spec.options, seed=spec.train.seed, source_digest=spec.factory_digest)


# ---------------------------------------------------------------- what they are like


def decoder_layers(shape: DecoderShape) -> list[Builder]:
    """The built-in decoder as such a list, with any values: to measure it."""

    def builder(index: int, name: str) -> Builder:
        stage = Stage(index=0, first=index, end=index + 1, names=(name,), num_params=0, num_copied=0, seconds=0.0)
        return lambda: build_decoder_stage(shape, stage, seed=0).layers[0]

    names = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(shape.layers)), "lm_head"]
    return [builder(index, name) for index, name in enumerate(names)]


def describe_layers(
    builders: Sequence[Builder],
    names: Sequence[str],
    *,
    vocab_size: int,
    seq_len: int,
    is_decoder: bool = False,
    clock: Callable[[], float] | None = time.perf_counter,
) -> LayerTable:
    """Build each layer, run it on what the one before gives of one sample, and throw it away.

    `clock`: None measures no times. Raises ModelError, with the layer, for what cannot be a pipeline.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, vocab_size, (1, seq_len), generator=generator)
    rows = []
    for name, build in zip(names, builders, strict=True):
        layer = build()
        y, saved_bytes, seconds = _run(name, layer, x, clock)
        shapes = tuple((local, tuple(p.shape)) for local, p in layer.named_parameters())
        rows.append(LayerRow(name=name, shapes=shapes, out_values=y.numel(), saved_bytes=saved_bytes, seconds=seconds))
        x = y
    return LayerTable(rows=tuple(rows), is_decoder=is_decoder)


def _run(name: str, layer: nn.Module, x: Tensor, clock: Callable[[], float] | None) -> tuple[Tensor, int, float]:
    saved_bytes, best_s = 0, math.inf

    def note(tensor: Tensor) -> Tensor:
        nonlocal saved_bytes
        saved_bytes += tensor.numel() * tensor.element_size()
        return tensor

    for _ in range(REPEATS if clock is not None else 1):
        saved_bytes = 0
        began_s = clock() if clock is not None else 0.0
        own = x.detach().requires_grad_(x.is_floating_point())
        try:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                y = layer(own)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ModelError(f"{name} ({type(layer).__qualname__}) cannot take {tuple(x.shape)}: {error}") from error
        if not isinstance(y, Tensor) or y.dtype != torch.float32:
            what = str(y.dtype) if isinstance(y, Tensor) else type(y).__qualname__
            raise ModelError(f"{name} ({type(layer).__qualname__}) gives {what}; a layer of a pipeline gives float32")
        if y.requires_grad:
            y.backward(torch.ones_like(y))
        if clock is not None:
            best_s = min(best_s, clock() - began_s)
        layer.zero_grad(set_to_none=True)
    return y.detach(), saved_bytes, best_s if clock is not None else 0.0


def make_table(
    *,
    factory: str | None,
    options: dict[str, Any],
    shape: DecoderShape,
    seed: int,
    by_time: bool,
    source_digest: str | None = None,
) -> LayerTable | None:
    """The table of a run's model; None for the built-in one where it is cut by parameters."""
    clock = time.perf_counter if by_time else None
    if factory is None:
        if not by_time:
            return None
        names = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(shape.layers)), "lm_head"]
        return describe_layers(
            decoder_layers(shape), names, vocab_size=shape.vocab_size, seq_len=shape.seq_len, is_decoder=True
        )
    builders, _ = load_layers(factory, options, seed=seed, source_digest=source_digest)
    names = [f"layers.{index}" for index in range(len(builders))]
    return describe_layers(builders, names, vocab_size=shape.vocab_size, seq_len=shape.seq_len, clock=clock)
