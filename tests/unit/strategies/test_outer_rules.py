"""Outer SGD, heavy ball and Adam against torch.optim, their bounds, the quadratic rule, eager's private correction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from strategies.config import StrategyConfig
from strategies.eager import Correction, correct
from strategies.elementwise import PASS_VALUES
from strategies.merge import advance_included, carry_over
from strategies.outer import Nesterov, OuterStep
from strategies.outer_adam import OuterAdam
from strategies.outer_sgd import HeavyBall, Sgd
from strategies.qsr import quadratic_steps
from strategies.schedule import check_divides, offset_of
from strategies.stability import largest_lr, nearest_lr

N = PASS_VALUES + 77


def gradients(num: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(N, generator=generator) for _ in range(num)]


def run(outer: OuterStep, deltas: list[Tensor], *, in_place: bool = False) -> Tensor:
    anchor, states = torch.ones(N), tuple(torch.zeros(N) for _ in range(outer.num_states))
    for version, g in enumerate(deltas):
        out = (anchor, states) if in_place else None
        anchor, states = outer.step(anchor, states, g, scale=None, version=version, progress=0.0, out=out)
    return anchor


CASES = {
    "sgd": (Sgd(lr=0.7), lambda p: torch.optim.SGD(p, lr=0.7)),
    "heavy ball": (HeavyBall(lr=0.7, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.9)),
    "adam": (
        OuterAdam(lr=0.3, beta1=0.9, beta2=0.95, eps=0.1),
        lambda p: torch.optim.Adam(p, lr=0.3, betas=(0.9, 0.95), eps=0.1),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_outer_step_is_that_of_torch(case: str) -> None:
    outer, build = CASES[case]
    parameter = nn.Parameter(torch.ones(N))
    optimizer = build([parameter])
    for g in gradients(5):
        parameter.grad = g.clone()
        optimizer.step()
    torch.testing.assert_close(run(outer, gradients(5)), parameter.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(run(outer, gradients(5)), run(outer, gradients(5), in_place=True))


def test_heavy_ball_is_not_nesterov() -> None:
    g = [torch.ones(N)]  # D3, D3b
    assert torch.allclose(1 - run(HeavyBall(lr=0.7, momentum=0.9), g), torch.tensor(0.7))
    assert torch.allclose(1 - run(Nesterov(lr=0.7, momentum=0.9), g), torch.tensor(1.33))


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize(
    ("outer", "momentum"), [("sgd", 0.0), ("heavy-ball", 0.9), ("nesterov", 0.5), ("nesterov", 0.9)]
)
def test_the_bound_is_where_the_recursion_begins_to_grow(outer: str, momentum: float, delay: int) -> None:
    bound = largest_lr(outer, momentum, delay=delay)  # type: ignore[arg-type]
    share = 0.5 if delay else 1.0

    def distance_after(lr: float, steps: int = 12_000) -> float:
        theta, buffer, late = 1.0, 0.0, [0.0] * delay
        for _ in range(steps):
            g = share * theta
            late.append(g)
            g = late.pop(0)
            buffer = (0.0 if outer == "sgd" else momentum) * buffer + g
            theta -= lr * (g + momentum * buffer if outer == "nesterov" else buffer)
            if abs(theta) > 1e6:
                return abs(theta)
        return abs(theta)

    assert distance_after(0.98 * bound) < 1e-3
    assert distance_after(1.02 * bound) > 1e3
    assert 0.9 * bound < nearest_lr(bound) < bound


def test_known_bounds() -> None:
    assert largest_lr("sgd", 0.0) == pytest.approx(2.0)
    assert largest_lr("heavy-ball", 0.9) == pytest.approx(3.8)
    assert largest_lr("nesterov", 0.9) == pytest.approx(2 * 1.9 / 2.8)
    assert largest_lr("average", 0.0) == float("inf")


def test_quadratic_rule() -> None:
    # Q1: never falls while the rate falls, four times as long at half the rate, never below its base.
    steps = [quadratic_steps(lr, alpha=0.02, least=4, most=5000) for lr in (1e-2, 4e-3, 2e-3, 1e-3, 0.0)]
    assert steps == [4, 25, 100, 400, 5000]
    config = StrategyConfig(inner_steps=4, qsr_alpha=0.02, qsr_max_steps=5000)
    assert config.inner_steps_at(0.5) == 4, "without a rate the rule is off"
    rate = {0.1: 4e-3, 0.5: 2e-3}.__getitem__
    assert config.inner_steps_at(0.5, rate, 0.1) == 100
    assert config.inner_steps_at(0.01, rate, 0.1) == 25, "in the warm-up, that of the peak"


def test_periods_that_do_not_divide_name_the_two_nearest_that_do() -> None:
    with pytest.raises(ValueError, match=r"inner_steps = 100 .* set it to 96 or 102"):
        check_divides(100, 6)
    assert [offset_of(p, num_fragments=4, inner_steps=100) for p in range(4)] == [25, 50, 75, 100]


def test_progress_after_the_due_step_is_kept_whole() -> None:
    anchor, following = torch.zeros(4), torch.full((4,), 1.0)
    displacement, due, live = torch.full((4,), 0.5), torch.full((4,), 0.75), torch.full((4,), -1.0)
    moved = advance_included(live.clone(), anchor, following, displacement, alpha=0.5, kappa=0.5, due_N=due)
    # A' - alpha (A' - (A - D)) - kappa (due - D) - (what came later)
    assert torch.allclose(moved, torch.full((4,), 1.0 - 0.5 * 1.5 - 0.5 * 0.25 - 0.25))


def test_carry_over_copies_where_nothing_was_done() -> None:
    old, new = gradients(2)
    assert torch.equal(carry_over(old.clone(), old, new), new)


def test_one_member_alone_is_diloco_with_eager_updates() -> None:
    # E2: with one member its own contribution is all there is, and it is applied at once.
    outer, deltas = Nesterov(lr=0.4, momentum=0.9), gradients(4)
    correction = Correction.zero(deltas[0], outer.num_states)
    anchor, states = torch.ones(N), (torch.zeros(N),)
    own = []
    for version, delta in enumerate(deltas):
        if version:
            anchor, states = outer.step(anchor, states, deltas[version - 1], scale=None, version=0, progress=0.0)
        correct(correction, delta, 1.0, outer)
        own.append(anchor + correction.ahead_N)
    torch.testing.assert_close(own[-1], run(outer, deltas), rtol=1e-4, atol=1e-4)
