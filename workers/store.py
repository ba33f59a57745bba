"""What a member serves: blobs under string keys, kept without copying, with waiting readers.

Keys are paths, such as ``piece/0/island-1.2/7/3`` or ``result/0/8/3``. The same bytes may be asked for by their content
too (``blob/<digest>``, see `content_key`): such an alias lives as long as one of the keys it was put under.

A stored buffer must not be written to until it is discarded: its digest was taken when it was put, and a reader that
receives other bytes refuses them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from workers.digest import byte_view, digest

if TYPE_CHECKING:
    from workers.digest import AnyBuffer


def content_key(digest_hex: str) -> str:
    """Return the key under which bytes with this digest are found, whoever holds them."""
    return f"blob/{digest_hex}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBlob:
    """One stored buffer: its bytes (read-only, one-dimensional, not copied) and their digest."""

    data: memoryview
    digest: str


class BlobSource(Protocol):
    """What a transport serves from. `BlobStore` is one; a test or a fault wraps one to serve something else."""

    def find(self, key: str) -> StoredBlob | None:
        """Return the blob under ``key``, or None; never blocks."""
        ...

    def wait_any(self, keys: Iterable[str], *, timeout_s: float, stop: Callable[[], bool] | None = None) -> bool:
        """Block until one of ``keys`` is here; False after ``timeout_s`` seconds or once ``stop()`` is true."""
        ...

    def interrupt(self) -> None:
        """Wake everybody in `wait_any`, so that they look at ``stop()`` again."""
        ...


class _Waiter:
    """A reader that waits for one of its keys; woken by a put of one of them and by `BlobStore.interrupt`."""

    def __init__(self, wanted: frozenset[str], lock: threading.Lock) -> None:
        self.wanted, self.here = wanted, False
        self.changed = threading.Condition(lock)


class BlobStore:
    """A thread-safe mapping from keys to buffers; see the module for what keys and aliases are."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiters: set[_Waiter] = set()
        self._blobs: dict[str, StoredBlob] = {}
        self._alias_of: dict[str, str] = {}  # key -> its content key
        self._holders: dict[str, dict[str, None]] = {}  # content key -> keys, oldest first
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all stored buffers; an alias costs nothing, equal bytes under two keys count twice."""
        with self._lock:
            return self._num_bytes

    def __len__(self) -> int:
        """Return the number of keys, without aliases."""
        with self._lock:
            return len(self._blobs)

    def __contains__(self, key: object) -> bool:
        """Return whether ``key`` (or alias) is here."""
        with self._lock:
            return isinstance(key, str) and self._lookup(key) is not None

    def keys(self, prefix: str = "") -> list[str]:
        """Return the keys equal to ``prefix`` or below it (aliases left out), oldest first."""
        with self._lock:
            return [key for key in self._blobs if _is_below(key, prefix)]

    def put(self, key: str, buffer: AnyBuffer, *, digest_hex: str | None = None, content_key: str | None = None) -> str:
        """Store ``buffer`` under ``key`` without copying it, wake whoever waits for it, and return its digest.

        ``digest_hex`` is the digest, where the caller has it already; else it is computed here, before the lock.
        ``content_key`` is an alias under which the blob is found as well. A second put under a key replaces the first;
        readers under way keep the old buffer. Raises ``ValueError`` for an empty key and for memory that is not
        contiguous.
        """
        if not key:
            raise ValueError("a blob needs a key that is not empty")
        data = byte_view(buffer)
        blob = StoredBlob(data=data, digest=digest_hex if digest_hex is not None else digest(data))
        with self._lock:
            self._remove(key)
            self._blobs[key] = blob
            self._num_bytes += data.nbytes
            if content_key is not None:
                self._alias_of[key] = content_key
                self._holders.setdefault(content_key, {})[key] = None
            for waiter in self._waiters:  # many wait, and one put is what few of them wait for
                if key in waiter.wanted or content_key in waiter.wanted:
                    waiter.here = True
                    waiter.changed.notify()
        return blob.digest

    def find(self, key: str) -> StoredBlob | None:
        """Return the blob under a key or an alias, or None; never blocks."""
        with self._lock:
            return self._lookup(key)

    def get(self, key: str, *, wait_s: float = 0.0) -> memoryview | None:
        """Return the bytes under a key or an alias, waiting up to ``wait_s`` seconds for them to be put; else None."""
        if wait_s > 0:
            self.wait_any((key,), timeout_s=wait_s)
        blob = self.find(key)
        return None if blob is None else blob.data

    def wait_any(self, keys: Iterable[str], *, timeout_s: float, stop: Callable[[], bool] | None = None) -> bool:
        """Block until one of ``keys`` is here; False after ``timeout_s`` seconds or once ``stop()`` is true.

        ``stop`` is looked at after a put of one of the keys and after `interrupt`; it must not block.
        """
        wanted = frozenset(keys)
        deadline = time.monotonic() + timeout_s
        with self._lock:
            if any(self._lookup(key) is not None for key in wanted):
                return True
            waiter = _Waiter(wanted, self._lock)
            self._waiters.add(waiter)
            try:
                while (left_s := deadline - time.monotonic()) > 0 and not (stop is not None and stop()):
                    waiter.changed.wait(left_s)
                    if waiter.here:
                        return True
                return False
            finally:
                self._waiters.discard(waiter)

    def interrupt(self) -> None:
        """Wake everybody in `wait_any`, so that they look at ``stop()`` again."""
        with self._lock:
            for waiter in self._waiters:
                waiter.changed.notify()

    def discard(self, prefix: str) -> int:
        """Drop the key ``prefix`` and all keys below it; return how many bytes that freed.

        Below means whole components of the path: ``piece/0/island-1`` does not touch ``piece/0/island-10``. The prefix
        may be an alias, which alone is dropped. Readers under way keep their buffers. Nothing there: nothing happens.
        """
        with self._lock:
            before = self._num_bytes
            for key in [key for key in self._blobs if _is_below(key, prefix)]:
                self._remove(key)
            for alias in [alias for alias in self._holders if _is_below(alias, prefix)]:
                for key in self._holders.pop(alias):
                    del self._alias_of[key]
            return before - self._num_bytes

    def discard_keys(self, keys: Iterable[str]) -> int:
        """Drop these keys and nothing below them; return how many bytes that freed."""
        with self._lock:
            before = self._num_bytes
            for key in keys:
                self._remove(key)
            return before - self._num_bytes

    def discard_content(self, prefix: str, digests: Collection[str]) -> None:
        """Drop the keys below ``prefix`` whose bytes have one of ``digests``; their aliases live as long as others."""
        with self._lock:
            for key in [k for k, blob in self._blobs.items() if blob.digest in digests and _is_below(k, prefix)]:
                self._remove(key)

    def _lookup(self, key: str) -> StoredBlob | None:
        blob = self._blobs.get(key)
        if blob is not None:
            return blob
        holders = self._holders.get(key)
        return self._blobs[next(iter(holders))] if holders else None

    def _remove(self, key: str) -> None:
        blob = self._blobs.pop(key, None)
        if blob is None:
            return
        self._num_bytes -= blob.data.nbytes
        alias = self._alias_of.pop(key, None)
        if alias is not None:
            del self._holders[alias][key]
            if not self._holders[alias]:
                del self._holders[alias]


def _is_below(key: str, prefix: str) -> bool:
    return not prefix or key == prefix or key.startswith(prefix if prefix.endswith("/") else prefix + "/")
