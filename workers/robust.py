"""What an owner does with the pieces of its part under a `Recipe`: mixtures of them, their median or trimmed mean, or
the distances between them. The order of operations is fixed, so that every owner of a part gets the same bits.

Suffixes: P contributions, C values of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from strategies.aggregate import accumulate, coordinate_median, pairwise_squares, trimmed_mean
from strategies.elementwise import scalar_like
from strategies.robust import Recipe, Row


def mixture(pieces_P: Sequence[Tensor], weights: Row) -> Tensor:
    """`sum_i w_i x_i` in roster order; contributions of weight 0 are left out."""
    acc_C: Tensor | None = None
    for piece_C, weight in zip(pieces_P, weights, strict=True):
        if weight:
            acc_C = accumulate(acc_C, piece_C, weight)
    return torch.zeros_like(pieces_P[0]) if acc_C is None else acc_C


def mix_pieces(pieces_P: Sequence[Tensor], recipe: Recipe, history_C: Tensor | None = None) -> Tensor:
    """The result of a chunk, before it is encoded. `history_C`: the centre, where the recipe wants that of history."""
    assert recipe.finish != "measure", "nothing is added up while distances are measured"
    mixed = [mixture(pieces_P, row) for row in recipe.rows]
    if recipe.finish == "sum":
        (result_C,) = mixed
        if not recipe.center:
            return result_C
        center_C = _kept(history_C) if recipe.history else _center(pieces_P, recipe.scaled)
        return accumulate(result_C, center_C, recipe.center)
    outcome_C = coordinate_median(mixed) if recipe.finish == "median" else trimmed_mean(mixed, recipe.trim)
    return torch.mul(outcome_C, scalar_like(recipe.total, outcome_C))


def measure_pieces(pieces_P: Sequence[Tensor], recipe: Recipe, history_C: Tensor | None = None) -> tuple[float, ...]:
    """Squared distances of the mixtures (and of the centre, the last) in this chunk: `[i][j]` for j < i, row by row."""
    points = [mixture(pieces_P, row) for row in recipe.rows]
    if recipe.center:
        points.append(_kept(history_C) if recipe.history else coordinate_median(points))
    squares = pairwise_squares(points)
    return tuple(squares[i][j] for i in range(len(points)) for j in range(i))


def _kept(history_C: Tensor | None) -> Tensor:
    assert history_C is not None, "a centre of history that nobody has"
    return history_C


def _center(pieces_P: Sequence[Tensor], factors: Row) -> Tensor:
    return coordinate_median([torch.mul(x, scalar_like(k, x)) for x, k in zip(pieces_P, factors, strict=True)])
