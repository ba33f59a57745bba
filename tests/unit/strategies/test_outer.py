from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from strategies.elementwise import PASS_VALUES, integer_power, square_root
from strategies.fragments import TensorSpec, gather, plan_fragments
from strategies.norm import clip_scale, halving_sum, sum_of_squares
from strategies.outer import Average, Nesterov, OuterAdamW, OuterStep, States


def gaussian(num: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=num).astype(np.float32))


def run(outer: OuterStep, anchor: Tensor, gradients: list[Tensor]) -> tuple[Tensor, States]:
    states: States = tuple(torch.zeros_like(anchor) for _ in range(outer.num_states))
    for version, g in enumerate(gradients):
        anchor, states = outer.step(
            anchor, states, g, scale=outer.prepare([g]), version=version, progress=version / len(gradients)
        )
    return anchor, states


def test_nesterov_is_torch_sgd() -> None:
    parameter = nn.Parameter(gaussian(1000))
    anchor = parameter.detach().clone()
    gradients = [gaussian(1000, seed) for seed in range(1, 30)]
    reference = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True, foreach=False)
    for g in gradients:
        parameter.grad = g.clone()
        reference.step()
    result, _ = run(Nesterov(lr=0.7, momentum=0.9), anchor, gradients)
    torch.testing.assert_close(result, parameter.detach(), rtol=1e-5, atol=1e-5)


def test_constant_pseudo_gradient_moves_as_the_formula_says() -> None:
    # D3: step t moves lr g (1 - mu^(t+2)) / (1 - mu), first 1.33 g, at last 7 g.
    # D3b: heavy-ball would begin with 0.70 g.
    outer, anchor, states = Nesterov(lr=0.7, momentum=0.9), torch.zeros(1), (torch.zeros(1),)
    moves = []
    for version in range(200):
        following, states = outer.step(anchor, states, torch.ones(1), scale=None, version=version, progress=0.0)
        moves.append(float(anchor - following))
        anchor = following
    expected = [0.7 * (1 - 0.9 ** (t + 2)) / (1 - 0.9) for t in range(200)]
    assert moves[0] == pytest.approx(1.33, rel=1e-6)
    assert moves[0] != pytest.approx(0.70, rel=0.1)
    assert moves == pytest.approx(expected, rel=1e-3)


def test_nesterov_is_numpy_to_the_bit() -> None:
    gradients = [gaussian(3001, seed) for seed in range(1, 9)]
    anchor, buffer, lr, mu = gaussian(3001).numpy(), np.zeros(3001, np.float32), np.float32(0.7), np.float32(0.9)
    for g in gradients:
        buffer = mu * buffer + g.numpy()
        anchor = anchor - lr * (g.numpy() + mu * buffer)
    result, (state,) = run(Nesterov(lr=0.7, momentum=0.9), gaussian(3001), gradients)
    assert result.numpy().tobytes() == anchor.tobytes()
    assert state.numpy().tobytes() == buffer.tobytes()


def test_average_ignores_its_states() -> None:
    anchor, g, state = gaussian(100), gaussian(100, 1), gaussian(100, 2)
    following, states = Average(num_states=1).step(anchor, (state,), g, scale=None, version=3, progress=0.5)
    assert torch.equal(following, anchor - g)
    assert states == (state,)
    assert Average().num_states == 0


def settings_of_adamw(lr: float, clip: float, weight_decay: float = 0.1) -> OuterAdamW:
    return OuterAdamW(
        lr_at=lambda progress: lr * (1 - 0.5 * progress),
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
        weight_decay=weight_decay,
        clip=clip,
    )


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_outer_adamw_is_torch_adamw_with_decay_on_matrices(clip: float) -> None:
    shapes = {"embed": (7, 5), "scale": (13,), "conv": (3, 2, 2, 2), "bias": (1,), "gain": ()}
    parameters = {n: nn.Parameter(gaussian(math.prod(s), i).reshape(s)) for i, (n, s) in enumerate(shapes.items())}
    specs = [TensorSpec(name=n, shape=s) for n, s in shapes.items()]
    # Chunks of 16 cut through tensors and their decay.
    (spec,) = plan_fragments(specs, num_fragments=1, pattern="strided", chunk_values=16)
    anchor = gather(spec, parameters).clone()
    chunks = [spec.chunk_slice(i) for i in range(spec.num_chunks)]
    states: States = (torch.zeros_like(anchor), torch.zeros_like(anchor))
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    outer = settings_of_adamw(lr=0.02, clip=clip)
    for version in range(60):
        for i, p in enumerate(parameters.values()):
            p.grad = gaussian(p.numel(), 1000 + 10 * version + i).reshape(p.shape) * 0.3
        g = gather(spec, {name: p.grad for name, p in parameters.items() if p.grad is not None}).clone()
        if clip:
            nn.utils.clip_grad_norm_(list(parameters.values()), clip)
        for group in reference.param_groups:
            group["lr"] = outer.lr_at(version / 60)
        reference.step()
        scale = outer.prepare(g[c] for c in chunks)
        for c in chunks:
            views = anchor[c], (states[0][c], states[1][c])
            outer.step(
                *views, g[c], scale=scale, version=version, progress=version / 60, spec=spec, start=c.start, out=views
            )
        torch.testing.assert_close(anchor, gather(spec, parameters), rtol=1e-5, atol=2e-6)


def test_decay_without_fragment_is_an_error() -> None:
    x = torch.ones(4)
    with pytest.raises(ValueError, match="weight decay needs `spec`"):
        settings_of_adamw(0.1, 0.0).step(x, (x, x), x, scale=None, version=0, progress=0.0)


