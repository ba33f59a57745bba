from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from strategies.codecs.base import Codec
from strategies.codecs.e3m0 import E3m0
from strategies.codecs.feedback import encode_with_feedback
from strategies.codecs.fp4 import Fp4
from strategies.codecs.int4 import Int4, Int4Stochastic
from strategies.codecs.int8 import Int8, Int8Stochastic
from strategies.codecs.none import Bf16, Fp32
from strategies.codecs.sign import Sign
from strategies.codecs.stochastic import keyed
from strategies.codecs.topk import TopK

N = 5000
# With the largest residual that values of 0.01 leave behind (standard deviation).
LOSSY: list[tuple[Codec, float]] = [
    (Int8(32), 0.01),
    (Int8(), 0.01),
    (Bf16(), 0.01),
    (Int8Stochastic(), 0.01),
    (Int4(), 0.02),
    (Int4Stochastic(), 0.05),
    (Fp4(), 0.02),
    (E3m0(), 0.05),
    (Sign(), 0.5),
    (TopK(), 1.0),
]


def gaussian(seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=N, scale=1e-2).astype(np.float32))


@pytest.mark.parametrize(("codec", "bound"), LOSSY, ids=[f"{codec.name}-{codec.block}" for codec, _ in LOSSY])
@pytest.mark.parametrize("drop", [frozenset(), frozenset({3, 4, 11})], ids=["all-included", "some-left-out"])
def test_sum_of_what_was_included_plus_residual_is_the_sum_of_the_displacements(
    codec: Codec, bound: float, drop: frozenset[int]
) -> None:
    # F1, also after rounds in which the contribution was left out: the residual is retained, the displacement grows.
    sent, displacements = torch.zeros(N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    residual, displacement = None, torch.zeros(N)
    for number in range(40):
        displacement = displacement + gaussian(number)
        kept = None if residual is None else residual.clone()
        payload, next_residual = encode_with_feedback(keyed(codec, number), displacement, residual)
        assert (residual is None) == (kept is None)
        assert residual is None or (kept is not None and torch.equal(residual, kept)), "the residual was touched"
        if number in drop:
            continue
        sent += codec.decode(payload, num_values=N).double()
        displacements += displacement.double()
        residual, displacement = next_residual, torch.zeros(N)
    assert residual is not None
    torch.testing.assert_close(sent + residual.double(), displacements, rtol=1e-6, atol=1e-6)
    assert float(residual.abs().max()) < bound, "the residual stays bounded"


def test_without_feedback_small_values_are_lost_and_with_it_they_arrive() -> None:
    displacement = torch.full((N,), 1e-4)
    displacement[0] = 1.0  # one outlier makes the scale coarser than everything else
    codec = Int8(8192)
    plain = sum(codec.decode(codec.encode(displacement), num_values=N)[1:].sum() for _ in range(100))
    residual, arrived = None, torch.zeros(N)
    for _ in range(100):
        payload, residual = encode_with_feedback(codec, displacement, residual)
        arrived += codec.decode(payload, num_values=N)
    assert float(plain) == 0.0
    assert float(arrived[1:].mean()) == pytest.approx(0.01, rel=0.5)


@pytest.mark.parametrize("codec", [Int8(), Int4(), Fp4(), E3m0(), Sign(), TopK()], ids=lambda c: c.name)
def test_decay(codec: Codec) -> None:
    # F2: EMA(sent) + e = EMA(displacements).
    beta, residual = 0.95, None
    sent, displacements = torch.zeros(N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    for number in range(40):
        payload, residual = encode_with_feedback(codec, gaussian(number), residual, decay=beta)
        sent = beta * sent + codec.decode(payload, num_values=N).double()
        displacements = beta * displacements + gaussian(number).double()
    assert residual is not None
    torch.testing.assert_close(sent + residual.double(), displacements, rtol=1e-6, atol=1e-6)


def test_a_codec_that_loses_nothing_leaves_no_residual() -> None:
    _, residual = encode_with_feedback(Fp32(), gaussian(0), None)
    assert torch.equal(residual, torch.zeros(N))
