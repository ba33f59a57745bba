from __future__ import annotations

import errno
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from journal_disk import Crash, Fault, FaultyDisk, MemoryDisk
from journal_histories import Story, chain_rows

from orchestrator.filesystem import FileSystem
from orchestrator.journal import (
    Fenced,
    FileJournal,
    JournalError,
    JournalFailed,
    JournalFull,
    claim_segment,
    open_segment,
    read_run,
)
from workers.records import JoinRecord, Record, Row, StopRecord, Term, TermRecord, make_row

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
IO_ERROR = OSError(errno.EIO, "Input/output error")


def join(number: int) -> JoinRecord:
    return JoinRecord(member=f"m{number}", incarnation=1, nonce=f"n{number}", node="node")


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.iterdir())


def test_a_first_life(tmp_path: Path) -> None:
    journal = open_segment(tmp_path, controller="c1")
    assert journal.term == Term(lineage=0, number=1, controller="c1")
    assert [row.record for row in journal.rows] == [TermRecord(lineage=0, number=1, controller="c1")]
    rows = journal.append([join(1), join(2)])
    assert [row.seq for row in rows] == [1, 2]
    assert journal.append([]) == []
    journal.close(merge=True)
    journal.close(merge=True)
    assert names(tmp_path) == ["journal.jsonl"]
    assert read_run(tmp_path).rows == journal.rows
    with pytest.raises(ValueError, match="closed"):
        journal.append([join(3)])


def test_a_second_life_continues_and_fences_the_first(tmp_path: Path) -> None:
    first = open_segment(tmp_path, controller="c1")
    first.append([join(1)])
    second = open_segment(tmp_path, controller="c2")
    assert second.term == Term(lineage=0, number=2, controller="c2")
    assert second.rows[:-1] == first.rows
    with pytest.raises(Fenced, match=r"term 0\.1 is over.*journal\.000002\.jsonl"):
        first.append([join(2)])
    with pytest.raises(Fenced):
        first.append([join(3)])
    second.append([join(4)])
    history = read_run(tmp_path)
    assert history.rows == second.rows
    assert history.unread == 1
    with pytest.raises(Fenced):
        first.close(merge=True)
    second.close(merge=False)
    assert names(tmp_path) == ["journal.000002.jsonl", "journal.jsonl"]


def test_the_fence_comes_before_the_reading(tmp_path: Path) -> None:
    """What an older controller writes after the claim is fenced; what it wrote before is read."""
    first = open_segment(tmp_path, controller="c1")
    first.append([join(1)])

    class Between(FileSystem):
        def create(self, path: Path) -> int:
            first.append([join(2)])
            descriptor = super().create(path)
            with pytest.raises(Fenced):
                first.append([join(3)])
            return descriptor

    second = open_segment(tmp_path, controller="c2", fs=Between())
    told = [row.record for row in second.rows]
    assert join(2) in told
    assert join(3) in told  # harmless: it was flushed, and nobody was told of it


def test_calls_are_made_in_the_order_that_makes_rows_durable(tmp_path: Path) -> None:
    disk = FaultyDisk()
    first = open_segment(tmp_path, controller="c1", fs=disk)
    assert disk.calls[: disk.calls.index("reserve")][-3:] == ["create", "sync_folder", "names"]
    disk.calls.clear()
    first.append([join(1)])
    assert disk.calls == ["reserve", "write", "sync", "names", "is_at"]
    disk.calls.clear()
    second = open_segment(tmp_path, controller="c2", fs=disk)
    assert disk.calls.index("create") < disk.calls.index("sync_folder") < disk.calls.index("sync_path")
    disk.calls.clear()
    second.close(merge=True)
    assert disk.calls[:4] == ["lock", "names", "is_at", "remove"]
    assert disk.calls[-6:] == ["write", "sync", "replace", "sync_folder", "remove", "sync_folder"]


def test_append_rows_takes_rows_that_follow_and_no_others(tmp_path: Path) -> None:
    journal = open_segment(tmp_path, controller="c")
    last = journal.rows[-1]
    good = make_row(1, last.hash, join(1))
    with pytest.raises(ValueError, match="row 2"):
        journal.append_rows([make_row(2, last.hash, join(1))])
    with pytest.raises(ValueError, match="row 1 does not follow row 0"):
        journal.append_rows([make_row(1, "0" * 32, join(1))])
    journal.append_rows([good, make_row(2, good.hash, join(2))])
    assert read_run(tmp_path).rows == journal.rows


