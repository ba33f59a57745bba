"""Rules that are decided by scalars and carried out part by part do what they do to whole vectors."""

from __future__ import annotations

import math

import pytest
import torch

from strategies import aggregate as agg
from strategies import robust
from strategies.outer import Average
from strategies.outer_choice import mean_of_results
from strategies.outer_sgd import HeavyBall
from workers.robust import measure_pieces, mix_pieces

NUM, VALUES = 7, 96
PARTS = [slice(0, 32), slice(32, 80), slice(80, 96)]
EQUAL = [1.0 / NUM] * NUM


def vectors(seed: int = 0, num: int = NUM) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(VALUES, generator=generator)
    return [common + 0.5 * torch.randn(VALUES, generator=generator) for _ in range(num)]


def run(
    rule: robust.Rule, updates: list[torch.Tensor], clip_times: float = 1.0, total: float = 1.0, **settings: int
) -> torch.Tensor:
    """As an exchange does it: lengths, distances part by part, one decision, results part by part."""
    lengths, coefficients = agg.norms(updates), [total / len(updates)] * len(updates)
    wanted = robust.to_measure(rule, lengths, clip_times=clip_times)
    squares = None
    if wanted is not None:
        squares = robust.whole_squares([measure_pieces([u[p] for u in updates], wanted) for p in PARTS])
    settings = {"num_wrong": 2, **settings}
    decision = robust.decide(rule, coefficients, lengths, squares, clip_times=clip_times, **settings)
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
            kept = sum(robust.clip_factors(agg.norms(updates))) / len(updates)
            return agg.weighted_sum(clipped, EQUAL) / kept
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


@pytest.mark.parametrize("rule", ["mean", "clip", "median", "trimmed", "krum", "nnm", "centered_clip"])
def test_half_the_weight_is_half_the_result(rule: robust.Rule) -> None:
    updates = vectors(6)
    torch.testing.assert_close(2.0 * run(rule, updates, total=0.5), run(rule, updates))


def test_with_a_wider_limit_who_is_below_it_counts_in_full() -> None:
    updates = vectors(4)
    updates[2] = updates[2] * 2.0
    torch.testing.assert_close(run("clip", updates, clip_times=3.0), agg.weighted_sum(updates, EQUAL))
    torch.testing.assert_close(run("median", updates, clip_times=3.0), agg.coordinate_median(updates))
    torch.testing.assert_close(run("krum", updates, clip_times=3.0), agg.multi_krum(updates, 2))
    assert not torch.allclose(run("clip", updates), run("clip", updates, clip_times=3.0), rtol=1e-3)
    far = [*updates[:-1], updates[-1] * 30.0]
    limit = 3.0 * sorted(agg.norms(far))[len(far) // 2]
    length, loose = float(run("clip", far, clip_times=3.0).norm()), float(run("mean", far).norm())
    assert length < limit < loose, "far above it nobody is"


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


def test_what_comes_in_one_exchange_moves_the_result_by_its_share_of_the_radius_from_history() -> None:
    """The centre is not of this exchange: a contribution moves the first step by 2 / n of the radius at most."""
    updates, center = vectors(4), vectors(9, num=1)[0]
    first = agg.centered_clip(updates, center_N=center, iterations=1)
    radius = float(torch.stack([(u - center).norm() for u in updates]).median())
    for seed in range(5):
        changed = [*updates[:-1], vectors(seed + 20, num=1)[0] * 0.5]
        limit = float(torch.stack([(u - center).norm() for u in changed]).median())
        moved = float((agg.centered_clip(changed, center_N=center, iterations=1) - first).norm())
        slack = abs(limit - radius)  # the median distance is another one as well
        assert moved <= 2.0 * max(radius, limit) / NUM + slack + 1e-5


def test_the_mean_of_results_is_what_the_momentum_keeps() -> None:
    outer, buffer = HeavyBall(lr=0.5, momentum=0.8), torch.zeros(3)
    results = [torch.full((3,), value) for value in (1.0, 2.0, 4.0)]
    for result in results:
        _, (buffer,) = outer.step(torch.zeros(3), (buffer,), result, scale=None, version=0, progress=0.0)
    kept = mean_of_results(outer, (buffer,), slice(0, 2))
    torch.testing.assert_close(kept, torch.full((2,), 0.2 * (4.0 + 0.8 * 2.0 + 0.64 * 1.0)))
    with pytest.raises(TypeError, match="Average keeps no mean"):
        mean_of_results(Average(), (), slice(None))


def centered(updates: list[torch.Tensor], center: torch.Tensor | None) -> torch.Tensor:
    """CenteredClip in two parts, as owners do it."""
    lengths, total = agg.norms(updates), [1.0 / len(updates)] * len(updates)
    wanted = robust.to_measure("centered_clip", lengths, history=center is not None)
    assert wanted is not None
    cuts = (slice(0, 77), slice(77, None))
    parts = [([u[cut] for u in updates], center[cut] if center is not None else None) for cut in cuts]
    squares = robust.whole_squares([measure_pieces(pieces, wanted, kept) for pieces, kept in parts])
    decision = robust.decide(
        "centered_clip", total, lengths, squares, num_wrong=2, history=center is not None
    )  # fmt: skip
    assert decision.recipe is not None
    return torch.cat([mix_pieces(pieces, decision.recipe, kept) for pieces, kept in parts])


def test_history_gives_what_centered_clip_with_a_centre_gives() -> None:
    updates, center = vectors(4, num=6), vectors(9, num=1)[0]
    expected = agg.centered_clip(agg.clip_to_median(updates), center_N=center)
    torch.testing.assert_close(centered(updates, center), expected, rtol=1e-4, atol=1e-5)
