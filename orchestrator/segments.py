"""Reading a journal: segment files of several controllers become one history (protocol 1.2 rule 1).

Each controller writes a segment of its own: `journal.jsonl` the first, `journal.<term>.jsonl` the later ones. A later
segment begins where its controller had read to, so the history is found from the newest segment backwards: its first
row names by number and hash the row that it continues, in an older segment; whatever stands behind that row was
written by a controller that had been fenced (a zombie), was told to nobody, and is no part of the history.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.filesystem import FileSystem
from workers.records import GENESIS_HASH, RecordError, Row, load_row, make_row

FIRST_SEGMENT = "journal.jsonl"
FIRST_NUMBER = 1
READ_ATTEMPTS = 5
RESTORE = (
    "put back the file from a backup; while members of the run live in a cluster, atoll up --recover-from-members RUN"
    " rebuilds it from their copies"
)
_NAME = re.compile(r"journal(?:\.(\d+))?\.jsonl")


class JournalError(ValueError):
    """A journal that contradicts itself: names the file, the line, the row and what to do.

    Attributes:
        path: the segment, or None when no file is concerned.
        line: line in it, from 1; 0 when the file as a whole is meant.
        seq: number of the first row that does not follow, or None if it cannot be told.
        reason: what is wrong, without place and remedy.
        remedy: what to do about it.
    """

    def __init__(
        self, reason: str, *, path: Path | None = None, line: int = 0, seq: int | None = None, remedy: str = RESTORE
    ) -> None:
        place = f"{path}, line {line}: " if path and line else f"{path}: " if path else ""
        super().__init__(f"{place}{reason}; {remedy}")
        self.reason = reason
        self.remedy = remedy
        self.path = path
        self.line = line
        self.seq = seq

    @property
    def is_damage(self) -> bool:
        """Whether rows are missing or altered; else the directory cannot be had now."""
        return self.line > 0 or self.seq is not None

    @property
    def what(self) -> str:
        """What is wrong and where, without the remedy."""
        return str(self).removesuffix(f"; {self.remedy}")

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_error, (self.reason, self.path, self.line, self.seq, self.remedy))


def _rebuild_error(reason: str, path: Path | None, line: int, seq: int | None, remedy: str) -> JournalError:
    return JournalError(reason, path=path, line=line, seq=seq, remedy=remedy)


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """The rows of one file; row `i` is on line `i + 1`. `torn`: bytes after the last whole row, never flushed."""

    path: Path
    rows: list[Row]
    torn: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A part of the history: rows from number `first_seq` on are in `path`, from line 1 on."""

    path: Path
    first_seq: int


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """The one history of a run: rows 0, 1, 2, ... and where they stand; `unread`: rows of zombies, left out."""

    rows: list[Row]
    pieces: tuple[Piece, ...]
    unread: int = 0
    torn: int = 0

    def place(self, seq: int) -> str:
        """`journal.jsonl:17`: file and line of row `seq`."""
        for piece in reversed(self.pieces):
            if seq >= piece.first_seq:
                return f"{piece.path.name}:{seq - piece.first_seq + 1}"
        return ""


