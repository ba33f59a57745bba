from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strategies.aggregate import accumulate, decode_accumulate, weighted_sum
from strategies.codecs.base import Codec, PayloadError
from strategies.config import DEFAULT_BLOCKS, CodecConfig
from strategies.elementwise import PASS_VALUES
from strategies.merge import advance_included, rebase
from strategies.norm import ROW_VALUES, SquareSum, sum_of_squares
from strategies.registry import CODECS, build_codec


def gaussian(num: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=num).astype(np.float32))


N = PASS_VALUES + 777


def points() -> tuple[Tensor, Tensor, Tensor]:
    """Anchor, next anchor, live parameters."""
    anchor = gaussian(N)
    return anchor, anchor + 0.1 * gaussian(N, 1), anchor + 0.2 * gaussian(N, 2)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def test_alpha_0_without_progress_is_a_copy_of_the_new_anchor() -> None:
    anchor, following, theta = points()
    for displacement in (None, anchor - theta):
        moved = theta.clone()
        assert advance_included(moved, anchor, following, displacement, alpha=0.0, kappa=1.0) is moved
        assert torch.equal(bits(moved), bits(following))


def test_alpha_1_leaves_the_member_alone() -> None:
    # S2: the trajectory is that of isolated training, to the bit.
    anchor, following, snapshot = points()
    live = snapshot + 0.05 * gaussian(N, 3)
    assert torch.equal(advance_included(snapshot.clone(), anchor, following, None, alpha=1.0, kappa=0.3), snapshot)
    displacement = anchor - snapshot
    assert torch.equal(advance_included(live.clone(), anchor, following, displacement, alpha=1.0, kappa=1.0), live)


@given(alpha=st.floats(0, 1), kappa=st.floats(0, 1), progress=st.booleans())
@settings(max_examples=40, deadline=None)
def test_included_is_the_formula(alpha: float, kappa: float, progress: bool) -> None:
    anchor, following, snapshot = (x[:500] for x in points())
    live = snapshot + 0.05 * gaussian(500, 3) if progress else snapshot
    displacement = anchor - snapshot
    expected = (
        following.double()
        - alpha * (following.double() - snapshot.double())
        - kappa * (snapshot.double() - live.double())
    )
    moved = advance_included(
        live.clone(), anchor, following, displacement if progress else None, alpha=alpha, kappa=kappa
    )
    torch.testing.assert_close(moved.double(), expected, rtol=1e-5, atol=1e-5)


def test_kappa_equal_alpha_is_the_merge_of_the_paper() -> None:
    anchor, following, snapshot = points()
    live = snapshot + 0.05 * gaussian(N, 3)
    moved = advance_included(live.clone(), anchor, following, anchor - snapshot, alpha=0.5, kappa=0.5)
    torch.testing.assert_close(moved, 0.5 * live + 0.5 * following, rtol=1e-5, atol=1e-6)


def test_merging_shrinks_the_spread_between_workers_by_alpha_squared() -> None:
    # S5
    anchor, following, _ = points()
    workers = [anchor + gaussian(N, 10 + m) for m in range(6)]
    before = torch.stack(workers).var(0)
    for alpha in (0.25, 0.5, 0.9):
        merged = [advance_included(w.clone(), anchor, following, None, alpha=alpha, kappa=1.0) for w in workers]
        torch.testing.assert_close(torch.stack(merged).var(0), alpha**2 * before, rtol=1e-3, atol=1e-6)


def test_rebase_keeps_the_displacement() -> None:
    anchor, following, theta = points()
    displacement = anchor - theta
    moved = theta.clone()
    assert rebase(moved, anchor, following) is moved
    torch.testing.assert_close(following - moved, displacement, rtol=1e-5, atol=1e-6)
    fresh = anchor.clone()  # a member that made no step stays at the anchor
    torch.testing.assert_close(rebase(fresh, anchor, following), following, rtol=1e-6, atol=1e-6)


def test_chunks_give_the_same_bits() -> None:
    anchor, following, live = points()
    displacement = anchor - (live + 0.01)
    whole = advance_included(live.clone(), anchor, following, displacement, alpha=0.5, kappa=1.0)
    shifted = rebase(live.clone(), anchor, following)
    parts, parts_shifted = live.clone(), live.clone()
    for start in range(0, N, 1000):
        c = slice(start, start + 1000)
        advance_included(parts[c], anchor[c], following[c], displacement[c], alpha=0.5, kappa=1.0)
        rebase(parts_shifted[c], anchor[c], following[c])
    assert torch.equal(parts, whole)
    assert torch.equal(parts_shifted, shifted)


def test_weights_outside_0_to_1_are_refused() -> None:
    x = torch.zeros(3)
    with pytest.raises(ValueError, match=r"merge alpha = 1\.5"):
        advance_included(x, x, x, None, alpha=1.5, kappa=1.0)
    with pytest.raises(ValueError, match="merge kappa = -1"):
        advance_included(x, x, x, None, alpha=0.5, kappa=-1.0)


