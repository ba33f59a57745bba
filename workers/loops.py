"""What an island's training thread runs: the built-in loop, or the function that `train.loop` names."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch

from workers.batch_fit import fit_batch, memory_probe, remember, remembered, share_of_memory
from workers.config import SCRIPT
from workers.context import IslandContext, IslandSpec
from workers.data.index import load_index
from workers.device import resolve_device
from workers.functions import FunctionError, load_function
from workers.inner_loop import InnerLoop, autocast
from workers.island import Island
from workers.loop_checks import LoopError
from workers.model.factory import ModelBundle, build_model
from workers.optim import build_optimizer
from workers.source import SourceChanged, check_source
from workers.variants import strategy_of

log = logging.getLogger("atoll.island")

NUM_MOMENTS = 2  # vectors that AdamW makes at its first step


class BuiltinLoop:
    """The built-in loop: model and optimizer from the settings, one `advance` per inner step."""

    def __init__(self, context: IslandContext) -> None:
        """Builds the model on its device; raises ModelError or LoopError for settings that do not fit."""
        spec = context.spec
        if spec.pack is None:
            raise LoopError(
                f"data.samples = {spec.data.samples}: the data comes from a loop of your own, and train.loop names none"
            )
        device = resolve_device(spec.train.device, index=spec.index)
        index = load_index(spec.pack)
        self.bundle = build_model(spec.model, vocab_size=index.vocab_size, seq_len=index.seq_len, seed=spec.train.seed)
        self.bundle.model.to(device)
        if spec.train.fit_batch:
            spec = context.spec = _with_fitting_batch(context, self.bundle, device, index.seq_len)
        optimizer = build_optimizer(self.bundle.model, spec.train)
        self.inner = context.inner = InnerLoop(self.bundle, optimizer, spec.train, device)
        self.island = Island(
            self.bundle.model,
            optimizer,
            loss_fn=self.bundle.loss_fn,
            context=context,
            flops_per_token=self.bundle.flops_per_token,
        )
        self.island.watches_changes = False
        self.gradients_only = strategy_of(spec).contribution == "gradient"

    def advance(self, *, blocking: bool) -> bool:
        """One inner step, if there is something to train on; whether a step was made."""
        batch = self.island.next_batch(blocking=blocking)
        if batch is None:
            return False
        if self.gradients_only:
            self.island.step(self.inner.forward_backward(batch))
        else:
            stats = self.inner.step(batch, progress=self.island.progress)
            self.island.step(stats.loss, stats=stats)
        return True

    def run(self) -> None:
        """Train until the run ends."""
        with self.island:
            while self.advance(blocking=True):
                pass


def _with_fitting_batch(context: IslandContext, bundle: ModelBundle, device: torch.device, seq_len: int) -> IslandSpec:
    """The settings with the largest batch that fits, measured now, or before the run was stopped."""
    spec, kept = context.spec, context.spec.run_dir / "batch" / f"{context.spec.name}.json"
    fit = remembered(kept) if spec.resume else None
    if fit is None:
        vectors = NUM_MOMENTS
        if device.type == "cpu":  # the anchor, its outer state and a payload on the way are there as well
            vectors += strategy_of(spec).num_states + 2
        num_sharing = context.num_sharing
        if device.type == "cuda":
            num_sharing = -(-num_sharing // torch.cuda.device_count())
        probe = memory_probe(
            bundle.model,
            bundle.loss_fn,
            lambda size: torch.zeros((size, seq_len + 1), dtype=torch.int64, device=device),
            later_bytes=4 * vectors * bundle.num_params,
        )
        limit = int(spec.train.memory_fraction * share_of_memory(device, num_sharing=num_sharing))
        with autocast(spec.train.precision, device):
            fit = fit_batch(probe, largest=spec.train.batch_size, limit_bytes=limit)
        remember(kept, fit)
    log.info("batches of %d samples: peak %d of %d bytes; %s", fit.batch_size, fit.peak_bytes, fit.limit_bytes, fit.why)
    return replace(spec, train=spec.train.model_copy(update={"batch_size": fit.batch_size, "fit_batch": False}))


def run_builtin_loop(context: IslandContext) -> None:
    """What an island's training thread does unless `train.loop` names another loop."""
    BuiltinLoop(context).run()


def run_user_loop(context: IslandContext) -> None:
    """What it does if `train.loop` is set: call that function, which makes the island; `context` is this thread's.

    Raises LoopError if the function returns before the run is over, besides whatever it raises itself.
    """
    spec = context.spec.train.loop
    assert spec is not None, "run_builtin_loop is for the other case"
    function = load_loop(spec)
    try:
        check_source(spec, context.spec.train.loop_digest, key="train.loop")
    except SourceChanged as error:
        raise LoopError(str(error)) from error
    function()
    if context.deliver is None:
        raise LoopError(f"train.loop = {spec!r} returned without an island: it must enter `with atoll.Island(...)`")
    if not context.ended:
        raise LoopError(
            f"train.loop = {spec!r} returned before the run was over: iterate over island.batches() to its end, which "
            "train.tokens decides"
        )


def load_loop(spec: str) -> Callable[[], object]:
    """The function that `train.loop` names; raises LoopError that says what was looked for."""
    if spec == SCRIPT:
        raise LoopError(
            "this run belongs to a script: go on with it there, by atoll.Island(model, optimizer, run_dir=..., "
            "resume=True); for a new run on Ray, name a function in train.loop"
        )
    try:
        return load_function(spec, key="train.loop", num_arguments=0, called="without arguments")
    except FunctionError as error:
        raise LoopError(str(error)) from error