@pytest.mark.parametrize(
    "outer",
    [
        Nesterov(lr=0.7, momentum=0.9),
        Nesterov(lr=0.7, momentum=0.9, backend="numba"),
        Average(),
        Average(num_states=1),
        settings_of_adamw(0.01, 0.0),
    ],
    ids=["nesterov", "nesterov-numba", "average", "average-1", "adamw"],
)
def test_chunks_and_in_place_give_the_same_bits_and_arguments_stay(outer: OuterStep) -> None:
    num = 2 * PASS_VALUES + 1001
    specs = [TensorSpec(name=n, shape=s) for n, s in (("w", (300, 200)), ("b", (7000,)), ("v", (num - 67_000, 1)))]
    (spec,) = plan_fragments(specs, num_fragments=1, pattern="strided")
    anchor, g = gaussian(num), gaussian(num, 1)
    states = tuple(gaussian(num, 2 + i).abs() for i in range(outer.num_states))
    inputs = [anchor, g, *states]
    copies = [x.clone() for x in inputs]
    whole, whole_states = outer.step(anchor, states, g, scale=None, version=5, progress=0.3, spec=spec)
    assert all(torch.equal(x, y) for x, y in zip(inputs, copies, strict=True))
    for length in (1000, 37_777, num):
        in_place, in_place_states = anchor.clone(), tuple(s.clone() for s in states)
        for start in range(0, num, length):
            part = slice(start, min(start + length, num))
            views = in_place[part], tuple(s[part] for s in in_place_states)
            outer.step(*views, g[part], scale=None, version=5, progress=0.3, spec=spec, start=start, out=views)
        assert torch.equal(in_place, whole)
        assert all(torch.equal(x, y) for x, y in zip(in_place_states, whole_states, strict=True))


@pytest.mark.parametrize("num", [0, 1, 7, 1000, 2 * PASS_VALUES + 1001])
def test_the_compiled_step_has_the_bits_of_the_plain_one(num: int) -> None:
    sizes = torch.logspace(-42, 37, num) if num else torch.ones(0)  # subnormal to almost infinite
    anchor, g, buffer = (gaussian(num, seed) * sizes for seed in (0, 1, 2))
    if num > 7:
        anchor[1], g[2], buffer[3], g[4], anchor[5] = math.inf, math.nan, -math.inf, -0.0, -0.0
    for lr, momentum in ((0.7, 0.9), (1.0, 0.0), (1e-3, 0.999)):
        found = run(Nesterov(lr=lr, momentum=momentum, backend="numba"), anchor, [g, buffer, g])
        wanted = run(Nesterov(lr=lr, momentum=momentum), anchor, [g, buffer, g])
        for x, y in zip((found[0], *found[1]), (wanted[0], *wanted[1]), strict=True):
            either_nan = torch.isnan(x) & torch.isnan(y)
            assert torch.equal(x.view(torch.int32)[~either_nan], y.view(torch.int32)[~either_nan])


@pytest.mark.parametrize("num", [1, 100, 200_000])
def test_a_square_root_is_the_nearest_number(num: int) -> None:
    values = gaussian(num).abs()
    exact = values.double()
    found = square_root(values)
    for nearby in (torch.nextafter(found, torch.tensor(0.0)), torch.nextafter(found, torch.tensor(math.inf))):
        between = (found.double() + nearby.double()) / 2  # exact, and so is the comparison: 25 bits squared are 50
        below = found > nearby
        assert torch.all(torch.where(below, between * between <= exact, between * between >= exact))
    assert square_root(values, out=values) is values and torch.equal(values, found)
    assert float(square_root(torch.tensor(2.0, dtype=torch.float64))) == math.sqrt(2.0)


def test_zero_gradient_keeps_the_anchor_to_the_bit() -> None:
    anchor = gaussian(1000)
    for outer in (Nesterov(lr=0.7, momentum=0.9), Average(), settings_of_adamw(0.1, 1.0, weight_decay=0.0)):
        result, _ = run(outer, anchor, [torch.zeros(1000)] * 5)
        assert torch.equal(result.view(torch.int32), anchor.view(torch.int32))


@pytest.mark.parametrize("num", [0, 1, 2, 3, 1000, 32_768, 100_001])
def test_sum_of_squares(num: int) -> None:
    x = gaussian(num) * 1e25  # squares overflow fp32
    assert float(sum_of_squares(x)) == pytest.approx(float(x.double().square().sum()), rel=1e-12)
    if num:
        assert float(halving_sum(torch.arange(num, dtype=torch.float64))) == num * (num - 1) / 2


def test_clip_scale_is_the_factor_of_clip_grad_norm() -> None:
    chunks = [gaussian(70_000), gaussian(10, 1)]
    norm = math.sqrt(sum(float(c.double().square().sum()) for c in chunks))
    scale = clip_scale(chunks, 1.0)
    assert scale is not None
    assert scale.dtype == torch.float32
    assert scale.shape == ()
    assert float(scale) == pytest.approx(1.0 / (norm + 1e-6), rel=1e-6)
    assert float(clip_scale(chunks, 2 * norm)) == 1.0  # type: ignore[arg-type]
    assert clip_scale([], 1.0) is None


def test_integer_power() -> None:
    for exponent in (0, 1, 2, 3, 17, 1000, 123_456):
        assert integer_power(0.999, exponent) == pytest.approx(0.999**exponent, rel=1e-12)
    with pytest.raises(ValueError, match="exponent = -1"):
        integer_power(0.5, -1)
