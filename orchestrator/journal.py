"""The journal on disk: one writer, appended and flushed before anybody is told (protocol 1.2).

A controller's life begins with `open_segment`: it creates the next segment file exclusively (the fence), only then
reads the older ones to their end, and writes its term. Order of calls of one `append`: reserve space, write, fdatasync,
look for a newer segment. The caller may tell others of a row only after `append` has returned.

Files are never written by two controllers, and no file of another one is ever cut or changed: an older controller that
still runs finds the newer segment (or that its own file is gone) after its next flush, and has to end.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from orchestrator.filesystem import FileSystem
from orchestrator.journal_recovery import recover
from orchestrator.segments import (
    FIRST_NUMBER,
    FIRST_SEGMENT,
    READ_ATTEMPTS,
    History,
    JournalError,
    link_problem,
    read_history,
    read_rows,
    read_run,
    segment_name,
    segment_number,
    segment_paths,
    verify_chain,
)
from workers.records import GENESIS_HASH, Record, Row, Term, TermRecord, dump_row, load_row, make_row

__all__ = [
    "Fenced",
    "FileJournal",
    "History",
    "JournalError",
    "JournalFailed",
    "JournalFull",
    "claim_segment",
    "open_segment",
    "read_rows",
    "read_run",
    "recover",
    "segment_paths",
]

LOCK_TIMEOUT_S = 10.0
MERGE_SUFFIX = ".merging"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_CANNOT_RESERVE = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV})
_ROWS_PER_WRITE = 1000


class Fenced(Exception):
    """Another controller has taken over: this one must end without another word."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.reason,))


class JournalFailed(Exception):
    """Whether the last rows are durable is not known: this controller must end; its successor reads what is there."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.reason,))


class JournalFull(Exception):
    """No space: nothing was added. The same rows may be tried again later; until then nothing can be committed."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.reason,))


