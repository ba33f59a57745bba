"""A member that sends wrong updates: what is put into its replica in the place of what it would send (`Replica.tamper`)
or reduce for others (`Replica.distort`).

`begin_attack(replica, kind)` makes a member an attacker and `end_attack` an honest one again. An attack on its
contributions works on what it was going to send; those that need to know what the others send (`little_is_enough`,
`copy_cat`) take it from `others`: a bench in one process looks, an attacker of a real run listens (`faults.eavesdrop`).
What the attacker announces (digest, sum of squares) is true of what it sends: a lie about that would be refused at
once. `begin_label_flip` is about what it trains on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from faults import attacks
from faults.plan import ATTACKS, LABEL_FLIP
from strategies.codecs.base import HEADER_BYTES, Codec
from strategies.codecs.none import Fp32

WITH_OTHERS = ("little_is_enough", "copy_cat")
ON_CONTRIBUTIONS = tuple(attack for attack in ATTACKS if attack not in ("lying_owner", LABEL_FLIP))
Others = Callable[[int, slice], Sequence[Tensor]]
"""Fragment and part -> what the honest members would send now; empty: the attacker does not know, and is honest."""


class Attackable(Protocol):
    """What an attack needs of a replica (`workers/replica.py`)."""

    tamper: Callable[[int, slice, Codec, Tensor, Tensor], Tensor] | None
    distort: Callable[[Tensor], Tensor] | None


class Trains(Protocol):
    """What a flip of labels needs of an inner loop (`workers/inner_loop.py`)."""

    loss_fn: Callable[[nn.Module, Any], Tensor]


def begin_attack(
    replica: Attackable, kind: str, *, seed: int = 0, others: Others | None = None, num_wrong: int = 1,
    z: float | None = None,
) -> None:  # fmt: skip
    """From now on the member whose replica this is does wrong; ValueError for an attack that cannot be made so.

    `num_wrong`, `z`: of `little_is_enough`, which takes its z from the number of attackers unless it is given.
    """
    end_attack(replica)
    if kind == "lying_owner":
        replica.distort = attacks.lying_owner
        return
    if kind in WITH_OTHERS and others is None:
        alone = ", ".join(one for one in ON_CONTRIBUTIONS if one not in WITH_OTHERS)
        raise ValueError(f"attack {kind!r} needs to know what the others send; on its own a member can do {alone}")
    if kind not in ON_CONTRIBUTIONS:
        raise ValueError(f"attack {kind!r} is not known; known are {', '.join(ON_CONTRIBUTIONS)}")
    generator = torch.Generator().manual_seed(seed)

    def tamper(fragment: int, where: slice, codec: Codec, values_C: Tensor, payload: Tensor) -> Tensor:
        if kind == "send_nan":
            return _nan_payload(values_C)
        honest_PC = others(fragment, where) if others is not None else [values_C]
        if not honest_PC:
            return payload
        honest_PC = [known_C.to(values_C.device) for known_C in honest_PC]
        return codec.encode(_wrong(kind, values_C, honest_PC, num_wrong, z, generator)).cpu()

    replica.tamper = tamper


def end_attack(replica: Attackable) -> None:
    """From now on the member is honest."""
    replica.tamper = replica.distort = None


def begin_label_flip(inner: Trains) -> Callable[[], None]:
    """From now on it trains, honestly, on wrong targets; returns what ends that. For models that return logits."""
    honest = inner.loss_fn

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        logits = model(batch[:, :-1])
        targets = attacks.label_flip(batch[:, 1:], logits.shape[-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def end() -> None:
        inner.loss_fn = honest

    inner.loss_fn = loss_fn
    return end


def _wrong(
    kind: str,
    values_C: Tensor,
    honest_PC: Sequence[Tensor],
    num_wrong: int,
    z: float | None,
    generator: torch.Generator,
) -> Tensor:
    match kind:
        case "sign_flip":
            return attacks.sign_flip(values_C)
        case "scale":
            return attacks.scale(values_C)
        case "noise":
            return attacks.noise(values_C.cpu(), generator).to(values_C.device)
        case "inner_product":
            return attacks.inner_product(honest_PC)
        case "little_is_enough":
            # One other alone has no spread, whatever z.
            return attacks.little_is_enough(honest_PC, num_wrong, 0.0 if len(honest_PC) == 1 else z)
        case _:
            return attacks.copy_cat(honest_PC)


def _nan_payload(values_C: Tensor) -> Tensor:
    """A lossless payload with one value that is not a number, which no codec of ours would write."""
    payload = Fp32().encode(torch.zeros_like(values_C, device="cpu")).cpu()
    payload[HEADER_BYTES : HEADER_BYTES + 4] = attacks.nan(torch.zeros(1)).view(torch.uint8)
    return payload
