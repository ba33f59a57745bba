"""The compiled sums have the bits of the torch form, whatever the length and however it is cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from strategies.aggregate import decode_accumulate
from strategies.codecs import numba_sums
from strategies.codecs.backends import Backend
from strategies.codecs.int8 import Int8
from strategies.codecs.none import Bf16, Fp32
from strategies.norm import ROW_VALUES, SquareSum, sum_of_squares

LENGTHS = [1, 2, 3, 1000, ROW_VALUES - 1, ROW_VALUES, ROW_VALUES + 1, 3 * ROW_VALUES + 777, 8 * ROW_VALUES]


def spread(num_values: int) -> Tensor:
    """Values of very different size, so that another order of additions has other bits."""
    generator = torch.Generator().manual_seed(num_values)
    return torch.randn(num_values, generator=generator) * torch.exp(torch.randn(num_values, generator=generator) * 6)


def test_both_forms_agree_on_what_a_row_is() -> None:
    assert numba_sums.ROW_VALUES == ROW_VALUES


@pytest.mark.parametrize("num_values", LENGTHS)
def test_the_sum_of_squares_has_the_same_bits(num_values: int) -> None:
    values = spread(num_values)
    expected = sum_of_squares(values)
    assert sum_of_squares(values, backend="numba").item() == expected.item()
    cut = SquareSum("numba")
    for start in range(0, num_values, 2 * ROW_VALUES):
        cut.add(values[start : start + 2 * ROW_VALUES])
    assert cut.total().item() == expected.item()


def test_another_order_would_be_seen() -> None:
    values = spread(ROW_VALUES)
    assert float((values.double() ** 2).cumsum(0)[-1]) != sum_of_squares(values).item()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_the_sum(value: float) -> None:
    values = spread(ROW_VALUES + 5)
    values[7] = value
    assert not torch.isfinite(sum_of_squares(values, backend="numba"))


@pytest.mark.parametrize("num_values", LENGTHS)
@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("first", [True, False])
def test_the_weighted_sum_has_the_same_bits(num_values: int, codec: str, first: bool) -> None:
    def build(backend: Backend) -> Fp32 | Bf16 | Int8:
        return {"fp32": Fp32, "bf16": Bf16}[codec](backend) if codec != "int8" else Int8(4096, backend)

    payload = build("torch").encode(spread(num_values))
    total = spread(num_values).flip(0)
    sums = [
        decode_accumulate(build(backend), payload, 0.3, None if first else total.clone(), num_values=num_values)
        for backend in ("torch", "numba")
    ]  # type: ignore[list-item]
    assert torch.equal(sums[0].acc_N.view(torch.int32), sums[1].acc_N.view(torch.int32))
    assert sums[0].sum_of_squares.item() == sums[1].sum_of_squares.item()
