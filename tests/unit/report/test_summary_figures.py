"""The formulas of the derived figures, against cases worked out by hand."""

from __future__ import annotations

import pytest

from orchestrator.metrics import FaultEvent, Phase, Row, SpanRow, StepRow
from orchestrator.summary import (
    bytes_sent_per_param_per_round,
    compute_utilization,
    data_parallel_bytes,
    derive_figures,
    fault_free_speed,
    fault_rows,
    first_joins,
    goodput,
    tokens_per_s,
)


def step(member: str, t_s: float, speed: float, *, incarnation: int = 1, compute_s: float = 0.0) -> StepRow:
    return StepRow(
        t_s=t_s,
        member=member,
        incarnation=incarnation,
        step=1,
        progress=0,
        loss=1,
        tokens_per_s=speed,
        step_ms=100,
        compute_s=compute_s,
    )


def span(member: str, phase: Phase, start_s: float, end_s: float, *, incarnation: int = 1) -> SpanRow:
    return SpanRow(member=member, incarnation=incarnation, phase=phase, start_s=start_s, end_s=end_s)


def test_tokens_per_s() -> None:
    assert tokens_per_s(3000, 20.0) == 150.0
    assert tokens_per_s(3000, 0.0) == 0.0


def test_utilization_weighs_members_by_their_seconds() -> None:
    # a: 8 of 10 s, b joined late: 1 of 2 s; together 9 of 12, not the mean of 0.8 and 0.5.
    assert compute_utilization({"a": 8.0, "b": 1.0}, {"a": 10.0, "b": 2.0}) == 0.75


def test_utilization_counts_a_member_that_never_computed() -> None:
    assert compute_utilization({"a": 5.0}, {"a": 10.0, "b": 10.0}) == 0.25


def test_utilization_without_members_is_zero() -> None:
    assert compute_utilization({}, {}) == 0.0
    assert compute_utilization({"a": 1.0}, {"a": 0.0}) == 0.0


def test_goodput_is_tokens_over_what_each_could_have_made() -> None:
    # 100 tokens/s for 10 s and 50 tokens/s for 20 s: 2000 were possible.
    assert goodput(1500, {"a": 100.0, "b": 50.0}, {"a": 10.0, "b": 20.0}) == 0.75


def test_goodput_counts_a_member_without_steps_at_the_median_of_the_others() -> None:
    assert goodput(1500, {"a": 100.0, "b": 50.0}, {"a": 10.0, "b": 10.0, "c": 20.0}) == 1500 / (1000 + 500 + 1500)


def test_goodput_without_speeds_or_time_is_zero() -> None:
    assert goodput(1500, {}, {"a": 10.0}) == 0.0
    assert goodput(1500, {"a": 100.0}, {}) == 0.0
    assert goodput(1500, {"a": 0.0}, {"a": 10.0}) == 0.0


def test_bytes_per_param_per_round() -> None:
    # 10 rounds, 3 members in 9 of them and 2 in one: 29 contributions of 1000 values, 1.5 bytes each.
    sent = round(29 * 1000 * 1.5)
    assert bytes_sent_per_param_per_round(sent, params=1000, num_contributions=29) == 1.5


def test_bytes_per_param_of_fragments_is_that_of_the_whole_model() -> None:
    # Two fragments of 500 values: the same bytes in twice as many exchanges.
    one = bytes_sent_per_param_per_round(6000, params=1000, num_contributions=3)
    assert bytes_sent_per_param_per_round(6000, params=1000, num_contributions=6, num_fragments=2) == one == 2.0


@pytest.mark.parametrize(("params", "contributions", "fragments"), [(0, 3, 1), (1000, 0, 1), (1000, 3, 0)])
def test_bytes_per_param_never_divides_by_zero(params: int, contributions: int, fragments: int) -> None:
    figure = bytes_sent_per_param_per_round(
        6000, params=params, num_contributions=contributions, num_fragments=fragments
    )
    assert figure == 0.0


def test_data_parallel_bytes_of_a_ring() -> None:
    # 4 members: each sends 2 * 3/4 of 4 bytes per value and step; 4 members make 10 steps each.
    assert data_parallel_bytes(params=100, num_member_steps=40, num_members=4) == 40 * 600
    assert data_parallel_bytes(params=100, num_member_steps=40, num_members=1) == 0


