"""A member that sends wrong updates: what is put into its replica in the place of what it would send (`Replica.tamper`)
or reduce for others (`Replica.distort`).

`begin_attack(replica, kind)` makes a member an attacker and `end_attack` an honest one again. An attack on its
contributions works on what it was going to send; those that need to know what the others send (`little_is_enough`,
`copy_cat`) take it from `others`, which only a bench in one process can give. What the attacker announces (digest, sum
of squares) is true of what it sends: a lie about that would be refused at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from faults import attacks
from faults.plan import ATTACKS
from strategies.codecs.base import HEADER_BYTES, Codec
from strategies.codecs.none import Fp32

WITH_OTHERS = ("little_is_enough", "copy_cat")
Others = Callable[[int, slice], Sequence[Tensor]]
"""Fragment and part -> what the honest members would send now."""


class Attackable(Protocol):
    """What an attack needs of a replica (`workers/replica.py`)."""

    tamper: Callable[[int, slice, Codec, Tensor, Tensor], Tensor] | None
    distort: Callable[[Tensor], Tensor] | None


def begin_attack(
    replica: Attackable, kind: str, *, seed: int = 0, others: Others | None = None, num_wrong: int = 1
) -> None:
    """From now on the member whose replica this is does wrong; ValueError for an attack that cannot be made so."""
    end_attack(replica)
    if kind == "lying_owner":
        replica.distort = attacks.lying_owner
        return
    if kind in WITH_OTHERS and others is None:
        raise ValueError(f"attack {kind!r} needs to know what the others send; on its own a member can do {ATTACKS}")
    if kind not in (*ATTACKS, *WITH_OTHERS):
        raise ValueError(f"attack {kind!r} is not known; known are {', '.join((*ATTACKS, *WITH_OTHERS))}")
    generator = torch.Generator().manual_seed(seed)

    def tamper(fragment: int, where: slice, codec: Codec, values_C: Tensor, payload: Tensor) -> Tensor:
        if kind == "send_nan":
            return _nan_payload(values_C)
        honest_PC = others(fragment, where) if others is not None else [values_C]
        return codec.encode(_wrong(kind, values_C, honest_PC, num_wrong, generator)).cpu()

    replica.tamper = tamper


def end_attack(replica: Attackable) -> None:
    """From now on the member is honest."""
    replica.tamper = replica.distort = None


def _wrong(
    kind: str, values_C: Tensor, honest_PC: Sequence[Tensor], num_wrong: int, generator: torch.Generator
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
            return attacks.little_is_enough(honest_PC, num_wrong)
        case _:
            return attacks.copy_cat(honest_PC)


def _nan_payload(values_C: Tensor) -> Tensor:
    """A lossless payload with one value that is not a number, which no codec of ours would write."""
    payload = Fp32().encode(torch.zeros_like(values_C, device="cpu")).cpu()
    payload[HEADER_BYTES : HEADER_BYTES + 4] = attacks.nan(torch.zeros(1)).view(torch.uint8)
    return payload
