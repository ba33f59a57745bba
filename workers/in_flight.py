"""The tensors of one fragment of a member, and where its displacement is while a contribution is under way.

Where training simply goes on (`in_flight` = "keep"), the displacement is `anchor - live`. With "restart" and "eager"
what is offered is set aside, and live parameters start again at the member's own anchor: the common one, plus the
correction of `strategies/eager.py`. The displacement is then in two places, and nothing is lost or there twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from strategies.eager import Correction, correct
from strategies.fragments import FragmentSpec, gather, scatter
from strategies.outer import OuterStep
from strategies.strategy import Strategy


@dataclass(kw_only=True, slots=True)
class Part:
    """Tensors of one fragment."""

    anchor: Tensor
    states: tuple[Tensor, ...]
    n: int = -1
    chain: str = ""
    residual: Tensor | None = None
    next_residual: Tensor | None = None
    displacement: Tensor | None = None
    sent: bool = False
    gradients: Tensor | None = None
    due: Tensor | None = None  # displacement at the step at which the result was due, once it is past
    aside: Tensor | None = None  # what is under way and no part of the live parameters any more
    correction: Correction | None = None


def own_anchor(part: Part, anchor_C: Tensor, where: slice) -> Tensor:
    """Where a chunk's live parameters start from: the anchor, plus this member's correction."""
    return anchor_C if part.correction is None else anchor_C + part.correction.ahead_N[where]


def displacement_of(part: Part, spec: FragmentSpec, tensors: Mapping[str, Tensor], where: slice) -> Tensor:
    """Everything that local training moved in a chunk and that no commit has."""
    moved_C = own_anchor(part, part.anchor[where], where) - gather(spec, tensors, values=where)
    return moved_C if part.aside is None else moved_C.add_(part.aside[where])


def lands_on_anchor(part: Part, strategy: Strategy, *, included: bool) -> bool:
    """Whether live parameters become the next anchor, whatever they are now: then nobody needs the last one.

    So it is with gradients, and where nobody has trained on since the contribution was cut (`advance_included`).
    """
    if strategy.contribution == "gradient":
        return True
    waited = part.displacement is None and part.due is None
    return included and waited and strategy.in_flight == "keep" and strategy.merge_alpha == 0.0


def set_aside(
    part: Part, spec: FragmentSpec, tensors: Mapping[str, Tensor], *, eager: OuterStep | None, share: float
) -> None:
    """What was just offered is under way: live parameters start again at this member's own anchor.

    `eager`: the outer step by which that anchor takes the member's own contribution, times `share`, before the commit.
    """
    whole = slice(0, spec.numel)
    part.aside = displacement_of(part, spec, tensors, whole)
    if eager is not None:
        if part.correction is None:
            part.correction = Correction.zero(part.anchor, eager.num_states)
        correct(part.correction, part.aside, share, eager)
    scatter(spec, own_anchor(part, part.anchor, whole), tensors)
