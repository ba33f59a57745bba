"""Rows of `metrics.jsonl`: their types, an append-only writer, a tolerant reader, and decimation for plots.

Every `_s` field is seconds since the start of the run on the controller's clock. A value that is not known, or not
finite (a diverged loss), is written as `null` and read as None: JSON has no NaN.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, Self, get_args

Phase = Literal["compute", "sync", "evaluate", "dead", "start", "away", "wait"]
PHASES: tuple[Phase, ...] = get_args(Phase)


class RowError(ValueError):
    """A metrics row lacks a field, or a field has the wrong type; names both."""


class MetricsWriteError(OSError):
    """A metrics row could not be written (full disk, quota, vanished directory); training can go on without it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRow:
    """The inner steps of one island since its row before, up to step number `step`; quick ones share a row.

    Means over these steps: `loss` (training, nats per token), `step_ms`, `tokens_per_s` (waits excluded), `mfu` (share
    of the device's peak). Sums over them: the waits and `compute_s` (seconds inside inner steps). Of the last one:
    `lr`, `grad_norm`. `mem_peak_bytes` is the island's peak so far.
    """

    kind: ClassVar[str] = "step"
    t_s: float
    member: str
    incarnation: int
    step: int
    progress: float
    loss: float | None
    tokens_per_s: float
    step_ms: float
    lr: float | None = None
    grad_norm: float | None = None
    mfu: float | None = None
    data_wait_ms: float = 0.0
    sync_wait_ms: float = 0.0
    mem_peak_bytes: int | None = None
    eta_s: float | None = None
    compute_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalRow:
    """One evaluation of the anchor (`val_loss` in nats per token) and the tokens committed when it was made."""

    kind: ClassVar[str] = "eval"
    t_s: float
    member: str
    version: int
    progress: float
    val_loss: float | None
    tokens_committed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SpanRow:
    """What one island did from `start_s` to `end_s`. Spans of an island do not overlap."""

    kind: ClassVar[str] = "span"
    member: str
    incarnation: int
    phase: Phase
    start_s: float
    end_s: float

    def __post_init__(self) -> None:
        """Refuse an unknown phase, or a span that ends before it starts."""
        if self.phase not in PHASES:
            raise RowError(f"span of {self.member}: phase = {self.phase!r} is not one of {', '.join(PHASES)}")
        if self.end_s < self.start_s:
            raise RowError(f"span of {self.member}: end_s = {self.end_s} lies before start_s = {self.start_s}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExchangeRow:
    """One committed exchange: `bytes` is the payload that all members sent for it, over all its attempts.

    `tokens_committed` is the total of the run after this commit; `seconds` runs from the closing to the commit.
    `closed_because`: why it waited for no further offer.
    """

    kind: ClassVar[str] = "exchange"
    t_s: float
    fragment: int
    version: int
    attempts: int
    roster: tuple[str, ...]
    seconds: float
    bytes: int
    opened_s: float
    tokens_committed: int
    closed_because: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultEvent:
    """One fault and what followed; written again when more of it is known (the last row counts).

    `injected_s` is when it happened: exact for an injected fault, else the last sign of life with `estimated` set.
    """

    kind: ClassVar[str] = "fault"
    t_s: float
    fault: str
    member: str
    injected_s: float | None = None
    detected_s: float | None = None
    next_commit_s: float | None = None
    back_s: float | None = None
    contributed_s: float | None = None
    estimated: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class MemberRow:
    """A member is judged otherwise than before: joining, healthy, slow, suspect, draining or fenced, and why."""

    kind: ClassVar[str] = "member"
    t_s: float
    member: str
    incarnation: int
    status: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class QuorumRow:
    """Too few members are there to commit: who is missing and what to set; empty when enough are there again."""

    kind: ClassVar[str] = "quorum"
    t_s: float
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyRow:
    """The local state of `member` after `version` is `kept` by `other`, or was `restored` from that of `other`."""

    kind: ClassVar[str] = "copy"
    t_s: float
    member: str
    incarnation: int
    what: str
    other: str
    version: int = 0
    num_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkRow:
    """What `member` measured of the link from `peer` in the last seconds, by fetching from it.

    `bytes_per_s`: a moving mean of what came in, from the first byte of a fetch to its last; None until a fetch was
    large enough to tell. `rtt_s`: the quickest answer to a request, the peer's own work included. `bytes`: received.
    """

    kind: ClassVar[str] = "link"
    t_s: float
    member: str
    peer: str
    bytes: int
    bytes_per_s: float | None = None
    rtt_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SilenceRow:
    """The controller heard nothing of a member: cut off, hung or starved. It may have trained on meanwhile."""

    kind: ClassVar[str] = "silence"
    member: str
    incarnation: int
    start_s: float
    end_s: float


Row = StepRow | EvalRow | SpanRow | ExchangeRow | FaultEvent | MemberRow | QuorumRow | LinkRow | SilenceRow | CopyRow
_ROW_TYPES: tuple[type[Row], ...] = (
    StepRow, EvalRow, SpanRow, ExchangeRow, FaultEvent, MemberRow, QuorumRow, LinkRow, SilenceRow, CopyRow,
)  # fmt: skip


def _as_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError("a finite number")
    return float(value)


def _as_int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError("a whole number")
    return value


def _as_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError("true or false")
    return value


def _as_str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a text")
    return value


def _as_names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TypeError("a list of texts")
    return tuple(value)


def _optional(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def converted(value: Any) -> Any:
        # A writer that is not ours may have put NaN or Infinity into the file, which Python's parser accepts.
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return None
        return convert(value)

    return converted


_CONVERT: dict[str, Callable[[Any], Any]] = {
    "float": _as_float,
    "float | None": _optional(_as_float),
    "int": _as_int,
    "int | None": _optional(_as_int),
    "bool": _as_bool,
    "str": _as_str,
    "Phase": _as_str,
    "tuple[str, ...]": _as_names,
}
# kind -> (row type, [(field name, converter, required)])
_PARSERS: dict[str, tuple[type[Row], list[tuple[str, Callable[[Any], Any], bool]]]] = {
    row_type.kind: (
        row_type,
        [(f.name, _CONVERT[str(f.type)], f.default is dataclasses.MISSING) for f in dataclasses.fields(row_type)],
    )
    for row_type in _ROW_TYPES
}


def row_to_dict(row: Row) -> dict[str, Any]:
    """The JSON object of a row, its `kind` first; numbers that are not finite become None."""
    values: dict[str, Any] = {"kind": row.kind}
    for name, _, _ in _PARSERS[row.kind][1]:
        value = getattr(row, name)
        values[name] = None if isinstance(value, float) and not math.isfinite(value) else value
    return values


def row_from_dict(values: Mapping[str, Any]) -> Row | None:
    """The row of a JSON object, or None for a kind that this version does not know; unknown fields are ignored.

    Raises RowError, naming the field, where one is missing or has the wrong type.
    """
    known = _PARSERS.get(str(values.get("kind")))
    if known is None:
        return None
    row_type, columns = known
    given: dict[str, Any] = {}
    for name, convert, required in columns:
        if name in values:
            try:
                given[name] = convert(values[name])
            except TypeError as wanted:
                raise RowError(f"{row_type.kind}: {name} = {values[name]!r} is not {wanted}") from None
        elif required:
            raise RowError(f"{row_type.kind}: field {name} is missing")
    return row_type(**given)


class MetricsWriter:
    """Appends rows to a JSONL file, each with one write, so that a reader never waits for a buffer.

    `open()` first, or use it as a context manager. Opening cuts a torn last line that a killed writer left.
    """

    def __init__(self, path: Path) -> None:
        """Remember `path`; nothing is opened."""
        self.path = path
        self.num_rows = 0
        self._fd: int | None = None
        self._torn = False

    def open(self) -> Self:
        """Create or continue the file. Raises OSError when that is not possible."""
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        _cut_torn_line(self._fd)
        return self

    def append(self, row: Row) -> None:
        """Write one row. Raises MetricsWriteError (disk full, quota, ...): the row is lost, later ones may succeed."""
        assert self._fd is not None, "MetricsWriter.append before open()"
        line = json.dumps(row_to_dict(row), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        if self._torn:
            line = b"\n" + line  # the remains of a half-written row stay a line of their own
        try:
            written = os.write(self._fd, line)
        except OSError as error:
            raise self._write_error(error.errno, os.strerror(error.errno or 0)) from error
        self._torn = written != len(line)
        if self._torn:
            raise self._write_error(None, f"only {written} of {len(line)} bytes were written (disk full?)")
        self.num_rows += 1

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Self:
        """Open the file."""
        return self.open()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close the file."""
        self.close()

    def _write_error(self, errno: int | None, why: str) -> MetricsWriteError:
        return MetricsWriteError(
            errno, f"cannot write metrics to {self.path}: {why}; free some space: training goes on, its curves do not"
        )


def _cut_torn_line(fd: int) -> None:
    """Truncate the file behind its last line end."""
    end = os.lseek(fd, 0, os.SEEK_END)
    position = end
    while position > 0:
        start = max(0, position - 65536)
        newline = os.pread(fd, position - start, start).rfind(b"\n")
        if newline >= 0:
            position = start + newline + 1
            break
        position = start
    if position < end:
        os.ftruncate(fd, position)


@dataclass(kw_only=True, slots=True)
class ReadProblems:
    """What a reader left out: a torn last line (normal after a kill), bad lines, and kinds it does not know."""

    torn: bool = False
    num_bad: int = 0
    first_bad: str = ""
    unknown_kinds: Counter[str] = field(default_factory=Counter)

    def sentences(self) -> list[str]:
        """The problems as sentences for people; empty when every line was read."""
        told: list[str] = []
        if self.torn:
            told.append("The last metrics row is cut off (the writer was stopped in the middle of it).")
        if self.num_bad:
            told.append(f"Metrics rows that could not be read: {self.num_bad} (first: {self.first_bad}).")
        if self.unknown_kinds:
            told.append(f"Metrics rows of unknown kinds were left out: {', '.join(sorted(self.unknown_kinds))}.")
        return told


def read_rows(path: Path, problems: ReadProblems | None = None) -> Iterator[Row]:
    """Yield the rows of a metrics file in order, in constant memory; what cannot be read is counted in `problems`.

    Raises OSError where the file cannot be opened.
    """
    with open(path, "rb") as lines:
        yield from _parsed(lines, problems)


def _parsed(lines: Iterable[bytes], problems: ReadProblems | None = None) -> Iterator[Row]:
    problems = problems if problems is not None else ReadProblems()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            if not isinstance(values, dict):
                raise RowError("not a JSON object")
            row = row_from_dict(values)
        except ValueError as error:
            if not line.endswith(b"\n"):
                problems.torn = True
            else:
                problems.num_bad += 1
                problems.first_bad = problems.first_bad or f"line {number}: {error}"
            continue
        if row is None:
            problems.unknown_kinds[str(values.get("kind"))] += 1
        else:
            yield row


def newest_rows(path: Path) -> Iterator[Row]:
    """Yield what `read_rows` does, but of a member's steps, spans and links only the newest: those of a night are many.

    Raises OSError where the file cannot be opened.
    """
    newest: dict[bytes, bytes] = {}
    others: list[bytes] = []
    with open(path, "rb") as lines:
        for line in lines:
            kind = _FREQUENT.match(line)
            member = _MEMBER.search(line) if kind else None
            if kind and member and line.endswith(b"}\n"):
                newest[kind[0] + member[0]] = line
            else:
                others.append(line)
    yield from _parsed([*newest.values(), *others])


_FREQUENT = re.compile(rb'\{"kind":"(?:step|span|link|copy)"')
_MEMBER = re.compile(rb'"member":"[^"]*"')


def latest_faults(events: Iterable[FaultEvent]) -> list[FaultEvent]:
    """One event per fault, the last one written for it, in order of their first row."""
    latest: dict[tuple[str, str, float | None], FaultEvent] = {}
    for event in events:
        moment = event.injected_s if event.injected_s is not None else event.detected_s
        latest[event.fault, event.member, moment] = event
    return list(latest.values())


def decimate(points: Sequence[tuple[float, float]], *, max_points: int) -> list[tuple[float, float]]:
    """At most `max_points` of `points` (sorted by x), keeping what the eye sees.

    The x range is cut into equal columns; the first, lowest, highest and last point of each stay (the M4 aggregation
    of Jugel et al., VLDB 2014), so every extreme of the curve and both its ends survive.
    """
    if max_points < 4:
        raise ValueError(f"max_points = {max_points}: at least 4 are needed to keep a curve's ends and extremes")
    if len(points) <= max_points:
        return list(points)
    num_columns = max_points // 4
    x_min, x_max = points[0][0], points[-1][0]
    scale = num_columns / (x_max - x_min) if x_max > x_min else 0.0
    columns: dict[int, list[int]] = {}  # column -> indices of its first, lowest, highest and last point
    for i, (x, y) in enumerate(points):
        column = min(int((x - x_min) * scale), num_columns - 1)
        kept = columns.setdefault(column, [i, i, i, i])
        if y < points[kept[1]][1]:
            kept[1] = i
        if y > points[kept[2]][1]:
            kept[2] = i
        kept[3] = i
    return [points[i] for kept in columns.values() for i in sorted(set(kept))]
