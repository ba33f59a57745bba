"""The fetching half of the Flight transport: one thread per stream, each filling its pieces of an `Assembly`."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.flight as fl

from workers.transport.assembly import Assembly, Piece
from workers.transport.base import CancelToken
from workers.transport.connections import MAX_MESSAGE_BYTES
from workers.transport.errors import (
    BadMessage,
    BlobMissing,
    BlobTooLarge,
    Cancelled,
    PeerUnreachable,
    TransportError,
    TransportTimeout,
    Unauthorized,
)
from workers.transport.flight_server import SCHEMA
from workers.transport.wire import Missing, PieceHeader, Ticket, Waiting, WireError, decode_message, encode_ticket


class StreamReader:
    """Reads one stream of a fetch; `run` in a thread of its own, `abandon` from any other."""

    def __init__(
        self,
        *,
        peer: str,
        client: fl.FlightClient,
        options: fl.FlightCallOptions,
        ticket: Ticket,
        assembly: Assembly,
        on_received: Callable[[int], None],
        give_up: Callable[[], bool] | None = None,
    ) -> None:
        self._peer = peer
        self._client = client
        self._options = options
        self._ticket = ticket
        self._assembly = assembly
        self._on_received = on_received
        self._give_up = give_up
        self._lock = threading.Lock()
        self._flight: fl.FlightStreamReader | None = None
        self._abandoned = False
        self.first_s: float | None = None  # when the peer's first message came

    @property
    def client(self) -> fl.FlightClient:
        """The connection that this stream uses."""
        return self._client

    def run(self) -> None:
        """Read to the end of the stream; raises a `TransportError`."""
        try:
            flight = self._client.do_get(fl.Ticket(encode_ticket(self._ticket)), self._options)
            with self._lock:
                self._flight = flight
                abandoned = self._abandoned
            if abandoned:
                flight.cancel()
            self._read(flight)
        except (pa.ArrowException, fl.FlightError, OSError) as error:
            raise explain(error, peer=self._peer) from error

    def abandon(self) -> None:
        """End the stream: a read under way fails at once. The server notices at its next write."""
        with self._lock:
            self._abandoned = True
            flight = self._flight
        if flight is not None:
            flight.cancel()

    def _read(self, flight: fl.FlightStreamReader) -> None:
        if not flight.schema.equals(SCHEMA):
            raise BadMessage(peer=self._peer, cause=f"its stream has another schema: {str(flight.schema)[:80]!r}")
        piece: Piece | None = None
        while not self._abandoned:
            try:
                chunk = flight.read_chunk()
            except StopIteration:
                return
            if self.first_s is None:
                self.first_s = time.monotonic()
            if chunk.app_metadata is not None:
                piece = self._begin(chunk.app_metadata.to_pybytes())
            if chunk.data is not None and chunk.data.num_rows:
                self._take(chunk.data, piece)

    def _begin(self, raw: bytes) -> Piece | None:
        try:
            message = decode_message(raw, num_keys=len(self._ticket.keys))
        except WireError as error:
            raise BadMessage(peer=self._peer, cause=str(error)) from None
        match message:
            case Waiting() if self._give_up is not None and self._give_up():
                raise BlobMissing(peer=self._peer, keys=self._ticket.keys, cause="not there yet, and of no use by now")
            case Waiting():
                return None
            case Missing():
                keys = tuple(self._ticket.keys[number] for number in message.keys)
                cause = f"{message.cause} ({len(keys)} of {len(self._ticket.keys)} keys)"
                raise BlobMissing(peer=self._peer, keys=keys, cause=cause)
            case PieceHeader():
                return self._assembly.open(message, stream=self._ticket.stream)

    def _take(self, batch: pa.RecordBatch, piece: Piece | None) -> None:
        self._on_received(batch.num_rows)
        if piece is None:
            raise BadMessage(peer=self._peer, cause="bytes that belong to no blob")
        batch.validate()  # that the buffers are as long as the message says
        column = batch.column(0)
        if column.null_count or column.offset:
            raise BadMessage(peer=self._peer, cause="a batch with nulls or an offset")
        piece.write(np.frombuffer(column.buffers()[1], dtype=np.uint8, count=batch.num_rows))


class Streams:
    """The streams of one fetch: started together, ended together by the first failure, a cancel or the deadline."""

    def __init__(self, readers: Sequence[StreamReader]) -> None:
        self._readers = readers
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._num_running = len(readers)
        self._failures: list[tuple[StreamReader, BaseException]] = []

    def start(self) -> list[threading.Thread]:
        """Start and return one daemon thread per stream."""
        threads = [
            threading.Thread(target=self._run, args=(reader,), name="atoll-fetch", daemon=True)
            for reader in self._readers
        ]
        for thread in threads:
            thread.start()
        return threads

    def wait(self, call: CancelToken, *, peer: str, timeout_s: float) -> None:
        """Return once all streams ended well; otherwise abandon them all and raise why.

        The threads are not waited for: one that is stuck connecting to a dead host ends by its own time limit.
        """
        unhook = call.on_cancel(self._over.set)
        try:
            in_time = self._over.wait(timeout_s)
            with self._lock:
                failures, num_running = list(self._failures), self._num_running
            if call.cancelled:
                raise Cancelled(peer=peer, cause=call.reason)
            if failures:
                raise failures[0][1]
            if not in_time or num_running:
                raise TransportTimeout(peer=peer, cause=f"not done after timeout_s={timeout_s:g}")
        finally:
            unhook()
            for reader in self._readers:
                reader.abandon()

    @property
    def failures(self) -> list[tuple[StreamReader, BaseException]]:
        """The streams that failed so far, and how, in that order."""
        with self._lock:
            return list(self._failures)

    def _run(self, reader: StreamReader) -> None:
        failure: BaseException | None = None
        try:
            reader.run()
        except TransportError as error:
            failure = error
        finally:
            # A bug of ours is on its way to the thread's excepthook: the caller must hear of it too, not wait in vain.
            failure = failure or sys.exc_info()[1]
            with self._lock:
                self._num_running -= 1
                if failure is not None:
                    self._failures.append((reader, failure))
                if failure is not None or self._num_running == 0:
                    self._over.set()


def explain(error: Exception, *, peer: str) -> TransportError:
    """Return the error of ours for one of pyarrow's."""
    text = str(error).splitlines()[0].split(". gRPC client debug context")[0].split("with message: ")[-1][:300]
    if isinstance(error, fl.FlightUnauthenticatedError | fl.FlightUnauthorizedError):
        return Unauthorized(peer=peer, cause=text)
    if isinstance(error, fl.FlightTimedOutError):
        return TransportTimeout(peer=peer, cause=f"the time limit of the call was over ({text})")
    if isinstance(error, fl.FlightUnavailableError):
        return PeerUnreachable(peer=peer, cause=text)
    if isinstance(error, fl.FlightCancelledError) and "with message: ." in str(error):
        # What gRPC makes of a message over its limit: a cancellation that nobody asked for and that says nothing.
        return BlobTooLarge(peer=peer, cause=f"one message of more than {MAX_MESSAGE_BYTES} bytes")
    if isinstance(error, fl.FlightCancelledError):
        return PeerUnreachable(peer=peer, cause=f"it broke the call off ({text})")
    return BadMessage(peer=peer, cause=f"{type(error).__name__}: {text}")
