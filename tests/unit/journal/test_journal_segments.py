from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from journal_histories import Story, chain_rows

from orchestrator.segments import (
    JournalError,
    parse_segment,
    read_history,
    read_rows,
    read_run,
    segment_name,
    segment_number,
    segment_paths,
)
from workers.records import FenceRecord, JoinRecord, Row, StopRecord, TermRecord, dump_row, make_row

ROWS = chain_rows(Story(2).run(40).records)


def write(path: Path, rows: list[Row], tail: bytes = b"") -> Path:
    path.write_bytes(b"".join(dump_row(row) for row in rows) + tail)
    return path


def continued(last: Row, number: int, num_rows: int = 3) -> list[Row]:
    """A controller's rows: its term and some more, after `last`."""
    rows = [make_row(last.seq + 1, last.hash, TermRecord(lineage=0, number=number, controller=f"c{number}"))]
    for i in range(num_rows - 1):
        record = JoinRecord(member=f"m{number}-{i}", incarnation=1, nonce=f"{number}-{i}", node="n")
        rows.append(make_row(rows[-1].seq + 1, rows[-1].hash, record))
    return rows


def test_names_and_numbers() -> None:
    assert segment_name(1) == "journal.jsonl"
    assert segment_name(12) == "journal.000012.jsonl"
    assert [segment_number(segment_name(n)) for n in (1, 2, 999, 1234567)] == [1, 2, 999, 1234567]
    others = ("journal.jsonl.merging", "metrics.jsonl", "journal.x.jsonl", "xjournal.jsonl", "journal.1")
    assert [segment_number(name) for name in others] == [None] * len(others)


def test_segments_are_listed_by_number(tmp_path: Path) -> None:
    for name in ("journal.000010.jsonl", "journal.jsonl", "journal.000002.jsonl", "LOCK", "journal.jsonl.merging"):
        (tmp_path / name).touch()
    names = [path.name for path in segment_paths(tmp_path)]
    assert names == ["journal.jsonl", "journal.000002.jsonl", "journal.000010.jsonl"]


def test_one_segment(tmp_path: Path) -> None:
    path = write(tmp_path / "journal.jsonl", ROWS)
    assert read_rows([path]) == ROWS
    history = read_run(tmp_path)
    assert history.rows == ROWS
    assert history.place(5) == "journal.jsonl:6"
    assert (history.unread, history.torn) == (0, 0)


@pytest.mark.parametrize("tail", [b"{", b'{"seq":40,"prev":"', b"\0" * 50, b"\0\0{}\n{}\n", b"garbage\n", b"\n"])
def test_a_torn_tail_is_cut(tmp_path: Path, tail: bytes) -> None:
    write(tmp_path / "journal.jsonl", ROWS, tail)
    history = read_run(tmp_path)
    assert history.rows == ROWS
    assert history.torn == len(tail)


def test_every_way_of_tearing_the_last_row_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    data = b"".join(dump_row(row) for row in ROWS[:3])
    whole = len(data) - len(dump_row(ROWS[2]))
    for size in range(whole, len(data)):
        assert parse_segment(path, data[:size]).rows == ROWS[:2], size
    assert parse_segment(path, data).rows == ROWS[:3]


def test_an_unwritten_page_within_the_last_write_cuts_what_is_behind_it() -> None:
    lines = [dump_row(row) for row in ROWS[:6]]
    hole = lines[3][:10] + bytes(20) + lines[3][30:]
    segment = parse_segment(Path("journal.jsonl"), b"".join([*lines[:3], hole, *lines[4:]]))
    assert segment.rows == ROWS[:3]
    assert segment.torn == sum(len(line) for line in lines[3:])


def test_a_broken_row_elsewhere_is_an_error_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b"".join([*(dump_row(row) for row in ROWS[:7]), b"nonsense\n", dump_row(ROWS[8])]))
    with pytest.raises(JournalError, match=r"journal\.jsonl, line 8: row 7: not JSON.*put back the file") as caught:
        read_rows([path])
    assert (caught.value.path, caught.value.line, caught.value.seq) == (path, 8, 7)


def test_an_altered_last_row_is_not_taken_for_a_torn_one(tmp_path: Path) -> None:
    path = write(tmp_path / "journal.jsonl", ROWS[:5], dump_row(ROWS[5]).replace(b'"seq":5', b'"seq":6'))
    with pytest.raises(JournalError, match="row 6 was altered"):
        read_rows([path])