def test_a_record_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    journal = open_segment(tmp_path, controller="c")
    with pytest.raises(TypeError):
        journal.append([join(1), StopRecord(reason=object())])  # type: ignore[arg-type]
    assert len(journal.append([join(2)])) == 1
    assert read_run(tmp_path).rows == journal.rows


# ---------------------------------------------------------------- no space


@pytest.mark.parametrize(
    "fault",
    [
        Fault(call="reserve", error=NO_SPACE, at=1),
        Fault(call="reserve", error=OSError(errno.EDQUOT, "Quota exceeded"), at=1),
        Fault(call="write", error=NO_SPACE, at=1),
        Fault(call="write", error=NO_SPACE, at=1, partial=30),
    ],
)
def test_a_full_disk_leaves_nothing_behind_and_may_be_tried_again(tmp_path: Path, fault: Fault) -> None:
    journal = open_segment(tmp_path, controller="c", fs=FaultyDisk(fault))
    size = (tmp_path / "journal.jsonl").stat().st_size
    with pytest.raises(JournalFull, match="nothing was added"):
        journal.append([join(1), join(2)])
    assert fault.fired
    assert (tmp_path / "journal.jsonl").stat().st_size == size
    assert len(read_run(tmp_path).rows) == len(journal.rows) == 1
    journal.append([join(1), join(2)])
    assert read_run(tmp_path).rows == journal.rows
    assert len(journal.rows) == 3


def test_a_whole_row_that_a_successor_may_have_read_is_not_cut_off(tmp_path: Path) -> None:
    fault = Fault(call="write", error=NO_SPACE, at=1, partial=400)
    journal = open_segment(tmp_path, controller="c", fs=FaultyDisk(fault))
    with pytest.raises(JournalFailed, match=r"writing .* failed"):
        journal.append([join(1), join(2), join(3)])
    history = read_run(tmp_path)
    assert len(history.rows) > 1
    assert open_segment(tmp_path, controller="c2").rows[:-1] == history.rows


def test_a_new_controller_waits_for_space_too(tmp_path: Path) -> None:
    fault = Fault(call="reserve", error=NO_SPACE)
    with pytest.raises(JournalFull):
        open_segment(tmp_path, controller="c1", fs=FaultyDisk(fault))
    journal = claim_segment(tmp_path, controller="c2", fs=FaultyDisk(Fault(call="write", error=NO_SPACE)))
    with pytest.raises(JournalFull):
        journal.begin()
    assert journal.begin().seq == 0
    assert journal.term.number == 2
    assert read_run(tmp_path).rows == journal.rows


def test_a_file_system_that_cannot_reserve_is_written_without(tmp_path: Path) -> None:
    faults = [Fault(call="reserve", error=OSError(errno.EOPNOTSUPP, "no"), at=n) for n in range(3)]
    journal = open_segment(tmp_path, controller="c", fs=FaultyDisk(*faults))
    journal.append([join(1)])
    assert read_run(tmp_path).rows == journal.rows


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize(
    "faults",
    [
        [Fault(call="sync", error=IO_ERROR, at=1)],
        [Fault(call="sync", error=NO_SPACE, at=1)],
        [Fault(call="write", error=IO_ERROR, at=1)],
        [Fault(call="write", error=IO_ERROR, at=1, partial=20)],
        [Fault(call="reserve", error=IO_ERROR, at=1)],
        [Fault(call="write", error=NO_SPACE, at=1, partial=20), Fault(call="truncate", error=IO_ERROR)],
        [Fault(call="is_at", error=IO_ERROR, at=1)],
    ],
    ids=lambda faults: "+".join(f"{fault.call}-{fault.partial}" for fault in faults),
)
def test_after_a_failure_the_journal_refuses_further_use(tmp_path: Path, faults: list[Fault]) -> None:
    journal = open_segment(tmp_path, controller="c", fs=FaultyDisk(*faults))
    with pytest.raises(JournalFailed):
        journal.append([join(1)])
    assert all(fault.fired for fault in faults)
    for again in (lambda: journal.append([join(2)]), lambda: journal.append([]), lambda: journal.close(merge=True)):
        with pytest.raises(JournalFailed):
            again()
    successor = open_segment(tmp_path, controller="c2")
    successor.append([join(3)])
    assert read_run(tmp_path).rows == successor.rows


def test_a_segment_that_was_taken_away_is_a_fence(tmp_path: Path) -> None:
    journal = open_segment(tmp_path, controller="c")
    content = (tmp_path / "journal.jsonl").read_bytes()
    (tmp_path / "journal.jsonl").unlink()
    (tmp_path / "journal.jsonl").write_bytes(content)
    with pytest.raises(Fenced, match="merged or taken away"):
        journal.append([join(1)])


