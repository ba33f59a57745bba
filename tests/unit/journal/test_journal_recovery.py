from __future__ import annotations

from dataclasses import replace

import pytest
from journal_histories import Story, chain_rows

from orchestrator.journal import JournalError, recover
from workers.records import FenceRecord, Row, TermRecord, make_row

ROWS = chain_rows(Story(4).run(40).records)


def fork(at: int, lineage: int = 0, num_rows: int = 3) -> list[Row]:
    """The first `at` rows, then others; with a term of `lineage` if that is above 0."""
    rows = list(ROWS[:at])
    for i in range(num_rows):
        record = (
            TermRecord(lineage=lineage, number=90, controller="new")
            if lineage and not i
            else FenceRecord(member=f"fork-{i}", incarnation=1, why="")
        )
        rows.append(make_row(len(rows), rows[-1].hash, record))
    return rows


def test_the_longest_copy_wins() -> None:
    assert recover([ROWS[:10], ROWS[:25], ROWS[:17]]) == ROWS[:25]
    assert recover([ROWS]) == ROWS
    assert recover([ROWS, []], num_members=2) == ROWS


def test_more_than_half_of_the_members_must_agree() -> None:
    copies = [ROWS[:10], ROWS[:25]]
    assert recover(copies, num_members=3) == ROWS[:25]
    with pytest.raises(JournalError, match=r"2 of 4 members .* wait until more members answer, or force"):
        recover(copies, num_members=4)
    assert recover(copies, num_members=4, force=True) == ROWS[:25]
    with pytest.raises(JournalError, match="0 of 0"):
        recover([])
    with pytest.raises(JournalError, match="0 of 2"):
        recover([], num_members=2, force=True)


@pytest.mark.parametrize(
    "broken",
    [
        [*ROWS[:5], *ROWS[6:]],
        [*ROWS[:5], ROWS[4], *ROWS[5:]],
        [*ROWS[:5], ROWS[6], ROWS[5], *ROWS[7:]],
        ROWS[1:],
        [*ROWS[:-1], replace(ROWS[-1], hash="0" * 32)],
        [*ROWS[:3], replace(ROWS[3], record=FenceRecord(member="x", incarnation=1, why="")), *ROWS[4:]],
    ],
)
def test_a_broken_copy_does_not_count(broken: list[Row]) -> None:
    assert recover([broken, ROWS[:10], ROWS[:12]]) == ROWS[:12]
    with pytest.raises(JournalError, match=r"1 of 2 members agree on 12 rows.*copy 0: "):
        recover([broken, ROWS[:12]])


def test_copies_that_contradict_are_an_error_that_names_the_row() -> None:
    with pytest.raises(JournalError, match="differ from row 20 on") as caught:
        recover([ROWS, ROWS, fork(20)])
    assert caught.value.seq == 20
    with pytest.raises(JournalError, match="differ from row 20 on"):
        recover([ROWS, ROWS, fork(20)], force=True)


def test_a_member_that_slept_through_a_recovery_is_passed_over() -> None:
    rebuilt = fork(20, lineage=5)
    assert recover([ROWS, rebuilt, rebuilt[:-1]]) == rebuilt
    with pytest.raises(JournalError, match=r"1 of 3 .* lineage \d+ differs from row 20 on"):
        recover([ROWS, ROWS[:30], rebuilt])
