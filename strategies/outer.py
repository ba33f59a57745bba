"""The outer step: from an anchor and the combined contribution of all members to the next anchor.

Sources: DiLoCo (arXiv 2311.08105), algorithm 1, line 14, with Nesterov momentum as torch.optim.SGD defines it;
AdamW (arXiv 1711.05101), algorithm 2, in the order of torch.optim.AdamW.

Every member computes the outer step by itself and all must get the same bits: only elementwise multiply, add,
subtract, divide and `square_root`, each rounded once, with tensor scalars. No `alpha=`, `lerp`, `addcmul`, fused or
foreach kernels, no sums (measured: these give other bits under AVX2 than without). Elementwise also means that
a fragment may be stepped chunk by chunk. Suffix: N = values of a chunk; names without it: the values of one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from strategies.codecs.backends import Backend, load_kernels
from strategies.elementwise import integer_power, new_scratch, passes, scalar_like, square_root
from strategies.fragments import FragmentSpec
from strategies.norm import clip_scale

States = tuple[Tensor, ...]
Stepped = tuple[Tensor, States]


class OuterStep(Protocol):
    """One rule for the outer step. A rule is a frozen record of settings; its state travels with the anchor."""

    @property
    def num_states(self) -> int:
        """Number of state vectors kept beside the anchor, each as long as it; they start at zero."""
        ...

    def prepare(self, chunks: Iterable[Tensor]) -> Tensor | None:
        """Look at the whole combined contribution once, before the first `step` of a version.

        Returns a 0-dim fp32 tensor that every `step` of this version is given as `scale`; None where there is none.
        """
        ...

    def step(
        self,
        anchor_N: Tensor,
        states: States,
        g_N: Tensor,
        *,
        scale: Tensor | None,
        version: int,
        progress: float,
        spec: FragmentSpec | None = None,
        start: int = 0,
        out: Stepped | None = None,
    ) -> Stepped:
        """Return the next anchor and states of one chunk (fp32).

        `g_N` points uphill: it is what descent subtracts. `version` is that of `anchor_N`, 0 before the first step;
        `progress` the share of the run's tokens committed. `spec` and `start` say which values of which fragment
        the chunk holds; rules that treat all values alike do not need them. The results go to `out`, which may be
        the anchor and the states themselves (in place); without it they are new and the arguments are not changed.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Nesterov:
    """`b <- mu b + g`, then `anchor <- anchor - lr (g + mu b)`: torch.optim.SGD(nesterov=True), one state.

    With `backend` "numba" a step on a CPU is made by compiled code (`codecs.numba_outer`): the same bits.
    """

    lr: float
    momentum: float
    backend: Backend = "torch"

    @property
    def num_states(self) -> int:
        """The momentum buffer."""
        return 1

    def prepare(self, chunks: Iterable[Tensor]) -> Tensor | None:
        """Nothing to prepare."""
        return None

    def step(
        self,
        anchor_N: Tensor,
        states: States,
        g_N: Tensor,
        *,
        scale: Tensor | None,
        version: int,
        progress: float,
        spec: FragmentSpec | None = None,
        start: int = 0,
        out: Stepped | None = None,
    ) -> Stepped:
        """See `OuterStep.step`."""
        (buffer_N,) = states
        next_N, (next_buffer_N,) = out or _new(anchor_N, 1)
        if self.backend == "numba" and anchor_N.is_cpu:
            arrays = (values.numpy() for values in (anchor_N, buffer_N, g_N))
            load_kernels("numba_outer").nesterov(*arrays, self.lr, self.momentum, next_N.numpy(), next_buffer_N.numpy())
            return next_N, (next_buffer_N,)
        lr, momentum, scratch = scalar_like(self.lr, anchor_N), scalar_like(self.momentum, anchor_N), new_scratch(g_N)
        for part in passes(g_N):
            g = g_N[part]
            buffer = torch.mul(buffer_N[part], momentum, out=next_buffer_N[part]).add_(g)
            update = torch.mul(buffer, momentum, out=scratch[: g.numel()]).add_(g).mul_(lr)
            torch.sub(anchor_N[part], update, out=next_N[part])
        return next_N, (next_buffer_N,)


