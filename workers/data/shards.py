"""Token shards: Arrow IPC files with one column `tokens`, in segments of a fixed length, memory-mapped when read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import pyarrow as pa
from blake3 import blake3
from numpy.typing import NDArray

from workers.data.errors import DataError
from workers.data.index import ShardIndex, SplitName, TokenType, damaged

Tokens: TypeAlias = NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.uint32]

SEGMENT_TOKENS = 1 << 20
SHARD_TOKENS = 1 << 26
_COLUMN = "tokens"


class ShardWriter:
    """Writes one split as shards of `SHARD_TOKENS` tokens; holds one segment in memory. Call `append`, then `close`
    once.

    Raises `DataError` where the disk refuses. `abandon` drops an unfinished shard.
    """

    def __init__(self, folder: Path, split: SplitName, dtype: TokenType) -> None:
        self._folder, self._split = folder, split
        self._schema = _schema(dtype)
        self._segment = np.empty(SEGMENT_TOKENS, dtype=dtype)
        self._num_filled = 0
        self._shards: list[ShardIndex] = []
        self._shard: _OpenShard | None = None

    def append(self, tokens: Tokens) -> None:
        """Add tokens to the end of the split."""
        start = 0
        while start < len(tokens):
            taken = min(len(tokens) - start, SEGMENT_TOKENS - self._num_filled)
            self._segment[self._num_filled : self._num_filled + taken] = tokens[start : start + taken]
            self._num_filled += taken
            start += taken
            if self._num_filled == SEGMENT_TOKENS:
                self._write_segment()

    def close(self) -> tuple[ShardIndex, ...]:
        """Write what is left and return the shards in order."""
        if self._num_filled:
            self._write_segment()
        self._close_shard()
        return tuple(self._shards)

    def abandon(self) -> None:
        """Let go of the open file without finishing it."""
        if self._shard is not None:
            self._shard.file.close()
            self._shard = None

    def _write_segment(self) -> None:
        if self._shard is None:
            self._shard = _OpenShard(self._folder / f"{self._split}-{len(self._shards):05d}.arrow", self._schema)
        self._shard.write(self._segment[: self._num_filled])
        self._num_filled = 0
        if self._shard.num_tokens >= SHARD_TOKENS:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shards.append(self._shard.finish())
            self._shard = None


class _OpenShard:
    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.num_tokens = path, 0
        self._schema, self._hash = schema, blake3()
        try:
            self.file: BinaryIO = path.open("wb")
            self._writer = pa.ipc.new_file(self.file, schema)
        except OSError as error:
            raise _unwritable(path, error) from None

    def write(self, tokens: Tokens) -> None:
        self._hash.update(tokens.data.cast("B"))
        self.num_tokens += len(tokens)
        try:
            self._writer.write_batch(pa.record_batch([pa.array(tokens)], schema=self._schema))
        except OSError as error:
            raise _unwritable(self.path, error) from None

    def finish(self) -> ShardIndex:
        try:
            self._writer.close()
            self.file.flush()
            os.fsync(self.file.fileno())
            num_bytes = self.file.tell()
            self.file.close()
        except OSError as error:
            raise _unwritable(self.path, error) from None
        return ShardIndex(
            file=self.path.name, num_tokens=self.num_tokens, num_bytes=num_bytes, digest=self._hash.hexdigest(length=16)
        )


def map_shard(file: Path, shard: ShardIndex, dtype: TokenType) -> list[Tokens]:
    """Map a shard and return its segments, read-only, without a copy; raises `DataError` if it is not as indexed."""
    try:
        with pa.memory_map(str(file)) as source:
            reader = pa.ipc.open_file(source)
            if reader.schema != _schema(dtype):
                raise damaged(file, f"it is not one column {_COLUMN!r} of {dtype}")
            columns = [reader.get_batch(i).column(0) for i in range(reader.num_record_batches)]
            segments = [column.to_numpy(zero_copy_only=True) for column in columns]
    except (pa.ArrowException, OSError) as error:
        raise damaged(file, " ".join(str(error).split())[:300]) from None
    num_tokens = sum(map(len, segments))
    if num_tokens != shard.num_tokens:
        raise damaged(file, f"it holds {num_tokens} tokens, the index says {shard.num_tokens}")
    return segments


def check_shard(file: Path, shard: ShardIndex, segments: list[Tokens], vocab_size: int) -> None:
    """Read every token of a shard; raises `DataError` for another digest or a token outside the vocabulary."""
    tokens_hash = blake3()
    largest = 0
    for segment in segments:
        tokens_hash.update(segment.data.cast("B"))
        largest = max(largest, int(segment.max(initial=0)))
    found = tokens_hash.hexdigest(length=16)
    if found != shard.digest:
        raise damaged(file, f"its tokens have digest {found}, the index says {shard.digest}")
    if largest >= vocab_size:
        raise damaged(file, f"token {largest} is outside the vocabulary 0..{vocab_size - 1}")


def _schema(dtype: TokenType) -> pa.Schema:
    return pa.schema([pa.field(_COLUMN, getattr(pa, dtype)(), nullable=False)])


def _unwritable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be written ({error.strerror or error}); free space or choose another folder")
