"""Delayed Nesterov against a plain reference, and its invariants (test catalogue A1 to A3)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from strategies.async_dn import DelayedNesterov
from strategies.config import CodecConfig, StrategyConfig
from strategies.errors import SettingError
from strategies.outer import Nesterov, OuterStep
from strategies.registry import build_codec
from strategies.stability import largest_lr, largest_lr_of_pushes

N, LR, BETA = 70_000, 0.4, 0.9


def pushes(num: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(N, generator=generator) - 0.5 for _ in range(num)]


def run(outer: OuterStep, gs: list[Tensor]) -> list[Tensor]:
    anchor, out = torch.linspace(-1, 1, N), []
    states = tuple(torch.zeros(N) for _ in range(outer.num_states))
    for version, g in enumerate(gs):
        anchor, states = outer.step(anchor, states, g, scale=None, version=version, progress=0.0)
        out.append(anchor)
    return out


def reference(gs: list[Tensor], every: int, c: float) -> list[Tensor]:
    """The code of HALoS, with g of N equal members: each is divided by N, as the fleet's coefficients do here."""
    theta, m, d, out = torch.linspace(-1, 1, N).double(), 0.0, torch.zeros(N).double(), []
    for t, scaled in enumerate(gs):
        g = scaled.double() * every
        d = d + g
        if (t + 1) % every == 0:
            m = BETA * m + d / every
            theta = theta - LR * ((1 - c * every + c) * BETA * m + g / every)
            d = torch.zeros(N).double()
        else:
            theta = theta - LR * (c * BETA * m + g / every)
        out.append(theta)
    return out


@pytest.mark.parametrize(("every", "c"), [(1, 0.0), (3, 0.0), (4, 0.25), (5, 0.1)])
def test_it_is_the_published_step_with_as_many_members_as_the_window(every: int, c: float) -> None:
    gs = pushes(11)
    found = run(DelayedNesterov(lr=LR, momentum=BETA, every=every, spread=c), gs)
    for mine, theirs in zip(found, reference(gs, every, c), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("c", [0.0, 0.5, 1.0])
def test_a_window_of_one_is_nesterov_bit_for_bit(c: float) -> None:
    gs = pushes(6)
    found = run(DelayedNesterov(lr=LR, momentum=BETA, every=1, spread=c), gs)
    for mine, theirs in zip(found, run(Nesterov(lr=LR, momentum=BETA), gs), strict=True):
        assert torch.equal(mine, theirs)


def test_without_spread_a_window_moves_by_its_sum_and_the_new_momentum() -> None:
    gs = pushes(4)
    last = run(DelayedNesterov(lr=LR, momentum=BETA, every=4), gs)[-1]
    total = gs[0] + gs[1] + gs[2] + gs[3]
    torch.testing.assert_close(last, torch.linspace(-1, 1, N) - LR * (total + BETA * total), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("every", [1, 2, 8])
def test_over_a_window_the_momentum_counts_once_whatever_its_spread(every: int) -> None:
    """From momentum 1 and pushes of nothing: the anchor moves by lr beta (in the window's old momentum's stead)."""
    for c in (0.0, 0.5 / every, 1.0 / every):
        outer = DelayedNesterov(lr=1.0, momentum=BETA, every=every, spread=c)
        anchor, states = torch.zeros(1), (torch.ones(1), torch.zeros(1))
        weights = 0.0
        for version in range(every):
            held = states[0].item() * (BETA if outer.takes_momentum(version) else 1.0)
            following, states = outer.step(anchor, states, torch.zeros(1), scale=None, version=version, progress=0.0)
            weights += (anchor - following).item() / (BETA * held)
            anchor = following
        assert weights == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("version", [2, 3])
def test_in_place_and_in_chunks_it_has_the_same_bits(version: int) -> None:
    outer = DelayedNesterov(lr=LR, momentum=BETA, every=4, spread=0.1)
    anchor, m, d, g = pushes(4, seed=1)
    whole, states = outer.step(anchor, (m, d), g, scale=None, version=version, progress=0.0)
    for where in (slice(0, 1000), slice(1000, N)):
        part = outer.step(anchor[where], (m[where], d[where]), g[where], scale=None, version=version, progress=0.0)
        assert torch.equal(part[0], whole[where])
        assert [torch.equal(a, b[where]) for a, b in zip(part[1], states, strict=True)] == [True, True]
    outer.step(anchor, (m, d), g, scale=None, version=version, progress=0.0, out=(anchor, (m, d)))
    assert torch.equal(anchor, whole) and torch.equal(m, states[0]) and torch.equal(d, states[1])


def test_stability_of_pushes_agrees_with_nesterov_and_with_the_recursion() -> None:
    assert largest_lr_of_pushes(BETA, every=1) == pytest.approx(largest_lr("nesterov", BETA), rel=0.01)
    for every in (2, 8):
        bound = largest_lr_of_pushes(BETA, every=every)
        for lr, settles in ((0.97 * bound, True), (1.03 * bound, False)):
            outer = DelayedNesterov(lr=lr, momentum=BETA, every=every)
            grows = False
            for members, share in ((every, 0.5), (1, 1.0)):
                anchor = torch.ones(1, dtype=torch.float64)
                states = (torch.zeros_like(anchor), torch.zeros_like(anchor))
                began = [anchor] * members
                for version in range(600 * every):
                    g = began[version % members] * (share / members)
                    anchor, states = outer.step(anchor, states, g, scale=None, version=version, progress=0.0)
                    began[version % members] = anchor
                grows = grows or not abs(anchor.item()) < 1.0
            assert grows is not settles


@pytest.mark.parametrize(
    "settings", [{"outer": "adam"}, {"warmup_sync": 0.1}, {"momentum_every": 4, "momentum_spread": 0.3}]
)
def test_what_it_cannot_do_is_refused(settings: dict[str, object]) -> None:
    from strategies.async_dn import build_async_dn

    codec = CodecConfig(name="fp32")
    with pytest.raises(SettingError, match=next(reversed(settings))):
        config = StrategyConfig(name="async-dn", **settings)  # type: ignore[arg-type]
        build_async_dn(config, codec, build_codec(codec), lambda progress: 4)