def test_weighted_sum_is_mul_then_add_in_order() -> None:
    contributions = [gaussian(N, m) for m in range(5)]
    coefficients = [0.1, 0.3, 0.25, 0.05, 0.2]
    expected = np.zeros(N, dtype=np.float32)
    for u, c in zip(contributions, coefficients, strict=True):
        expected = expected + np.float32(c) * u.numpy()
    total = weighted_sum(contributions, coefficients)
    assert torch.equal(total, torch.from_numpy(expected))
    assert torch.equal(contributions[0], gaussian(N, 0)), "contributions are left as they are"
    acc = accumulate(None, contributions[0], 0.1)
    assert accumulate(acc, contributions[1], 0.3) is acc


def test_order_changes_bits_but_not_the_sum() -> None:
    # D4
    contributions = [gaussian(N, m) for m in range(5)]
    one = weighted_sum(contributions, [0.2] * 5)
    other = weighted_sum(contributions[::-1], [0.2] * 5)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert not torch.equal(one, other), "the order of the roster must matter, or this test is blind"
    assert torch.equal(one, weighted_sum(contributions, [0.2] * 5))


@pytest.mark.parametrize("num_workers", [2, 4])
def test_identical_contributions_sum_to_themselves(num_workers: int) -> None:
    # D7
    x = gaussian(N)
    assert torch.equal(weighted_sum([x] * num_workers, [1 / num_workers] * num_workers), x)


def test_a_missing_coefficient_or_contribution_is_an_error() -> None:
    with pytest.raises(ValueError, match="no contribution"):
        weighted_sum([], [])
    with pytest.raises(ValueError, match="argument 2"):
        weighted_sum([torch.zeros(1)], [])


EVERY_CODEC = [
    build_codec(CodecConfig(name=name, block=block, backend=backend))
    for name in CODECS
    for block in ([None] if name == "topk" or name not in DEFAULT_BLOCKS else [None, 33])
    for backend in ("torch", "numba")
]


@pytest.mark.parametrize("codec", EVERY_CODEC, ids=lambda c: f"{c.name}-{c.block}-{c.backend}")
def test_decoding_and_adding_in_parts_is_the_same_to_the_bit(codec: Codec) -> None:
    for num in (0, 1, 500, ROW_VALUES, 3 * ROW_VALUES + 77, N):
        pieces = [gaussian(num, seed) for seed in range(3)]
        # A zero that the sum starts with keeps or loses its sign as in the plain sum.
        pieces[0][::2] = -0.0
        payloads = [codec.encode(piece) for piece in pieces]
        acc = expected = None
        for payload, coefficient in zip(payloads, (0.25, 0.3, 0.45), strict=True):
            decoded = codec.decode(payload, num_values=num)
            expected = accumulate(expected, decoded, coefficient)
            acc, squares = decode_accumulate(codec, payload, coefficient, acc, num_values=num)
            assert torch.equal(squares, sum_of_squares(decoded))
        assert acc is not None and expected is not None
        assert torch.equal(bits(acc), bits(expected))


@pytest.mark.parametrize("codec", EVERY_CODEC, ids=lambda c: f"{c.name}-{c.block}-{c.backend}")
def test_parts_are_short_and_malformed_payloads_have_none(codec: Codec) -> None:
    num = 4 * PASS_VALUES
    payload = codec.encode(gaussian(num))
    longest = max(part.numel() for _, part in codec.decode_parts(payload, num_values=num))
    assert longest <= (num if codec.block == 33 else PASS_VALUES)
    for broken in (payload[:-1], payload[:3]):
        with pytest.raises(PayloadError):
            decode_accumulate(codec, broken, 1.0, None, num_values=num)


def test_a_payload_is_only_added_once_it_is_known_to_be_good() -> None:
    codec = build_codec(CodecConfig(name="int4"))
    payload = codec.encode(gaussian(N))
    payload[16:20].view(torch.float32)[0] = float("nan")
    acc = gaussian(N, 1)
    before = acc.clone()
    with pytest.raises(PayloadError):
        decode_accumulate(codec, payload, 1.0, acc, num_values=N)
    assert torch.equal(acc, before)


def test_squares_are_summed_alike_however_the_vector_is_cut() -> None:
    x = gaussian(5 * ROW_VALUES + 123)
    total = SquareSum()
    for cut in (x[: 3 * ROW_VALUES], x[3 * ROW_VALUES : 4 * ROW_VALUES], x[4 * ROW_VALUES :]):
        total.add(cut)
    assert torch.equal(total.total(), sum_of_squares(x))
    assert float(SquareSum().total()) == 0.0
    with pytest.raises(AssertionError, match="no multiple of"):
        total.add(x[:5])
