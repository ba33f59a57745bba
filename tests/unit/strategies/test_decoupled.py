"""The radial-directional average against a plain reference, and its invariants (test catalogue R1, R2)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from strategies.aggregate import weighted_sum
from strategies.codecs.base import Codec
from strategies.codecs.int8 import Int8
from strategies.codecs.none import Fp32
from strategies.decoupled import RadialSum, direction_weight, radial_average
from strategies.norm import sum_of_squares

N = 40_000
SHARES = [0.5, 0.3, 0.2]
WEIGHTS = [4.0, 1.0, 2.0]


def vectors(num: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.rand(N, generator=generator) - 0.4) * (k + 1) for k in range(num)]


def reference(values: list[Tensor], shares: list[float], weights: list[float]) -> Tensor:
    wide = [v.double() for v in values]
    direction = sum(w * v / torch.linalg.vector_norm(v) for w, v in zip(weights, wide, strict=True))
    assert isinstance(direction, Tensor)
    length = sum(c * torch.linalg.vector_norm(v) for c, v in zip(shares, wide, strict=True))
    return length * direction / torch.linalg.vector_norm(direction)


def norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values.double()))


def through(codec: Codec, values: list[Tensor], shares: list[float], weights: list[float]) -> Tensor:
    total = RadialSum(N)
    for v, c, w in zip(values, shares, weights, strict=True):
        payload = codec.encode(v)
        announced = float(sum_of_squares(codec.decode(payload, num_values=N)))
        assert float(total.add(codec, payload, coefficient=c, weight=w, sumsq=announced)) == announced
    return total.result()


def test_it_is_the_reference() -> None:
    mine = radial_average(vectors(), SHARES, WEIGHTS)
    torch.testing.assert_close(mine.double(), reference(vectors(), SHARES, WEIGHTS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("codec", [Fp32(), Int8(4096)])
def test_pieces_give_what_their_values_give(codec: Codec) -> None:
    decoded = [codec.decode(codec.encode(v), num_values=N) for v in vectors()]
    assert torch.equal(through(codec, vectors(), SHARES, WEIGHTS), radial_average(decoded, SHARES, WEIGHTS))


def test_its_length_is_the_mean_length_and_no_less_than_that_of_the_mean() -> None:
    average = radial_average(vectors(), SHARES, SHARES)
    assert norm(average) == pytest.approx(sum(c * norm(v) for c, v in zip(SHARES, vectors(), strict=True)), rel=1e-5)
    assert norm(weighted_sum(vectors(), SHARES)) < norm(average)


def test_the_scale_of_weights_is_of_no_meaning_that_of_coefficients_is() -> None:
    once = radial_average(vectors(), SHARES, WEIGHTS)
    thrice = radial_average(vectors(), SHARES, [3 * w for w in WEIGHTS])
    torch.testing.assert_close(thrice, once, rtol=1e-5, atol=1e-7)
    half = radial_average(vectors(), [c / 2 for c in SHARES], WEIGHTS)
    torch.testing.assert_close(half, once / 2, rtol=1e-5, atol=1e-7)


def test_one_contribution_is_itself_and_nothing_is_nothing() -> None:
    (only,) = vectors(1)
    torch.testing.assert_close(radial_average([only], [1.0], [7.0]), only, rtol=1e-5, atol=1e-7)
    zero = torch.zeros(N)
    torch.testing.assert_close(radial_average([only, zero], [0.5, 0.5], [1.0, 1.0]), only / 2, rtol=1e-5, atol=1e-7)
    assert torch.equal(radial_average([zero, zero], [0.5, 0.5], [1.0, 1.0]), zero)
    assert torch.equal(radial_average([only, -only], [0.5, 0.5], [1.0, 1.0]), zero), "opposite directions: none"


def test_equal_contributions_give_their_mean() -> None:
    (only,) = vectors(1)
    torch.testing.assert_close(radial_average([only] * 3, SHARES, WEIGHTS), only, rtol=1e-5, atol=1e-7)


def test_directions_have_the_published_weight() -> None:
    """tokens * tokens / steps, from the coefficient (tokens a step over those of all) and the samples."""
    tokens_a_step, steps, seq_len = [32, 64], [10, 3], 8
    published = [(a * h) * (a * h) / h for a, h in zip(tokens_a_step, steps, strict=True)]
    mine = [
        direction_weight(a / sum(tokens_a_step), a * h // seq_len) for a, h in zip(tokens_a_step, steps, strict=True)
    ]
    assert mine[0] / mine[1] == pytest.approx(published[0] / published[1])


@pytest.mark.parametrize("sumsq", [float("nan"), float("inf"), -1.0])
def test_an_impossible_sum_of_squares_is_refused(sumsq: float) -> None:
    with pytest.raises(ValueError, match="sum of squares"):
        RadialSum(N).add(Fp32(), Fp32().encode(vectors()[0]), coefficient=1.0, weight=1.0, sumsq=sumsq)
