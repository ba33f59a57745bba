"""What each codec of 4 bits and less, and stochastic rounding, promise beyond what all codecs do."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strategies.codecs.base import HEADER_BYTES, Codec, NonFiniteError, PayloadError
from strategies.codecs.e3m0 import E3m0
from strategies.codecs.fp4 import GRID, Fp4
from strategies.codecs.int4 import Int4, Int4Stochastic
from strategies.codecs.int8 import Int8, Int8Stochastic
from strategies.codecs.none import Fp32
from strategies.codecs.sign import Sign
from strategies.codecs.stochastic import keyed, mix
from strategies.codecs.topk import TopK
from strategies.registry import decode_payload

values_32 = st.lists(st.floats(width=32, min_value=-(2.0**60), max_value=2.0**60), min_size=1, max_size=70)


def gaussian(num: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=num, scale=scale).astype(np.float32))


def there_and_back(codec: Codec, x: Tensor) -> Tensor:
    return codec.decode(codec.encode(x), num_values=x.numel())


def absmax_of_blocks(x: Tensor, block: int) -> Tensor:
    """The largest magnitude of each value's block, in fp64."""
    parts = x.double().abs().split(block)
    return torch.cat([part.max().expand(part.numel()) for part in parts])


def relative_rms(codec: Codec) -> float:
    x = gaussian(256 * 256)
    return float((there_and_back(codec, x) - x).norm() / x.norm())


# ------------------------------------------------------------ int4 and fp4


@given(values=values_32, block=st.sampled_from([32, 33, 256]))
@settings(max_examples=60, deadline=None)
def test_int4_error_is_at_most_half_a_scale(values: list[float], block: int) -> None:
    # K2
    x = torch.tensor(values)
    scale = absmax_of_blocks(x, block) / 7
    error = (there_and_back(Int4(block), x).double() - x.double()).abs()
    assert bool((error <= scale * (0.5 + 2.0**-15) + 2.0**-122).all())


@pytest.mark.parametrize(
    ("codec", "expected"), [(Int4(), 0.127), (Fp4(), 0.111), (Fp4(32), 0.100), (E3m0(), 0.204)], ids=str
)
def test_rms_errors_on_gaussians_are_those_of_the_literature(codec: Codec, expected: float) -> None:
    # Computed independently of this code, with numpy, for blocks of 256 and 32.
    assert relative_rms(codec) == pytest.approx(expected, abs=0.002)


@pytest.mark.parametrize(("codec", "highest"), [(Int4(1 << 17), 7.0), (Fp4(1 << 17), 6.0)], ids=["int4", "fp4"])
def test_rounding_to_nearest_has_no_bias(codec: Codec, highest: float) -> None:
    # K1: a codec that truncates has a bias of half a level.
    x = torch.linspace(0, highest, 100_001)
    error = there_and_back(codec, x).double() - x.double()
    assert abs(float(error.mean())) < 1e-4


@given(values=values_32)
@settings(max_examples=60, deadline=None)
def test_fp4_takes_the_nearest_of_its_grid(values: list[float]) -> None:
    x = torch.tensor(values)
    payload = Fp4(128).encode(x)
    scale = float(payload[HEADER_BYTES : HEADER_BYTES + 4].view(torch.float32))
    y = Fp4(128).decode(payload, num_values=x.numel())
    if scale == 0.0:
        assert not y.any()
        return
    distance = (x.double().abs().unsqueeze(1) - scale * torch.tensor(GRID).double()).abs()
    # Exact: no rounding on the way decides for the other neighbour.
    assert torch.equal((x.double() - y.double()).abs(), distance.min(1).values)