def segment_number(name: str) -> int | None:
    """Number of the segment with this file name, or None if it is no segment."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    return int(match[1]) if match[1] is not None else FIRST_NUMBER


def segment_name(number: int) -> str:
    """File name of segment `number`."""
    return FIRST_SEGMENT if number == FIRST_NUMBER else f"journal.{number:06d}.jsonl"


def segment_paths(run_dir: Path, fs: FileSystem | None = None) -> list[Path]:
    """The segments of a run directory, oldest first."""
    found = [(number, name) for name in (fs or FileSystem()).names(run_dir) if (number := segment_number(name))]
    return [run_dir / name for _, name in sorted(found)]


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """The history in the segments `paths` (any order). Raises JournalError, FileNotFoundError."""
    return read_history(paths).rows


def read_run(run_dir: Path, fs: FileSystem | None = None) -> History:
    """The history of a run directory, which a live controller may be writing or merging meanwhile."""
    fs = fs or FileSystem()
    for _ in range(READ_ATTEMPTS - 1):
        try:
            return read_history(segment_paths(run_dir, fs), fs)
        except FileNotFoundError:
            continue  # a merge removed a segment after it was listed: what it held is in the first one now
    return read_history(segment_paths(run_dir, fs), fs)


def read_history(paths: Iterable[Path], fs: FileSystem | None = None) -> History:
    """The history in the segments `paths` (any order). Raises JournalError, FileNotFoundError.

    Read newest first: a live older segment can then only hold more than what a newer one continues, never less.
    """
    fs = fs or FileSystem()
    newest_first = sorted(paths, key=lambda path: segment_number(path.name) or 0, reverse=True)
    return link_segments([parse_segment(path, fs.read(path)) for path in newest_first][::-1])


def parse_segment(path: Path, data: bytes) -> Segment:
    """The rows of one segment. A torn tail is cut: no newline, or broken JSON on the very last line, or zero bytes.

    Zeros are space that was reserved and not written: what is behind them belongs to a write that was never flushed.
    Raises JournalError for any other row that is broken or does not continue the one before it.
    """
    hole = data.find(b"\0")
    lines = (data if hole < 0 else data[:hole]).split(b"\n")
    tail = lines.pop()
    if not tail and lines and not _is_json(lines[-1]):
        tail = lines.pop() + b"\n"
    rows: list[Row] = []
    for line, text in enumerate(lines, start=1):
        try:
            row = _load(text)
        except RecordError as error:
            last = rows[-1].seq + 1 if rows else None
            name = f"row {last}: " if last is not None else ""
            raise JournalError(f"{name}{error}", path=path, line=line, seq=last) from error
        problem = link_problem(rows[-1] if rows else None, row)
        if problem is not None:
            raise JournalError(problem, path=path, line=line, seq=row.seq)
        rows.append(row)
    return Segment(path=path, rows=rows, torn=len(tail) + (len(data) - hole if hole >= 0 else 0))


def _load(text: bytes) -> Row:
    try:
        row = load_row(text)
    except RecordError:
        raise
    except (ValueError, TypeError, AttributeError, RecursionError) as error:  # a field of a type that cannot be hashed
        raise RecordError(f"not a journal row: {error}") from error
    if type(row.seq) is not int or row.seq < 0:
        raise RecordError(f"not a journal row: seq is {row.seq!r}")
    return row


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def link_problem(last: Row | None, row: Row) -> str | None:
    """Why `row` cannot follow `last` (None: why it cannot be the first of a file), or None if it can."""
    if last is None:
        if row.seq == 0 and row.prev != GENESIS_HASH:
            return f"row 0 continues another journal (prev is {row.prev}, expected {GENESIS_HASH})"
        return None
    if row.hash == last.hash:
        return f"row {row.seq} is there twice"
    if row.seq > last.seq + 1:
        missing = f"row {last.seq + 1} is" if row.seq == last.seq + 2 else f"rows {last.seq + 1} to {row.seq - 1} are"
        return f"{missing} missing before row {row.seq}"
    if row.seq != last.seq + 1:
        return f"row {row.seq} stands behind row {last.seq}: rows were moved or doubled"
    if row.prev != last.hash:
        return f"row {row.seq} does not follow row {last.seq}: one of the two was altered or exchanged"
    return None


def verify_chain(rows: Sequence[Row]) -> None:
    """Raise JournalError unless `rows` are rows 0, 1, 2, ... with right hashes."""
    last: Row | None = None
    for row in rows:
        try:
            problem = (
                link_problem(last, row) if last or row.seq == 0 else f"row {row.seq} is the first, row 0 is missing"
            )
            if problem is None and make_row(row.seq, row.prev, row.record).hash != row.hash:
                problem = f"row {row.seq} was altered: its hash is not that of its content"
        except (RecordError, ValueError, TypeError, AttributeError) as error:
            problem = f"row {row.seq} cannot be hashed: {error}"
        if problem is not None:
            raise JournalError(problem, seq=row.seq)
        last = row


def link_segments(segments: Sequence[Segment]) -> History:
    """One history out of segments (oldest first). Raises JournalError where a segment continues nothing."""
    parts: list[tuple[Segment, int]] = []
    index = next((i for i in reversed(range(len(segments))) if segments[i].rows), None)
    stop = len(segments[index].rows) if index is not None else 0
    while index is not None:
        segment = segments[index]
        parts.append((segment, stop))
        first = segment.rows[0]
        if first.seq == 0:
            break
        found = _find(segments[:index], first.seq - 1, first.prev)
        if found is None:
            raise _nothing_before(segment, segments[:index])
        index, stop = found
    parts.reverse()
    rows = [row for segment, stop in parts for row in segment.rows[:stop]]
    return History(
        rows=rows,
        pieces=tuple(Piece(path=segment.path, first_seq=segment.rows[0].seq) for segment, _ in parts),
        unread=sum(not _holds(rows, row) for segment in segments for row in segment.rows) if len(segments) > 1 else 0,
        torn=sum(segment.torn for segment in segments),
    )


def _holds(rows: Sequence[Row], row: Row) -> bool:
    return row.seq < len(rows) and rows[row.seq].hash == row.hash


def _find(segments: Sequence[Segment], seq: int, wanted: str) -> tuple[int, int] | None:
    """Where row `seq` with hash `wanted` is: index of the newest such segment, and the rows up to and including it."""
    for index in reversed(range(len(segments))):
        rows = segments[index].rows
        at = seq - rows[0].seq if rows else -1
        if 0 <= at < len(rows) and rows[at].hash == wanted:
            return index, at + 1
    return None


def _nothing_before(segment: Segment, older: Sequence[Segment]) -> JournalError:
    first = segment.rows[0]
    longest = max((s.rows[-1].seq for s in older if s.rows), default=None)
    if longest is None:
        what = "no older segment has a row"
    elif longest < first.seq - 1:
        what = f"the older segments end with row {longest}"
    else:
        what = f"row {first.seq - 1} of the older segments is another one"
    reason = f"row {first.seq} continues row {first.seq - 1} ({first.prev}), but {what}"
    return JournalError(reason, path=segment.path, line=1, seq=first.seq)
