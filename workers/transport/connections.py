"""Warm gRPC connections, several per peer.

One TCP stream is capped by the sender's kernel buffer (4 MiB on Linux) over the round trip, so a fast distant link
needs several. They stay open between exchanges: a fresh one begins slowly.
"""

from __future__ import annotations

import threading

import pyarrow.flight as fl

from workers.transport.flight_server import TlsConfig
from workers.transport.wire import BATCH_BYTES

MAX_MESSAGE_BYTES = 4 * BATCH_BYTES
"""A peer that sends a larger gRPC message than this is cut off by gRPC, before the message is in memory."""

READ_AHEAD_BYTES = 3 << 20
"""HTTP/2 window of one stream: what may be under way to us, or wait in memory for us to read it.

Eight of 4 MiB overflowed the queue of a link of 1 Gbit/s and 100 ms at each start, eight of 2 MiB did not fill it."""


def channel_options(
    *, keepalive_time_s: float, keepalive_timeout_s: float, ping_timeout_s: float
) -> list[tuple[str, int]]:
    """Return the gRPC options of a connection. What each is there for, as measured with gRPC in pyarrow 26:

    - Without a subchannel pool of its own, a client shares the connection of the others to the same address.
    - ``keepalive_*``: a ping after ``keepalive_time`` of silence. ``keepalive_timeout`` acts as TCP_USER_TIMEOUT
      alone: it notices a cut link and a dead host. A frozen process, whose kernel goes on acknowledging, is noticed
      by ``ping_timeout`` (60 s unless set).
    - ``max_pings_without_data`` = 0: otherwise a stream that only waits sends two pings and then never notices
      anything.
    - ``bdp_probe`` = 0, with a fixed window instead: bandwidth probes are pings too and fall under ``ping_timeout``,
      so a slow but living link with full buffers would be declared dead.
    - ``min_reconnect_backoff`` is also the time limit of connecting, 20 s unless set.
    """
    return [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.keepalive_time_ms", _ms(keepalive_time_s)),
        ("grpc.keepalive_timeout_ms", _ms(keepalive_timeout_s)),
        ("grpc.http2.ping_timeout_ms", _ms(ping_timeout_s)),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", READ_AHEAD_BYTES),
        ("grpc.http2.max_frame_size", BATCH_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", _ms(keepalive_timeout_s)),
        ("grpc.max_reconnect_backoff_ms", _ms(keepalive_timeout_s)),
    ]


class ConnectionPool:
    """Up to ``num_connections`` clients per address, made when first asked for. Thread-safe.

    Clients are dropped, not closed: whoever still reads through one keeps it alive, and its socket closes with the last
    reference.
    """

    def __init__(self, *, options: list[tuple[str, int]], tls: TlsConfig | None) -> None:
        self._options = options
        self._tls = tls
        self._lock = threading.Lock()
        self._clients: dict[tuple[str, int], fl.FlightClient] = {}

    def client(self, address: str, index: int) -> fl.FlightClient:
        """Return connection number ``index`` to ``address``; it connects with its first call."""
        with self._lock:
            client = self._clients.get((address, index))
            if client is None:
                client = self._clients[address, index] = self._make(address)
            return client

    def drop(self, address: str, index: int, client: fl.FlightClient) -> None:
        """Forget a connection that failed, unless another took its place already; the next call connects anew."""
        with self._lock:
            if self._clients.get((address, index)) is client:
                del self._clients[address, index]

    def forget(self, address: str) -> None:
        """Drop all connections to ``address``."""
        with self._lock:
            for place in [place for place in self._clients if place[0] == address]:
                del self._clients[place]

    def clear(self) -> None:
        """Drop all connections."""
        with self._lock:
            self._clients.clear()

    def _make(self, address: str) -> fl.FlightClient:
        if self._tls is None:
            return fl.FlightClient(address, generic_options=self._options)
        identity = (
            {"cert_chain": self._tls.cert_chain, "private_key": self._tls.private_key} if self._tls.verify_peers else {}
        )
        return fl.FlightClient(address, tls_root_certs=self._tls.root_certs, generic_options=self._options, **identity)


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))