def test_a_directory_that_is_held_is_waited_for_and_then_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.journal.LOCK_TIMEOUT_S", 0.02)
    journal = open_segment(tmp_path, controller="c0")
    open_segment(tmp_path, controller="c1").close(merge=False)
    with FileSystem().lock(tmp_path, timeout_s=1.0):
        with pytest.raises(JournalError, match="cannot be taken over: another process has held"):
            open_segment(tmp_path, controller="c")
    del journal
    last = open_segment(tmp_path, controller="c2")
    with FileSystem().lock(tmp_path, timeout_s=1.0), pytest.raises(JournalError, match="cannot be merged"):
        last.close(merge=True)
    assert read_run(tmp_path).rows == last.rows


def test_errors_survive_pickling() -> None:
    for error in (Fenced("a"), JournalFailed("b"), JournalFull("c")):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert (copy.reason, str(copy)) == (error.reason, error.reason)


def test_a_broken_journal_cannot_be_taken_over(tmp_path: Path) -> None:
    journal = open_segment(tmp_path, controller="c")
    journal.append([join(1), join(2), join(3)])
    path = tmp_path / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], *lines[2:]]))
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for _ in range(3):
        with pytest.raises(JournalError, match="row 1 is missing before row 2"):
            open_segment(tmp_path, controller="c2")
    assert not before or len(os.listdir("/proc/self/fd")) == before


# ---------------------------------------------------------------- merging


def three_lives(run_dir: Path, fs: FileSystem | None = None) -> FileJournal:
    """Three controllers, each overtaken while it lived; the second wrote a row that is no part of the history."""
    first = open_segment(run_dir, controller="c1")
    first.append([join(1)])
    second = open_segment(run_dir, controller="c2")
    second.append([join(2)])
    third = open_segment(run_dir, controller="c3", fs=fs)
    third.append([join(3), join(4)])
    with pytest.raises(Fenced):
        second.append([join(5)])
    first.close(merge=False)
    second.close(merge=False)
    return third


def test_a_clean_end_makes_one_file(tmp_path: Path) -> None:
    journal = three_lives(tmp_path)
    journal.close(merge=True)
    assert names(tmp_path) == ["journal.jsonl"]
    history = read_run(tmp_path)
    assert history.rows == journal.rows
    assert history.unread == 0


def test_the_term_after_a_merge_is_above_all_merged_ones(tmp_path: Path) -> None:
    three_lives(tmp_path).close(merge=True)
    journal = open_segment(tmp_path, controller="c4")
    assert journal.term.number == 4
    assert names(tmp_path) == ["journal.000004.jsonl", "journal.jsonl"]


NUM_MERGE_CALLS = 13
"""Calls of one merge of three segments; each is crashed at in turn."""


@pytest.mark.parametrize("at", range(NUM_MERGE_CALLS))
def test_a_crash_in_a_merge_loses_nothing(tmp_path: Path, at: int) -> None:
    disk = FaultyDisk()
    journal = three_lives(tmp_path, disk)
    disk.calls.clear()
    fault = Fault(call="any", error=Crash(), at=at)
    disk.faults.append(fault)
    with pytest.raises(Crash):
        journal.close(merge=True)
    assert fault.fired
    assert read_run(tmp_path).rows == journal.rows
    successor = open_segment(tmp_path, controller="c4")
    assert successor.rows[:-1] == journal.rows
    assert successor.term.number == 4
    successor.append([join(9)])
    successor.close(merge=True)
    assert names(tmp_path) == ["journal.jsonl"]
    assert read_run(tmp_path).rows == successor.rows


def test_the_crashes_above_cover_the_whole_merge(tmp_path: Path) -> None:
    disk = FaultyDisk()
    journal = three_lives(tmp_path, disk)
    disk.calls.clear()
    journal.close(merge=True)
    assert len(disk.calls) == NUM_MERGE_CALLS


def test_a_controller_merged_away_is_fenced(tmp_path: Path) -> None:
    first = open_segment(tmp_path, controller="c1")
    second = open_segment(tmp_path, controller="c2")
    second.append([join(2)])
    second.close(merge=True)
    with pytest.raises(Fenced, match="merged or taken away"):
        first.append([join(1)])
    assert read_run(tmp_path).rows == second.rows


# ---------------------------------------------------------------- recovery


