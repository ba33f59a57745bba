"""Cutting a model into stages, and refusing with the numbers what cannot run."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.errors import SettingError
from strategies.swarm import (
    LayerCost,
    PipelineSize,
    check_pipeline,
    peer_bytes,
    split_layers,
    trainer_bytes,
)


def layers(costs: list[int], seconds: list[float] | None = None) -> list[LayerCost]:
    times = seconds or [0.0] * len(costs)
    return [
        LayerCost(name=f"l{i}", num_params=cost, seconds=time)
        for i, (cost, time) in enumerate(zip(costs, times, strict=True))
    ]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.data())
def test_the_dearest_stage_is_as_cheap_as_any_cut_allows(costs: list[int], data: st.DataObject) -> None:
    num_stages = data.draw(st.integers(1, len(costs)))
    stages = split_layers(layers(costs), num_stages)
    assert [name for stage in stages for name in stage.names] == [f"l{i}" for i in range(len(costs))]
    assert all(stage.names for stage in stages)
    cuts = ([0, *inner, len(costs)] for inner in combinations(range(1, len(costs)), num_stages - 1))
    best = min(max(sum(costs[a:b]) for a, b in pairwise(cut)) for cut in cuts)
    assert max(stage.num_params for stage in stages) == best


def test_by_time_and_by_parameters_differ() -> None:
    model = layers([10, 10, 10, 10], [3.0, 1.0, 1.0, 1.0])
    assert [len(stage.names) for stage in split_layers(model, 2)] == [2, 2]
    assert [len(stage.names) for stage in split_layers(model, 2, by="time")] == [1, 3]
    with pytest.raises(SettingError, match=r"'l0' has a time of 0\.0 s"):
        split_layers(layers([1, 1]), 2, by="time")


def test_a_tied_matrix_is_owned_by_the_last_stage_and_copied_in_the_first() -> None:
    model = [
        LayerCost(name="embed", num_params=100, tied_to="head"),
        LayerCost(name="l", num_params=30),
        LayerCost(name="head", num_params=101),
    ]
    first, last = split_layers(model, 2)
    assert (first.num_copied, last.num_copied) == (100, 0)
    assert [stage.num_params for stage in split_layers(model, 1)] == [131]
    with pytest.raises(SettingError, match="only the last stage may own"):
        split_layers([*model, LayerCost(name="more", num_params=500)], 3)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(SettingError, match="4 stages, but the model has 3 layers"):
        split_layers(layers([1, 2, 3]), 4)


def size(**changes: int) -> PipelineSize:
    known = {"num_microbatches": 8, "max_in_flight": 4, "boundary_bytes": 1000} | changes
    return PipelineSize(**known)  # type: ignore[arg-type]


STAGES = split_layers(layers([1_000_000] * 4), 2)
ROOMY = dict.fromkeys(("a", "b", "c", "d"), 1 << 30)


def test_memory_is_what_is_kept() -> None:
    # Parameters, gradient, two moments, the next state, eight gradients of microbatches, each 2 M values in fp32; four
    # boundaries.
    assert peer_bytes(STAGES[0], size()) == 2_000_000 * 4 * (7 + 8) + 4000
    assert peer_bytes(STAGES[0], size(ordered=False)) == 2_000_000 * 4 * (7 + 1) + 4000
    assert peer_bytes(STAGES[0], size(min_peers=2)) == 2_000_000 * 4 * (7 + 4) + 4000
    held = peer_bytes(STAGES[0], size(buddy_copies=6), buddy_params=3_000_000)
    assert held == peer_bytes(STAGES[0], size()) + 3_000_000 * 4 * 6
    assert trainer_bytes(2, size()) == 2 * 1 * 1000 * 8
    assert trainer_bytes(2, size(num_open_steps=2)) == 2 * trainer_bytes(2, size())


@pytest.mark.parametrize(
    ("changes", "peers", "limit", "words"),
    [
        (
            {"num_microbatches": 1, "max_in_flight": 1},
            ROOMY,
            1 << 30,
            "1 microbatches is smaller than",
        ),
        ({"max_in_flight": 9}, ROOMY, 1 << 30, "9 microbatches in flight"),
        ({"min_peers": 3}, ROOMY, 1 << 30, "4 stage peers for 2 stages with at least 3 each: 6 needed"),
        ({}, ROOMY, 15_999, "16,000 bytes, and may take 15,999"),
        (
            {},
            dict.fromkeys("abcd", 120_003_999),
            1 << 30,
            "needs 120,004,000 bytes; the largest .* 120,003,999",
        ),
    ],
)
def test_what_can_never_run_is_refused_with_the_numbers(
    changes: dict[str, int], peers: dict[str, int], limit: int, words: str
) -> None:
    with pytest.raises(SettingError, match=words):
        check_pipeline(STAGES, size(**changes), peers=peers, trainer_limit_bytes=limit)


def test_what_just_fits_is_taken() -> None:
    check_pipeline(STAGES, size(), peers=dict.fromkeys("abcd", 120_004_000), trainer_limit_bytes=16_000)
