"""Rules that are decided by scalars and carried out part by part do what they do to whole vectors."""

from __future__ import annotations

import math

import pytest
import torch

from strategies import aggregate as agg
from strategies import robust
from workers.robust import measure_pieces, mix_pieces

NUM, VALUES = 7, 96
PARTS = [slice(0, 32), slice(32, 80), slice(80, 96)]
EQUAL = [1.0 / NUM] * NUM


def vectors(seed: int = 0, num: int = NUM) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(VALUES, generator=generator)
    return [common + 0.5 * torch.randn(VALUES, generator=generator) for _ in range(num)]


def run(rule: robust.Rule, updates: list[torch.Tensor], **settings: int) -> torch.Tensor:
    """As an exchange does it: lengths, distances part by part, one decision, results part by part."""
    lengths, coefficients = agg.norms(updates), [1.0 / len(updates)] * len(updates)
    wanted = robust.to_measure(rule, lengths)
    squares = None
    if wanted is not None:
        squares = robust.whole_squares([measure_pieces([u[p] for u in updates], wanted) for p in PARTS])
    decision = robust.decide(rule, coefficients, lengths, squares, **{"num_wrong": 2, **settings})
    parts = []
    for part in PARTS:
        pieces = [u[part] for u in updates]
        if decision.recipe is None:
            parts.append(agg.weighted_sum(pieces, decision.weights))
        else:
            parts.append(mix_pieces(pieces, decision.recipe))
    return torch.cat(parts)


def reference(rule: robust.Rule, updates: list[torch.Tensor], num_wrong: int = 2) -> torch.Tensor:
    clipped = agg.clip_to_median(updates)
    match rule:
        case "mean":
            return agg.weighted_sum(updates, EQUAL)
        case "clip":
            return agg.weighted_sum(clipped, EQUAL)
        case "median":
            return agg.coordinate_median(clipped)
        case "trimmed":
            return agg.trimmed_mean(clipped, num_wrong)
        case "krum":
            return agg.multi_krum(clipped, num_wrong)
        case "nnm":
            return agg.trimmed_mean(agg.nearest_mixing(clipped, num_wrong), num_wrong)
        case "centered_clip":
            return agg.centered_clip(clipped)


@pytest.mark.parametrize("rule", ["mean", "clip", "median", "trimmed", "krum", "nnm", "centered_clip"])
@pytest.mark.parametrize("seed", range(5))
def test_parts_give_what_the_whole_gives(rule: robust.Rule, seed: int) -> None:
    updates = vectors(seed)
    updates[seed] = updates[seed] * 3.0
    torch.testing.assert_close(run(rule, updates), reference(rule, updates), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["median", "trimmed", "krum", "nnm", "centered_clip"])
def test_two_far_vectors_do_not_carry_the_result_away(rule: robust.Rule) -> None:
    updates = vectors(3)
    honest = torch.stack(updates[2:]).mean(0)
    updates[0] = updates[1] = -10.0 * honest
    assert torch.dot(run(rule, updates), honest) > 0.5 * honest.square().sum()
    plain = run("mean", updates)
    assert torch.dot(plain, honest) < 0, "the attack would have worked"


def test_buckets_are_averaged_before_the_rule() -> None:
    updates = vectors(1, num=6)
    whole = run("median", updates, bucket=2, num_wrong=1)
    clipped = agg.clip_to_median(updates)
    torch.testing.assert_close(whole, agg.coordinate_median(agg.bucket_means(clipped, 2, seed=0)), rtol=1e-4, atol=1e-5)


def test_with_too_few_contributions_a_rule_bears_fewer_and_says_so() -> None:
    lengths, squares = [1.0] * 5, [[float(i != j) for j in range(5)] for i in range(5)]
    decision = robust.decide("krum", [0.2] * 5, lengths, squares, num_wrong=2)
    assert "5 contributions bear 1 wrong ones, not 2" in decision.why
    assert sorted(decision.weights) == pytest.approx([0.0] + [0.25] * 4)


def test_distances_of_mixtures_are_those_of_the_mixed_vectors() -> None:
    updates = vectors(5)
    squares = agg.pairwise_squares(updates)
    a, b = torch.softmax(torch.arange(7.0), 0).tolist(), [1 / 7] * 7
    mixed = agg.weighted_sum(updates, a) - agg.weighted_sum(updates, b)
    assert robust.affine_square(a, b, squares) == pytest.approx(float(mixed.square().sum()), rel=1e-4)


@pytest.mark.parametrize(
    ("lengths", "steps", "refused"),
    [
        ({"a": 1.0, "b": 1.1, "c": 10.0}, {"a": 8, "b": 8, "c": 8}, {"c"}),
        ({"a": 1.0, "b": 1.1, "c": 3.9}, {"a": 8, "b": 8, "c": 8}, set()),
        ({"a": 1.0, "b": 1.1, "c": 10.0}, {"a": 8, "b": 8, "c": 32}, set()),  # late, with the work of four rounds
        ({"a": 1.0, "b": 1.1, "c": math.nan}, {"a": 8, "b": 8, "c": 8}, {"c"}),
        ({"a": 1.0, "c": 100.0}, {"a": 8, "c": 8}, set()),  # of two nobody can be outvoted
        ({"a": 1.0, "b": math.nan, "c": math.nan}, {"a": 8, "b": 8, "c": 8}, set()),
        ({"a": 0.0, "b": 0.0, "c": 1.0}, {"a": 8, "b": 8, "c": 8}, set()),
    ],
)
def test_who_is_too_long(lengths: dict[str, float], steps: dict[str, int], refused: set[str]) -> None:
    found = robust.too_long(lengths, steps, 4.0)
    assert set(found) == refused
    assert all("median" in why or "finite" in why for why in found.values())
