"""Which outer steps cannot be stable, from their settings alone (no torch: asked when a configuration is read).

Model: near an optimum a round of local training covers a share h of the way to it, so that the contribution is
`g = h (anchor - optimum)`, 0 < h <= 1. The outer step is then a linear recursion whose polynomial

    (z - 1) (z - mu) z^d + lr h q(z),    q = z - mu (sgd: mu = 0), z (heavy ball), (1 + mu) z - mu (Nesterov)

must have all roots inside the unit circle; d is the delay of the contribution in rounds. Without delay it must hold
for h = 1: long rounds do come to an optimum. With a delay of one round (`eager`, `delayed`) for h = 1/2: h = 1 would
forbid the 0.4 / 0.9 that is published for it and works with short rounds. Bounds without delay in closed form: sgd 2,
heavy ball 2 (1 + mu), Nesterov 2 (1 + mu) / (1 + 2 mu).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Outer = Literal["nesterov", "average", "sgd", "heavy-ball", "adam"]

DELAYED_SHARE = 0.5
ADAM_ALWAYS = 0.01
"""An outer learning rate of Adam that is never refused: no value moves further than this in a round."""


def largest_lr(outer: Outer, momentum: float, *, delay: int = 0, eps: float = 0.0) -> float:
    """Return the learning rate at which an outer step ceases to be stable; infinite for `average`, which has none.

    Adam is bounded where its epsilon rules: there it is a heavy ball with averaged gradients and `lr / eps`.
    """
    if outer == "average":
        return float("inf")
    if outer == "adam":
        return max(ADAM_ALWAYS, eps * largest_lr("heavy-ball", momentum, delay=delay) / (1.0 - momentum))
    share = 1.0 if delay == 0 else DELAYED_SHARE
    low, high = 0.0, 8.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _stable(outer, momentum, middle * share, delay) else (low, middle)
    return low


def largest_gamma(alpha: float, group_size: int = 2) -> float:
    """Where NoLoCo's consensus ceases to be mean-square stable: `2 (1 - a^2) / (1 - a + 2 a / n)`; pairs: 2 (1 - a^2).

    Derived for replicas that are independent and do not drift; a larger group is stable further out.
    """
    return 2.0 * (1.0 - alpha * alpha) / (1.0 - alpha + 2.0 * alpha / group_size)


def largest_lr_of_pushes(momentum: float, *, every: int, spread: float = 0.0) -> float:
    """Return the learning rate at which delayed Nesterov ceases to be stable, the lesser of two cases.

    As many members as `every` push in turn, each `1 / 2 / every` of the way from where the anchor was when it began:
    since then all others have pushed. Or all members are in every version, as one with h = 1. Found by running the
    recursion, within 1 %.
    """
    cases = [(every, DELAYED_SHARE), (1, 1.0)] if every > 1 else [(1, 1.0)]
    low, high = 0.0, 8.0
    for _ in range(10):
        middle = (low + high) / 2
        settles = all(_pushes_settle(middle, momentum, share, members, every, spread) for members, share in cases)
        low, high = (middle, high) if settles else (low, middle)
    return low


def _pushes_settle(lr: float, momentum: float, share: float, members: int, every: int, spread: float) -> bool:
    """Whether the anchor's distance from the optimum shrinks over a long run of pushes."""
    anchor, buffer, total = 1.0, 0.0, 0.0
    began = [anchor] * members
    largest = [0.0, 0.0]
    windows = 40
    for version in range(2 * windows * every):
        g = share / members * began[version % members]
        total += g
        if (version + 1) % every == 0:
            buffer, total = momentum * buffer + total, 0.0
            weight = 1.0 - spread * (every - 1)
        else:
            weight = spread
        anchor -= lr * (weight * momentum * buffer + g)
        began[version % members] = anchor
        half = version // (windows * every)
        largest[half] = max(largest[half], abs(anchor))
        if abs(anchor) > 1e6:
            return False
    return largest[1] < largest[0]


def nearest_lr(bound: float) -> float:
    """A learning rate that can be written down, just below a bound: two significant digits, rounded down."""
    mantissa, _, exponent = f"{bound * 0.999:.6e}".partition("e")
    return float(f"{math.floor(float(mantissa) * 10) / 10:.1f}e{exponent}")


def _stable(outer: Outer, momentum: float, gain: float, delay: int) -> bool:
    mu = 0.0 if outer == "sgd" else momentum
    q = {"sgd": (1.0, -mu), "heavy-ball": (1.0, 0.0), "nesterov": (1.0 + mu, -mu)}[outer]
    polynomial = [1.0, -1.0 - mu, mu, *[0.0] * delay]
    polynomial[-2] += gain * q[0]
    polynomial[-1] += gain * q[1]
    return _inside_unit_circle(polynomial)


def _inside_unit_circle(coefficients: Sequence[float]) -> bool:
    """Schur-Cohn: whether all roots of a polynomial (highest power first) lie inside the unit circle."""
    a = list(coefficients)
    while len(a) > 1:
        if a[-1] == 0.0:
            a.pop()
        elif abs(a[-1]) >= abs(a[0]):
            return False
        else:
            ratio = a[-1] / a[0]
            a = [x - ratio * y for x, y in zip(a[:-1], reversed(a[1:]), strict=True)]
    return True
