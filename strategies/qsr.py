"""Quadratic synchronisation rule: longer rounds as the learning rate falls (no torch).

Source: "A Quadratic Synchronization Rule for Distributed Deep Learning" (arXiv 2310.14423), section 2:
`H = max(H_base, floor((alpha / eta)^2))`, taken at the start of a round. In the warm-up the H of the peak is used: by
the small rate of its first steps H would be huge. What differs: an upper bound, lest a rate near zero make one round
of the rest of the run. The rate is the *scheduled* one, a function of progress alone, so that all members agree.
"""

from __future__ import annotations

import math


def quadratic_steps(lr: float, *, alpha: float, least: int, most: int) -> int:
    """Return the local steps of a round that starts at learning rate `lr` (0: `most`). Raises ValueError for lr < 0."""
    if lr < 0:
        raise ValueError(f"lr = {lr}; it must be at least 0")
    ratio = alpha / lr if lr > 0 else math.inf
    return max(least, most if ratio * ratio >= most else int(ratio * ratio))
