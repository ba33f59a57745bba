"""metrics.jsonl: rows survive a round trip, a torn line, a full disk; decimation keeps what the eye sees."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.metrics import (
    EvalRow,
    ExchangeRow,
    FaultEvent,
    MetricsWriteError,
    MetricsWriter,
    ReadProblems,
    Row,
    RowError,
    SpanRow,
    StepRow,
    decimate,
    latest_faults,
    newest_rows,
    read_rows,
    row_from_dict,
    row_to_dict,
)

ROWS: list[Row] = [
    StepRow(
        t_s=1.5, member="a", incarnation=1, step=3, progress=0.1, loss=2.5, tokens_per_s=1e4, step_ms=40.0, lr=1e-3
    ),
    EvalRow(t_s=2.0, member="a", version=4, progress=0.2, val_loss=None, tokens_committed=4096),
    SpanRow(member="a", incarnation=1, phase="sync", start_s=1.0, end_s=1.25),
    ExchangeRow(
        t_s=2.5,
        fragment=0,
        version=4,
        attempts=2,
        roster=("a", "b"),
        seconds=0.5,
        bytes=10,
        opened_s=2,
        tokens_committed=9,
    ),
    FaultEvent(t_s=3.0, fault="kill", member="b", injected_s=2.9, detected_s=3.0),
]


def write(path: Path, rows: list[Row]) -> None:
    with MetricsWriter(path) as writer:
        for row in rows:
            writer.append(row)


def test_rows_survive_a_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, ROWS)
    problems = ReadProblems()
    assert list(read_rows(path, problems)) == ROWS
    assert problems.sentences() == []


def test_each_line_is_an_object_with_its_kind_first(tmp_path: Path) -> None:
    write(tmp_path / "m", ROWS)
    lines = (tmp_path / "m").read_text().splitlines()
    assert [next(iter(json.loads(line).items())) for line in lines] == [("kind", row.kind) for row in ROWS]


def test_a_row_is_on_disk_before_the_next_one(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "m") as writer:
        for number, row in enumerate(ROWS, start=1):
            writer.append(row)
            assert len(list(read_rows(tmp_path / "m"))) == number == writer.num_rows


def test_numbers_that_are_not_finite_become_null() -> None:
    row = row_to_dict(
        StepRow(t_s=1, member="a", incarnation=1, step=1, progress=0, loss=math.nan, tokens_per_s=1, step_ms=1)
    )
    assert row["loss"] is None
    assert "NaN" not in json.dumps(row)


def test_a_foreign_nan_is_read_as_unknown(tmp_path: Path) -> None:
    values = {**row_to_dict(ROWS[0]), "loss": math.nan}
    (tmp_path / "m").write_text(json.dumps(values) + "\n")
    (row,) = read_rows(tmp_path / "m")
    assert isinstance(row, StepRow) and row.loss is None


def test_a_torn_last_line_is_left_out_and_said(tmp_path: Path) -> None:
    path = tmp_path / "m"
    write(path, ROWS)
    whole = path.read_bytes()
    for cut in range(1, 20):
        path.write_bytes(whole[:-cut])
        problems = ReadProblems()
        rows = list(read_rows(path, problems))
        # Only the line end may go missing unharmed.
        assert (len(rows), problems.torn) == ((5, False) if cut == 1 else (4, True))


def test_a_writer_cuts_the_torn_line_of_the_last_one(tmp_path: Path) -> None:
    path = tmp_path / "m"
    write(path, ROWS)
    path.write_bytes(path.read_bytes()[:-9])
    write(path, ROWS[:1])
    problems = ReadProblems()
    assert list(read_rows(path, problems)) == [*ROWS[:4], ROWS[0]]
    assert problems.sentences() == []


def test_a_file_of_one_long_torn_line_is_cut_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b'{"kind":"' + b"x" * 200_000)
    write(tmp_path / "m", ROWS)
    assert list(read_rows(tmp_path / "m")) == ROWS


def test_bad_lines_and_unknown_kinds_are_counted_and_named(tmp_path: Path) -> None:
    lines = [
        json.dumps(row_to_dict(ROWS[2])),
        "nonsense",
        "[1]",
        '{"kind":"weather","t_s":1}',
        '{"kind":"span","member":"a","incarnation":1,"phase":"dance","start_s":0,"end_s":1}',
        '{"kind":"span","member":"a","incarnation":1,"phase":"sync","start_s":2,"end_s":1}',
        '{"kind":"eval","t_s":"late","member":"a","version":1,"progress":0,"val_loss":1,"tokens_committed":1}',
        "\x00\xff",
    ]
    (tmp_path / "m").write_text("\n".join(lines) + "\n\n")
    problems = ReadProblems()
    assert list(read_rows(tmp_path / "m", problems)) == [ROWS[2]]
    assert (problems.num_bad, problems.torn, dict(problems.unknown_kinds)) == (6, False, {"weather": 1})
    assert problems.first_bad.startswith("line 2:")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 1.5}, "step = 1.5 is not a whole number"),
        ({"step": True}, "step = True is not a whole number"),
        ({"member": 3}, "member = 3 is not a text"),
        ({"t_s": None}, "t_s = None is not a finite number"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(RowError, match=message):
        row_from_dict({**row_to_dict(ROWS[0]), **change})


def test_a_missing_field_is_named_and_a_later_one_ignored() -> None:
    values = row_to_dict(ROWS[2])
    assert row_from_dict({**values, "added_later": 1}) == ROWS[2]
    del values["phase"]
    with pytest.raises(RowError, match="field phase is missing"):
        row_from_dict(values)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_named_error() -> None:
    with MetricsWriter(Path("/dev/full")) as writer, pytest.raises(MetricsWriteError, match="cannot write metrics"):
        writer.append(ROWS[0])
    assert writer.num_rows == 0


def test_writing_goes_on_after_half_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m"
    real_write = os.write
    with MetricsWriter(path) as writer:
        writer.append(ROWS[0])
        with monkeypatch.context() as patch, pytest.raises(MetricsWriteError, match="only 7 of"):
            patch.setattr("orchestrator.metrics.os.write", lambda fd, data: real_write(fd, data[:7]))
            writer.append(ROWS[1])
        writer.append(ROWS[2])
    problems = ReadProblems()
    assert list(read_rows(path, problems)) == [ROWS[0], ROWS[2]]
    assert problems.num_bad == 1


def test_the_last_row_of_a_fault_counts() -> None:
    early = FaultEvent(t_s=1, fault="kill", member="a", injected_s=1.0)
    late = FaultEvent(t_s=5, fault="kill", member="a", injected_s=1.0, back_s=4.0)
    other = FaultEvent(t_s=2, fault="kill", member="b", injected_s=1.0)
    assert latest_faults([early, other, late]) == [late, other]


FINITE = st.floats(min_value=-1e6, max_value=1e6)


@given(
    points=st.lists(st.tuples(FINITE, FINITE), min_size=1, max_size=300).map(sorted),
    max_points=st.integers(min_value=4, max_value=60),
)
def test_decimation_keeps_order_ends_and_extremes(points: list[tuple[float, float]], max_points: int) -> None:
    kept = decimate(points, max_points=max_points)
    assert len(kept) <= max_points
    remaining = iter(points)
    assert all(point in remaining for point in kept), "not a subsequence"
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert min(y for _, y in kept) == min(y for _, y in points)
    assert max(y for _, y in kept) == max(y for _, y in points)


def test_decimation_keeps_a_spike_of_one_point() -> None:
    points = [(float(x), 0.0) for x in range(100_000)]
    points[61_803] = (61_803.0, 9.0)
    assert (61_803.0, 9.0) in decimate(points, max_points=400)


def test_decimation_needs_room() -> None:
    with pytest.raises(ValueError, match="max_points = 3"):
        decimate([(0.0, 0.0)], max_points=3)


def test_newest_rows_are_the_last_of_each_member_and_all_that_are_rare(tmp_path: Path) -> None:
    """A night's steps are not parsed one by one: `atoll status` answers at once."""
    path = tmp_path / "metrics.jsonl"
    nights = [replace(row, member=name, t_s=float(t)) for t in range(200) for name in ("a", "b") for row in ROWS[:2]]
    write(path, [*nights, *ROWS[2:]])
    rows = list(newest_rows(path))
    assert [(row.member, row.t_s) for row in rows if isinstance(row, StepRow)] == [("a", 199.0), ("b", 199.0)]
    assert [row for row in rows if not isinstance(row, StepRow)] == [*ROWS[2:3], *nights[1::2], *ROWS[3:]]
