"""Robust rules: equal to references, their properties, and what each does to each attack."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from faults import attacks
from strategies import aggregate as agg
from strategies.errors import SettingError

N = 257


def draw(num: int, seed: int, shift: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(num, N, generator=generator) + shift)


def krum_by_definition(stacked: np.ndarray, num_wrong: int, kept: int) -> np.ndarray:
    num = len(stacked)
    distances = ((stacked[:, None] - stacked[None]) ** 2).sum(-1)
    scores = [sum(sorted(np.delete(distances[i], i))[: num - num_wrong - 2]) for i in range(num)]
    return stacked[np.argsort(scores, kind="stable")[:kept]].mean(0)


@pytest.mark.parametrize("num", [1, 2, 5, 8])
def test_the_median_equals_numpy(num: int) -> None:
    updates = draw(num, num)
    expected = np.median(torch.stack(updates).numpy(), axis=0)
    np.testing.assert_allclose(agg.coordinate_median(updates).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(("num", "wrong"), [(3, 1), (8, 2), (8, 0), (7, 3)])
def test_rules_equal_numpy(num: int, wrong: int) -> None:
    updates = draw(num, 10 * num + wrong)
    stacked = torch.stack(updates).double().numpy()
    ordered = np.sort(stacked, axis=0)[wrong : num - wrong]
    np.testing.assert_allclose(agg.trimmed_mean(updates, wrong), ordered.mean(0), rtol=1e-5, atol=1e-6)
    distances = ((stacked[:, None] - stacked[None]) ** 2).sum(-1)
    near = np.stack([stacked[np.argsort(row, kind="stable")[: num - wrong]].mean(0) for row in distances])
    got = torch.stack(agg.nearest_mixing(updates, wrong))
    np.testing.assert_allclose(got, near, rtol=1e-5, atol=1e-6)
    lengths = np.linalg.norm(stacked, axis=1)
    clipped = stacked * np.minimum(1, np.median(lengths) / lengths)[:, None]
    np.testing.assert_allclose(torch.stack(agg.clip_to_median(updates)), clipped, rtol=1e-5, atol=1e-6)
    if num >= 2 * wrong + 3:
        expected = krum_by_definition(stacked, wrong, num - wrong)
        np.testing.assert_allclose(agg.multi_krum(updates, wrong), expected, rtol=1e-5, atol=1e-6)
        single = krum_by_definition(stacked, wrong, 1)
        np.testing.assert_allclose(agg.multi_krum(updates, wrong, num_kept=1), single, rtol=1e-6)


def test_centered_clip_equals_numpy() -> None:
    updates, center, radius = draw(6, 3), draw(1, 4)[0], 7.0
    value = center.double().numpy()
    for _ in range(3):
        offsets = torch.stack(updates).double().numpy() - value
        lengths = np.linalg.norm(offsets, axis=1)
        value = value + (offsets * np.minimum(1, radius / lengths)[:, None]).mean(0)
    got = agg.centered_clip(updates, center_N=center, radius=radius)
    np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-6)


RULES: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "median": agg.coordinate_median,
    "trimmed_mean": lambda u: agg.trimmed_mean(u, 2),
    "multi_krum": lambda u: agg.multi_krum(u, 2),
    "nearest + trimmed": lambda u: agg.trimmed_mean(agg.nearest_mixing(u, 2), 2),
    "clip + nearest + trimmed": lambda u: agg.trimmed_mean(agg.nearest_mixing(agg.clip_to_median(u), 2), 2),
    "centered_clip": agg.centered_clip,
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


@every_rule
def test_rules_repeat_to_the_bit_and_leave_their_input_alone(rule: Callable[[list[Tensor]], Tensor]) -> None:
    updates = draw(8, 5)
    before = [u.clone() for u in updates]
    first = rule(updates)
    assert torch.equal(first, rule(updates))
    assert all(torch.equal(a, b) for a, b in zip(updates, before, strict=True))
    assert first.dtype == torch.float32


@every_rule
def test_rules_do_not_care_about_the_order(rule: Callable[[list[Tensor]], Tensor]) -> None:
    updates, expected = draw(8, 6), rule(draw(8, 6))
    for shift in (1, 3, 5):
        torch.testing.assert_close(rule(updates[shift:] + updates[:shift]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["median", "trimmed_mean"])
def test_sorted_rules_do_not_care_to_the_bit_even_about_signed_zeros(name: str) -> None:
    updates = draw(8, 7)
    updates[0][:9], updates[1][:9], updates[2][:9] = 0.0, -0.0, -0.0
    expected = RULES[name](updates).numpy().tobytes()
    for order in itertools.islice(itertools.permutations(range(8)), 0, 40320, 4001):
        assert RULES[name]([updates[i] for i in order]).numpy().tobytes() == expected


@every_rule
def test_rules_move_with_a_translation_and_agree_with_the_unanimous(rule: Callable[[list[Tensor]], Tensor]) -> None:
    if rule is not RULES["clip + nearest + trimmed"]:  # norms are measured from zero
        shifted = rule([u + 3.0 for u in draw(8, 8)])
        torch.testing.assert_close(shifted, rule(draw(8, 8)) + 3.0, rtol=1e-4, atol=1e-4)
    same = draw(1, 9)[0]
    torch.testing.assert_close(rule([same] * 8), same)


def test_without_wrong_ones_the_rules_are_the_mean() -> None:
    updates = draw(7, 10)
    mean = torch.stack(updates).mean(0)
    torch.testing.assert_close(agg.trimmed_mean(updates, 0), mean)
    torch.testing.assert_close(agg.multi_krum(updates, 0), mean)
    torch.testing.assert_close(torch.stack(agg.nearest_mixing(updates, 0)), mean.expand(7, -1))
    torch.testing.assert_close(agg.centered_clip(updates, radius=math.inf, iterations=1), mean)
    assert torch.equal(agg.bucket_means(updates, 1, seed=1)[0], updates[agg.buckets(7, 1, seed=1)[0][0]])


@pytest.mark.parametrize("size", [1e9, -1e9, 3.0e38])
def test_trimmed_mean_and_median_stay_among_the_honest(size: float) -> None:
    honest = draw(6, 11)
    low, high = torch.stack(honest).amin(0), torch.stack(honest).amax(0)
    for wrong in ([torch.full((N,), size)] * 2, [torch.full((N,), size), torch.full((N,), -size)]):
        for got in (agg.trimmed_mean(honest + wrong, 2), agg.coordinate_median(honest + wrong)):
            assert ((low <= got) & (got <= high)).all()


def test_krum_takes_no_far_cluster_and_distances_of_parts_add_up() -> None:
    updates = [*draw(5, 12), *(torch.full((N,), 50.0) + i * 1e-3 for i in range(2))]
    squares = agg.pairwise_squares(updates)
    assert set(agg.krum_order(squares, 2)[:5]) == set(range(5))
    cut = [agg.pairwise_squares([u[part] for u in updates]) for part in (slice(0, 100), slice(100, N))]
    added = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(*cut, strict=True)]
    np.testing.assert_allclose(added, squares, rtol=1e-12)
    parts = [agg.multi_krum([u[part] for u in updates], 2, squares=squares) for part in (slice(0, 100), slice(100, N))]
    assert torch.equal(torch.cat(parts), agg.multi_krum(updates, 2)), "owners of parts do as one owner of all"


def test_one_attacker_moves_centered_clip_by_its_share_of_the_radius() -> None:
    honest, center, radius = draw(7, 13), draw(1, 14)[0], 2.0
    first = agg.centered_clip([*honest, torch.full((N,), 1e6)], center_N=center, radius=radius, iterations=1)
    other = agg.centered_clip([*honest, torch.full((N,), -1e6)], center_N=center, radius=radius, iterations=1)
    assert float((first - other).norm()) <= 2 * radius / 8 * 1.001
    far = [u * 1e6 for u in draw(8, 15)]
    assert float((agg.centered_clip(far, center_N=center, radius=radius) - center).norm()) <= 3 * radius * 1.001


def test_at_the_fixed_point_of_centered_clip_what_is_clipped_adds_up_to_nothing() -> None:
    updates, radius = [*draw(7, 16), torch.full((N,), 100.0)], 2.0
    value = agg.centered_clip(updates, radius=radius, iterations=200)
    offsets = [u - value for u in updates]
    clipped = torch.stack([o * min(1.0, radius / float(o.norm())) for o in offsets])
    assert float(clipped.norm(dim=1).min()) > 0.5 * radius and float(clipped.sum(0).norm()) < 1e-3 * radius


def test_a_radius_for_parts_is_another_rule_than_one_for_the_whole() -> None:
    updates, center, cut = draw(7, 17), draw(1, 18)[0], (slice(0, N // 2), slice(N // 2, N))
    whole = agg.centered_clip(updates, center_N=center, radius=2.0, iterations=1)
    parts = [agg.centered_clip([u[p] for u in updates], center_N=center[p], radius=2.0, iterations=1) for p in cut]
    assert float((torch.cat(parts) - whole).norm()) > 0.1 * float((whole - center).norm())


def test_history_is_the_next_centre_and_is_never_poisoned() -> None:
    center = None
    for round_ in range(5):
        center = agg.centered_clip([*draw(6, 20 + round_), *(torch.full((N,), 1e4),) * 2], center_N=center)
    assert center is not None
    assert float((center - 1.0).norm()) < float(torch.stack(draw(6, 20)).sub(1.0).norm(dim=1).mean())
    with pytest.raises(ValueError, match="not finite"):
        agg.centered_clip(draw(3, 1), center_N=torch.full((N,), math.nan))


def test_a_contribution_that_is_not_finite_is_found() -> None:
    good, inf = draw(2, 16), draw(1, 17)[0]
    inf[-1] = -math.inf
    assert agg.finite([good[0], attacks.nan(good[1], at=N - 1), inf]) == [True, False, False]


def test_clipping_leaves_half_alone_and_shortens_the_rest() -> None:
    updates = [u * k for u, k in zip(draw(5, 18), (1, 1, 1, 1, 100), strict=True)]
    clipped = agg.clip_to_median(updates)
    limit = sorted(agg.norms(updates))[2]
    assert max(agg.norms(clipped)) <= limit * (1 + 1e-6)
    assert sum(a is b for a, b in zip(updates, clipped, strict=True)) == 3
    assert agg.clip_factors([1.0, 1.0, 1.9, 4.0], 2.0)[:3] == [1.0] * 3, "nobody below the limit is touched"
    assert agg.clip_factors([1.0, 1.0, 1.0, 4.0], 2.0)[3] == pytest.approx(0.5)
    assert agg.clip_factors([]) == [] and agg.clip_factors([0.0, 0.0]) == [1.0, 1.0]


def test_buckets_cover_everybody_once_and_are_drawn_from_the_seed() -> None:
    for num, size in ((8, 2), (7, 3), (3, 5)):
        dealt = agg.buckets(num, size, seed=4)
        assert sorted(i for bucket in dealt for i in bucket) == list(range(num))
        assert all(1 <= len(bucket) <= size for bucket in dealt)
        assert dealt == agg.buckets(num, size, seed=4)
    assert agg.buckets(8, 2, seed=4) != agg.buckets(8, 2, seed=5)
    updates = draw(8, 19)
    torch.testing.assert_close(
        torch.stack(agg.bucket_means(updates, 2, seed=1)).mean(0), torch.stack(updates).mean(0), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda u: agg.trimmed_mean(u, 2), "trimmed_mean against 2 wrong contributions needs at least 5, there are 4"),
        (lambda u: agg.multi_krum(u, 1), "multi_krum against 1 wrong contributions needs at least 5.*lower it to 0"),
        (lambda u: agg.nearest_mixing(u, 2), "nearest_mixing against 2"),
        (lambda u: agg.trimmed_mean(u, -1), "cannot be negative"),
        (lambda u: agg.check_enough("centered_clip", 4, 2), "lower it to 1"),
        (lambda u: agg.bucket_means(u, 2, seed=0, num_wrong=1), "could spoil half of them"),
        (lambda u: agg.buckets(4, 0, seed=0), "buckets of 0"),
        (lambda u: agg.multi_krum(u, 0, num_kept=5), "num_kept = 5"),
        (lambda u: agg.centered_clip(u, iterations=0), "at least 1"),
    ],
)
def test_too_few_members_for_a_rule_are_refused(call: Callable[[list[Tensor]], object], reason: str) -> None:
    with pytest.raises(SettingError, match=reason):
        call(draw(4, 1))


@pytest.mark.parametrize("rule", [agg.coordinate_median, agg.centered_clip])
def test_nothing_to_aggregate_is_an_error(rule: Callable[[list[Tensor]], Tensor]) -> None:
    with pytest.raises(ValueError, match="no contribution"):
        rule([])


# ---------------------------------------------------------------- attacks


def test_attacks_are_what_they_say() -> None:
    own, honest = draw(1, 30)[0], draw(6, 31)
    assert torch.equal(attacks.sign_flip(own), own * -10.0)
    assert torch.equal(attacks.scale(own), own * 100.0)
    assert torch.equal(attacks.lying_owner(own), own * -10.0)
    generator = torch.Generator().manual_seed(1)
    noise = attacks.noise(own, generator)
    assert float(noise.norm() / own.norm()) == pytest.approx(10.0, rel=1e-5)
    assert abs(float(torch.cosine_similarity(noise, own, dim=0))) < 0.3
    assert int(attacks.nan(own).isnan().sum()) == 1 and not own.isnan().any()
    mean = torch.stack(honest).mean(0)
    assert float(torch.dot(attacks.inner_product(honest), mean)) < 0
    assert torch.equal(attacks.copy_cat(honest, 3), honest[3]) and attacks.copy_cat(honest, 3) is not honest[3]
    targets = torch.tensor([0, 7, 255, -100])
    assert attacks.label_flip(targets, 256).tolist() == [255, 248, 0, -100]
    assert torch.equal(attacks.label_flip(attacks.label_flip(targets, 256), 256), targets)


def test_a_little_is_enough_hides_in_the_spread() -> None:
    honest = draw(48, 32)
    z = attacks.little_z(50, 24)  # the paper's example: 50 workers, 24 corrupted
    assert z == pytest.approx(1.4261, abs=0.001)
    little = attacks.little_is_enough(honest, 2, z=0.5)
    distances = [float((u - torch.stack(honest).mean(0)).norm()) for u in honest]
    assert float((little - torch.stack(honest).mean(0)).norm()) < min(distances)
    for num, wrong in ((4, 3), (4, 0)):
        with pytest.raises(ValueError, match=r"a minority$"):
            attacks.little_z(num, wrong)


@pytest.mark.parametrize("name", attacks.GROSS[:3])
@every_rule
def test_two_gross_attackers_of_eight_do_less_than_to_the_mean(
    rule: Callable[[list[Tensor]], Tensor], name: str
) -> None:
    honest, generator = draw(6, 33), torch.Generator().manual_seed(2)
    attack = getattr(attacks, name)
    victims = draw(2, 34)
    wrong = [attack(u, generator) if name == "noise" else attack(u) for u in victims]
    clean = torch.stack(honest).mean(0)
    plain = float((torch.stack(honest + wrong).mean(0) - clean).norm())
    robust = float((rule(honest + wrong) - clean).norm())
    spread = float((honest[0] - clean).norm())
    assert plain > 2.0 * spread or (name == "noise" and plain > spread)
    assert robust < spread, "no further from the truth than an honest member"