class FileJournal:
    """One controller's life in the journal. `claim_segment` and `open_segment` make it; not thread-safe.

    `rows` is the whole history, what was read first and then what was appended; callers must not change it.
    `term` is the term that this controller writes under.
    """

    def __init__(self, *, fs: FileSystem, path: Path, descriptor: int, term: Term, history: History) -> None:
        """`descriptor`: the empty segment at `path`, created by the caller; `history`: what the older ones hold."""
        self.term = term
        self.path = path
        self.rows: list[Row] = list(history.rows)
        self.unread = history.unread
        self._fs = fs
        self._descriptor = descriptor
        self._num_bytes = 0
        self._state: Literal["claimed", "open", "closed"] = "claimed"
        self._stopped: Fenced | JournalFailed | None = None

    def begin(self, recovered: Sequence[Row] | None = None) -> Row:
        """Write the term's row, and before it the rows of `recovered` that the files had lost; returns the term's row.

        Raises JournalError if `recovered` is not a continuation of `rows`, ValueError if the term's lineage does not
        rise although rows were recovered; otherwise as `append`. May be called again after JournalFull.
        """
        if self._state != "claimed":
            raise ValueError(f"{self.path} was begun before")
        lost = self._lost_rows(recovered or ())
        term = TermRecord(lineage=self.term.lineage, number=self.term.number, controller=self.term.controller)
        row = _next_row(lost or self.rows, term)
        self._add([*lost, row])
        self._state = "open"
        return row

    def append(self, records: Iterable[Record]) -> list[Row]:
        """Make rows of `records`, write and flush them; they are durable when this returns.

        Raises:
            JournalFull: nothing was added, try again later.
            Fenced, JournalFailed: end this controller; every later call raises the same.
        """
        rows: list[Row] = []
        for record in records:
            rows.append(_next_row(rows or self.rows, record))
        self.append_rows(rows)
        return rows

    def append_rows(self, rows: Sequence[Row]) -> None:
        """`append` for a caller that numbers and chains its rows itself. Raises ValueError if they do not follow."""
        if self._stopped is not None:
            raise self._stopped
        if self._state != "open":
            raise ValueError(f"{self.path} is {self._state}; rows can be appended between begin() and close()")
        last = self.rows[-1]
        for row in rows:
            problem = link_problem(last, row)
            if problem is not None:
                raise ValueError(f"cannot append to {self.path}: {problem}")
            last = row
        if rows:
            self._add(rows)

    def close(self, *, merge: bool) -> None:
        """End this life. `merge`: make one `journal.jsonl` of all segments, as a clean end of a run does.

        Raises Fenced (then nothing was merged), JournalError if another process holds the directory, OSError. After
        any of them, and after a crash at any point of it, the segments that are left hold the same history.
        """
        if self._state == "closed":
            return
        try:
            if merge and self._state == "open":
                if self._stopped is not None:
                    raise self._stopped
                self._merge()
        finally:
            self._state = "closed"
            self._fs.close(self._descriptor)

    # ------------------------------------------------------------ writing

    def _add(self, rows: Sequence[Row]) -> None:
        if self._stopped is not None:
            raise self._stopped
        lines = [dump_row(row) for row in rows]
        self._write(b"".join(lines), len(lines[0]))
        try:
            self._fs.sync(self._descriptor)
        except OSError as error:
            raise self._failed("flushing", error) from error
        self._check_fence()
        self._num_bytes += sum(len(line) for line in lines)
        self.rows.extend(rows)

    def _write(self, data: bytes, first_line_bytes: int) -> None:
        """Write `data` behind what is durable, or raise JournalFull after making sure that nothing of it is left."""
        try:
            self._fs.reserve(self._descriptor, self._num_bytes, len(data))
        except OSError as error:
            if error.errno in _FULL:
                raise self._full(error) from error
            if error.errno not in _CANNOT_RESERVE:
                raise self._failed("reserving space in", error) from error
        view, written = memoryview(data), 0
        while written < len(data):
            try:
                num = self._fs.write(self._descriptor, view[written:], self._num_bytes + written)
            except OSError as error:
                # A whole row may have been read by a successor already: cutting it off would break that one's chain.
                if error.errno in _FULL and written < first_line_bytes:
                    raise self._full(error) from error
                raise self._failed("writing", error) from error
            written += num

    def _full(self, error: OSError) -> JournalFull | JournalFailed:
        try:
            self._fs.truncate(self._descriptor, self._num_bytes)
        except OSError as second:
            return self._failed("cutting back", second)
        return JournalFull(f"no space for {self.path} ({error.strerror}); nothing was added, free some and try again")

    def _failed(self, doing: str, error: OSError) -> JournalFailed:
        self._stopped = JournalFailed(f"{doing} {self.path} failed: {error}; what it holds now is not known")
        return self._stopped

    def _check_fence(self) -> None:
        try:
            newest = max((segment_number(name) or 0 for name in self._fs.names(self.path.parent)), default=0)
            in_place = self._fs.is_at(self._descriptor, self.path)
        except OSError as error:
            raise self._failed("looking for segments newer than", error) from error
        if newest > self.term.number:
            self._stopped = Fenced(f"term {self.term} is over: {self.path.parent / segment_name(newest)} exists")
            raise self._stopped
        if not in_place:
            self._stopped = Fenced(f"term {self.term} is over: its segment {self.path} was merged or taken away")
            raise self._stopped

    def _lost_rows(self, recovered: Sequence[Row]) -> list[Row]:
        common = min(len(recovered), len(self.rows))
        for mine, theirs in zip(self.rows[:common], recovered, strict=False):
            if mine.hash != theirs.hash:
                raise JournalError(
                    f"row {mine.seq} on disk is another one than in the members' copies",
                    path=self.path.parent,
                    seq=mine.seq,
                )
        lost = list(recovered[common:])
        if lost:
            verify_chain(recovered)
            highest = max((r.record.lineage for r in recovered if isinstance(r.record, TermRecord)), default=-1)
            if self.term.lineage <= highest:
                raise ValueError(f"a recovery needs a lineage above {highest}, this term is {self.term}")
        return lost

    # ------------------------------------------------------------ merging

    def _merge(self) -> None:
        """Temp file, fsync, rename, then remove the others oldest first: the newest left always finds its beginning."""
        folder = self.path.parent
        first, scratch = folder / FIRST_SEGMENT, folder / (FIRST_SEGMENT + MERGE_SUFFIX)
        try:
            with self._fs.lock(folder, timeout_s=LOCK_TIMEOUT_S):
                self._check_fence()
                self._fs.remove(scratch)  # left behind by a merge that crashed
                others = [path for path in segment_paths(folder, self._fs) if path != first]
                if not others:
                    return
                self._write_all(scratch)
                self._fs.replace(scratch, first)
                self._fs.sync_path(folder)
                for path in others:
                    self._fs.remove(path)
                self._fs.sync_path(folder)
        except TimeoutError as error:
            raise JournalError(f"the journal cannot be merged: {error}", path=folder) from error

    def _write_all(self, path: Path) -> None:
        descriptor = self._fs.create(path)
        try:
            offset = 0
            for start in range(0, len(self.rows), _ROWS_PER_WRITE):
                view = memoryview(b"".join(dump_row(row) for row in self.rows[start : start + _ROWS_PER_WRITE]))
                while view:
                    num = self._fs.write(descriptor, view, offset)
                    view, offset = view[num:], offset + num
            self._fs.sync(descriptor)
        finally:
            self._fs.close(descriptor)


