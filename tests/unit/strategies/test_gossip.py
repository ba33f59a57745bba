"""NoLoCo and D-SGD: equal to plain torch, the mean is a heavy ball, the stability bound is where it is said to be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from strategies import gossip
from strategies import topology as top
from strategies.errors import SettingError
from strategies.gossip import NoLoCo


def draw(num: int, values: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(num, values, generator=generator))


def ranks(groups: top.Groups) -> list[list[int]]:
    return [[int(name) for name in group] for group in groups]


def test_a_step_equals_plain_torch_to_the_bit_on_both_sides() -> None:
    rule = NoLoCo()
    anchors, moves = draw(2, 70_001, 1), draw(2, 70_001, 2)
    momenta = draw(2, 70_001, 3)
    for own in (0, 1):
        got, momentum = rule.step(anchors, moves, own=own, momentum_N=momenta[own])
        half, seven = torch.tensor(0.5), torch.tensor(0.7)
        mean = moves[0] * half + moves[1] * half
        pull = anchors[own] - (anchors[0] + (anchors[1] - anchors[0]) * half)
        expected = momenta[own] * half + mean * seven + pull * seven
        assert torch.equal(momentum, expected)
        assert torch.equal(got, anchors[own] - expected)


def test_the_sign_is_the_papers() -> None:
    # m <- a m + b mean(theta - phi) + c (mean(phi) - phi); phi <- phi + m.
    phi, theta = draw(2, 9, 4), draw(2, 9, 5)
    rule = NoLoCo(alpha=0.5, beta=0.6, gamma=0.8)
    got, _ = rule.step(phi, [p - t for p, t in zip(phi, theta, strict=True)], own=1, momentum_N=torch.zeros(9))
    m = 0.6 * ((theta[0] - phi[0]) + (theta[1] - phi[1])) / 2 + 0.8 * ((phi[0] + phi[1]) / 2 - phi[1])
    torch.testing.assert_close(got, phi[1] + m)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_the_mean_of_all_members_is_a_heavy_ball_whatever_the_groups(size: int) -> None:
    num, rule = 9 if size == 3 else 8, NoLoCo()
    phi = [v.double().float() for v in draw(num, 11, 6)]
    momenta = [torch.zeros(11) for _ in range(num)]
    mean, ball = torch.stack(phi).mean(0), torch.zeros(11)
    members = [str(rank) for rank in range(num)]
    for round_ in range(12):
        moves = draw(num, 11, 100 + round_)
        ball = 0.5 * ball + 0.7 * torch.stack(moves).mean(0)
        mean = mean - ball
        updated = list(zip(phi, momenta, strict=True))
        for group in ranks(top.random_groups(members, seed=1, round_=round_, size=size)):
            a, d = [phi[i] for i in group], [moves[i] for i in group]
            for own, i in enumerate(group):
                updated[i] = rule.step(a, d, own=own, momentum_N=momenta[i])
        phi, momenta = [p for p, _ in updated], [m for _, m in updated]
        torch.testing.assert_close(torch.stack(phi).mean(0), mean, rtol=1e-4, atol=1e-4)


def test_the_pull_sums_to_nothing_and_equal_anchors_are_not_pulled() -> None:
    phi, zeros = draw(2, 50, 7), [torch.zeros(50)] * 2
    moved = [NoLoCo().step(phi, zeros, own=i, momentum_N=zeros[0])[1] for i in (0, 1)]
    torch.testing.assert_close(moved[0], -moved[1])
    same = [phi[0], phi[0].clone()]
    assert torch.equal(NoLoCo().step(same, zeros, own=0, momentum_N=zeros[0])[0], phi[0])


def spread_after(alpha: float, gamma: float, size: int, rounds: int = 150, num: int = 128) -> float:
    """Monte-Carlo with the bare recursion: what the rule itself refuses to run."""
    phi = torch.stack(draw(num, 8, 8))
    m = torch.zeros_like(phi)
    for round_ in range(rounds):
        order = torch.tensor(ranks(top.random_groups([str(i) for i in range(num)], seed=2, round_=round_, size=size)))
        flat, anchors = order.flatten(), phi[order]
        m[flat] = alpha * m[flat] + gamma * (anchors - anchors.mean(1, keepdim=True)).flatten(0, 1)
        phi = phi - m
    return float((phi - phi.mean(0)).square().mean())


@pytest.mark.parametrize(("alpha", "size"), [(0.5, 2), (0.7, 2), (0.9, 2), (0.7, 4)])
def test_members_come_together_inside_the_bound_and_drift_apart_outside(alpha: float, size: int) -> None:
    bound = gossip.largest_gamma(alpha, size)
    assert spread_after(alpha, 0.8 * bound, size) < 1.0
    assert spread_after(alpha, 1.25 * bound, size) > 10.0


def test_the_bound_is_enforced_with_the_reason() -> None:
    assert gossip.largest_gamma(0.5) == pytest.approx(1.5)
    assert gossip.largest_gamma(0.9) == pytest.approx(0.38)
    with pytest.raises(SettingError, match=r"gamma = 0.7 with alpha = 0.9 in groups of 2: members drift apart.*0\.38"):
        NoLoCo(alpha=0.9, gamma=0.7)
    with pytest.raises(SettingError, match="never come together"):
        NoLoCo(gamma=0.0)
    with pytest.raises(SettingError, match="heavy ball, which is stable between 0 and 3"):
        NoLoCo(beta=3.1)
    with pytest.raises(SettingError, match="alpha = 1"):
        NoLoCo(alpha=1.0)
    with pytest.raises(SettingError, match="group_size = 1"):
        NoLoCo(group_size=1)
    NoLoCo(alpha=0.7, gamma=1.2, group_size=4)
    with pytest.raises(SettingError, match="members drift apart"):
        NoLoCo(alpha=0.7, gamma=1.2, group_size=2)


def test_weights_count_displacements_and_not_anchors() -> None:
    phi, moves, zero = draw(2, 5, 9), draw(2, 5, 10), torch.zeros(5)
    got, momentum = NoLoCo().step(phi, moves, own=0, momentum_N=zero, weights=[0.75, 0.25])
    torch.testing.assert_close(momentum, 0.7 * (0.75 * moves[0] + 0.25 * moves[1]) + 0.7 * (phi[0] - phi[1]) / 2)
    torch.testing.assert_close(got, phi[0] - momentum)
    with pytest.raises(ValueError, match="with sum 1"):
        NoLoCo().step(phi, moves, own=0, momentum_N=zero, weights=[0.75, 0.75])
    with pytest.raises(ValueError, match="group of 1"):
        NoLoCo().step(phi[:1], moves[:1], own=0, momentum_N=zero)


def test_mixing_equals_the_matrix_product() -> None:
    values = draw(6, 40, 11)
    for matrix in (top.ring(6), top.one_peer_exponential(6, 1), top.complete(6)):
        got = torch.stack(gossip.gossip_steps(values, [matrix]))
        torch.testing.assert_close(got, torch.tensor(matrix, dtype=torch.float32) @ torch.stack(values))


def test_several_steps_contract_by_the_gap_and_exponential_ones_to_the_mean() -> None:
    values = draw(8, 1000, 12)
    mean = torch.stack(values).mean(0)
    apart = float((torch.stack(values) - mean).norm())
    after = gossip.gossip_steps(values, [top.ring(8)] * 5)
    assert float((torch.stack(after) - mean).norm()) <= apart * top.contraction([top.ring(8)]) ** 5 * 1.0001
    exact = gossip.gossip_steps(values, [top.one_peer_exponential(8, step) for step in range(3)])
    torch.testing.assert_close(torch.stack(exact), mean.expand(8, -1))


def test_the_full_merge_of_equal_replicas_is_the_identity() -> None:
    value = draw(1, 30, 13)[0]
    for num in (1, 2, 7, 8):
        assert torch.equal(gossip.group_mean([value] * num), value)
    values = draw(7, 30, 15)
    torch.testing.assert_close(gossip.group_mean(values), torch.stack(values).mean(0))


def test_wrong_matrices_are_refused_before_anything_is_mixed() -> None:
    with pytest.raises(SettingError, match="sums to"):
        gossip.gossip_steps(draw(2, 3, 14), [top.ring(2) * 0.9])
    with pytest.raises(SettingError, match="of 3 members for 2"):
        gossip.gossip_steps(draw(2, 3, 14), [top.ring(3)])
