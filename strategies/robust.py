"""Robust rules by scalars: what is decided from lengths and distances of contributions, before a value is added up.

Owners reduce parts of vectors; a rule about whole vectors needs their norms and distances, which are sums over parts.
Whoever has these scalars turns a rule into a `Recipe`: weights, and what is done coordinate by coordinate afterwards.
Multi-Krum, nearest-neighbour mixing, buckets and CenteredClip are all *affine* in the contributions, with weights that
depend on distances alone, so that nothing but scalars has to travel. No torch here: the controller decides with this.

Sources: multi-Krum, Blanchard et al. 2017 with its n - f - 2 neighbours; nearest-neighbour mixing, Allouah et al. 2023;
CenteredClip and bucketing, Karimireddy et al. 2021 and 2022 (arXiv 2012.10333, 2006.09365). What differs: the centre of
CenteredClip is the coordinate median of the same exchange, or with history the mean of the results before that the
outer momentum keeps (as published: the last one); its radius is the median distance from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from statistics import median
from typing import Literal

from strategies.errors import SettingError

Squares = list[list[float]]
"""Squared distances between contributions, `[i][j]`; those of parts of a vector add up to those of the whole."""

Rule = Literal["mean", "clip", "median", "trimmed", "krum", "centered_clip", "nnm"]
Finish = Literal["sum", "median", "trimmed", "measure"]

RULE_MINIMA = {"trimmed_mean": (2, 1), "multi_krum": (2, 3), "nearest_mixing": (2, 1), "centered_clip": (2, 1)}
"""Least number of contributions with f wrong ones: `a f + b`."""

FUNCTION_OF = {"trimmed": "trimmed_mean", "krum": "multi_krum", "nnm": "nearest_mixing", "median": "trimmed_mean"}
"""Rule of a run -> whose minimum it has; `clip` and `centered_clip` bear what their radius bears."""

BY_DISTANCES = ("krum", "centered_clip", "nnm")
"""Rules that need the distances between contributions."""

CLIP_EPS = 1e-6
CLIP_ITERATIONS = 3
Row = tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What an owner does with the pieces of its part.

    rows      each the weights of one mixture of the contributions, in roster order
    finish    "sum": the one mixture that there is; "median", "trimmed": of the mixtures coordinate by coordinate;
              "measure": squared distances between the mixtures
    trim      "trimmed": how many of the lowest and of the highest values are left out
    total     "median", "trimmed": by what the outcome is multiplied: a mean stands where a weighted sum would
    center    "sum": weight of the centre, the coordinate median of `scaled`; "measure": not 0 if it is measured too
    scaled    "sum" with a centre: the factor of each contribution before the median
    history   the centre is what the owner keeps of earlier results, as of the base of the exchange
    """

    rows: tuple[Row, ...]
    finish: Finish
    trim: int = 0
    total: float = 1.0
    center: float = 0.0
    scaled: Row = ()
    history: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """Weights of the contributions, and the recipe (None: their sum with these weights). `why`: for the log."""

    weights: tuple[float, ...]
    recipe: Recipe | None
    why: str


# ---------------------------------------------------------------- how many are enough


def check_enough(rule: str, num: int, num_wrong: int) -> None:
    """Raise SettingError, with the reason, if a rule of `RULE_MINIMA` cannot bear so many wrong ones of `num`."""
    if num_wrong < 0:
        raise SettingError(f"num_wrong = {num_wrong}; it cannot be negative")
    times, plus = RULE_MINIMA[rule]
    least = times * num_wrong + plus
    if num < least:
        raise SettingError(
            f"{rule} against {num_wrong} wrong contributions needs at least {least}, there are {num}: the others could "
            f"not outvote them; lower it to {max((num - plus) // times, 0)}, or wait for more members"
        )