def test_fp4_sends_middles_to_the_even_code() -> None:
    middles = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert there_and_back(Fp4(32), middles).tolist() == [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert there_and_back(Fp4(32), -middles).tolist() == [-6.0, 0.0, -1.0, -1.0, -2.0, -2.0, -4.0, -4.0]
    above = torch.nextafter(middles, torch.tensor(10.0))
    above[0] = 6.0
    assert there_and_back(Fp4(32), above).tolist() == [6.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@pytest.mark.parametrize(
    ("codec", "levels"), [(Int4(32), range(-7, 8)), (Fp4(32), [*GRID, *(-g for g in GRID)])], ids=["int4", "fp4"]
)
def test_all_levels_decode_exactly(codec: Codec, levels: list[float]) -> None:
    for scale in (1.0, 2.0**-100, 1.25 * 2.0**90, 0.1):
        x = torch.tensor([level * scale for level in levels])
        y = there_and_back(codec, x)
        torch.testing.assert_close(y, x, rtol=2.0**-20, atol=0)
        assert torch.equal(there_and_back(codec, y), y)


@pytest.mark.parametrize("codec", [Int4(32), Fp4(32), E3m0(32), Sign(32)], ids=lambda c: c.name)
def test_numbers_at_the_ends_of_fp32(codec: Codec) -> None:
    for tiny in (torch.tensor([1e-45, -1e-40, 1e-38]), torch.tensor([-0.0, 0.0]), torch.zeros(40)):
        assert not there_and_back(codec, tiny).any()
    large = torch.tensor([3.4e38, -3.4e38, 1.0, 2e38])
    if codec.name == "int4":
        with pytest.raises(NonFiniteError, match=r"codec 'int4': the largest magnitude is .* too near the end of fp32"):
            codec.encode(large)
        large = large / 2
    y = there_and_back(codec, large)
    assert bool(torch.isfinite(y).all())
    assert bool((y[:2].sign() == large[:2].sign()).all())


# ------------------------------------------------------------ e3m0


@given(values=values_32, block=st.sampled_from([32, 33, 256]))
@settings(max_examples=60, deadline=None)
def test_e3m0_is_right_to_a_factor_of_the_square_root_of_2(values: list[float], block: int) -> None:
    # K3
    x = torch.tensor(values)
    y, absmax = there_and_back(E3m0(block), x).double(), absmax_of_blocks(x, block)
    kept = y != 0
    ratio = y[kept] / x[kept].double()
    slack = 1 + 2.0**-22
    assert bool(((ratio >= 2**-0.5 / slack) & (ratio <= 2**0.5 * slack)).all())
    small = absmax * 2**-6.5
    assert bool((x[~kept].double().abs() <= (small[~kept] * slack).clamp(min=2.0**-119)).all())
    assert torch.equal(y[x.abs() == absmax].float(), x[x.abs() == absmax]) or float(absmax.min()) < 2.0**-119


def test_e3m0_has_fifteen_values() -> None:
    y = there_and_back(E3m0(1 << 16), gaussian(1 << 16))
    assert len(y.unique()) == 15
    assert float(y.abs().max() / y[y != 0].abs().min()) == 64.0


# ------------------------------------------------------------ sign


def test_sign_sends_the_mean_magnitude() -> None:
    x = gaussian(10_000)
    y = there_and_back(Sign(4096), x)
    for part, sent in zip(x.split(4096), y.split(4096), strict=True):
        assert torch.equal(torch.signbit(sent), torch.signbit(part))
        assert sent.abs().unique().numel() == 1
        assert float(sent.abs()[0]) == pytest.approx(float(part.double().abs().mean()), rel=1e-7)


# ------------------------------------------------------------ top-k


def dense_topk(x: Tensor, block: int) -> Tensor:
    """The kept values themselves; of equal magnitudes the first ones."""
    parts = []
    for part in x.split(block):
        order = sorted(range(part.numel()), key=lambda i: (-abs(float(part[i])), i))
        kept = torch.zeros_like(part)
        for i in order[: math.ceil(part.numel() / 64)]:
            kept[i] = part[i]
        parts.append(kept)
    return torch.cat(parts)


@pytest.mark.parametrize("num", [1, 64, 65, 500, 4096, 9001])
def test_topk_keeps_the_largest_and_breaks_ties_by_place(num: int) -> None:
    for x in (gaussian(num), torch.ones(num), gaussian(num).mul_(3).round_()):
        kept, y = dense_topk(x, 4096), there_and_back(TopK(), x)
        assert torch.equal(y != 0, kept != 0)
        assert torch.equal(torch.signbit(y), torch.signbit(kept) & (kept != 0))
        # Two levels per block with 4 significant bits.
        for part in y.split(4096):
            assert part.abs().unique().numel() <= 3


def test_topk_levels_are_the_means_of_the_upper_and_the_lower_values() -> None:
    x = torch.zeros(4096)
    x[100:132], x[200:216], x[300:316] = 1.0, -9.0, 7.0
    y = there_and_back(TopK(), x)
    assert torch.equal(y[100:132], x[100:132])
    assert torch.equal(y[200:216], torch.full((16,), -8.0))
    assert torch.equal(y[300:316], torch.full((16,), 8.0))


@given(
    values=st.lists(st.floats(width=32, min_value=-(2.0**40), max_value=2.0**40), min_size=1, max_size=200),
    outlier=st.sampled_from([1.0, 1e3, 1e-9]),
)
@settings(max_examples=60, deadline=None)
def test_topk_is_a_contraction(values: list[float], outlier: float) -> None:
    # F4 for the kept values themselves; with two levels, what is sent never makes the residual larger than x was.
    x = torch.tensor(values)
    x[0] *= outlier
    x64 = x.double()
    kept = dense_topk(x, 64).double()
    smaller = (1 - 1 / 64) * float(x64.square().sum())
    assert float((x64 - kept).square().sum()) <= smaller * (1 + 1e-12)
    y = there_and_back(TopK(64), x).double()
    assert float((x64 - y).square().sum()) <= float(x64.square().sum()) * (1 + 1e-12)


def test_topk_of_every_value_is_the_value() -> None:
    # F3: k = d; one value to a block has one level, which 3 bits of significand hold for these.
    for value in (1.0, -1.5, 1.75 * 2.0**40, -(2.0**-100)):
        assert there_and_back(TopK(), torch.tensor([value])).tolist() == [value]


def test_topk_sends_nothing_of_blocks_too_small_to_be_named() -> None:
    x = torch.cat([torch.full((4096,), 1e-20), torch.full((4096,), 1.0)])
    assert not there_and_back(TopK(), x)[:4096].any()
    assert there_and_back(TopK(), torch.full((4096,), 1e-20))[0] == pytest.approx(1e-20, rel=0.07)


def test_topk_refuses_entries_that_no_encoder_writes() -> None:
    x = gaussian(4096 + 128)
    x[:64] += 100.0
    good = TopK().encode(x)
    body = HEADER_BYTES + 4 + 2 * 2
    for place, value in (
        (HEADER_BYTES + 3, 0x40),  # base
        (HEADER_BYTES + 4, 255),  # low level of the first block as high as the other
        (HEADER_BYTES + 5, 0),  # codes name a level that is not there
        (body, 0xFF),  # first index behind the second
        (body + 3, 0x01),  # third index as the second, but not the fourth
        (good.numel() - 1, 0xFF),  # two codes in the last byte are not used
    ):
        payload = good.clone()
        assert payload[place] != value
        payload[place] = value
        with pytest.raises(PayloadError, match=r"which no encoder writes|are not what an encoder writes"):
            TopK().decode(payload, num_values=x.numel())
    header = good.clone()
    header[4:8] = torch.tensor([100, 0, 0, 0], dtype=torch.uint8)
    with pytest.raises(PayloadError, match="a block size that its codec has not"):
        decode_payload(header, num_values=x.numel())


# ------------------------------------------------------------ stochastic rounding


@pytest.mark.parametrize("kind", [Int8Stochastic, Int4Stochastic], ids=lambda k: k.name)
def test_stochastic_rounding_is_right_on_average(kind: type[Int8Stochastic] | type[Int4Stochastic]) -> None:
    x = torch.linspace(-1, 1, 1001)
    rounds = 600
    mean = sum(there_and_back(keyed(kind(4096), version), x).double() for version in range(rounds)) / rounds
    scale = 1 / (127 if kind is Int8Stochastic else 7)
    # A Bernoulli variable has a standard deviation of at most half a level; 5.5 of them for 1,001 values.
    assert float((mean - x.double()).abs().max()) < 5.5 * 0.5 * scale / rounds**0.5
    assert float((mean - x.double()).mean().abs()) < 5.5 * 0.5 * scale / (rounds * 1001) ** 0.5


@given(values=values_32)
@settings(max_examples=60, deadline=None)
def test_stochastic_rounding_takes_a_neighbour(values: list[float]) -> None:
    x = torch.tensor(values)
    y = there_and_back(Int4Stochastic(128, key=mix(3)), x).double()
    scale = absmax_of_blocks(x, 128) / 7
    assert bool(((y - x.double()).abs() <= scale * (1 + 2.0**-15) + 2.0**-122).all())
    largest = x.abs() == x.abs().max()
    torch.testing.assert_close(y[largest].float(), x[largest], rtol=2.0**-19, atol=2.0**-122)


def test_random_numbers_belong_to_their_counters() -> None:
    x = gaussian(5000)
    codec = Int4Stochastic(key=mix(0, 1234, 2))
    payloads = [bytes(keyed(codec, *where).encode(x).numpy()) for where in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len(set(payloads)) == 4
    assert payloads[1] == bytes(keyed(codec, 0, 1).encode(x).numpy())
    errors = [decode_payload(torch.tensor(list(p), dtype=torch.uint8), num_values=5000) - x for p in payloads]
    correlation = np.corrcoef(np.stack([error.numpy() for error in errors]))
    # The part of the error that is common is that of the values themselves; between rounds there is none.
    assert float(np.abs(correlation - np.eye(4)).max()) < 0.06
    nearest = Int4()
    assert keyed(nearest, 1, 2) is nearest
    assert keyed(Fp32(), 1) == Fp32()


def test_stochastic_payloads_are_read_by_the_nearest_form() -> None:
    x = gaussian(1000)
    for nearest, random in ((Int8(64), Int8Stochastic(64)), (Int4(64), Int4Stochastic(64))):
        payload = random.encode(x)
        assert torch.equal(nearest.decode(payload, num_values=1000), random.decode(payload, num_values=1000))
        assert torch.equal(decode_payload(payload, num_values=1000), random.decode(payload, num_values=1000))


def test_hashed_numbers_are_uniform_and_independent() -> None:
    # x = 0.5 everywhere: each code is a coin. 1 / 7 of a level apart: every probability is met.
    codec = Int4Stochastic(1 << 17, key=mix(11))
    for fraction in (0.03, 0.5, 0.9):
        x = torch.full((100_000,), 3 + fraction)
        x[0] = 7.0
        up = (there_and_back(codec, x)[1:] > 3.5).double()
        deviation = (fraction * (1 - fraction) / up.numel()) ** 0.5
        assert abs(float(up.mean()) - fraction) < 4.5 * deviation
        for lag in (1, 2, 64, 4096):
            product = float(((up[lag:] - fraction) * (up[:-lag] - fraction)).mean()) / (fraction * (1 - fraction))
            assert abs(product) < 4.5 / up.numel() ** 0.5
