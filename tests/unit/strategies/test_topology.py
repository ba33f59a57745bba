"""Mixing matrices, schedules of pairs, and the refusal of those that cannot converge."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from strategies import topology as top
from strategies.errors import SettingError


def names(num: int) -> list[str]:
    return [f"island-{rank:04d}" for rank in range(num)]


@pytest.mark.parametrize("num", [2, 3, 4, 6, 8, 16, 33])
def test_every_matrix_is_doubly_stochastic_and_keeps_the_mean(num: int) -> None:
    values = np.random.default_rng(num).normal(size=(num, 5))
    members = names(num)
    matrices = [
        top.ring(num),
        top.complete(num),
        *(top.one_peer_exponential(num, step) for step in range(7)),
        *(top.group_matrix(members, top.random_groups(members, seed=1, round_=r)) for r in range(5)),
        *(top.group_matrix(members, top.exponential_pairs(members, round_=r)) for r in range(5)),
        *(top.group_matrix(members, top.ring_pairs(members, round_=r)) for r in range(2)),
    ]
    for matrix in matrices:
        top.check_stochastic(matrix)
        assert np.allclose((matrix @ values).mean(0), values.mean(0))
        shrunk = np.linalg.norm(matrix @ values - values.mean(0))
        assert shrunk <= np.linalg.norm(values - values.mean(0)) * top.contraction([matrix]) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("num", [2, 4, 8, 16])
def test_one_peer_exponential_is_exact_after_log2_n_rounds_to_the_bit(num: int) -> None:
    period, members = top.period_of_exponential(num), names(num)
    directed = [top.one_peer_exponential(num, step) for step in range(period)]
    pairs = [top.group_matrix(members, top.exponential_pairs(members, round_=r)) for r in range(period)]
    for schedule in (directed, pairs):
        assert (np.linalg.multi_dot([*reversed(schedule), np.eye(num)]) == 1.0 / num).all()
        assert top.check_converges(schedule) == 1.0


def test_one_peer_exponential_is_not_exact_for_six() -> None:
    schedule = [top.one_peer_exponential(6, step) for step in range(3)]
    assert np.abs(np.linalg.multi_dot(schedule) - 1 / 6).max() == pytest.approx(0.0833, abs=1e-3)
    assert 0.0 < top.check_converges(schedule) < 1.0
    members = names(6)
    pairs = [top.group_matrix(members, top.exponential_pairs(members, round_=r)) for r in range(3)]
    assert 0.0 < top.check_converges(pairs) < 1.0


def test_the_gap_of_a_ring_is_the_one_of_the_formula_and_shrinks_with_its_square() -> None:
    for num in (4, 8, 16, 32):
        expected = 1 - max(abs(1 + 2 * np.cos(2 * np.pi * k / num)) for k in range(1, num)) / 3
        assert top.spectral_gap([top.ring(num)]) == pytest.approx(expected)
    ratio = top.spectral_gap([top.ring(16)]) / top.spectral_gap([top.ring(32)])
    assert 3.8 < ratio < 4.0


@pytest.mark.parametrize(("num", "size"), [(8, 2), (9, 2), (9, 4), (12, 3)])
def test_the_expected_gap_is_what_many_random_rounds_show(num: int, size: int) -> None:
    members = names(num)
    groups = [top.random_groups(members, seed=5, round_=r, size=size) for r in range(4000)]
    mean = sum(top.group_matrix(members, g) for g in groups) / len(groups)
    measured = 1 - np.linalg.svd(mean - 1 / num, compute_uv=False)[0]
    assert measured == pytest.approx(top.expected_gap(num, size), abs=0.03)


@pytest.mark.parametrize(("num", "size"), [(2, 2), (7, 2), (8, 2), (11, 4), (9, 4), (1024, 2)])
def test_groups_are_disjoint_complete_and_the_same_for_everybody(num: int, size: int) -> None:
    members = names(num)
    for round_ in range(3):
        groups = top.random_groups(members, seed=3, round_=round_, size=size)
        seen = [name for group in groups for name in group]
        assert len(seen) == len(set(seen)) and set(seen) <= set(members)
        assert num - len(seen) <= 1, "at most one is left over"
        assert all(2 <= len(group) <= size for group in groups)
        assert groups == top.random_groups(members[::-1], seed=3, round_=round_, size=size)


def test_everybody_meets_everybody_and_is_left_out_in_turn() -> None:
    members, met, out = names(7), Counter[frozenset[str]](), Counter[str]()
    for round_ in range(400):
        groups = top.random_groups(members, seed=0, round_=round_)
        met.update(frozenset(group) for group in groups)
        out.update(set(members) - {name for group in groups for name in group})
    assert len(met) == 21 and len(out) == 7
    assert max(out.values()) < 2 * min(out.values())


@pytest.mark.parametrize("keep_gap", [0.25, 0.5, 1.0])
def test_near_pairs_are_near_and_the_gap_is_kept(keep_gap: float) -> None:
    members = names(12)
    regions = {name: f"region-{rank % 2}" for rank, name in enumerate(members)}
    rounds = range(2000)
    schedule = [top.near_groups(members, regions=regions, seed=1, round_=r, keep_gap=keep_gap) for r in rounds]
    far = sum(regions[a] != regions[b] for groups in schedule for a, b in groups) / (6 * len(schedule))
    assert far == pytest.approx(keep_gap * 6 / 11, abs=0.03), "without regions 6 of 11 pairs would be far ones"
    mean = sum(top.group_matrix(members, groups) for groups in schedule) / len(schedule)
    measured = 1 - np.linalg.svd(mean - 1 / 12, compute_uv=False)[0]
    assert measured > keep_gap * top.expected_gap(12, 2) - 0.02
    assert measured > top.expected_gap(12, 2, far_share=keep_gap) - 0.02
    assert sum(top.is_far_round(r, keep_gap) for r in range(100)) == 100 * keep_gap


def test_those_left_over_in_their_regions_meet() -> None:
    members = names(4)
    regions = dict(zip(members, "abcd", strict=True))
    for round_ in range(4):
        assert len(top.near_groups(members, regions=regions, seed=0, round_=round_)) == 2


def test_what_cannot_converge_is_refused_with_the_reason() -> None:
    two_rings = np.kron(np.eye(2), top.ring(3))
    swap = np.array([[0.0, 1.0], [1.0, 0.0]])
    only_in = top.group_matrix(names(4), ((names(4)[0], names(4)[1]),))
    refused = {
        "not connected: rank 0 and ranks 3, 4, 5": [two_rings],
        "swap values and never average": [swap],
        "row 0 of the mixing matrix sums to 1.1": [np.array([[0.6, 0.5], [0.4, 0.5]])],
        "column 0 of the mixing matrix sums to 0.9": [np.array([[0.5, 0.5], [0.4, 0.6]])],
        "negative weight: row 0, column 1": [np.array([[1.5, -0.5], [-0.5, 1.5]])],
        "is square": [np.ones((2, 3))],
        "not finite": [np.full((2, 2), np.nan)],
        "without a round": [],
        "rank 0 and ranks 2, 3": [only_in],
        "matrices of 2 and of 3": [top.ring(2), top.ring(3)],
    }
    for reason, matrices in refused.items():
        with pytest.raises(SettingError, match=reason):
            top.check_converges(matrices)
    one_way = np.array([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])
    assert top.unreachable([one_way]) == (1, 2), "who only listens, or is only listened to, is not connected"


def test_too_few_members_and_wrong_settings_are_refused() -> None:
    one, two = names(1), names(2)
    calls = {
        "a group of 2 needs at least 2 members, there is 1": lambda: top.random_groups(one, seed=0, round_=0),
        "a group of 4 needs at least 4": lambda: top.random_groups(two, seed=0, round_=0, size=4),
        "nobody would meet anybody": lambda: top.random_groups(two, seed=0, round_=0, size=1),
        "an exponential graph needs": lambda: top.exponential_pairs(one, round_=0),
        "regions never meet": lambda: top.near_groups(two, regions={}, seed=0, round_=0, keep_gap=0.0),
        "no region is known of island-0001": lambda: top.near_groups(two, regions={two[0]: "a"}, seed=0, round_=0),
        "is twice": lambda: top.group_matrix(two, ((two[0], two[1]), (two[0],))),
        "is no member": lambda: top.group_matrix(two, (("stranger", two[0]),)),
    }
    for reason, call in calls.items():
        with pytest.raises(SettingError, match=reason):
            call()