@pytest.mark.parametrize(
    "line",
    [
        b'{"seq":0,"prev":5,"hash":"","kind":"stop","reason":"x"}',
        b'{"seq":NaN,"prev":"","hash":"","kind":"stop","reason":"x"}',
        b'{"seq":-1,"prev":"","hash":"","kind":"stop","reason":"x"}',
        b"[" * 100_000 + b"]" * 100_000,
        b"\xff\xfe\xfd",
        dump_row(make_row(True, "0" * 32, StopRecord(reason="x"))).strip(),
        dump_row(make_row("0", "0" * 32, StopRecord(reason="x"))).strip(),  # type: ignore[arg-type]
    ],
)
def test_hostile_rows_are_errors_of_the_journal(line: bytes) -> None:
    with pytest.raises(JournalError, match="line 1"):
        parse_segment(Path("journal.jsonl"), line + b"\n" + dump_row(ROWS[0]))


def test_a_chain_that_begins_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=r"row 3 continues row 2 .* no older segment has a row"):
        read_rows([write(tmp_path / "journal.jsonl", ROWS[3:])])
    foreign = make_row(0, "1" * 32, ROWS[0].record)
    with pytest.raises(JournalError, match="row 0 continues another journal"):
        read_rows([write(tmp_path / "journal.jsonl", [foreign])])


def test_later_segments_continue_what_they_read(tmp_path: Path) -> None:
    second = continued(ROWS[-1], 2)
    third = continued(second[-1], 3)
    write(tmp_path / "journal.jsonl", ROWS)
    write(tmp_path / "journal.000002.jsonl", second)
    write(tmp_path / "journal.000003.jsonl", third)
    history = read_run(tmp_path)
    assert history.rows == [*ROWS, *second, *third]
    assert history.place(len(ROWS)) == "journal.000002.jsonl:1"
    assert history.place(len(ROWS) - 1) == f"journal.jsonl:{len(ROWS)}"


def test_rows_of_a_zombie_are_left_out(tmp_path: Path) -> None:
    second = continued(ROWS[30], 2)
    write(tmp_path / "journal.jsonl", ROWS)
    write(tmp_path / "journal.000002.jsonl", second)
    history = read_run(tmp_path)
    assert history.rows == [*ROWS[:31], *second]
    assert history.unread == len(ROWS) - 31


def test_a_controller_that_took_over_and_was_overtaken_before_its_first_row(tmp_path: Path) -> None:
    """Term 2 read 31 rows and stalled; term 3 read them all and went on; then term 2 woke and wrote its row."""
    third = continued(ROWS[-1], 3)
    write(tmp_path / "journal.jsonl", ROWS)
    write(tmp_path / "journal.000002.jsonl", continued(ROWS[30], 2, 1))
    write(tmp_path / "journal.000003.jsonl", third)
    history = read_run(tmp_path)
    assert history.rows == [*ROWS, *third]
    assert history.unread == 1


def test_empty_segments_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").touch()
    assert read_run(tmp_path).rows == []
    write(tmp_path / "journal.000002.jsonl", ROWS)
    write(tmp_path / "journal.000003.jsonl", [], b'{"seq"')
    history = read_run(tmp_path)
    assert history.rows == ROWS
    assert history.place(0) == "journal.000002.jsonl:1"


def test_a_segment_that_continues_nothing(tmp_path: Path) -> None:
    write(tmp_path / "journal.jsonl", ROWS[:20])
    path = write(tmp_path / "journal.000002.jsonl", continued(ROWS[30], 2))
    with pytest.raises(JournalError, match=r"row 31 continues row 30 .* end with row 19") as caught:
        read_run(tmp_path)
    assert (caught.value.path, caught.value.line, caught.value.seq) == (path, 1, 31)
    other = make_row(20, ROWS[19].hash, FenceRecord(member="z", incarnation=1, why=""))
    write(path, continued(other, 2))
    write(tmp_path / "journal.jsonl", ROWS)
    with pytest.raises(JournalError, match="row 20 of the older segments is another one"):
        read_run(tmp_path)


def test_a_merge_in_the_middle_of_reading_is_outlasted(tmp_path: Path) -> None:
    from orchestrator.filesystem import FileSystem

    second = continued(ROWS[-1], 2)
    first_path = write(tmp_path / "journal.jsonl", ROWS)
    second_path = write(tmp_path / "journal.000002.jsonl", second)

    class Merging(FileSystem):
        def names(self, folder: Path) -> list[str]:
            names = super().names(folder)
            if second_path.exists():
                write(first_path, [*ROWS, *second])
                second_path.unlink()
            return names

    assert read_run(tmp_path, Merging()).rows == [*ROWS, *second]


def test_a_segment_that_stays_away_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_history([tmp_path / "journal.jsonl"])


def test_errors_survive_pickling() -> None:
    error = JournalError("row 3 is there twice", path=Path("journal.jsonl"), line=4, seq=3, remedy="do this")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == "journal.jsonl, line 4: row 3 is there twice; do this"
    assert (copy.path, copy.line, copy.seq) == (error.path, 4, 3)