def bearable(rule: str, num: int, num_wrong: int) -> int:
    """How many wrong ones of `num` contributions a rule of a run bears, at most `num_wrong`; -1: not even none."""
    times, plus = RULE_MINIMA[FUNCTION_OF[rule]]
    return min(num_wrong, (num - plus) // times) if num >= plus else -1


# ---------------------------------------------------------------- lengths


def clip_factors(lengths: Sequence[float], times: float = 1.0) -> list[float]:
    """By what each contribution is multiplied so that none is longer than `times` the median of their norms."""
    if not lengths:
        return []
    limit = times * median(lengths)
    return [min(1.0, limit / (length + CLIP_EPS)) if length > limit else 1.0 for length in lengths]


def too_long(lengths: Mapping[str, float], steps: Mapping[str, int], times: float) -> dict[str, str]:
    """Who is to be refused for its length, with the reason; never half of the contributions or more.

    Longer than `times` the median of all; who covers more local steps than the median may be longer in proportion.
    That bears unequal data: with an adaptive inner optimizer the length of a round hardly depends on the gradients.
    """
    finite = [length for length in lengths.values() if math.isfinite(length)]
    if len(lengths) < 3 or 2 * len(finite) <= len(lengths):
        return {}
    middle, usual = median(finite), median(steps.values())
    out: dict[str, str] = {}
    for who, length in lengths.items():
        limit = times * middle * max(steps[who] / usual, 1.0)
        if not math.isfinite(length):
            out[who] = "its length is not finite"
        elif length > limit and middle > 0.0:
            out[who] = f"its length {length:.3g} is {length / middle:.1f} times the median of {len(finite)}"
    return out


# ---------------------------------------------------------------- distances


def krum_order(squares: Squares, num_wrong: int) -> list[int]:
    """Contributions from the most central one on: by the sum of squares to their n - f - 2 nearest others."""
    num = len(squares)
    check_enough("multi_krum", num, num_wrong)
    scores = [
        math.fsum(sorted(square for j, square in enumerate(row) if j != i)[: num - num_wrong - 2])
        for i, row in enumerate(squares)
    ]
    return sorted(range(num), key=lambda i: (scores[i], i))


def nearest(squares: Squares, num_wrong: int) -> list[list[int]]:
    """Of each contribution its n - f nearest, itself among them, by rank."""
    num = len(squares)
    check_enough("nearest_mixing", num, num_wrong)
    # Itself first, also among copies of itself at distance 0.
    rows = [sorted(range(num), key=lambda j, i=i: (squares[i][j], j != i, j)) for i in range(num)]  # type: ignore[misc]
    return [sorted(row[: num - num_wrong]) for row in rows]


def whole_squares(parts: Sequence[tuple[float, ...]]) -> Squares:
    """Squared distances of whole vectors from those of their parts, in the order `[i][j]` for j < i, row by row."""
    sums = [sum(values) for values in zip(*parts, strict=True)]
    num = next(n for n in range(2, len(sums) + 3) if n * (n - 1) // 2 == len(sums))
    squares = [[0.0] * num for _ in range(num)]
    pairs = [(i, j) for i in range(num) for j in range(i)]
    for (i, j), value in zip(pairs, sums, strict=True):
        squares[i][j] = squares[j][i] = value
    return squares


def affine_square(a: Sequence[float], b: Sequence[float], squares: Squares) -> float:
    """Squared distance of two mixtures whose weights sum to 1 each, from the distances of what they are mixed of.

    `|sum_i d_i y_i|^2 = -1/2 sum_ij d_i d_j |y_i - y_j|^2` for weights d = a - b, which sum to 0.
    """
    d = [x - y for x, y in zip(a, b, strict=True)]
    cross = math.fsum(d[i] * d[j] * squares[i][j] for i in range(len(d)) for j in range(i))
    return max(-cross, 0.0)


def mixed_squares(rows: Sequence[Sequence[float]], squares: Squares) -> Squares:
    """Squared distances between mixtures."""
    return [[affine_square(a, b, squares) for b in rows] for a in rows]


def centered_weights(squares: Squares, iterations: int = CLIP_ITERATIONS) -> tuple[list[float], float]:
    """Weights of the contributions and of the centre after CenteredClip; the centre is the last of `squares`.

    `v <- v + 1/n sum_i (x_i - v) min(1, radius / |x_i - v|)`: affine in the contributions and the centre.
    """
    num = len(squares) - 1
    v = [0.0] * num + [1.0]
    corners = [[float(i == j) for j in range(num + 1)] for i in range(num)]
    for _ in range(iterations):
        lengths = [math.sqrt(affine_square(corner, v, squares)) for corner in corners]
        radius = median(lengths)
        factors = [min(1.0, radius / length) if length > 0.0 else 1.0 for length in lengths]
        kept = 1.0 - math.fsum(factors) / num
        v = [kept * value for value in v]
        for i, factor in enumerate(factors):
            v[i] += factor / num
    return v[:num], v[num]


def buckets(num: int, size: int, *, seed: str | int) -> list[list[int]]:
    """Ranks dealt at random (by hash) to buckets of `size`, the last one perhaps smaller."""
    if size < 1:
        raise SettingError(f"buckets of {size}; at least 1")
    order = sorted(range(num), key=lambda i: (blake2b(f"{seed}/{i}".encode(), digest_size=16).digest(), i))
    return [sorted(order[start : start + size]) for start in range(0, num, size)]


# ---------------------------------------------------------------- from a rule to a recipe


def to_measure(
    rule: Rule, lengths: Sequence[float], *, history: bool = False, clip_times: float = 1.0
) -> Recipe | None:
    """What owners measure before a rule can be decided; None: lengths are enough."""
    if rule not in BY_DISTANCES or len(lengths) < 3:
        return None
    factors = clip_factors(lengths, clip_times)
    rows = tuple(_corner(i, len(factors), k) for i, k in enumerate(factors))
    return Recipe(rows=rows, finish="measure", center=float(rule == "centered_clip"), history=history)


def decide(
    rule: Rule,
    coefficients: Sequence[float],
    lengths: Sequence[float],
    squares: Squares | None = None,
    *,
    num_wrong: int,
    bucket: int = 1,
    seed: str | int = 0,
    history: bool = False,
    clip_times: float = 1.0,
) -> Decision:
    """What is done with contributions that have these coefficients and lengths.

    Args:
        lengths: not looked at for the mean.
        squares: distances between the contributions, each clipped as here, where `to_measure` asked.
        num_wrong: wrong ones that the rule is to bear; fewer where too few contributions are there, which `why` says.
        bucket: contributions that are averaged at random, by `seed`, before the rule sees them.
        history: what was measured from, where the rule has a centre, is what owners keep of earlier results.
        clip_times: every contribution is shortened to at most so many times the median length before the rule.
    """
    num, total = len(coefficients), math.fsum(coefficients)
    if rule == "mean" or num < 3:
        return Decision(weights=tuple(coefficients), recipe=None, why="the sum")
    factors = clip_factors(lengths, clip_times)
    num_clipped = sum(k < 1.0 for k in factors)
    limit = "the median length" if clip_times == 1.0 else f"{clip_times:g} times the median length"
    why = f"{num_clipped} of {num} clipped to {limit}"
    if rule == "clip":
        clipped = [c * k for c, k in zip(coefficients, factors, strict=True)]
        # What is taken off some is given back to all: else unequal data would make every outer step a shorter one.
        given = total / math.fsum(clipped)
        return Decision(weights=tuple(given * weight for weight in clipped), recipe=None, why=why)
    groups = buckets(num, bucket, seed=seed)
    points = [[float(i in group) / len(group) for i in range(num)] for group in groups]
    borne = bearable(rule, len(points), num_wrong) if rule in FUNCTION_OF else num_wrong
    if borne < num_wrong:
        why += f"; {len(points)} contributions bear {max(borne, 0)} wrong ones, not {num_wrong}"
    if rule == "centered_clip":
        assert squares is not None, "CenteredClip without distances"
        parts, center = centered_weights(squares)
        weights = tuple(total * a * k for a, k in zip(parts, factors, strict=True))
        scaled = () if history else tuple(factors)
        recipe = Recipe(rows=(weights,), finish="sum", center=total * center, scaled=scaled, history=history)
        return Decision(weights=weights, recipe=recipe, why=why)
    if rule == "krum" and borne >= 0:
        assert squares is not None, "Krum without distances"
        kept = sorted(krum_order(mixed_squares(points, squares), borne)[: len(points) - borne])
        chosen = [math.fsum(points[r][i] for r in kept) / len(kept) for i in range(num)]
        weights = tuple(total * a * k for a, k in zip(chosen, factors, strict=True))
        return Decision(weights=weights, recipe=None, why=f"{why}; {len(kept)} of {len(points)} most central ones")
    if rule == "nnm" and borne >= 0:
        assert squares is not None, "nearest-neighbour mixing without distances"
        near = nearest(mixed_squares(points, squares), borne)
        points = [[math.fsum(points[r][i] for r in row) / len(row) for i in range(num)] for row in near]
    rows = tuple(tuple(a * k for a, k in zip(row, factors, strict=True)) for row in points)
    finish: Finish = "median" if rule in ("median", "krum") else "trimmed"
    recipe = Recipe(rows=rows, finish=finish, trim=max(borne, 0) if finish == "trimmed" else 0, total=total)
    return Decision(weights=tuple(coefficients), recipe=recipe, why=why)


def _corner(i: int, num: int, value: float) -> Row:
    return tuple(value if j == i else 0.0 for j in range(num))
