"""How a member's live parameters move when its anchor does.

Source: the exchange protocol, section 1.5; the weight `alpha` of the local point as in Streaming DiLoCo
(arXiv 2501.18512), equation 3, whose merge at the due step is kappa = alpha. Written for one chunk or a whole fragment
(suffix N), fp32.

Words: A the anchor before, A' after; D = A - theta as it was when the contribution was cut (its displacement);
p = (A - theta) - D the progress made since then (in the direction of descent), exactly 0 if no step was made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strategies.elementwise import new_scratch, passes, scalar_like


def advance_included(
    theta_N: Tensor,
    anchor_old_N: Tensor,
    anchor_new_N: Tensor,
    displacement_N: Tensor | None,
    *,
    alpha: float,
    kappa: float,
    due_N: Tensor | None = None,
) -> Tensor:
    """Move `theta_N` in place after a commit that included this member's contribution; returns it.

    `theta <- A' - alpha (A' - (A - D)) - kappa p`. `displacement_N` None means that no step was made since the
    contribution was cut: p = 0 and A - D = theta. Exact: without progress, alpha = 0 copies A' and alpha = 1
    leaves theta untouched; so does alpha = kappa = 1 with progress.

    `due_N`: A - theta as it was at the step at which the result was due, if that is past. `kappa` weighs the progress
    made until then; what was made later is kept whole.
    """
    _check(alpha, kappa)
    if due_N is not None:
        point_N = torch.sub(anchor_old_N, due_N)
        later_N = torch.sub(anchor_old_N, theta_N).sub_(due_N)
        advance_included(point_N, anchor_old_N, anchor_new_N, displacement_N, alpha=alpha, kappa=kappa)
        return torch.sub(point_N, later_N, out=theta_N)
    if alpha == 1.0 and (displacement_N is None or kappa == 1.0):
        # A' - (A' - (A - D)) - p = theta; written out, it would be theta up to rounding only.
        return theta_N
    weight, kept = scalar_like(alpha, theta_N), scalar_like(kappa, theta_N)
    scratch, scratch2 = new_scratch(theta_N), new_scratch(theta_N)
    for part in passes(theta_N):
        theta, old, new = theta_N[part], anchor_old_N[part], anchor_new_N[part]
        local, progress = scratch[: theta.numel()], scratch2[: theta.numel()]
        if displacement_N is None:
            local.copy_(theta)
        else:
            torch.sub(old, displacement_N[part], out=local)
            torch.sub(old, theta, out=progress).sub_(displacement_N[part]).mul_(kept)
        theta.copy_(new)
        if alpha > 0.0:
            theta.sub_(torch.sub(new, local, out=local).mul_(weight))
        if displacement_N is not None:
            theta.sub_(progress)
    return theta_N


def rebase(theta_N: Tensor, anchor_old_N: Tensor, anchor_new_N: Tensor) -> Tensor:
    """Move `theta_N` in place after a commit without this member's contribution; returns it.

    `theta <- theta + (A' - A)`: a translation, so that the displacement A - theta is kept and offered next time.
    Never a merge: A' - theta would undo the others' step.
    """
    scratch = new_scratch(theta_N)
    for part in passes(theta_N):
        theta = theta_N[part]
        theta.add_(torch.sub(anchor_new_N[part], anchor_old_N[part], out=scratch[: theta.numel()]))
    return theta_N


def carry_over(theta_N: Tensor, anchor_old_N: Tensor, anchor_new_N: Tensor) -> Tensor:
    """Move `theta_N` in place to the next anchor with its displacement; returns it.

    `theta <- A' - (A - theta)`: the translation of `rebase`, rounded so that theta = A becomes A' to the bit.
    """
    return torch.sub(anchor_new_N, torch.sub(anchor_old_N, theta_N), out=theta_N)


def _check(alpha: float, kappa: float) -> None:
    for name, value in (("alpha", alpha), ("kappa", kappa)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"merge {name} = {value}; it must lie between 0 (anchor) and 1 (local)")
