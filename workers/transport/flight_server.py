"""The serving half of the Flight transport: blobs as streams of record batches over their own memory.

pyarrow runs each call in a thread of its own that gRPC makes as needed, so a reader that waits for a key holds up
nobody; `MAX_WAITING` bounds how many threads can be spent on waiting. gRPC listens from the constructor of a
``FlightServerBase`` on, which is why one is only made by `start_server`.

Source: https://arrow.apache.org/docs/format/Flight.html
"""

from __future__ import annotations

import hmac
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.flight as fl

from workers.store import BlobSource, StoredBlob
from workers.transport.base import MAX_WAIT_S
from workers.transport.pacing import LinkShare, Pacer, batch_bytes_at
from workers.transport.precedence import Precedence
from workers.transport.wire import (
    BATCH_BYTES,
    Missing,
    PieceHeader,
    Ticket,
    Waiting,
    WireError,
    announces,
    batches_of,
    decode_ticket,
    encode_message,
    piece_of,
)

TOKEN_HEADER = "x-atoll-token"
SCHEMA = pa.schema([pa.field("bytes", pa.uint8(), nullable=False)])

WAITING_EVERY_S = 1.0
"""How often a waiting reader hears from the server. It must be often: gRPC servers close a connection on its third
keepalive ping without data in between (``too_many_pings``), and the client pings every second."""

MAX_WAITING = 1024
"""Streams that may wait at once; one more is answered as if the key were missing."""

