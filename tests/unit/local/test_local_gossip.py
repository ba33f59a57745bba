"""Gossip runs in one process: no all-reduce, pairs that commit all or none, an exact ledger, a full merge."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from orchestrator.gossip_local import GossipRun, GossipSettings
from orchestrator.pairing import PairRecord, RosterRecord
from strategies.errors import SettingError
from strategies.fragments import TensorSpec, plan_fragments
from strategies.gossip import NoLoCo
from tests.small_run import make_pack, small_config
from workers import ranges
from workers.gossip_replica import Averaging, GossipReplica, PayloadDamaged

ROUND_TOKENS = 8 * 4 * 16


@contextmanager
def gossip(tmp_path: Path, islands: int, rounds: int, **settings: object) -> Iterator[GossipRun]:
    tokens = f"train.tokens={islands * rounds * ROUND_TOKENS}"
    config = small_config(make_pack(tmp_path), f"run.islands={islands}", tokens)
    run = GossipRun(config, GossipSettings(inner_steps=8, **settings))  # type: ignore[arg-type]
    yield run
    run.close()


def check_ledger(run: GossipRun) -> None:
    assert run.committed == ((0, run.total_samples),), "every sample once"
    assert run.next_position == run.total_samples and run.free == ()


@pytest.mark.parametrize(
    ("step", "topology"),
    [("noloco", "random"), ("gossip", "exponential")],
)
def test_members_train_meet_in_pairs_and_merge(tmp_path: Path, step: str, topology: str) -> None:
    with gossip(tmp_path, 4, 4, step=step, topology=topology) as run:
        before = run.members["island-0"].replica.digest()
        run.turn()
        run.run()
        check_ledger(run)
        assert run.merged() and run.members["island-0"].replica.digest() != before
        pairs = [row for row in run.rows if isinstance(row, PairRecord)]
        sizes = {len(row.spans) for row in pairs[:-1]}
        assert sizes == {2} and len(pairs[-1].spans) == 4, "pairs, and one full merge at the end"
        assert len(pairs) > 6
        loss = run.val_loss()
        assert loss < 5.2, loss


def test_a_scheduled_merge_makes_all_anchors_equal(tmp_path: Path) -> None:
    with gossip(tmp_path, 4, 6, merge_every=2) as run:
        merges = 0
        for _ in range(6 * 8 * 3):
            known = len(run.rows)
            run.turn()
            new = [row for row in run.rows[known:] if isinstance(row, PairRecord)]
            if any(len(row.spans) == 4 for row in new):
                merges += 1
                assert len({m.replica.digest() for m in run.alive()}) == 1
            elif new and len({m.replica.digest() for m in run.alive()}) == 1:
                raise AssertionError("a pair made all anchors equal")
            if run.is_done():
                break
        assert merges >= 2


@pytest.mark.parametrize("noticed", [True, False])
def test_a_dead_member_costs_its_partner_one_timeout_and_its_open_work_only(tmp_path: Path, noticed: bool) -> None:
    with gossip(tmp_path, 4, 7, pair_timeout_s=1.0) as run:
        while run.members["island-2"].watermark < 3 * 8 * 4:
            run.turn()
        for _ in range(3):
            run.turn()
        victim = run.members["island-2"]
        open_work = ranges.count(victim.leases) - victim.watermark
        run.kill("island-2", noticed=noticed)
        for _ in range(40):
            run.turn()
        if not noticed:
            assert run.longest_s <= 1.0 + 0.11, "one timeout, to one partner at a time"
            run.fence("island-2")
        run.spawn("island-2")
        run.run()
        assert run.counts["samples given back"] == open_work
        check_ledger(run)
        assert run.merged() and run.incarnations["island-2"] == 2
        last = [row for row in run.rows if isinstance(row, PairRecord)][-1]
        assert {str(span.member) for span in last.spans} == {"island-0.1", "island-1.1", "island-2.2", "island-3.1"}


def test_a_controller_that_restarts_reads_what_was_committed(tmp_path: Path) -> None:
    with gossip(tmp_path, 4, 6, pair_timeout_s=1.0) as run:
        for _ in range(5):
            for _ in range(11):
                run.turn()
            run.restart_controller()
        run.run()
        check_ledger(run)
        assert run.merged()


def test_near_peers_meet_more_often_and_far_ones_still_do(tmp_path: Path) -> None:
    regions = {f"island-{i}": "east" if i < 2 else "west" for i in range(4)}
    with gossip(tmp_path, 4, 8, topology="near", regions=regions, keep_gap=0.25) as run:
        run.run()
        pairs = [row.spans for row in run.rows if isinstance(row, PairRecord) and len(row.spans) == 2]
        near = [spans for spans in pairs if len({regions[s.member.name] for s in spans}) == 1]
        assert len(pairs) / 2 < len(near) < len(pairs)
    with pytest.raises(SettingError, match="no region is known of island-1"):
        GossipSettings(topology="near", regions={"island-0": "east"}).check(2)


def test_a_payload_that_is_damaged_is_in_no_average(tmp_path: Path) -> None:
    with gossip(tmp_path, 2, 6, pair_timeout_s=0.5) as run:
        while not any(isinstance(row, PairRecord) for row in run.rows):
            run.turn()
        sick = run.members["island-1"]
        fetch, wrong = sick.replica.publish, []

        def publish() -> object:
            data = fetch().copy()
            if len(wrong) < 2:
                wrong.append(len(data))
                return data[:-4]
            return data

        sick.replica.publish = publish  # type: ignore[method-assign,assignment]
        with pytest.raises(PayloadDamaged):
            while True:
                run.turn()


def test_training_during_an_exchange_is_kept() -> None:
    torch.manual_seed(0)
    (spec,) = plan_fragments([TensorSpec(name="w", shape=(6,))], num_fragments=1, pattern="sequential", chunk_values=64)
    tensors = [{"w": torch.zeros(6)} for _ in range(2)]
    a, b = (GossipReplica(spec=spec, tensors=t, step=NoLoCo()) for t in tensors)
    tensors[0]["w"] -= 1.0
    shared = [r.parse(r.publish()) for r in (a, b)]
    tensors[0]["w"] -= 0.25  # during the exchange
    a.apply(shared, 0, merge=False)
    b.apply(shared, 1, merge=False)
    assert torch.allclose(a.anchor_N, torch.full((6,), -0.35)) and torch.equal(a.anchor_N, b.anchor_N)
    assert torch.allclose(tensors[0]["w"], a.anchor_N - 0.25)
    assert torch.allclose(a.displacement(), torch.full((6,), 0.25))


def test_a_merge_is_the_step_of_the_mean() -> None:
    """Whatever the pairs were: the mean of all anchors follows one heavy ball, and the merge is its next step."""
    torch.manual_seed(1)
    (spec,) = plan_fragments([TensorSpec(name="w", shape=(5,))], num_fragments=1, pattern="sequential", chunk_values=64)
    replicas = [GossipReplica(spec=spec, tensors={"w": torch.zeros(5)}, step=NoLoCo()) for _ in range(4)]
    mean, momentum = torch.zeros(5), torch.zeros(5)
    for turn in range(4):
        for replica in replicas:
            replica.tensors["w"].sub_(torch.randn(5))
        moved = torch.stack([r.displacement() for r in replicas]).mean(0)
        momentum = 0.5 * momentum + 0.7 * moved
        mean = mean - momentum
        groups = ([0, 1], [2, 3]) if turn == 0 else ([0, 2], [1, 3]) if turn == 1 else ([0, 3], [1, 2])
        for group in groups if turn < 3 else ([0, 1, 2, 3],):
            shared = [replicas[i].parse(replicas[i].publish()) for i in group]
            for place, i in enumerate(group):
                replicas[i].apply(shared, place, merge=turn == 3)
        torch.testing.assert_close(torch.stack([r.anchor_N for r in replicas]).mean(0), mean)
    assert all(torch.equal(r.anchor_N, replicas[0].anchor_N) for r in replicas)


@pytest.mark.parametrize(
    ("islands", "settings", "reason"),
    [
        (4, {"gamma": 1.6}, "drift apart"),
        (4, {"alpha": 0.9}, "drift apart"),
        (4, {"topology": "star"}, "not known"),
        (4, {"step": "push-sum"}, "not known"),
        (4, {"group_size": 1}, "needs at least 2 members"),
        (2, {"group_size": 3}, "needs at least 3 members"),
        (4, {"topology": "ring", "group_size": 3}, "has pairs"),
        (1, {}, "needs at least 2 members"),
    ],
)
def test_what_cannot_converge_is_refused(islands: int, settings: dict[str, object], reason: str) -> None:
    with pytest.raises(SettingError, match=reason):
        GossipSettings(**settings).check(islands)  # type: ignore[arg-type]


def test_averaging_is_d_sgd() -> None:
    new, momentum = Averaging().step(
        [torch.tensor([1.0]), torch.tensor([3.0])], [torch.tensor([0.5]), torch.tensor([0.5])], own=0,
        momentum_N=torch.zeros(1),
    )  # fmt: skip
    assert new.item() == 1.5 and momentum.item() == 0.0


def test_rosters_come_before_what_they_allow(tmp_path: Path) -> None:
    with gossip(tmp_path, 3, 3) as run:
        run.run()
        rounds: set[int] = set()
        for row in run.rows:
            if isinstance(row, RosterRecord):
                rounds.add(row.round_)
            elif isinstance(row, PairRecord):
                assert row.round_ in rounds
        check_ledger(run)
