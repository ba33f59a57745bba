"""Arrow Flight between members: gRPC streams of raw bytes over several warm connections, with a token and optional TLS.

A fetch of up to ``max_bytes`` is spread over as many streams as it has megabytes, at most one per connection; large
blobs are cut, small ones go round (`workers.transport.wire`). Nothing is pickled on either side.

Trust: the token keeps the members of another run out. Without TLS it travels in clear, as do the blobs, so it is no
defence against whoever can read the network.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

import pyarrow.flight as fl

from workers.store import BlobSource
from workers.transport.assembly import Assembly
from workers.transport.base import Blob, CallSet, CancelToken, check_fetch
from workers.transport.connections import ConnectionPool, channel_options
from workers.transport.errors import BadMessage, PeerUnreachable, TransportError, TransportTimeout
from workers.transport.flight_server import TOKEN_HEADER, WAITING_EVERY_S, BlobServer, TlsConfig, start_server
from workers.transport.flight_stream import StreamReader, Streams, explain
from workers.transport.link_meter import LinkMeter, LinkReport
from workers.transport.pacing import LinkShare, SpeedMeter
from workers.transport.wire import Ticket, streams_for

__all__ = ["FlightTransport", "TlsConfig"]

logger = logging.getLogger(__name__)


class FlightTransport:
    """A `workers.transport.base.Transport` over `pyarrow.flight`.

    ``host`` is the address to listen on and, unless ``advertise_host`` is given, the one that others dial; ``port`` 0
    takes any free one. ``token`` is the secret of the run. A dead host or cut link is noticed ``keepalive_time_s`` +
    ``keepalive_timeout_s`` after the last sign of life, a killed process at once, a frozen one after
    ``ping_timeout_s`` more than ``keepalive_time_s`` (long, as a slow link may delay a ping by that much). ``stop``
    waits up to ``stop_timeout_s`` for streams to end. Background transfers use ``link_share`` of the line, which
    carries ``link_bytes_per_s``, or what was measured.
    """

    def __init__(
        self,
        store: BlobSource,
        *,
        host: str,
        token: str,
        port: int = 0,
        advertise_host: str | None = None,
        num_connections: int = 8,
        tls: TlsConfig | None = None,
        keepalive_time_s: float = 1.0,
        keepalive_timeout_s: float = 3.0,
        ping_timeout_s: float = 20.0,
        stop_timeout_s: float = 5.0,
        link_share: float = 0.5,
        link_bytes_per_s: float | None = None,
    ) -> None:
        if not token or not token.isascii() or not token.isprintable():
            raise ValueError("the token of a run must be printable ASCII and not empty, e.g. secrets.token_hex(16)")
        if num_connections < 1:
            raise ValueError(f"num_connections={num_connections}: at least 1 is needed")
        if advertise_host is None and host in ("0.0.0.0", "::", "[::]"):
            raise ValueError(f"host={host} listens everywhere, but nobody can dial it: give advertise_host too")
        if keepalive_time_s < WAITING_EVERY_S / 2:
            raise ValueError(
                f"keepalive_time_s={keepalive_time_s}: a peer closes connections that ping it more often than every "
                f"{WAITING_EVERY_S / 2:g} s"
            )
        self._store = store
        self._host = host
        self._port = port
        self._advertise_host = advertise_host or host
        self._token = token
        self._tls = tls
        self._num_connections = num_connections
        self._stop_timeout_s = stop_timeout_s
        options = channel_options(
            keepalive_time_s=keepalive_time_s, keepalive_timeout_s=keepalive_timeout_s, ping_timeout_s=ping_timeout_s
        )
        self._pool = ConnectionPool(options=options, tls=tls)
        self._uplink = LinkShare(share=link_share, bytes_per_s=link_bytes_per_s)
        self._downlink = LinkShare(share=link_share, bytes_per_s=link_bytes_per_s)
        self._seen: dict[str, SpeedMeter] = {}
        self._calls = CallSet()
        self._links = LinkMeter()
        self._lock = threading.Lock()
        self._server: BlobServer | None = None
        self._threads: set[threading.Thread] = set()
        self._bytes_sent = 0
        self._bytes_received = 0

    @property
    def address(self) -> str:
        """The URI that others fetch from; raises ``RuntimeError`` before `start`."""
        server = self._server
        if server is None:
            raise RuntimeError("a Flight transport has no address before start() and after stop()")
        return f"{'grpc+tcp' if self._tls is None else 'grpc+tls'}://{self._advertise_host}:{server.port}"

    @property
    def bytes_sent(self) -> int:
        """Payload bytes served since the start (no headers, but bytes sent to a reader that gave up are in)."""
        return self._bytes_sent

    @property
    def bytes_received(self) -> int:
        """Payload bytes that arrived since the start, refused ones included."""
        return self._bytes_received

    def start(self) -> None:
        """Open the port and serve; raises ``OSError`` if it cannot be opened. May be called again after `stop`."""
        assert self._server is None, "start() was called twice"
        self._server = start_server(
            self._store, host=self._host, port=self._port, token=self._token, tls=self._tls, on_sent=self._count_sent,
            uplink=self._uplink,
        )  # fmt: skip
        self._calls.open()

    def stop(self) -> None:
        """End own fetches (`Cancelled`) and streams to others (`PeerUnreachable` there), close port and connections."""
        self._calls.close("this transport was stopped")
        with self._lock:
            server, self._server = self._server, None
            threads = list(self._threads)
        deadline = time.monotonic() + self._stop_timeout_s
        if server is not None and not server.end(timeout_s=self._stop_timeout_s):
            logger.warning("a peer still holds a stream of ours open after %g s; left behind", self._stop_timeout_s)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in threads):
            logger.warning("a fetch of ours hangs in gRPC after %g s; left behind", self._stop_timeout_s)
        self._pool.clear()

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
        """See `workers.transport.base.Transport.fetch`."""
        check_fetch(keys, timeout_s=timeout_s, wait_s=wait_s, max_bytes=max_bytes)
        if not keys:
            return []
        num_streams = streams_for(max_bytes, num_connections=self._num_connections)
        assembly = Assembly(peer=address, keys=keys, num_streams=num_streams, max_bytes=max_bytes, on_blob=on_blob)
        options = self._call_options(timeout_s)
        limit = self._downlink.limit() / (background * num_streams) if background else 0.0
        meter = self._seen.setdefault(address, SpeedMeter())
        seen = meter.bytes_per_s
        began_s = time.monotonic()
        with self._calls.call(address, cancel) as call:
            readers = [
                StreamReader(
                    peer=address,
                    client=self._pool.client(address, stream),
                    options=options,
                    ticket=Ticket(
                        keys=tuple(keys),
                        stream=stream,
                        num_streams=num_streams,
                        wait_s=wait_s,
                        background=background > 0,
                        urgent=urgent,
                        limit_bytes_per_s=limit,
                        seen_bytes_per_s=seen if stream == 0 else 0,
                    ),
                    assembly=assembly,
                    on_received=self._count_received,
                    give_up=give_up,
                )
                for stream in range(num_streams)
            ]
            streams = Streams(readers)
            self._track(streams.start())
            try:
                streams.wait(call, peer=address, timeout_s=timeout_s)
            except TransportError:
                self._drop_broken(address, readers, streams)
                raise
        blobs = assembly.blobs()
        num_bytes = sum(blob.data.nbytes for blob in blobs)
        if wait_s == 0:
            self._measure(address, readers, num_bytes, began_s)
        if not background and not wait_s:  # what was paced, or not there at first, says nothing of the line
            seconds = time.monotonic() - began_s
            for known in (meter, self._downlink.meter):
                known.add(num_bytes, seconds)
        return blobs

    def _measure(self, address: str, readers: Sequence[StreamReader], num_bytes: int, began_s: float) -> None:
        first_s = min((reader.first_s for reader in readers if reader.first_s is not None), default=None)
        if first_s is not None:
            receive_s = time.monotonic() - first_s
            self._links.note(address, num_bytes=num_bytes, answer_s=first_s - began_s, receive_s=receive_s)

    def take_links(self) -> tuple[LinkReport, ...]:
        """See `workers.transport.base.Transport.take_links`."""
        return self._links.take()

    def warm(self, address: str, *, timeout_s: float) -> None:
        """Open all connections to a peer now, so that the first exchange need not; raises as `fetch` does."""
        options = self._call_options(timeout_s)
        for index in range(self._num_connections):
            client = self._pool.client(address, index)
            try:
                list(client.do_action(fl.Action("warm", b""), options))
            except (fl.FlightError, OSError) as error:
                self._pool.drop(address, index, client)
                raise explain(error, peer=address) from error

    def forget(self, address: str) -> None:
        """Drop the connections to a peer that is gone; a later fetch connects anew."""
        self._seen.pop(address, None)
        self._pool.forget(address)
        self._links.forget(address)

    def _call_options(self, timeout_s: float) -> fl.FlightCallOptions:
        return fl.FlightCallOptions(timeout=timeout_s, headers=[(TOKEN_HEADER.encode(), self._token.encode())])

    def _drop_broken(self, address: str, readers: Sequence[StreamReader], streams: Streams) -> None:
        """Have connections made anew where a stream failed other than for want of a blob."""
        for reader, failure in streams.failures:
            if isinstance(failure, PeerUnreachable | TransportTimeout | BadMessage):
                self._pool.drop(address, readers.index(reader), reader.client)

    def _track(self, threads: list[threading.Thread]) -> None:
        with self._lock:
            self._threads = {thread for thread in self._threads if thread.is_alive()} | set(threads)

    def _count_sent(self, num_bytes: int) -> None:
        with self._lock:
            self._bytes_sent += num_bytes

    def _count_received(self, num_bytes: int) -> None:
        with self._lock:
            self._bytes_received += num_bytes
