"""The few file operations that the journal is made of, as an object: tests hand in one that fails on purpose.

Nothing here interprets an error; every method raises the `OSError` of the system call.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

LOCK_RETRY_S = 0.01


class FileSystem:
    """A local file system. It must have exclusive create, fsync and atomic rename (object stores have none of them)."""

    def names(self, folder: Path) -> list[str]:
        """File names in `folder`, in no particular order."""
        return os.listdir(folder)

    def read(self, path: Path) -> bytes:
        """The whole content of a file."""
        return path.read_bytes()

    def create(self, path: Path) -> int:
        """Create a file that must not exist; an open descriptor for reading and writing."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def reserve(self, descriptor: int, offset: int, num_bytes: int) -> None:
        """Make sure that there is space for a write; the new bytes read as zeros until they are written."""
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, offset, num_bytes)

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        """Write at `offset`; the number of bytes written, which may be fewer than given."""
        return os.pwrite(descriptor, data, offset)

    def sync(self, descriptor: int) -> None:
        """Wait until the content and the length of a file are durable."""
        os.fdatasync(descriptor) if hasattr(os, "fdatasync") else os.fsync(descriptor)

    def sync_path(self, path: Path) -> None:
        """`sync` for a file or folder that somebody else may have open; for a folder: its entries."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def truncate(self, descriptor: int, num_bytes: int) -> None:
        """Cut a file to its first `num_bytes`."""
        os.ftruncate(descriptor, num_bytes)

    def is_at(self, descriptor: int, path: Path) -> bool:
        """Whether `path` still names the file that `descriptor` has open."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(path))
        except FileNotFoundError:
            return False

    def replace(self, source: Path, target: Path) -> None:
        """Rename `source` to `target` atomically."""
        os.replace(source, target)

    def remove(self, path: Path) -> None:
        """Delete a file if it is there."""
        path.unlink(missing_ok=True)

    def close(self, descriptor: int) -> None:
        """Close a descriptor."""
        os.close(descriptor)

    @contextlib.contextmanager
    def lock(self, folder: Path, *, timeout_s: float) -> Iterator[None]:
        """Be the only one inside for this folder; ends with the process. Raises TimeoutError."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            deadline_s = time.monotonic() + timeout_s
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline_s:
                        raise TimeoutError(f"another process has held {folder} for {timeout_s:g} s") from None
                time.sleep(LOCK_RETRY_S)
            yield
        finally:
            os.close(descriptor)
