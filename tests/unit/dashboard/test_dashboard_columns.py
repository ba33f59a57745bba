"""The reductions by column give what a plain loop over the rows gives."""

from __future__ import annotations

import math
import random
import warnings

import numpy as np
import pytest

from orchestrator.dashboard.columns import Columns, Spans, Steps, Window
from orchestrator.dashboard.series import column_quantiles

NUM = 5


def random_steps(seed: int) -> tuple[Steps, list[tuple[float, int, float]]]:
    rng, steps, rows = random.Random(seed), Steps(), []
    for _ in range(3000):
        row = (rng.uniform(0, 100), rng.randrange(NUM), rng.choice([rng.gauss(2, 1), math.nan]))
        rows.append(row)
        steps.append(t_s=row[0], member=row[1], loss=row[2], tokens_per_s=row[2], compute_s=1.0, num_steps=2)
    return steps, rows


@pytest.mark.parametrize("window", [(0.0, 100.0, 40), (20.0, 30.0, 7), (99.0, 200.0, 50), (5.0, 5.0, 3)])
def test_means_and_extremes_are_those_of_a_loop(window: tuple[float, float, int]) -> None:
    steps, rows = random_steps(1)
    chosen = Window(start_s=window[0], end_s=window[1], num_bins=window[2])
    means, (low, high) = steps.means("loss", chosen, NUM), steps.extremes("loss", chosen)
    found: dict[tuple[int, int], list[float]] = {}
    for t_s, member, loss in rows:
        bin_ = math.floor((t_s - chosen.start_s) / chosen.width_s)
        if 0 <= bin_ < chosen.num_bins and math.isfinite(loss):
            found.setdefault((member, bin_), []).append(loss)
    for member in range(NUM):
        for bin_ in range(chosen.num_bins):
            values = found.get((member, bin_))
            assert means[member, bin_] == pytest.approx(sum(values) / len(values) if values else math.nan, nan_ok=True)
    for bin_ in range(chosen.num_bins):
        values = [loss for (_, at), losses in found.items() if at == bin_ for loss in losses]
        assert low[bin_] == pytest.approx(min(values, default=math.nan), nan_ok=True)
        assert high[bin_] == pytest.approx(max(values, default=math.nan), nan_ok=True)


def test_the_newest_row_is_in_the_last_bin() -> None:
    steps = Steps()
    steps.append(t_s=10.0, member=0, loss=1.5, tokens_per_s=1, compute_s=0, num_steps=1)
    assert steps.means("loss", Window(start_s=0, end_s=10, num_bins=4), 1)[0].tolist()[3] == 1.5


def test_shares_are_the_overlap_of_spans_and_bins() -> None:
    rng, spans, rows = random.Random(2), Spans(), []
    for member in range(NUM):
        at_s = rng.uniform(0, 3)
        while at_s < 60:
            end_s, phase = at_s + rng.choice([0.01, 0.4, 7.0]) * rng.random(), rng.randrange(3)
            spans.append(start_s=at_s, end_s=end_s, member=member, phase=phase, incarnation=1)
            rows.append((at_s, end_s, member, phase))
            at_s = end_s + rng.choice([0, 0.2])
    window = Window(start_s=4.0, end_s=50.0, num_bins=33)
    shares = spans.shares(window, NUM, 3)
    expected = np.zeros((NUM, 3, 33))
    for start_s, end_s, member, phase in rows:
        for bin_ in range(33):
            left = window.start_s + bin_ * window.width_s
            overlap = min(end_s, left + window.width_s) - max(start_s, left)
            expected[member, phase, bin_] += max(0.0, overlap) / window.width_s
    assert np.abs(shares - expected).max() < 1e-9


def test_medians_leave_out_what_lies_in_the_intervals() -> None:
    steps = Steps()
    for t_s, value in ((1, 10.0), (2, 20.0), (3, 30.0), (9, 99.0)):
        steps.append(t_s=t_s, member=1, loss=0, tokens_per_s=value, compute_s=0, num_steps=1)
    assert steps.medians("tokens_per_s", 100, 2, ()).tolist()[1] == 25.0
    assert steps.medians("tokens_per_s", 100, 2, [(1.5, 2.5), (8, 10)]).tolist()[1] == 20.0
    assert math.isnan(steps.medians("tokens_per_s", 100, 2, ())[0])
    assert steps.medians("tokens_per_s", 2.0, 2, ()).tolist()[1] == 15.0


def test_columns_grow_and_keep_their_rows() -> None:
    columns = Columns("a", "b")
    for i in range(5000):
        columns.append(i, -i)
    assert len(columns) == 5000
    assert columns.column("b")[4321] == -4321


def test_quantiles_of_columns_are_those_of_numpy() -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(size=(20, 50))
    values[rng.random(values.shape) < 0.6] = np.nan
    values[:, 7], values[1:, 8] = np.nan, np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a column without a value
        expected = np.nanquantile(values, (0.1, 0.5, 0.9), axis=0)
    np.testing.assert_allclose(column_quantiles(values, (0.1, 0.5, 0.9)), expected, rtol=1e-12)
