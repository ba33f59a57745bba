"""About how long an inner step takes, by a few small ones: for what is said of a run before it has begun.

A step of fewer samples is timed and its forward and backward pass scaled up; the optimizer's part does not depend on
them. The CPU alone: a GPU would be taken, and its kernels loaded, for one number.
"""

from __future__ import annotations

from time import perf_counter

import torch

from workers.config import ModelConfig, TrainConfig
from workers.inner_loop import InnerLoop
from workers.model.factory import build_model
from workers.model.flops import flops_per_token
from workers.model.shape import resolve_shape
from workers.optim import build_optimizer

# Of one timed step: 0.05 to 0.2 s of one core; more samples are scaled, and larger models are not timed.
MOST_FLOPS = 10e9
MOST_VALUES = 20_000_000
NUM_TIMED = 2  # after one that loads kernels


def time_step(model: ModelConfig, train: TrainConfig, *, vocab_size: int, seq_len: int) -> float | None:
    """Seconds of an inner step of the built-in decoder with `train.threads` threads that nobody else uses.

    The quickest of `NUM_TIMED`: what else goes on here is not counted. None for a model that is too large to be timed
    in passing. Raises ModelError for settings that do not fit, as an island would. Sets the calling thread's number of
    threads.
    """
    shape = resolve_shape(model, vocab_size=vocab_size, seq_len=seq_len)
    samples = min(train.batch_size, int(MOST_FLOPS / (flops_per_token(shape) * seq_len)))
    if samples < 1 or shape.num_params > MOST_VALUES:
        return None
    torch.set_num_threads(train.threads)
    bundle = build_model(model, vocab_size=vocab_size, seq_len=seq_len, seed=0, load_init=False)
    one = train.model_copy(update={"accumulation": 1})
    loop = InnerLoop(bundle, build_optimizer(bundle.model, one), one, torch.device("cpu"))
    tokens_BS = (torch.arange(samples * (seq_len + 1)) * 31 % vocab_size).view(samples, seq_len + 1)
    pass_s = apply_s = float("inf")
    for number in range(1 + NUM_TIMED):
        started = perf_counter()
        loop.forward_backward(tokens_BS)
        between = perf_counter()
        loop.apply(0.0)
        if number:
            pass_s = min(pass_s, between - started)
            apply_s = min(apply_s, perf_counter() - between)
    return pass_s * train.batch_size / samples + apply_s
