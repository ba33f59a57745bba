"""What a transport is: it serves the blobs of one member and fetches those of others.

Used by `workers/sync.py` alone: a member publishes by putting blobs into its store,
then others pull them. Nothing is ever pushed, and no call changes the state of a peer, so every fetch may be repeated.
Faults are injected by wrapping: an object with these methods around a transport, or around the store that it serves.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from workers.transport.errors import (
    BadMessage,
    BlobCorrupt,
    BlobMissing,
    BlobTooLarge,
    Cancelled,
    PeerUnreachable,
    TransportError,
    TransportTimeout,
    Unauthorized,
)
from workers.transport.link_meter import LinkReport

__all__ = [
    "MAX_KEYS",
    "MAX_KEY_CHARS",
    "MAX_WAIT_S",
    "BadMessage",
    "Blob",
    "BlobCorrupt",
    "BlobMissing",
    "BlobTooLarge",
    "CallSet",
    "CancelToken",
    "Cancelled",
    "PeerUnreachable",
    "Transport",
    "TransportError",
    "TransportTimeout",
    "Unauthorized",
    "check_fetch",
    "is_key",
]

MAX_KEYS = 4096
"""Most keys in one fetch."""

MAX_KEY_CHARS = 256
"""Longest key."""

MAX_WAIT_S = 60.0
"""Longest a peer waits for a key, whatever ``wait_s`` says: waiting costs it a thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """One fetched blob: its own writable memory (uint8, one dimension), already checked against ``digest``."""

    key: str
    data: NDArray[np.uint8]
    digest: str


class CancelToken:
    """Lets one thread end the fetches of another; once cancelled, it stays so. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reason: str | None = None
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._next_handle = 0

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._reason is not None

    @property
    def reason(self) -> str:
        """Why it was cancelled; "" before."""
        return self._reason or ""

    def cancel(self, reason: str = "cancelled by the caller") -> None:
        """End all fetches that hold this token, now and later. The first reason stays; later calls do nothing."""
        with self._lock:
            if self._reason is not None:
                return
            self._reason = reason
            callbacks = list(self._callbacks.values())
            self._callbacks.clear()
        for callback in callbacks:
            callback()

    def on_cancel(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have ``callback`` called once on `cancel`, in that thread (now, if it is cancelled); returns a way to unhook.

        The callback must not block and may still run while or just after it is unhooked.
        """
        with self._lock:
            if self._reason is None:
                handle, self._next_handle = self._next_handle, self._next_handle + 1
                self._callbacks[handle] = callback
                return lambda: self._unhook(handle)
        callback()
        return lambda: None

    def _unhook(self, handle: int) -> None:
        with self._lock:
            self._callbacks.pop(handle, None)


class CallSet:
    """The fetches of one transport that are under way, so that `stop` can end them. Closed until `open`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: set[CancelToken] = set()
        self._is_open = False

    def open(self) -> None:
        """Admit calls."""
        with self._lock:
            self._is_open = True

    def close(self, reason: str) -> None:
        """Admit no more calls and cancel those under way."""
        with self._lock:
            self._is_open = False
            calls = list(self._calls)
        for call in calls:
            call.cancel(reason)

    @contextmanager
    def call(self, peer: str, cancel: CancelToken | None) -> Iterator[CancelToken]:
        """Give a call a token that `close` and ``cancel`` both cancel; raises `Cancelled` if that was before."""
        token = CancelToken()
        with self._lock:
            if not self._is_open:
                raise Cancelled(peer=peer, cause="this transport is not running (not started, or stopped)")
            self._calls.add(token)
        unhook = cancel.on_cancel(lambda: token.cancel(cancel.reason)) if cancel is not None else None
        try:
            if token.cancelled:
                raise Cancelled(peer=peer, cause=token.reason)
            yield token
        finally:
            if unhook is not None:
                unhook()
            with self._lock:
                self._calls.discard(token)


class Transport(Protocol):
    """Serves one store and fetches from the transports of others. All methods may be called from any thread."""

    @property
    def address(self) -> str:
        """Where others reach this member; known once started."""
        ...

    @property
    def bytes_sent(self) -> int:
        """Payload bytes served since the start (no headers)."""
        ...

    @property
    def bytes_received(self) -> int:
        """Payload bytes that arrived since the start, refused ones included (no headers)."""
        ...

    def start(self) -> None:
        """Begin to serve."""
        ...

    def stop(self) -> None:
        """End serving and end own fetches (they raise `Cancelled`); may be called twice. No thread or port is left."""
        ...

    def fetch(
        self,
        address: str,
        keys: Sequence[str],
        *,
        timeout_s: float,
        wait_s: float = 0.0,
        give_up: Callable[[], bool] | None = None,
        max_bytes: int,
        cancel: CancelToken | None = None,
        background: int = 0,
        urgent: bool = False,
        on_blob: Callable[[Blob], None] | None = None,
    ) -> list[Blob]:
        """Fetch the blobs under ``keys`` from the peer at ``address``, in that order, all or nothing.

        ``timeout_s`` bounds the whole call. ``wait_s`` is how long the peer may wait for keys that it does not have yet
        (peers bound it too); while it waits, ``give_up`` is asked about once a second whether it is still worth it, and
        ends the fetch as if the time were over (`BlobMissing`). ``max_bytes`` bounds the sum of all blobs: nothing
        beyond it is received or allocated.
        ``background`` above 0: no exchange waits for this, and so many such fetches run at once: together they use a
        share of the link only (`workers.transport.pacing`).
        ``urgent``: others cannot begin without this, so it goes before what else comes from this peer.
        ``on_blob`` is called with each blob once it is whole and checked, in any order and thread, also where a later
        one fails; it must not raise, and the stream that brought the blob waits for it.
        Every blob is checked against the digest sent with it; whether that is the digest the caller expects is for the
        caller to compare. Raises a `TransportError`; `ValueError` for arguments that can never work (`check_fetch`).
        """
        ...

    def forget(self, address: str) -> None:
        """Drop the connections to a peer that is gone; a later fetch connects anew."""
        ...

    def take_links(self) -> tuple[LinkReport, ...]:
        """What was measured of the links to peers since the last call."""
        ...


def is_key(key: str) -> bool:
    """Return whether ``key`` can travel: 1 to `MAX_KEY_CHARS` printable ASCII characters."""
    return 0 < len(key) <= MAX_KEY_CHARS and key.isascii() and key.isprintable()


def check_fetch(keys: Sequence[str], *, timeout_s: float, wait_s: float, max_bytes: int) -> None:
    """Raise ``ValueError`` for the arguments of `Transport.fetch` that can never work."""
    if len(keys) > MAX_KEYS:
        raise ValueError(f"{len(keys)} keys in one fetch: at most {MAX_KEYS}; fetch them in several calls")
    if len(set(keys)) != len(keys):
        raise ValueError("the keys of one fetch must differ from each other")
    for key in keys:
        if not is_key(key):
            raise ValueError(
                f"key {key[:40]!r} ({len(key)} characters): a key is 1 to {MAX_KEY_CHARS} printable ASCII characters"
            )
    if not timeout_s > 0 or not wait_s >= 0 or max_bytes < 0:
        raise ValueError(
            f"timeout_s={timeout_s} must be above 0, wait_s={wait_s} and max_bytes={max_bytes} must not be negative"
        )
