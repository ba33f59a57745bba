"""Arithmetic of the built-in decoder, and what a device can do: the two halves of model FLOPs utilisation (MFU)."""

from __future__ import annotations

import time
from functools import cache
from typing import Literal

import torch

from workers.model.linear import linear
from workers.model.shape import DecoderShape

MEASURE_SECONDS = 0.1
_SIDES = {"cpu": 512, "cuda": 4096}


def flops_per_token(shape: DecoderShape) -> float:
    """Floating-point operations to train one token (forward and backward), as in PaLM (arXiv:2204.02311, appendix B).

    `6 N + 12 layers heads head_dim seq_len`: N counts the matrices that are multiplied, so the head but not the
    look-up of the embedding; attention counts in full, although the causal half is skipped. Norms and activations
    are left out.
    """
    layer = 2 * shape.dim * shape.dim + 2 * shape.dim * shape.kv_dim + 3 * shape.dim * shape.hidden
    multiplied = shape.layers * layer + shape.vocab_size * shape.dim
    return 6.0 * multiplied + 12.0 * shape.layers * shape.heads * shape.head_dim * shape.seq_len


def measured_matmul_flops(device: torch.device, precision: Literal["fp32", "bf16"] = "fp32") -> float:
    """Peak of this process on `device`: operations per second of its best square matrix product within 0.1 s.

    A measurement and no data-sheet figure: it uses the threads that torch has now, suffers from busy neighbours and
    is taken once per process, device, precision and number of threads.
    """
    return _measure(str(device), precision, torch.get_num_threads())


@cache
def _measure(device: str, precision: str, _threads: int) -> float:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    side = _SIDES[torch.device(device).type]
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.rand(side, side, generator=generator).to(device, dtype) for _ in range(2))
    best_s, started = float("inf"), time.perf_counter()
    with torch.no_grad():
        _timed_product(left, right)  # the first call loads kernels
        while best_s == float("inf") or time.perf_counter() - started < MEASURE_SECONDS:
            best_s = min(best_s, _timed_product(left, right))
    return 2.0 * side**3 / best_s


def _timed_product(left: torch.Tensor, right: torch.Tensor) -> float:
    started = time.perf_counter()
    linear(left, right)
    if left.is_cuda:
        torch.cuda.synchronize(left.device)
    return time.perf_counter() - started
