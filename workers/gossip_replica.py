"""The tensors of one member of a gossip run: its own anchor and momentum, its live parameters, what it offered.

The send point publishes anchor and displacement (for a full merge the momentum as well); training goes on, and what was
trained since is kept when the exchange is applied: `theta = phi' - (D_now - D_offered)`. A skipped exchange changes
nothing, and the displacement is offered again, longer. `Averaging` is D-SGD on a pair or group: no momentum, and the
mean of the parameters themselves.
Suffix: N = all values of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from strategies.aggregate import weighted_sum
from strategies.elementwise import scalar_like
from strategies.fragments import FragmentSpec, gather, scatter
from strategies.gossip import NoLoCo, group_mean
from workers.digest import digest


class GossipStep(Protocol):
    """What a group does with the anchors and displacements of its members."""

    @property
    def alpha(self) -> float:
        """Momentum that is kept."""
        ...

    @property
    def beta(self) -> float:
        """Learning rate of the mean displacement."""
        ...

    def step(
        self, anchors: Sequence[Tensor], displacements: Sequence[Tensor], *, own: int, momentum_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The next anchor and momentum of member `own`."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Averaging:
    """D-SGD: `x <- mean_j x_j` over the group, with `x = phi - D` (Lian et al. 2017, with the group's mean as W)."""

    alpha: float = 0.0
    beta: float = 1.0

    def step(
        self, anchors: Sequence[Tensor], displacements: Sequence[Tensor], *, own: int, momentum_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The mean of the group's parameters; momentum stays what it is."""
        return group_mean([torch.sub(a, d) for a, d in zip(anchors, displacements, strict=True)]), momentum_N


STEPS: dict[str, type[NoLoCo] | type[Averaging]] = {"noloco": NoLoCo, "gossip": Averaging}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """What a member offers to its group."""

    anchor_N: Tensor
    displacement_N: Tensor
    momentum_N: Tensor


class PayloadDamaged(ValueError):
    """A payload of another size than the model needs."""


class GossipReplica:
    """Anchor, momentum and live parameters of one member."""

    def __init__(self, *, spec: FragmentSpec, tensors: Mapping[str, Tensor], step: GossipStep) -> None:
        """`tensors`: live parameters by name, fp32, read and written in place; the anchor begins as their copy."""
        self.spec, self.tensors, self.step = spec, tensors, step
        self.anchor_N = gather(spec, tensors)
        self.momentum_N = torch.zeros_like(self.anchor_N)
        self.offered_N: Tensor | None = None

    def displacement(self) -> Tensor:
        """How far local training has moved since the anchor: anchor minus live parameters."""
        return torch.sub(self.anchor_N, gather(self.spec, self.tensors))

    def publish(self, *, momentum: bool = True) -> np.ndarray:
        """At the send point: the bytes of what this member offers, which it remembers until `apply` or `skip`.

        `momentum`: with it; only a full merge of all needs that of others.
        """
        self.offered_N = self.displacement()
        whole = torch.cat([self.anchor_N, self.offered_N, *((self.momentum_N,) if momentum else ())])
        return whole.cpu().view(torch.uint8).numpy()

    def parse(self, data: np.ndarray) -> Shared:
        """What another member published. Raises PayloadDamaged for other sizes."""
        num = self.spec.numel
        if len(data) not in (8 * num, 12 * num):
            raise PayloadDamaged(f"{len(data)} bytes, expected {8 * num} or {12 * num}")
        flat = torch.from_numpy(np.frombuffer(data, dtype=np.float32).copy()).to(self.anchor_N.device)
        anchor_N, displacement_N, *rest = flat.view(-1, num)
        momentum_N = rest[0] if rest else torch.zeros_like(anchor_N)
        return Shared(anchor_N=anchor_N, displacement_N=displacement_N, momentum_N=momentum_N)

    def apply(self, shared: Sequence[Shared], own: int, *, merge: bool) -> None:
        """Move to the next anchor, with the group in its order; training since the offer is kept.

        `merge`: everybody takes the same anchor and momentum, one heavy-ball step on the means of all.
        """
        assert self.offered_N is not None, "an exchange without an offer"
        since_N = torch.sub(self.displacement(), self.offered_N)
        anchors, displacements = [s.anchor_N for s in shared], [s.displacement_N for s in shared]
        if merge:
            momentum_N = merged_momentum(self.step, displacements, [s.momentum_N for s in shared])
            anchor_N = torch.sub(group_mean(anchors), momentum_N)
        else:
            anchor_N, momentum_N = self.step.step(anchors, displacements, own=own, momentum_N=self.momentum_N)
        self.anchor_N, self.momentum_N, self.offered_N = anchor_N, momentum_N, None
        if merge and isinstance(self.step, Averaging):
            self.momentum_N = torch.zeros_like(anchor_N)
        scatter(self.spec, torch.sub(anchor_N, since_N), self.tensors)

    def skip(self) -> None:
        """The exchange did not come about: nothing has changed."""
        self.offered_N = None

    def begin_from(self, shared: Shared) -> None:
        """A new member: another one's anchor, without its momentum or what it has trained since."""
        self.anchor_N, self.momentum_N = shared.anchor_N.clone(), torch.zeros_like(shared.anchor_N)
        self.offered_N = None
        scatter(self.spec, self.anchor_N, self.tensors)

    def digest(self) -> str:
        """Of the anchor: equal on all members after a full merge."""
        return digest(self.anchor_N.view(torch.uint8).numpy())


def merged_momentum(step: GossipStep, displacements: Sequence[Tensor], momenta: Sequence[Tensor]) -> Tensor:
    """`alpha mean(b) + beta mean(D)`: the outer step that the mean of all members makes, whatever the groups were."""
    share = [1.0 / len(displacements)] * len(displacements)
    mean_N, kept_N = weighted_sum(displacements, share), group_mean(momenta)
    pushed_N = torch.mul(mean_N, scalar_like(step.beta, mean_N))
    return torch.add(torch.mul(kept_N, scalar_like(step.alpha, kept_N)), pushed_N)
