"""What the transport tests share: waiting for a condition, wrapped stores, a hostile server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as fl

from workers.digest import digest
from workers.store import BlobSource, BlobStore, StoredBlob
from workers.transport.flight_server import SCHEMA
from workers.transport.wire import PieceHeader, encode_message

TOKEN = "token-of-this-test-run"


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    """Return once ``condition()`` holds; fail naming ``what`` it waited for."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        pause.wait(0.005)


def random_bytes(num_bytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)


class WrappedStore:
    """A store around another one, as the faults wrap it: says when somebody waits, may change what is served."""

    def __init__(self, inner: BlobSource, tamper: Callable[[StoredBlob], StoredBlob] | None = None) -> None:
        self.inner = inner
        self.waiting = threading.Event()
        self.interrupted = threading.Event()
        self._tamper = tamper

    def find(self, key: str) -> StoredBlob | None:
        blob = self.inner.find(key)
        return self._tamper(blob) if blob is not None and self._tamper is not None else blob

    def wait_any(self, keys: Iterable[str], *, timeout_s: float, stop: Callable[[], bool] | None = None) -> bool:
        keys = list(keys)
        if timeout_s > 0 and not any(self.inner.find(key) for key in keys):
            self.waiting.set()
        return self.inner.wait_any(keys, timeout_s=timeout_s, stop=stop)

    def interrupt(self) -> None:
        self.interrupted.set()
        self.inner.interrupt()


def flip_one_bit(blob: StoredBlob) -> StoredBlob:
    data = np.frombuffer(blob.data, dtype=np.uint8).copy()
    data[len(data) // 2] ^= 1
    return StoredBlob(data=memoryview(data).toreadonly(), digest=blob.digest)


def store_with(**blobs: Any) -> BlobStore:
    store = BlobStore()
    for key, data in blobs.items():
        store.put(key, data)
    return store


Answer = Callable[[fl.Ticket], Iterator[tuple[pa.RecordBatch, bytes | None]]]


class HostileServer(fl.FlightServerBase):  # type: ignore[misc]
    """Answers every fetch with whatever the test wants to send; asks for no token."""

    def __init__(self, answer: Answer, schema: pa.Schema = SCHEMA) -> None:
        self._answer = answer
        self._schema = schema
        super().__init__("grpc+tcp://127.0.0.1:0")

    @property
    def address(self) -> str:
        return f"grpc+tcp://127.0.0.1:{self.port}"

    def do_get(self, context: Any, ticket: fl.Ticket) -> fl.FlightDataStream:
        return fl.GeneratorStream(self._schema, self._answer(ticket))


def batch(data: bytes | np.ndarray) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array(np.frombuffer(data, dtype=np.uint8))], schema=SCHEMA)


def header(data: bytes, **changes: Any) -> bytes:
    fields = {"key": 0, "length": len(data), "digest": digest(data), "offset": 0, "size": len(data)} | changes
    return encode_message(PieceHeader(**fields))
