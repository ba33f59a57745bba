"""Reads a pack: samples by id, straight out of memory-mapped shards."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from workers.data.errors import DataError
from workers.data.index import SPLITS, PackIndex, ShardIndex, SplitName, check_sizes, load_index, shard_paths
from workers.data.shard_cache import ShardCache
from workers.data.shards import Tokens, check_shard, map_shard
from workers.data.tokenizers import Tokenizer, load_tokenizer


class PackReader:
    """A pack, opened: its index is checked, every shard is there, whole by its size, and mapped. `verify` reads every
    token.

    Safe to use from several threads. Raises `DataError` naming the file and what to do where the pack cannot be used.
    A file that is cut short while it is mapped kills the process (SIGBUS): replace a pack with `atoll data pack`,
    never in place.
    """

    def __init__(self, path: Path, cache: ShardCache | None = None) -> None:
        """`cache`: where shards come from that are not here yet; each is mapped when it is first read then."""
        self._path = Path(path)
        self._index = load_index(self._path)
        self.cache = cache
        if cache is None:
            check_sizes(self._path, self._index)
        self._streams = {name: _Stream(self._index.splits[name].shards, self._map) for name in SPLITS}
        if cache is None:
            for stream in self._streams.values():
                stream.map_all()

    def _map(self, shard: ShardIndex) -> list[Tokens]:
        file = self._path / shard.file if self.cache is None else self.cache.ensure(shard)
        return map_shard(file, shard, self._index.token_type)

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

    def shards_of(self, sample_ids: NDArray[np.int64], split: SplitName = "train") -> list[ShardIndex]:
        """The shards that these samples are in, in the order in which they are needed first."""
        return self._streams[split].shards_of(np.asarray(sample_ids, dtype=np.int64), self._index.seq_len)

    def verify(self) -> None:
        """Read the whole pack; raises `DataError` naming the first shard whose digest or tokens are not as indexed."""
        for _, shard, file in shard_paths(self._path, self._index):
            segments = map_shard(file, shard, self._index.token_type)
            check_shard(file, shard, segments, self._index.vocab_size)
        _ = self.tokenizer


class _Stream:
    """Several shards seen as one array; each is mapped when it is first read."""

    def __init__(self, shards: tuple[ShardIndex, ...], load: Callable[[ShardIndex], list[Tokens]]) -> None:
        self._shards, self._load = shards, load
        self._ends = np.cumsum([shard.num_tokens for shard in shards], dtype=np.int64)
        self._parts: list[_Segments | None] = [None] * len(shards)

    def map_all(self) -> None:
        for number in range(len(self._shards)):
            self._part(number)

    def shards_of(self, ids: NDArray[np.int64], seq_len: int) -> list[ShardIndex]:
        first = np.searchsorted(self._ends, ids * seq_len, side="right")
        last = np.searchsorted(self._ends, ids * seq_len + seq_len, side="right")
        numbers = dict.fromkeys(n for a, b in zip(first.tolist(), last.tolist(), strict=True) for n in range(a, b + 1))
        return [self._shards[number] for number in numbers]

    def copy(self, start: int, out: NDArray[np.int64]) -> None:
        """Fill `out` with the tokens from position `start` on."""
        number = int(np.searchsorted(self._ends, start, side="right"))
        num_done = 0
        while num_done < len(out):
            first = start + num_done - (int(self._ends[number]) - self._shards[number].num_tokens)
            num_done += self._part(number).copy(first, out[num_done:])
            number += 1

    def _part(self, number: int) -> _Segments:
        part = self._parts[number]
        if part is None:
            part = self._parts[number] = _Segments(self._load(self._shards[number]))
        return part


class _Segments:
    """Several arrays seen as one."""

    def __init__(self, segments: list[Tokens]) -> None:
        self._segments = segments
        self._ends = np.cumsum([len(segment) for segment in segments], dtype=np.int64)

    def copy(self, start: int, out: NDArray[np.int64]) -> int:
        """Fill `out` from position `start` on, as far as there are tokens; returns how many there were."""
        index = int(np.searchsorted(self._ends, start, side="right"))
        num_done = 0
        while num_done < len(out) and index < len(self._segments):
            segment = self._segments[index]
            first = start + num_done - (int(self._ends[index]) - len(segment))
            part = segment[first : first + len(out) - num_done]
            out[num_done : num_done + len(part)] = part
            num_done += len(part)
            index += 1
        return num_done
