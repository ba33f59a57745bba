"""File systems that fail on purpose: one that refuses or crashes at a chosen call, one that forgets at a power cut."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.filesystem import FileSystem


class Crash(BaseException):
    """The process dies here."""


@dataclass
class Fault:
    """At the `at`-th call (from 0) of `call`: raise `error`; for a write, after `partial` bytes of it."""

    call: str
    error: BaseException
    at: int = 0
    partial: int = 0
    fired: bool = False


class FaultyDisk(FileSystem):
    """The real file system; every call is noted in `calls`, and `faults` happen."""

    def __init__(self, *faults: Fault) -> None:
        self.faults = list(faults)
        self.calls: list[str] = []

    def _note(self, call: str) -> Fault | None:
        number = self.calls.count(call)
        self.calls.append(call)
        for fault in self.faults:
            if fault.call in (call, "any") and fault.at == (number if fault.call == call else len(self.calls) - 1):
                fault.fired = True
                if call != "write":
                    raise fault.error
                return fault
        return None

    def names(self, folder: Path) -> list[str]:
        self._note("names")
        return super().names(folder)

    def read(self, path: Path) -> bytes:
        self._note("read")
        return super().read(path)

    def create(self, path: Path) -> int:
        self._note("create")
        return super().create(path)

    def reserve(self, descriptor: int, offset: int, num_bytes: int) -> None:
        self._note("reserve")
        super().reserve(descriptor, offset, num_bytes)

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        fault = self._note("write")
        if fault is None:
            return super().write(descriptor, data, offset)
        if fault.partial:
            self.faults.append(Fault(call="write", error=fault.error, at=self.calls.count("write")))
            return super().write(descriptor, data[: fault.partial], offset)
        raise fault.error

    def sync(self, descriptor: int) -> None:
        self._note("sync")
        super().sync(descriptor)

    def sync_path(self, path: Path) -> None:
        self._note("sync_folder" if path.is_dir() else "sync_path")
        super().sync_path(path)

    def truncate(self, descriptor: int, num_bytes: int) -> None:
        self._note("truncate")
        super().truncate(descriptor, num_bytes)

    def is_at(self, descriptor: int, path: Path) -> bool:
        self._note("is_at")
        return super().is_at(descriptor, path)

    def replace(self, source: Path, target: Path) -> None:
        self._note("replace")
        super().replace(source, target)

    def remove(self, path: Path) -> None:
        self._note("remove")
        super().remove(path)

    @contextlib.contextmanager
    def lock(self, folder: Path, *, timeout_s: float) -> Iterator[None]:
        self._note("lock")
        with super().lock(folder, timeout_s=timeout_s):
            yield


PAGE = 64


@dataclass
class Inode:
    """A file's content as processes see it, and as it is on the platter."""

    seen: bytearray = field(default_factory=bytearray)
    kept: bytes = b""


class MemoryDisk(FileSystem):
    """A folder in memory. What is not synced may be lost at `power_cut`: entries one by one, content page by page."""

    def __init__(self, rng: random.Random, *, crash_after: int | None = None) -> None:
        self.rng = rng
        self.entries: dict[str, Inode] = {}
        self.kept_entries: dict[str, Inode] = {}
        self.open: dict[int, Inode] = {}
        self.next_descriptor = 100
        self.calls_left = crash_after

    def _call(self) -> None:
        if self.calls_left is not None:
            if self.calls_left == 0:
                raise Crash
            self.calls_left -= 1

    def power_cut(self) -> None:
        """Everything stops; what was not synced survives by chance."""
        for name in sorted({*self.entries, *self.kept_entries}):
            source = self.entries if self.rng.random() < 0.5 else self.kept_entries
            if name in source:
                self.kept_entries[name] = source[name]
            else:
                self.kept_entries.pop(name, None)
        for inode in {id(i): i for i in self.kept_entries.values()}.values():
            inode.kept = bytes(self._survives(inode))
            inode.seen = bytearray(inode.kept)
        self.entries = dict(self.kept_entries)
        self.open = {}
        self.calls_left = None

    def _survives(self, inode: Inode) -> bytearray:
        size = self.rng.choice([len(inode.kept), len(inode.seen), self.rng.randint(0, len(inode.seen))])
        out = bytearray(size)
        for start in range(0, size, PAGE):
            source = inode.seen if self.rng.random() < 0.7 else inode.kept
            page = source[start : min(start + PAGE, size)]
            out[start : start + len(page)] = page
        out[: min(size, len(inode.kept))] = inode.kept[:size]
        return out if size >= len(inode.kept) else bytearray(inode.kept)

    def names(self, folder: Path) -> list[str]:
        self._call()
        return list(self.entries)

    def read(self, path: Path) -> bytes:
        self._call()
        if path.name not in self.entries:
            raise FileNotFoundError(path)
        return bytes(self.entries[path.name].seen)

    def create(self, path: Path) -> int:
        self._call()
        if path.name in self.entries:
            raise FileExistsError(path)
        self.next_descriptor += 1
        self.open[self.next_descriptor] = self.entries[path.name] = Inode()
        return self.next_descriptor

    def reserve(self, descriptor: int, offset: int, num_bytes: int) -> None:
        self._call()
        seen = self.open[descriptor].seen
        seen.extend(bytes(max(offset + num_bytes - len(seen), 0)))

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        self._call()
        num = self.rng.randint(1, len(data))
        self.open[descriptor].seen[offset : offset + num] = data[:num]
        return num

    def sync(self, descriptor: int) -> None:
        self._call()
        self.open[descriptor].kept = bytes(self.open[descriptor].seen)

    def sync_path(self, path: Path) -> None:
        self._call()
        if path.suffix == ".jsonl":
            if path.name not in self.entries:
                raise FileNotFoundError(path)
            self.entries[path.name].kept = bytes(self.entries[path.name].seen)
        else:
            self.kept_entries = dict(self.entries)

    def truncate(self, descriptor: int, num_bytes: int) -> None:
        self._call()
        del self.open[descriptor].seen[num_bytes:]

    def is_at(self, descriptor: int, path: Path) -> bool:
        self._call()
        return self.entries.get(path.name) is self.open[descriptor]

    def replace(self, source: Path, target: Path) -> None:
        self._call()
        self.entries[target.name] = self.entries.pop(source.name)

    def remove(self, path: Path) -> None:
        self._call()
        self.entries.pop(path.name, None)

    def close(self, descriptor: int) -> None:
        self.open.pop(descriptor, None)

    @contextlib.contextmanager
    def lock(self, folder: Path, *, timeout_s: float) -> Iterator[None]:
        self._call()
        yield
