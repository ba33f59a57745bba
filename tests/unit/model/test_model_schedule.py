from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.schedule import WARMUP_START, lr_at

SHAPES = ("cosine", "constant", "linear")


def test_corner_points() -> None:
    for shape, middle, end in (("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0)):
        at = {p: lr_at(p, lr=2.0, warmup=0.2, min_ratio=0.1, shape=shape) for p in (0.0, 0.1, 0.2, 0.6, 1.0, 1.3)}
        assert at[0.0] == pytest.approx(2.0 * WARMUP_START)
        assert at[0.1] == pytest.approx(2.0 * (1 + WARMUP_START) / 2)
        assert at[0.2] == pytest.approx(2.0)
        assert at[0.6] == pytest.approx(2.0 * middle)
        assert at[1.0] == at[1.3] == pytest.approx(2.0 * end)


def test_no_warmup_starts_at_the_peak_and_a_whole_one_ends_there() -> None:
    assert lr_at(0.0, lr=0.5, warmup=0.0, min_ratio=0.0, shape="cosine") == 0.5
    assert lr_at(1.0, lr=0.5, warmup=1.0, min_ratio=0.1, shape="cosine") == 0.5


@given(
    st.lists(st.floats(0, 1.5), min_size=2, max_size=20),
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from(SHAPES),
)
def test_rises_then_falls_within_its_bounds(points: list[float], warmup: float, ratio: float, shape: str) -> None:
    rates = [(p, lr_at(p, lr=1.0, warmup=warmup, min_ratio=ratio, shape=shape)) for p in sorted(points)]  # type: ignore[arg-type]
    assert all(min(WARMUP_START, ratio) - 1e-12 <= rate <= 1.0 for _, rate in rates)
    for (p, a), (q, b) in itertools.pairwise(rates):
        assert a <= b + 1e-12 if q <= warmup else (p < warmup or a >= b - 1e-12)


@pytest.mark.parametrize("progress", [-0.1, math.nan, math.inf])
def test_refuses_what_is_no_progress(progress: float) -> None:
    with pytest.raises(ValueError, match="progress"):
        lr_at(progress, lr=1.0, warmup=0.1, min_ratio=0.1, shape="cosine")


def test_refuses_an_unknown_shape() -> None:
    with pytest.raises(ValueError, match=r"'step'.*cosine"):
        lr_at(0.5, lr=1.0, warmup=0.1, min_ratio=0.1, shape="step")  # type: ignore[arg-type]


def test_schedule_and_shape_need_no_torch() -> None:
    code = "import sys, workers.schedule, workers.model.shape, workers.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 0
