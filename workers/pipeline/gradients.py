"""Gradients of one step of one stage: kept by microbatch and added in their order, or added as they come.

Floating-point addition depends on its order, and which peer computes what depends on speeds, losses and luck. Added in
the order of their ids, from all peers together, microbatches give the same bits whatever the routing (ADR 33 says what
that costs). Added as they come, a peer holds one sum, and a run repeats only up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from strategies.aggregate import accumulate

Gradients = dict[str, Tensor]


class GradientStore:
    """What one peer has counted. `ordered`: keep each microbatch's gradient, else one sum a step."""

    def __init__(self, *, ordered: bool) -> None:
        self._ordered = ordered
        self._kept: dict[int, dict[int, Gradients]] = {}
        self._sums: dict[int, Gradients] = {}

    @property
    def num_bytes(self) -> int:
        """Memory of what is kept."""
        kept = [one for step in self._kept.values() for one in step.values()] + list(self._sums.values())
        return sum(tensor.nbytes for gradients in kept for tensor in gradients.values())

    def add(self, step: int, microbatch: int, gradients: Gradients) -> None:
        """Count a microbatch; the caller's accumulator said that it is the first time."""
        if self._ordered:
            own = self._kept.setdefault(step, {})
            assert microbatch not in own, f"microbatch {microbatch} of step {step} was counted before"
            own[microbatch] = gradients
        elif step in self._sums:
            for name, gradient in gradients.items():
                self._sums[step][name].add_(gradient)
        else:
            self._sums[step] = {name: gradient.clone() for name, gradient in gradients.items()}

    def parts(self, step: int, identity: int) -> Mapping[int, Gradients]:
        """What is added for the step, by the number that orders it: the microbatch, or this peer's `identity`."""
        if self._ordered:
            return self._kept.get(step, {})
        return {identity: self._sums[step]} if step in self._sums else {}

    def drop(self, step: int) -> None:
        """The step is committed, or this peer was fenced for it."""
        self._kept.pop(step, None)
        self._sums.pop(step, None)


def reduce_in_order(parts: Iterable[Mapping[int, Gradients]]) -> Gradients:
    """The sum over all parts of all peers, in the order of their numbers. Raises ValueError if a number comes twice."""
    by_number: dict[int, Gradients] = {}
    for mapping in parts:
        if twice := by_number.keys() & mapping.keys():
            raise ValueError(f"microbatches {sorted(twice)} were counted by two peers")
        by_number |= mapping
    if not by_number:
        raise ValueError("there is no gradient to add")
    total: dict[str, Tensor | None] = {}
    for _, gradients in sorted(by_number.items()):
        for name, gradient in gradients.items():
            total[name] = accumulate(total.get(name), gradient.detach().reshape(-1), 1.0)
    shapes = next(iter(by_number.values()))
    return {name: _there(flat).view(shapes[name].shape) for name, flat in total.items()}


def _there(flat: Tensor | None) -> Tensor:
    assert flat is not None, "accumulate returned a sum"
    return flat


@torch.no_grad()
def add_tied(owner: Gradients, copy: Gradients, name: str) -> Gradients:
    """Add the gradient of a tied matrix's copy to that of its owner: the owner's first, then the copy's."""
    return {**owner, name: torch.add(owner[name], copy[name])}
