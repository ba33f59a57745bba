"""Reads a pack: samples by id, straight out of memory-mapped shards."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from workers.data.errors import DataError
from workers.data.index import SPLITS, PackIndex, SplitName, check_sizes, load_index, shard_paths
from workers.data.shards import Tokens, check_shard, map_shard
from workers.data.tokenizers import Tokenizer, load_tokenizer


class PackReader:
    """A pack, opened: its index is checked, every shard is there, whole by its size, and mapped. `verify` reads every
    token.

    Safe to use from several threads. Raises `DataError` naming the file and what to do where the pack cannot be used.
    A file that is cut short while it is mapped kills the process (SIGBUS): replace a pack with `atoll data pack`,
    never in place.
    """

    def __init__(self, path: Path) -> None:
        self._path = Path(path)
        self._index = load_index(self._path)
        check_sizes(self._path, self._index)
        segments: dict[SplitName, list[Tokens]] = {name: [] for name in SPLITS}
        for name, shard, file in shard_paths(self._path, self._index):
            segments[name] += map_shard(file, shard, self._index.token_type)
        self._streams = {name: _Stream(parts) for name, parts in segments.items()}

    @property
    def path(self) -> Path:
        """The folder."""
        return self._path

    @property
    def index(self) -> PackIndex:
        """What is in it."""
        return self._index

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens; raises `DataError` where it is missing or another."""
        return load_tokenizer(self._path, self._index)

    def num_samples(self, split: SplitName = "train") -> int:
        """Return the number of samples of a split."""
        return self._index.splits[split].num_samples

    def batch(self, sample_ids: NDArray[np.int64], split: SplitName = "train") -> NDArray[np.int64]:
        """Return the samples with these ids, (B,) -> (B, seq_len + 1): inputs are `[:, :-1]`, targets `[:, 1:]`.

        Sample i is tokens i * seq_len to i * seq_len + seq_len inclusive. Raises `DataError` for an id outside the
        split.
        """
        ids = np.asarray(sample_ids, dtype=np.int64).reshape(-1)
        num_samples = self.num_samples(split)
        if ids.size and not (0 <= int(ids.min()) and int(ids.max()) < num_samples):
            raise DataError(
                f"{self._path}: sample {int(ids.min())} or {int(ids.max())} of {split} is outside 0..{num_samples - 1}"
            )
        seq_len = self._index.seq_len
        rows = np.empty((ids.size, seq_len + 1), dtype=np.int64)
        stream = self._streams[split]
        for row, sample_id in zip(rows, ids.tolist(), strict=True):
            stream.copy(sample_id * seq_len, row)
        return rows

    def verify(self) -> None:
        """Read the whole pack; raises `DataError` naming the first shard whose digest or tokens are not as indexed."""
        for _, shard, file in shard_paths(self._path, self._index):
            segments = map_shard(file, shard, self._index.token_type)
            check_shard(file, shard, segments, self._index.vocab_size)
        _ = self.tokenizer


class _Stream:
    """Several arrays seen as one."""

    def __init__(self, segments: list[Tokens]) -> None:
        self._segments = segments
        self._ends = np.cumsum([len(segment) for segment in segments], dtype=np.int64)

    def copy(self, start: int, out: NDArray[np.int64]) -> None:
        """Fill `out` with the tokens from position `start` on."""
        index = int(np.searchsorted(self._ends, start, side="right"))
        num_done = 0
        while num_done < len(out):
            segment = self._segments[index]
            first = start + num_done - (int(self._ends[index]) - len(segment))
            part = segment[first : first + len(out) - num_done]
            out[num_done : num_done + len(part)] = part
            num_done += len(part)
            index += 1