def test_a_lost_journal_is_written_anew_in_a_higher_lineage(tmp_path: Path) -> None:
    copy = chain_rows(Story(4).run(30).records)
    lineage = max(row.record.lineage for row in copy if isinstance(row.record, TermRecord))
    journal = claim_segment(tmp_path, controller="new", lineage=lineage + 1)
    assert journal.rows == []
    assert journal.term == Term(lineage=lineage + 1, number=1, controller="new")
    row = journal.begin(copy)
    assert journal.rows == [*copy, row]
    assert read_run(tmp_path).rows == journal.rows
    journal.append([join(1)])
    assert open_segment(tmp_path, controller="next").term.lineage == lineage + 1


def test_a_lost_tail_is_completed_from_a_copy(tmp_path: Path) -> None:
    copy = chain_rows(Story(4).run(30).records)
    (tmp_path / "journal.jsonl").write_bytes(b"")
    open_segment(tmp_path, controller="a", lineage=90, recovered=copy[:10]).close(merge=False)
    old = read_run(tmp_path).rows
    longer = [*old, make_row(len(old), old[-1].hash, join(7))]
    journal = open_segment(tmp_path, controller="b", lineage=91, recovered=longer)
    assert [row.hash for row in journal.rows[:-1]] == [row.hash for row in longer]
    assert read_run(tmp_path).rows == journal.rows
    shorter = open_segment(tmp_path, controller="c", lineage=92, recovered=old)
    assert shorter.rows[:-1] == journal.rows


def test_copies_that_contradict_the_disk_are_refused(tmp_path: Path) -> None:
    open_segment(tmp_path, controller="a").append([join(1), join(2)])
    rows = read_run(tmp_path).rows
    other = [*rows[:2], make_row(2, rows[1].hash, join(8)), rows[2]]
    with pytest.raises(JournalError, match="row 2 on disk is another one"):
        open_segment(tmp_path, controller="b", lineage=1, recovered=other)
    broken = [*rows, make_row(9, rows[2].hash, join(8))]
    with pytest.raises(JournalError, match="missing before row 9"):
        open_segment(tmp_path, controller="b", lineage=1, recovered=broken)


def test_the_lineage_rises_with_a_recovery(tmp_path: Path) -> None:
    copy = chain_rows([TermRecord(lineage=3, number=1, controller="x"), join(1)])
    for lineage in (None, 3):
        with pytest.raises(ValueError, match="a recovery needs a lineage above 3"):
            open_segment(tmp_path, controller="a", lineage=lineage, recovered=copy)
    open_segment(tmp_path, controller="a", lineage=4, recovered=copy)
    with pytest.raises(ValueError, match="lineage 4 does not rise above 4"):
        open_segment(tmp_path, controller="b", lineage=4)


# ---------------------------------------------------------------- power cuts


class Fleet:
    """Controllers that come, append, are overtaken, merge and lose power on one disk; `told` are the flushed rows."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.disk = MemoryDisk(self.rng)
        self.folder = Path("run")
        self.journals: list[FileJournal] = []
        self.told: list[Row] = []
        self.count = 0

    def come(self) -> None:
        self.count += 1
        journal = open_segment(self.folder, controller=f"c{self.count}", fs=self.disk)
        assert journal.rows[: len(self.told)] == self.told
        self.told = list(journal.rows)
        self.journals.append(journal)

    def append(self) -> None:
        journal = self.rng.choice(self.journals) if self.journals else None
        if journal is None:
            return
        newest = journal is self.journals[-1]
        records: list[Record] = []
        for _ in range(self.rng.randint(1, 4)):
            self.count += 1
            records.append(join(self.count))
        try:
            self.told += journal.append(records)
            assert newest
        except Fenced:
            assert not newest

    def end(self) -> None:
        if self.journals:
            self.journals.pop().close(merge=True)
            self.journals.clear()

    def cut(self, step: Callable[[], None]) -> None:
        """Power fails within a step."""
        self.disk.calls_left = self.rng.randrange(14)
        try:
            step()
        except Crash:
            pass
        self.disk.power_cut()
        self.journals.clear()
        rows = read_run(self.folder, self.disk).rows
        assert rows[: len(self.told)] == self.told

    def run(self, num_steps: int) -> None:
        steps = [self.come, self.append, self.append, self.append, self.end]
        for _ in range(num_steps):
            step = self.rng.choice(steps)
            self.cut(step) if self.rng.random() < 0.3 else step()
        rows = read_run(self.folder, self.disk).rows
        assert rows[: len(self.told)] == self.told


@pytest.mark.parametrize("seed", range(150))
def test_no_row_that_was_flushed_is_ever_lost(seed: int) -> None:
    Fleet(seed).run(25)