Message = tuple[pa.RecordBatch, bytes | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsConfig:
    """PEM texts. ``root_certs`` verify servers and, where ``verify_peers`` is set, the certificates of clients too."""

    cert_chain: bytes
    private_key: bytes
    root_certs: bytes
    verify_peers: bool = False


class TokenGate(fl.ServerMiddlewareFactory):  # type: ignore[misc]  # pyarrow has no types
    """Refuses every call without the token of this run, before anything else of the call is looked at."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    def start_call(self, info: Any, headers: dict[str, list[Any]]) -> None:
        """Let the call pass or raise; the comparison takes the same time whatever the offered token is."""
        del info
        offered = headers.get(TOKEN_HEADER, [])
        raw = offered[0] if len(offered) == 1 else ""
        if not hmac.compare_digest(raw if isinstance(raw, bytes) else str(raw).encode(), self._token):
            raise fl.FlightUnauthenticatedError("no or another token: this member belongs to another run")


class BlobServer(fl.FlightServerBase):  # type: ignore[misc]
    """Serves one `BlobSource`; made by `start_server`, ended by `end`."""

    def __init__(
        self,
        location: str,
        store: BlobSource,
        token: str,
        *,
        tls: TlsConfig | None,
        batch_bytes: int,
        on_sent: Callable[[int], None],
        uplink: LinkShare,
    ) -> None:
        self._store = store
        self._uplink = uplink
        self._pacer = Pacer(uplink.limit, time.monotonic)
        self._batch_bytes = batch_bytes
        self._on_sent = on_sent
        self._ending = threading.Event()
        self._precedence = Precedence()
        self._waiting_slots = threading.BoundedSemaphore(MAX_WAITING)
        super().__init__(location, middleware={"token": TokenGate(token)}, **_tls_options(tls))

    def do_get(self, context: Any, ticket: fl.Ticket) -> fl.FlightDataStream:
        """Answer one stream of a fetch; see `workers.transport.wire` for what is in it."""
        try:
            wanted = decode_ticket(ticket.ticket)
        except WireError as error:
            raise pa.ArrowInvalid(f"not understood: {error}") from None
        self._uplink.meter.heard(wanted.seen_bytes_per_s)
        connection = str(context.peer())
        answer = self._urgently(wanted, connection) if wanted.urgent else self._in_turn(wanted, connection)
        return fl.GeneratorStream(SCHEMA, answer)

    def do_action(self, context: Any, action: Any) -> list[fl.Result]:
        """Answer the call by which a peer opens its connections ahead of time; there is nothing to do."""
        del context, action
        return []

    def end(self, *, timeout_s: float) -> bool:
        """Cut all streams and close the port; False if a stream did not end within ``timeout_s``.

        A stream ends at its next batch. Only one whose reader neither reads nor closes its connection can hold out, at
        most until that reader's own time limit; it is left to a daemon thread.
        """
        self._ending.set()
        self._store.interrupt()
        self._precedence.interrupt()
        ending = threading.Thread(target=self.shutdown, name="atoll-flight-shutdown", daemon=True)
        ending.start()
        ending.join(timeout_s)
        return not ending.is_alive()

    def _urgently(self, ticket: Ticket, connection: str) -> Iterator[Message]:
        with self._precedence.urgent(connection) as moves:
            for message in self._answer(ticket):
                moves()
                yield message

    def _in_turn(self, ticket: Ticket, connection: str) -> Iterator[Message]:
        for message in self._answer(ticket):
            self._precedence.give_way(connection, stop=self._ending.is_set)
            yield message

    def _answer(self, ticket: Ticket) -> Iterator[Message]:
        """Send what is there, then each blob as it appears; the order of the keys gives way to availability."""
        wait_until = time.monotonic() + min(ticket.wait_s, MAX_WAIT_S)
        pacers = (self._pacer, Pacer(lambda: ticket.limit_bytes_per_s, time.monotonic)) if ticket.background else ()
        pending = dict(enumerate(ticket.keys))
        while True:
            for number in list(pending):
                blob = self._store.find(pending[number])
                if blob is not None:
                    del pending[number]
                    yield from self._pieces(number, blob, ticket, pacers)
            if not pending:
                return
            if time.monotonic() >= wait_until:
                yield _empty(Missing(keys=tuple(pending), cause="not in the peer's store"))
                return
            cause = yield from self._await_any(pending, wait_until)
            if cause:
                yield _empty(Missing(keys=tuple(pending), cause=cause))
                return

    def _await_any(self, pending: dict[int, str], wait_until: float) -> Generator[Message, None, str]:
        """Wait for one of the keys, with a sign of life every second; returns why it will not wait, or ""."""
        if not self._waiting_slots.acquire(blocking=False):
            return f"not in the peer's store, and {MAX_WAITING} readers wait there already"
        try:
            while (left_s := wait_until - time.monotonic()) > 0:
                timeout_s = min(WAITING_EVERY_S, left_s)
                if self._store.wait_any(pending.values(), timeout_s=timeout_s, stop=self._ending.is_set):
                    break
                self._check_ending()
                yield _empty(Waiting(num_keys=len(pending)))
        finally:
            self._waiting_slots.release()
        return ""

    def _pieces(self, number: int, blob: StoredBlob, ticket: Ticket, pacers: Sequence[Pacer]) -> Iterator[Message]:
        limits = (self._uplink.limit(), ticket.limit_bytes_per_s) if pacers else ()
        length = blob.data.nbytes
        place = {
            "key": number, "num_keys": len(ticket.keys), "stream": ticket.stream, "num_streams": ticket.num_streams,
        }  # fmt: skip
        if not announces(length, **place):
            return
        offset, size = piece_of(length, **place)
        header = PieceHeader(key=number, length=length, digest=blob.digest, offset=offset, size=size)
        if size == 0:
            yield _empty(header)
            return
        buffer = pa.py_buffer(blob.data)  # keeps the memory alive while it is sent, even if it is discarded meanwhile
        batch_bytes = batch_bytes_at(min(filter(None, limits), default=0.0), self._batch_bytes)
        for start, num_bytes in batches_of(offset, size, batch_bytes):
            if pacers:
                self._ending.wait(max(pacer.delay(num_bytes) for pacer in pacers))
            self._check_ending()
            yield _batch(buffer.slice(start, num_bytes)), encode_message(header) if start == offset else None
            self._on_sent(num_bytes)

    def _check_ending(self) -> None:
        if self._ending.is_set():
            raise fl.FlightUnavailableError("this member stops serving")


def start_server(
    store: BlobSource,
    *,
    host: str,
    port: int,
    token: str,
    tls: TlsConfig | None,
    on_sent: Callable[[int], None],
    uplink: LinkShare,
    batch_bytes: int = BATCH_BYTES,
) -> BlobServer:
    """Open a port of ``host`` (0 = any free one, see ``.port``) and serve on it; ``OSError`` if it is taken."""
    scheme = "grpc+tcp" if tls is None else "grpc+tls"
    try:
        place = f"{scheme}://{host}:{port}"
        return BlobServer(place, store, token, tls=tls, batch_bytes=batch_bytes, on_sent=on_sent, uplink=uplink)
    except (pa.ArrowException, OSError) as error:
        raise OSError(
            f"cannot serve on {host}:{port}: {str(error).splitlines()[0]}. Is the address one of this machine, and the "
            "port free?"
        ) from error


def _tls_options(tls: TlsConfig | None) -> dict[str, Any]:
    if tls is None:
        return {}
    options: dict[str, Any] = {"tls_certificates": [fl.CertKeyPair(tls.cert_chain, tls.private_key)]}
    if tls.verify_peers:
        options |= {"verify_client": True, "root_certificates": tls.root_certs}
    return options


def _batch(buffer: pa.Buffer) -> pa.RecordBatch:
    column = pa.Array.from_buffers(pa.uint8(), buffer.size, [None, buffer], null_count=0)
    return pa.RecordBatch.from_arrays([column], schema=SCHEMA)


_NOTHING = _batch(pa.py_buffer(b""))


def _empty(message: PieceHeader | Waiting | Missing) -> Message:
    return _NOTHING, encode_message(message)
