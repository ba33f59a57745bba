"""The tensors of a member that gossips: what it offers, what it keeps, what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from strategies.fragments import TensorSpec, plan_fragments
from strategies.gossip import NoLoCo
from workers.gossip_replica import Averaging, GossipReplica, GossipStep, PayloadDamaged

VALUES = 6
(SPEC,) = plan_fragments(
    [TensorSpec(name="w", shape=(VALUES,))], num_fragments=1, pattern="sequential", chunk_values=64
)


def replicas(num: int, step: GossipStep) -> list[GossipReplica]:
    return [GossipReplica(spec=SPEC, tensors={"w": torch.zeros(VALUES)}, step=step) for _ in range(num)]


def meet(group: list[GossipReplica]) -> None:
    shared = [replica.parse(replica.publish()) for replica in group]
    for own, replica in enumerate(group):
        replica.apply(shared, own)


def test_training_during_an_exchange_is_kept() -> None:
    a, b = replicas(2, NoLoCo())
    a.tensors["w"] -= 1.0
    shared = [replica.parse(replica.publish()) for replica in (a, b)]
    a.tensors["w"] -= 0.25  # during the exchange
    a.apply(shared, 0)
    b.apply(shared, 1)
    assert torch.allclose(a.anchor_N, torch.full((VALUES,), -0.35)) and torch.equal(a.anchor_N, b.anchor_N)
    assert torch.allclose(a.tensors["w"], a.anchor_N - 0.25)
    assert torch.allclose(a.displacement(), torch.full((VALUES,), 0.25))


def test_the_mean_of_all_members_follows_one_heavy_ball_whatever_the_pairs() -> None:
    torch.manual_seed(1)
    members = replicas(4, NoLoCo())
    mean, momentum = torch.zeros(VALUES), torch.zeros(VALUES)
    for groups in (([0, 1], [2, 3]), ([0, 2], [1, 3]), ([0, 3], [1, 2])):
        for replica in members:
            replica.tensors["w"].sub_(torch.randn(VALUES))
        momentum = 0.5 * momentum + 0.7 * torch.stack([r.displacement() for r in members]).mean(0)
        mean = mean - momentum
        for group in groups:
            meet([members[i] for i in group])
        torch.testing.assert_close(torch.stack([r.anchor_N for r in members]).mean(0), mean)


def test_averaging_is_d_sgd() -> None:
    a, b = replicas(2, Averaging())
    a.tensors["w"] += 1.0
    b.tensors["w"] += 3.0
    meet([a, b])
    assert torch.equal(a.tensors["w"], torch.full((VALUES,), 2.0)) and torch.equal(b.tensors["w"], a.tensors["w"])
    assert a.num_bytes == 4 * VALUES, "parameters are all that is sent"
    assert not a.momentum_N.any() and not a.displacement().any()


@pytest.mark.parametrize("cut", [4, 4 * VALUES, 8 * VALUES])
def test_a_payload_of_another_size_is_refused(cut: int) -> None:
    (replica,) = replicas(1, NoLoCo())
    data = replica.publish()
    assert len(data) == replica.num_bytes
    for wrong in (data[:-cut], np.concatenate([data, data[:cut]])):
        with pytest.raises(PayloadDamaged, match=f"expected {8 * VALUES}"):
            replica.parse(wrong)
