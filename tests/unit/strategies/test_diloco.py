"""DiLoCo put together from its parts against plain torch references (test catalogue D1-D7, S1-S5)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from strategies.aggregate import weighted_sum
from strategies.codecs.base import Codec
from strategies.codecs.none import Fp32
from strategies.fragments import TensorSpec, plan_fragments
from strategies.merge import advance_included
from strategies.outer import Average, Nesterov, OuterStep
from strategies.schedule import is_due

M, NUM_LAYERS, WIDTH = 4, 6, 5
N = NUM_LAYERS * WIDTH
_RNG = np.random.default_rng(0)
_CURVATURE = torch.from_numpy(_RNG.uniform(0.2, 2, (M, N)).astype(np.float32))
_SLOPE = torch.from_numpy(_RNG.normal(size=(M, N)).astype(np.float32))
Gradient = Callable[[Tensor, int, int], Tensor]


def gradient(theta: Tensor, worker: int, step: int) -> Tensor:
    """Gradient of a noisy quadratic of one worker; a function of its arguments alone."""
    noise = np.random.default_rng(1000 * worker + step).normal(size=N, scale=0.1).astype(np.float32)
    return _CURVATURE[worker] * theta + _SLOPE[worker] + torch.from_numpy(noise)


def train(
    *,
    steps: int,
    inner_steps: int,
    outer: OuterStep,
    inner_lr: float = 0.05,
    alpha: float = 0.0,
    num_fragments: int = 1,
    workers: list[int] | None = None,
    grad: Gradient = gradient,
    codec: Codec | None = None,
) -> tuple[Tensor, list[Tensor], list[tuple[int, int]]]:
    """Train by the parts of `strategies`; returns anchor, live parameters and the sends (step, fragment)."""
    codec, workers = codec or Fp32(), workers or list(range(M))
    names = [TensorSpec(name=f"layers.{i}.weight", shape=(WIDTH,)) for i in range(NUM_LAYERS)]
    fragments = plan_fragments(names, num_fragments=num_fragments, pattern="sequential", chunk_values=7)
    regions = np.cumsum([0, *(f.numel for f in fragments)])
    anchor = torch.zeros(N)
    states = tuple(torch.zeros(N) for _ in range(outer.num_states))
    live = [anchor.clone() for _ in workers]
    sends, versions = [], [0] * num_fragments
    for step in range(1, steps + 1):
        for theta, worker in zip(live, workers, strict=True):
            theta -= inner_lr * grad(theta, worker, step - 1)
        for f, spec in enumerate(fragments):
            if not is_due(step, fragment=f, num_fragments=num_fragments, inner_steps=inner_steps):
                continue
            sends.append((step, f))
            for chunk in range(spec.num_chunks):
                inside = spec.chunk_slice(chunk)
                c = slice(int(regions[f]) + inside.start, int(regions[f]) + inside.stop)
                num = inside.stop - inside.start
                decoded = [codec.decode(codec.encode(anchor[c] - theta[c]), num_values=num) for theta in live]
                total = weighted_sum(decoded, [1 / len(workers)] * len(workers))
                g = codec.decode(codec.encode(total), num_values=num)
                following, next_states = outer.step(
                    anchor[c], tuple(s[c] for s in states), g, scale=None, version=versions[f], progress=step / steps
                )
                for theta in live:
                    advance_included(theta[c], anchor[c], following, None, alpha=alpha, kappa=1.0)
                anchor[c] = following
                for state, following_state in zip(states, next_states, strict=True):
                    state[c] = following_state
            versions[f] += 1
    return anchor, live, sends


def sgd(parameter: nn.Parameter, lr: float, momentum: float = 0.0) -> torch.optim.SGD:
    return torch.optim.SGD([parameter], lr=lr, momentum=momentum, nesterov=momentum > 0, foreach=False)


def large_batch(steps: int, lr: float, momentum: float) -> Tensor:
    parameter = nn.Parameter(torch.zeros(N))
    optimizer = sgd(parameter, lr, momentum)
    for step in range(steps):
        parameter.grad = torch.stack([gradient(parameter.detach(), m, step) for m in range(M)]).mean(0)
        optimizer.step()
    return parameter.detach()


def reference_diloco(rounds: int, inner_steps: int, lr: float, momentum: float) -> Tensor:
    """DiLoCo with torch.optim.SGD as the outer optimizer and the displacement as its gradient."""
    anchor = nn.Parameter(torch.zeros(N))
    optimizer = sgd(anchor, lr, momentum)
    for r in range(rounds):
        ends = []
        for worker in range(M):
            theta = anchor.detach().clone()
            for h in range(inner_steps):
                theta -= 0.05 * gradient(theta, worker, r * inner_steps + h)
            ends.append(theta)
        anchor.grad = torch.stack([anchor.detach() - end for end in ends]).mean(0)
        optimizer.step()
    return anchor.detach()


NESTEROV = Nesterov(lr=0.7, momentum=0.9)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_d1_one_step_with_averaging_is_large_batch_sgd() -> None:
    close(train(steps=20, inner_steps=1, outer=Average())[0], large_batch(20, 0.05, 0.0))


def test_d1b_one_step_with_nesterov_is_large_batch_nesterov() -> None:
    close(train(steps=20, inner_steps=1, outer=NESTEROV)[0], large_batch(20, 0.05 * 0.7, 0.9))


def test_d2_average_is_parameter_averaging() -> None:
    anchor = torch.zeros(N)
    for r in range(6):
        ends = []
        for worker in range(M):
            theta = anchor.clone()
            for h in range(5):
                theta -= 0.05 * gradient(theta, worker, r * 5 + h)
            ends.append(theta)
        anchor = torch.stack(ends).mean(0)
    result, live, _ = train(steps=30, inner_steps=5, outer=Average())
    close(result, anchor)
    assert all(torch.equal(theta, result) for theta in live)


def test_diloco_is_torch_sgd_on_displacements() -> None:
    close(train(steps=40, inner_steps=5, outer=NESTEROV)[0], reference_diloco(8, 5, 0.7, 0.9))


def test_d4_order_of_workers_matters_within_rounding_only() -> None:
    forwards = train(steps=20, inner_steps=4, outer=NESTEROV, workers=[0, 1, 2, 3])[0]
    close(forwards, train(steps=20, inner_steps=4, outer=NESTEROV, workers=[3, 1, 0, 2])[0])
    assert torch.equal(forwards, train(steps=20, inner_steps=4, outer=NESTEROV, workers=[0, 1, 2, 3])[0])


def test_d5_without_inner_learning_the_anchor_does_not_move() -> None:
    assert torch.equal(train(steps=20, inner_steps=4, outer=NESTEROV, inner_lr=0.0)[0], torch.zeros(N))


@pytest.mark.parametrize("num_workers", [2, 4])
def test_d7_identical_workers_are_one_worker(num_workers: int) -> None:
    alone = train(steps=20, inner_steps=4, outer=NESTEROV, workers=[2])[0]
    assert torch.equal(train(steps=20, inner_steps=4, outer=NESTEROV, workers=[2] * num_workers)[0], alone)


def test_s1_one_fragment_without_overlap_is_diloco_to_the_bit() -> None:
    """Algorithm 1 of DiLoCo in numpy, which rounds each operation once, against the parts with alpha = 0."""
    anchor, buffer, lr, mu = np.zeros(N, np.float32), np.zeros(N, np.float32), np.float32(0.7), np.float32(0.9)
    for r in range(8):
        delta = np.zeros(N, np.float32)
        for worker in range(M):
            theta = torch.from_numpy(anchor.copy())
            for h in range(5):
                theta -= 0.05 * gradient(theta, worker, r * 5 + h)
            delta = delta + np.float32(1 / M) * (anchor - theta.numpy())
        buffer = mu * buffer + delta
        anchor = anchor - lr * (delta + mu * buffer)
    result, live, _ = train(steps=40, inner_steps=5, outer=NESTEROV, alpha=0.0)
    assert result.numpy().tobytes() == anchor.tobytes()
    assert all(torch.equal(theta, result) for theta in live)


def test_fragments_sent_at_the_same_steps_do_what_one_does() -> None:
    one = train(steps=12, inner_steps=1, outer=NESTEROV, num_fragments=1)
    three = train(steps=12, inner_steps=1, outer=NESTEROV, num_fragments=3)
    assert torch.equal(one[0], three[0])
    assert all(torch.equal(a, b) for a, b in zip(one[1], three[1], strict=True))


def test_s2_alpha_1_is_isolated_training() -> None:
    anchor, live, _ = train(steps=20, inner_steps=5, outer=NESTEROV, alpha=1.0)
    for worker, theta in enumerate(live):
        isolated = torch.zeros(N)
        for step in range(20):
            isolated -= 0.05 * gradient(isolated, worker, step)
        assert torch.equal(theta, isolated)
    assert not torch.equal(anchor, torch.zeros(N)), "the anchor still moves"
    assert not torch.equal(anchor, train(steps=20, inner_steps=5, outer=NESTEROV)[0])


def test_s3_each_fragment_is_sent_once_per_period() -> None:
    _, _, sends = train(steps=60, inner_steps=6, outer=NESTEROV, num_fragments=3)
    for fragment in range(3):
        assert [step for step, f in sends if f == fragment] == list(range(2 + 2 * fragment, 61, 6))
    assert len({step for step, _ in sends}) == len(sends), "one fragment at a time"


def test_s3_steps_are_counted_from_1() -> None:
    due = [s for s in range(0, 301) if is_due(s, fragment=0, num_fragments=1, inner_steps=100)]
    assert due == [100, 200, 300]


def test_s3_a_period_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"inner_steps = 100 is not a multiple of.*num_fragments = 3: set it to 99"):
        is_due(1, fragment=0, num_fragments=3, inner_steps=100)
    with pytest.raises(IndexError, match="fragment 3 does not exist"):
        is_due(1, fragment=3, num_fragments=3, inner_steps=99)


def test_fragments_agree_on_all_workers_after_their_synchronisation() -> None:
    anchor, live, sends = train(steps=12, inner_steps=6, outer=Average(), num_fragments=3)
    assert sends[-1] == (12, 2)
    last = slice(2 * N // 3, N)
    assert all(torch.equal(theta[last], anchor[last]) for theta in live)
    assert not torch.equal(live[0], live[1]), "the other fragments have moved on"