def _next_row(rows: Sequence[Row], record: Record) -> Row:
    return make_row(rows[-1].seq + 1, rows[-1].hash, record) if rows else make_row(0, GENESIS_HASH, record)


# ---------------------------------------------------------------- the beginning of a life


def open_segment(
    run_dir: Path,
    *,
    controller: str,
    lineage: int | None = None,
    recovered: Sequence[Row] | None = None,
    fs: FileSystem | None = None,
) -> FileJournal:
    """Take over the journal of `run_dir` (protocol 1.2 rule 1): `claim_segment`, then `FileJournal.begin`."""
    journal = claim_segment(run_dir, controller=controller, lineage=lineage, fs=fs)
    try:
        journal.begin(recovered)
    except BaseException:
        journal.close(merge=False)
        raise
    return journal


def claim_segment(
    run_dir: Path, *, controller: str, lineage: int | None = None, fs: FileSystem | None = None
) -> FileJournal:
    """Create the next segment (which fences every older controller), then read the history; nothing is written yet.

    Args:
        run_dir: an existing directory on a local file system.
        controller: unique name of this controller's life.
        lineage: None keeps the lineage of the journal (0 for a new one); a higher one starts a rebuilt journal, whose
            rows are then handed to `FileJournal.begin`.
        fs: what to work with instead of the real file system.

    Raises:
        JournalError: the older segments contradict each other, or another process holds the directory.
        ValueError: `lineage` is not above the journal's.
        OSError: the segment cannot be created or made durable.
    """
    fs = fs or FileSystem()
    try:
        with fs.lock(run_dir, timeout_s=LOCK_TIMEOUT_S):
            number = _next_number(run_dir, fs)
            path = run_dir / segment_name(number)
            descriptor = fs.create(path)
    except TimeoutError as error:
        raise JournalError(f"the journal cannot be taken over: {error}", path=run_dir) from error
    try:
        fs.sync_path(run_dir)
        history = _read_older(run_dir, number, fs)
        last = max((r.record.lineage for r in history.rows if isinstance(r.record, TermRecord)), default=None)
        if lineage is not None and last is not None and lineage <= last:
            raise ValueError(f"lineage {lineage} does not rise above {last}, the one of the journal in {run_dir}")
        term = Term(lineage=lineage if lineage is not None else last or 0, number=number, controller=controller)
        return FileJournal(fs=fs, path=path, descriptor=descriptor, term=term, history=history)
    except BaseException:
        fs.close(descriptor)
        raise


def _next_number(run_dir: Path, fs: FileSystem) -> int:
    """One above every segment and every term: a merged journal holds terms that have no file any more."""
    highest = FIRST_NUMBER - 1
    for path in segment_paths(run_dir, fs):
        highest = max(highest, segment_number(path.name) or 0)
        for line in fs.read(path).split(b"\n"):
            if b'"term"' in line:
                highest = max(highest, _term_number(line))
    return highest + 1


def _term_number(line: bytes) -> int:
    """Number of a term's row; 0 for another or a broken row (reading the history says what is wrong with it)."""
    try:
        record = load_row(line).record
    except (ValueError, TypeError, AttributeError, RecursionError):
        return 0
    return record.number if isinstance(record, TermRecord) else 0


def _read_older(run_dir: Path, number: int, fs: FileSystem) -> History:
    """What stands in the segments below `number`; made durable first, for this controller's chain will build on it."""
    for attempt in range(READ_ATTEMPTS):
        try:
            paths = [path for path in segment_paths(run_dir, fs) if (segment_number(path.name) or 0) < number]
            for path in paths:
                fs.sync_path(path)
            return read_history(paths, fs)
        except FileNotFoundError:
            if attempt == READ_ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")
