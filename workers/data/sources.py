"""Text out of files: which files, which documents, which blocks. Streaming: a row, and a page of parquet, must fit.

A document is a file (.txt .md .py) or a row (.jsonl, .parquet). One that is longer than 64 KiB is cut into blocks of
at most 64 KiB, after the last line end that fits, or between two characters where no line ends. Text must be UTF-8:
anything else is refused with its place, since silently replaced characters would be trained on. A byte order mark is
dropped; empty documents, empty lines of .jsonl and null rows are left out. Within a folder, files come in the order
of their paths; hidden ones and other suffixes are skipped.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from workers.data.errors import DataError

MAX_BLOCK_BYTES = 64 << 10
MAX_LINE_BYTES = 16 << 20
SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")
_READ_BYTES = 1 << 20
_BATCH_BYTES = 4 << 20
_MAX_BATCH_ROWS = 256
_MAX_COPIED_ROWS = 16
_ONE_EACH = "write one JSON object on each line"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Block(NamedTuple):
    """At most 64 KiB of UTF-8 text, and how many bytes of its file have been read so far (for progress)."""

    data: bytes
    starts_document: bool
    num_read_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """One file to read; `name` is the field or column of its text."""

    path: Path
    kind: Literal["text", "jsonl", "parquet"]
    name: str
    num_bytes: int


def find_sources(sources: Sequence[Path], *, text_field: str | None, text_column: str | None) -> tuple[SourceFile, ...]:
    """List the files of `sources` (files and folders) in the order in which they are read, each once.

    Raises `DataError` for what is missing, unsupported, unreadable or lacks its text field or column, before anything
    is read.
    """
    if not sources:
        raise DataError("no source given; name at least one file or folder")
    found: dict[str, SourceFile] = {}
    for source in map(Path, sources):
        try:
            for path in _walk(source):
                found.setdefault(os.path.realpath(path), _describe(path, text_field, text_column))
        except OSError as error:
            raise DataError(
                f"{error.filename or source}: cannot be read ({error.strerror}); check its permissions"
            ) from None
    return tuple(found.values())


def read_blocks(source: SourceFile) -> Iterator[Block]:
    """Yield the blocks of one file, in order; raises `DataError` naming file and place for text that cannot be used."""
    try:
        if source.kind == "parquet":
            yield from _parquet_blocks(source)
        else:
            with source.path.open("rb") as file:
                yield from _text_blocks(file, source.path) if source.kind == "text" else _jsonl_blocks(file, source)
    except OSError as error:
        raise DataError(f"{source.path}: cannot be read ({error.strerror or error})") from None


def cut_blocks(data: bytes) -> Iterator[bytes]:
    """Cut one document into blocks of at most 64 KiB whose concatenation it is."""
    start = 0
    while start < len(data):
        end = _block_end(data, start)
        yield data[start:end]
        start = end


def _block_end(data: bytes, start: int) -> int:
    limit = start + MAX_BLOCK_BYTES
    if limit >= len(data):
        return len(data)
    line_end = data.rfind(b"\n", start, limit) + 1
    if line_end:
        return line_end
    # 0b10xxxxxx continues a character; a character has at most three of them.
    cut = next((at for at in range(limit, limit - 4, -1) if data[at] & 0xC0 != 0x80), limit)
    return cut


# ---------------------------------------------------------------- which files


def _walk(source: Path) -> Iterable[Path]:
    if source.is_dir():
        paths = [Path(folder, name) for folder, names in _visible_files(source) for name in names]
        paths.sort(key=lambda path: path.relative_to(source).as_posix())
        if not paths:
            raise DataError(f"{source}: folder holds no file that ends in {', '.join(SUFFIXES)}")
        return paths
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    if not source.is_file():
        raise DataError(f"{source}: not a regular file; write its text into a file first")
    if source.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{source}: suffix {source.suffix!r} is not supported; convert it to one of {', '.join(SUFFIXES)}"
        )
    return [source]


def _visible_files(source: Path) -> Iterator[tuple[str, list[str]]]:
    def refuse(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(source, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        visible = [name for name in names if not name.startswith(".") and name.lower().endswith(SUFFIXES)]
        yield folder, [name for name in visible if Path(folder, name).is_file()]


def _describe(path: Path, text_field: str | None, text_column: str | None) -> SourceFile:
    suffix, name = path.suffix.lower(), ""
    kind: Literal["text", "jsonl", "parquet"] = "text"
    if suffix == ".jsonl":
        if not text_field:
            raise DataError(f"{path}: which field holds the text? name it with --text-field")
        kind, name = "jsonl", text_field
    elif suffix == ".parquet":
        if not text_column:
            raise DataError(f"{path}: which column holds the text? name it with --text-column")
        kind, name = "parquet", text_column
        _check_column(path, text_column)
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: cannot be read; check its permissions")
    return SourceFile(path=path, kind=kind, name=name, num_bytes=path.stat().st_size)


# ---------------------------------------------------------------- .txt .md .py


def _text_blocks(file: BinaryIO, path: Path) -> Iterator[Block]:
    pending = _skip_mark(file.read(_READ_BYTES))
    offset = file.tell() - len(pending)
    is_first, at_end = True, False
    while not at_end:
        chunk = file.read(_READ_BYTES)
        at_end = not chunk
        pending, start = pending + chunk, 0
        # The same cuts as in `cut_blocks`, which sees the whole document: a shorter rest waits for more.
        while len(pending) - start > (0 if at_end else MAX_BLOCK_BYTES):
            end = _block_end(pending, start)
            block = pending[start:end]
            _check_utf8(block, path, "byte", offset + start)
            yield Block(block, is_first, offset + end)
            is_first, start = False, end
        pending, offset = pending[start:], offset + start


def _skip_mark(data: bytes) -> bytes:
    return data[len(_BYTE_ORDER_MARK) :] if data.startswith(_BYTE_ORDER_MARK) else data


def _check_utf8(data: bytes, path: Path, unit: str, position: int) -> None:
    if data.isascii():
        return
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = f"byte {position + error.start}" if unit == "byte" else f"{unit} {position}"
        raise DataError(
            f"{path}: not UTF-8 at {at} ({error.reason}); convert the file to UTF-8 or leave it out"
        ) from None


# ---------------------------------------------------------------- .jsonl


def _jsonl_blocks(file: BinaryIO, source: SourceFile) -> Iterator[Block]:
    number, num_read_bytes = 0, 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        num_read_bytes += len(line)
        if len(line) > MAX_LINE_BYTES:
            raise DataError(f"{source.path}: line {number} is longer than {MAX_LINE_BYTES >> 20} MiB; {_ONE_EACH}")
        data = _row_text(_skip_mark(line) if number == 1 else line, number, source)
        yield from _document(data, num_read_bytes)


def _row_text(line: bytes, number: int, source: SourceFile) -> bytes:
    """Return the text of one line, empty where the line or the text is empty or null."""
    if not line.strip():
        return b""
    place = f"{source.path}: line {number}"
    _check_utf8(line, source.path, "line", number)
    try:
        row: Any = json.loads(line.decode())
    except json.JSONDecodeError as error:
        raise DataError(f"{place} is not JSON ({error.msg} at column {error.colno}); {_ONE_EACH}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not usable JSON ({error}); {_ONE_EACH}") from None
    if not isinstance(row, dict):
        raise DataError(f"{place} is not a JSON object but {type(row).__name__}; {_ONE_EACH}")
    if source.name not in row:
        raise DataError(f"{place} has no field {source.name!r}; {_name_hint(source.name, list(row), '--text-field')}")
    text = row[source.name]
    if text is None:
        return b""
    if not isinstance(text, str):
        raise DataError(f"{place}: field {source.name!r} is not text but {type(text).__name__}; name a text field")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: field {source.name!r} holds a lone surrogate at character {error.start}; remove it"
        ) from None


def _document(data: bytes, num_read_bytes: int) -> Iterator[Block]:
    for index, block in enumerate(cut_blocks(data)):
        yield Block(block, index == 0, num_read_bytes)


# ---------------------------------------------------------------- .parquet


def _open_parquet(path: Path) -> pq.ParquetFile:
    # Without pre_buffer and with a small buffer, pages are read as they are needed, not a row group at once.
    return pq.ParquetFile(path, pre_buffer=False, buffer_size=_READ_BYTES)


def _check_column(path: Path, column: str) -> None:
    try:
        with _open_parquet(path) as file:
            schema = file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({_one_line(error)}); write it again") from None
    if column not in schema.names:
        raise DataError(f"{path}: has no column {column!r}; {_name_hint(column, schema.names, '--text-column')}")
    if schema.names.count(column) > 1:
        raise DataError(f"{path}: has more than one column {column!r}; rename the others")
    kind = schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise DataError(f"{path}: column {column!r} is not text but {schema.field(column).type}; name a text column")


def _parquet_blocks(source: SourceFile) -> Iterator[Block]:
    row = 0
    try:
        with _open_parquet(source.path) as file:
            num_rows = max(1, file.metadata.num_rows)
            batches = file.iter_batches(_batch_rows(file, source.name), columns=[source.name], use_threads=False)
            for batch in batches:
                for data in _values(batch.column(source.name)):
                    row += 1
                    if data:
                        _check_utf8(data, source.path, "row", row)
                        yield from _document(data, source.num_bytes * row // num_rows)
    except pa.ArrowException as error:
        raise DataError(
            f"{source.path}: column {source.name!r} cannot be read after row {row} ({_one_line(error)}); "
            "write the file again"
        ) from None


def _values(column: pa.Array) -> Iterator[bytes | None]:
    """Yield the UTF-8 bytes of each row; a few are copied at a time, since a dictionary may repeat a long text."""
    column = column.cast(pa.large_string()).cast(pa.large_binary())
    for start in range(0, len(column), _MAX_COPIED_ROWS):
        yield from column.slice(start, _MAX_COPIED_ROWS).to_pylist()


def _batch_rows(file: pq.ParquetFile, column: str) -> int:
    """Return how many rows to decode at once, so that they take about 4 MiB."""
    widest = 1
    for group in map(file.metadata.row_group, range(file.metadata.num_row_groups)):
        for chunk in map(group.column, range(group.num_columns)):
            if chunk.path_in_schema == column and group.num_rows:
                widest = max(widest, chunk.total_uncompressed_size // group.num_rows)
    return int(min(_MAX_BATCH_ROWS, max(1, _BATCH_BYTES // widest)))


def _name_hint(name: str, known: Sequence[str], option: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    meant = f"did you mean {near[0]!r}? " if near else ""
    shown = ", ".join(repr(each) for each in known[:12]) + (", ..." if len(known) > 12 else "")
    return f"{meant}it has {shown or 'none'}; choose one with {option}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