@dataclass(frozen=True, kw_only=True, slots=True)
class Average:
    """`anchor <- anchor - g`: the weighted average of the members' parameters (FedAvg, local SGD).

    `num_states` states are handed through unchanged, so that the rule can stand in for another one for a while.
    """

    num_states: int = 0

    def prepare(self, chunks: Iterable[Tensor]) -> Tensor | None:
        """Nothing to prepare."""
        return None

    def step(
        self,
        anchor_N: Tensor,
        states: States,
        g_N: Tensor,
        *,
        scale: Tensor | None,
        version: int,
        progress: float,
        spec: FragmentSpec | None = None,
        start: int = 0,
        out: Stepped | None = None,
    ) -> Stepped:
        """See `OuterStep.step`. Without `out` the states returned are the ones given."""
        if out is None:
            return torch.sub(anchor_N, g_N), states
        for target, state in zip(out[1], states, strict=True):
            target.copy_(state)
        return torch.sub(anchor_N, g_N, out=out[0]), out[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class OuterAdamW:
    """AdamW on the averaged gradient: the whole optimizer of data parallel training, two states.

    Equal to torch.optim.AdamW with weight decay on tensors of two or more dimensions only, within rounding.
    `clip` bounds the norm of the averaged gradient of the whole fragment first (0: no clipping).
    """

    lr_at: Callable[[float], float]
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip: float

    @property
    def num_states(self) -> int:
        """First and second moment."""
        return 2

    def prepare(self, chunks: Iterable[Tensor]) -> Tensor | None:
        """Return the clipping factor of the fragment, None without clipping."""
        return clip_scale(chunks, self.clip) if self.clip > 0 else None

    def step(
        self,
        anchor_N: Tensor,
        states: States,
        g_N: Tensor,
        *,
        scale: Tensor | None,
        version: int,
        progress: float,
        spec: FragmentSpec | None = None,
        start: int = 0,
        out: Stepped | None = None,
    ) -> Stepped:
        """See `OuterStep.step`; needs `spec` and `start` if there is weight decay."""
        next_N, next_states = out or _new(anchor_N, 2)
        lr, steps = self.lr_at(progress), version + 1
        step_size = scalar_like(lr / (1.0 - integer_power(self.beta1, steps)), g_N)
        correction = scalar_like(math.sqrt(1.0 - integer_power(self.beta2, steps)), g_N)
        eps, factor = scalar_like(self.eps, g_N), scalar_like(1.0, g_N) if scale is None else scale
        scratch, scratch2 = new_scratch(g_N), new_scratch(g_N)
        for part in passes(g_N):
            num = part.stop - part.start
            g = torch.mul(g_N[part], factor, out=scratch[:num])
            first = _blend(states[0][part], g, self.beta1, scratch2[:num], next_states[0][part])
            second = _blend(states[1][part], g.mul_(g), self.beta2, scratch2[:num], next_states[1][part])
            denominator = square_root(second, out=scratch[:num]).div_(correction).add_(eps)
            update = torch.div(first, denominator, out=scratch2[:num]).mul_(step_size)
            anchor = next_N[part].copy_(anchor_N[part])
            if self.weight_decay > 0:
                _decay_matrices(anchor, 1.0 - lr * self.weight_decay, spec, start + part.start)
            anchor.sub_(update)
        return next_N, next_states


def _new(anchor_N: Tensor, num_states: int) -> Stepped:
    return torch.empty_like(anchor_N), tuple(torch.empty_like(anchor_N) for _ in range(num_states))


def _blend(old: Tensor, new: Tensor, beta: float, scratch: Tensor, out: Tensor) -> Tensor:
    """Return `beta old + (1 - beta) new` with three roundings; `out` may be `old`."""
    torch.mul(new, scalar_like(1.0 - beta, new), out=scratch)
    return torch.mul(old, scalar_like(beta, old), out=out).add_(scratch)


def _decay_matrices(values: Tensor, factor: float, spec: FragmentSpec | None, start: int) -> None:
    """Multiply what `values` (from place `start` of the fragment) holds of tensors with two or more dimensions."""
    if spec is None:
        raise ValueError("weight decay needs `spec`: only the fragment tells matrices from vectors")
    keep = scalar_like(factor, values)
    for tensor, in_range, _ in spec.overlaps(start, start + values.numel()):
        if len(tensor.shape) >= 2:
            values[in_range].mul_(keep)
