"""The shards of a pack on one machine: those that are there, and those that come when somebody is going to need them.

Each shard is fetched by one process of the machine, under a lock of the file system, into `<file>.part`, which the next
one goes on with if the first is killed; it gets its name when its tokens have the digest that the index says. Where it
comes from is the business of sources, which are tried in order: the place that `data.path` names, and peers.
"""

from __future__ import annotations

import fcntl
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from workers.data.errors import DataError
from workers.data.index import PackIndex, ShardIndex, shard_paths
from workers.data.shards import check_shard, map_shard


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Somebody who has shards. `fetch` goes on with a part where it ends; raises DataError."""

    name: str
    fetch: Callable[[ShardIndex, Path], None]


def is_whole(folder: Path, index: PackIndex) -> bool:
    """Whether every shard is there, by name: one gets its name when it is complete."""
    return all(file.is_file() for _, _, file in shard_paths(folder, index))


def ensure_shard(folder: Path, shard: ShardIndex, index: PackIndex, sources: Sequence[Source]) -> Path:
    """Have one shard, fetched and checked by whoever comes first. Raises DataError that says what each source said."""
    file = folder / shard.file
    if file.is_file():
        return file
    with _locked(folder / f".{shard.file}.lock"):
        if file.is_file():
            return file
        part = folder / f"{shard.file}.part"
        why = []
        for source in sources:
            try:
                source.fetch(shard, part)
                _check(part, shard, index, source.name)
            except DataError as error:
                why.append(str(error))
                continue
            os.replace(part, file)
            return file
    raise DataError("; ".join(why) or f"{file}: not here, and nobody is named who has it")


def _check(part: Path, shard: ShardIndex, index: PackIndex, name: str) -> None:
    try:
        check_shard(part, shard, map_shard(part, shard, index.token_type), index.vocab_size)
    except DataError as error:
        part.unlink(missing_ok=True)
        raise DataError(f"{name}/{shard.file}: not what its index says, and not kept ({error})") from None


class ShardCache:
    """Shards on demand. Those that are wanted soon are fetched ahead on a thread, in the order of the wish."""

    def __init__(self, folder: Path, index: PackIndex, sources: Sequence[Source], *, threaded: bool) -> None:
        """Without threads nothing is fetched ahead."""
        self.folder, self.index, self.sources = folder, index, tuple(sources)
        self._wanted: queue.SimpleQueue[ShardIndex | None] | None = queue.SimpleQueue() if threaded else None
        self._asked: set[str] = set()
        self._thread: threading.Thread | None = None

    def has(self, shards: Iterable[ShardIndex]) -> bool:
        """Whether all of these are here."""
        return all((self.folder / shard.file).is_file() for shard in shards)

    def ensure(self, shard: ShardIndex) -> Path:
        """The file of a shard, fetched now if it is not here. Raises DataError."""
        return ensure_shard(self.folder, shard, self.index, self.sources)

    def want(self, shards: Iterable[ShardIndex]) -> None:
        """These will be needed, in this order."""
        if self._wanted is None:
            return
        new = [shard for shard in shards if shard.file not in self._asked]
        self._asked.update(shard.file for shard in new)
        for shard in new:
            self._wanted.put(shard)
        if new and self._thread is None:
            self._thread = threading.Thread(target=self._fetch_ahead, name="shards", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Fetch nothing more ahead."""
        if self._wanted is not None:
            self._wanted.put(None)

    def _fetch_ahead(self) -> None:
        assert self._wanted is not None
        while (shard := self._wanted.get()) is not None:
            try:
                self.ensure(shard)
            except DataError:
                self._asked.discard(shard.file)  # whoever needs it asks again, and says what is wrong


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process, whatever happens to it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