def test_fault_free_speed_is_a_median_outside_of_every_fault() -> None:
    fault = FaultEvent(t_s=10, fault="kill", member="b", injected_s=10.0, detected_s=10.1, contributed_s=20.0)
    steps = [step("a", t, speed) for t, speed in ((1, 90), (2, 100), (3, 110), (12, 900), (20, 900), (21, 100))]
    # b has steps in the fault only (it came back before it contributed): they are all there is.
    steps += [step("b", 15.0, 50.0), step("b", 16.0, 70.0)]
    assert fault_free_speed(steps, [fault]) == {"a": 100.0, "b": 60.0}


def test_a_fault_without_a_return_lasts_to_the_end() -> None:
    fault = FaultEvent(t_s=10, fault="kill", member="b", detected_s=10.0)
    assert fault_free_speed([step("a", 1, 100), step("a", 99, 300)], [fault]) == {"a": 100.0}


def test_first_joins_is_the_end_of_the_first_start() -> None:
    spans = [
        span("a", "compute", 2.0, 5.0),
        span("a", "start", 0.0, 2.0),
        span("a", "start", 7.0, 9.0, incarnation=2),
        span("b", "compute", 3.0, 5.0),
    ]
    assert first_joins(spans) == {"a": 2.0, "b": 3.0}


def test_fault_rows_count_from_the_fault() -> None:
    early = FaultEvent(t_s=10.2, fault="kill", member="b", injected_s=10.0, detected_s=10.2)
    late = FaultEvent(
        t_s=16, fault="kill", member="b", injected_s=10.0, detected_s=10.2, next_commit_s=11.5, back_s=15.0
    )
    (row,) = fault_rows([early, late])  # the later row of the same fault replaces the earlier one
    assert (row.kind, row.member, row.estimated) == ("kill", "b", False)
    assert row.detected_after_s == pytest.approx(0.2)
    assert (row.next_commit_after_s, row.back_after_s, row.contributed_after_s) == (1.5, 5.0, None)


def test_fault_of_unknown_moment_is_estimated_from_its_detection() -> None:
    (row,) = fault_rows([FaultEvent(t_s=10, fault="crash", member="a", detected_s=10.0, back_s=14.0)])
    assert (row.estimated, row.detected_after_s, row.back_after_s) == (True, None, 4.0)


def test_two_faults_of_one_member_stay_two() -> None:
    events = [FaultEvent(t_s=t, fault="kill", member="a", injected_s=t) for t in (5.0, 9.0)]
    assert len(fault_rows(events)) == 2


def test_derive_figures_of_a_small_run() -> None:
    # Two members join at 2 s, the run ends at 12 s; b is killed at 6 s, trains again from 10 s.
    rows: list[Row] = [
        *(span(member, "start", 0.0, 2.0) for member in "ab"),
        span("a", "compute", 2.0, 11.0),
        span("a", "sync", 11.0, 12.0),
        span("b", "compute", 2.0, 6.0),
        span("b", "dead", 6.0, 8.0),
        span("b", "start", 8.0, 10.0, incarnation=2),
        span("b", "compute", 10.0, 12.0, incarnation=2),
        *(step("a", t, 100.0, compute_s=3.0) for t in (3.0, 4.0, 11.5)),
        step("b", 4.0, 50.0, compute_s=4.0),
        step("b", 11.9, 50.0, compute_s=1.5, incarnation=2),
        FaultEvent(t_s=6, fault="kill", member="b", injected_s=6.0, detected_s=6.1, back_s=10.1, contributed_s=11.0),
    ]
    figures = derive_figures(rows, tokens_committed=1200, end_s=12.0)
    assert figures.tokens_per_s == 120.0
    assert figures.compute_utilization == (9 + 4 + 1.5) / 20
    assert figures.goodput == 1200 / (100 * 10 + 50 * 10)
    assert figures.faults[0].contributed_after_s == 5.0


def test_derive_figures_takes_joins_from_the_journal() -> None:
    rows: list[Row] = [span("a", "compute", 2.0, 4.0), step("a", 4.0, 100.0, compute_s=2.0)]
    figures = derive_figures(rows, tokens_committed=100, end_s=4.0, joins_s={"a": 0.0})
    assert (figures.compute_utilization, figures.goodput, figures.tokens_per_s) == (0.5, 0.25, 25.0)


def test_derive_figures_of_nothing() -> None:
    figures = derive_figures([], tokens_committed=0, end_s=0.0)
    assert (figures.tokens_per_s, figures.compute_utilization, figures.goodput, figures.faults) == (0.0, 0.0, 0.0, ())
