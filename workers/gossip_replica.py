"""The tensors of one member of a gossip run: its own anchor and momentum, its live parameters, what it offered.

The send point publishes anchor and displacement; training goes on, and what was trained since is kept when the exchange
is applied: `theta = phi' - (D_now - D_offered)`. A skipped exchange changes nothing, and the displacement is offered
again, longer. `Averaging` is D-SGD on a pair or group: no momentum, and the mean of the parameters, which are
then all that is published.
Suffix: N = all values of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from strategies.fragments import FragmentSpec, gather, scatter
from strategies.gossip import group_mean


class GossipStep(Protocol):
    """What a group does with the anchors and displacements of its members."""

    def step(
        self, anchors: Sequence[Tensor], displacements: Sequence[Tensor], *, own: int, momentum_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The next anchor and momentum of member `own`."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Averaging:
    """D-SGD: `x <- mean_j x_j` over the group, with `x = phi - D` (Lian et al. 2017, with the group's mean as W)."""

    def step(
        self, anchors: Sequence[Tensor], displacements: Sequence[Tensor], *, own: int, momentum_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The mean of the group's parameters; momentum stays what it is."""
        return group_mean([torch.sub(a, d) for a, d in zip(anchors, displacements, strict=True)]), momentum_N


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """What a member offers to its group."""

    anchor_N: Tensor
    displacement_N: Tensor


class PayloadDamaged(ValueError):
    """A payload of another size than the model needs."""


class GossipReplica:
    """Anchor, momentum and live parameters of one member."""

    def __init__(self, *, spec: FragmentSpec, tensors: Mapping[str, Tensor], step: GossipStep) -> None:
        """`tensors`: live parameters by name, fp32, read and written in place; the anchor begins as their copy."""
        self.spec, self.tensors, self.step = spec, tensors, step
        self.averages = isinstance(step, Averaging)
        self.anchor_N = gather(spec, tensors)
        self.momentum_N = torch.zeros_like(self.anchor_N)
        self.offered_N: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of what it publishes."""
        return (1 if self.averages else 2) * 4 * self.spec.numel

    def displacement(self) -> Tensor:
        """How far local training has moved since the anchor: anchor minus live parameters."""
        return torch.sub(self.anchor_N, gather(self.spec, self.tensors))

    def publish(self) -> np.ndarray:
        """At the send point: the bytes of what this member offers, which it remembers until `apply`."""
        self.offered_N = self.displacement()
        if self.averages:
            return gather(self.spec, self.tensors).cpu().view(torch.uint8).numpy()
        return torch.cat([self.anchor_N, self.offered_N]).cpu().view(torch.uint8).numpy()

    def parse(self, data: np.ndarray) -> Shared:
        """What another member published. Raises PayloadDamaged for another size."""
        if len(data) != self.num_bytes:
            raise PayloadDamaged(f"{len(data)} bytes, expected {self.num_bytes}")
        flat = torch.from_numpy(np.frombuffer(data, dtype=np.float32).copy()).to(self.anchor_N.device)
        if self.averages:
            return Shared(anchor_N=flat, displacement_N=torch.zeros_like(flat))
        anchor_N, displacement_N = flat.view(2, -1)
        return Shared(anchor_N=anchor_N, displacement_N=displacement_N)

    def apply(self, shared: Sequence[Shared], own: int) -> None:
        """Move to the next anchor, with the group in its order; training since the offer is kept."""
        assert self.offered_N is not None, "an exchange without an offer"
        since_N = torch.sub(self.displacement(), self.offered_N)
        anchors, displacements = [s.anchor_N for s in shared], [s.displacement_N for s in shared]
        self.anchor_N, self.momentum_N = self.step.step(anchors, displacements, own=own, momentum_N=self.momentum_N)
        self.offered_N = None
        scatter(self.spec, torch.sub(self.anchor_N, since_N), self.tensors)
