"""Flight's life cycle: peers that are killed or freeze, connections, ports, threads, TLS."""

from __future__ import annotations

import datetime
import ipaddress
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.flight as fl
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.unit.transport.support import TOKEN, random_bytes, store_with, wait_for
from workers.store import BlobStore
from workers.transport.base import Cancelled, PeerUnreachable, TransportError
from workers.transport.flight import FlightTransport, TlsConfig
from workers.transport.flight_stream import StreamReader
from workers.transport.wire import Ticket, encode_ticket


def _transport(store: BlobStore, **options: object) -> FlightTransport:
    transport = FlightTransport(store, host="127.0.0.1", token=TOKEN, **options)  # type: ignore[arg-type]
    transport.start()
    return transport


def _port(transport: FlightTransport) -> int:
    return int(transport.address.rsplit(":", 1)[1])


def _num_sockets_to(port: int) -> int:
    """Connections of this machine to ``port`` that are established (state 01)."""
    tables = [Path("/proc/net") / name for name in ("tcp", "tcp6")]  # gRPC's sockets speak both
    rows = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
    return sum(row[2].endswith(f":{port:04X}") and row[3] == "01" for row in rows)


@pytest.fixture
def half_server() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("half_server.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate(timeout=10)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_peer_lost_in_the_middle_of_a_blob_is_noticed(half_server: subprocess.Popen[str], how: signal.Signals) -> None:
    assert half_server.stdout is not None
    address = half_server.stdout.readline().strip()
    client = _transport(BlobStore(), keepalive_time_s=0.5, keepalive_timeout_s=1.0, ping_timeout_s=0.5)
    holder = _transport(store_with(a=random_bytes(300_000)))
    try:
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(client.fetch, address, ["a"], timeout_s=50, max_bytes=300_000)
            assert half_server.stdout.readline() == "half\n"
            wait_for(lambda: client.bytes_received == 150_000, "half of the blob")
            lost_at = time.monotonic()
            half_server.send_signal(how)
            with pytest.raises(PeerUnreachable):
                future.result(20)
            assert time.monotonic() - lost_at < 3
        # Nobody can be connected to there, and this is noticed in the same time; another holder has the blob.
        with pytest.raises(PeerUnreachable):
            client.fetch(address, ["a"], timeout_s=50, max_bytes=300_000)
        assert time.monotonic() - lost_at < 6
        blob = client.fetch(holder.address, ["a"], timeout_s=10, max_bytes=300_000)[0]
        assert np.array_equal(blob.data, random_bytes(300_000))
    finally:
        client.stop()
        holder.stop()


def test_stop_leaves_no_thread_no_port_and_no_connection() -> None:
    before = threading.active_count()
    server, client = _transport(store_with(a=random_bytes(4 << 20))), _transport(BlobStore(), num_connections=4)
    address, port = server.address, _port(server)
    client.warm(address, timeout_s=5)
    assert _num_sockets_to(port) == 4
    client.fetch(address, ["a"], timeout_s=5, max_bytes=4 << 20)
    assert _num_sockets_to(port) == 4, "the connections are kept"
    client.stop()
    wait_for(lambda: _num_sockets_to(port) == 0, "the connections to close")
    server.stop()
    server.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="no address"):
        _ = server.address


def test_stop_while_fetches_run() -> None:
    """Either side may stop at any moment: each fetch ends, well or with an error of ours."""
    data = random_bytes(8 << 20)
    for stop_server_first in (True, False):
        server, client = _transport(store_with(a=data)), _transport(BlobStore())
        address = server.address
        started = threading.Barrier(5)

        def fetch_on(
            client: FlightTransport = client, address: str = address, started: threading.Barrier = started
        ) -> str:
            started.wait(10)
            try:
                while True:
                    assert client.fetch(address, ["a"], timeout_s=20, max_bytes=len(data))[0].data.nbytes == len(data)
            except TransportError as error:
                return type(error).__name__

        with ThreadPoolExecutor(4) as pool:
            fetches = [pool.submit(fetch_on) for _ in range(4)]
            started.wait(10)
            wait_for(lambda client=client: client.bytes_received > 0, "the first bytes")  # type: ignore[misc]
            (server if stop_server_first else client).stop()
            expected = "PeerUnreachable" if stop_server_first else "Cancelled"
            assert [future.result(20) for future in fetches] == [expected] * 4
        client.stop()
        server.stop()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("atoll-")]


def test_a_reader_that_stalls_cannot_hold_up_stop(caplog: pytest.LogCaptureFixture) -> None:
    server = _transport(store_with(a=random_bytes(16 << 20)), stop_timeout_s=0.2)
    port = _port(server)
    # A fixed small window: else gRPC takes the whole blob in before anybody reads it.
    flight = fl.FlightClient(server.address, generic_options=[("grpc.http2.bdp_probe", 0)])
    ticket = encode_ticket(Ticket(keys=("a",), stream=0, num_streams=1, wait_s=0))
    options = fl.FlightCallOptions(timeout=50, headers=[(b"x-atoll-token", TOKEN.encode())])
    reader = flight.do_get(fl.Ticket(ticket), options)
    reader.read_chunk()  # the first batch, then no more
    seen: list[int] = []
    wait_for(lambda: seen.append(server.bytes_sent) or seen.count(seen[-1]) == 20, "the stream to stall")
    assert seen[-1] < 16 << 20
    server.stop()
    assert "still holds a stream of ours open after 0.2 s" in caplog.text
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    with pytest.raises(fl.FlightUnavailableError, match="stops serving"):
        while True:
            reader.read_chunk()
    wait_for(lambda: not any(t.name == "atoll-flight-shutdown" for t in threading.enumerate()), "the stream to end")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_a_stream_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(reader: StreamReader) -> None:
        raise KeyError("a bug of ours")

    server, client = _transport(store_with(a=b"1")), _transport(BlobStore())
    monkeypatch.setattr(StreamReader, "run", run)
    try:
        with pytest.raises(KeyError, match="a bug of ours"):
            client.fetch(server.address, ["a"], timeout_s=20, max_bytes=1)
    finally:
        client.stop()
        server.stop()


def test_reconnects_when_a_peer_comes_back_at_the_same_address() -> None:
    server, client = _transport(store_with(a=b"old")), _transport(BlobStore())
    address, port = server.address, _port(server)
    try:
        assert client.fetch(address, ["a"], timeout_s=5, max_bytes=9)[0].data.tobytes() == b"old"
        server.stop()
        with pytest.raises(PeerUnreachable):
            client.fetch(address, ["a"], timeout_s=5, max_bytes=9)
        server = _transport(store_with(a=b"new"), port=port)
        assert client.fetch(address, ["a"], timeout_s=5, max_bytes=9)[0].data.tobytes() == b"new"
        client.forget(address)
        assert client.fetch(address, ["a"], timeout_s=5, max_bytes=9)[0].data.tobytes() == b"new"
    finally:
        client.stop()
        server.stop()


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"cannot serve on 127\.0\.0\.1:{port}"):
            _transport(BlobStore(), port=port)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"token": ""}, "token"),
        ({"token": "söd"}, "token"),
        ({"num_connections": 0}, "num_connections=0"),
        ({"host": "0.0.0.0"}, "advertise_host"),
        ({"keepalive_time_s": 0.1}, "keepalive_time_s=0.1"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FlightTransport(BlobStore(), **({"host": "127.0.0.1", "token": TOKEN} | options))  # type: ignore[arg-type]


def test_listens_everywhere_and_advertises_one_address() -> None:
    server, client = (
        FlightTransport(store_with(a=b"1"), host="0.0.0.0", advertise_host="127.0.0.1", token=TOKEN),
        _transport(BlobStore()),
    )
    server.start()
    try:
        assert server.address.startswith("grpc+tcp://127.0.0.1:")
        assert len(client.fetch(server.address, ["a"], timeout_s=5, max_bytes=1)) == 1
    finally:
        client.stop()
        server.stop()


def test_fetch_before_start_is_refused() -> None:
    with pytest.raises(Cancelled, match="not started"):
        FlightTransport(BlobStore(), host="127.0.0.1", token=TOKEN).fetch("x", ["a"], timeout_s=1, max_bytes=1)


def _self_signed() -> TlsConfig:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "atoll test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return TlsConfig(cert_chain=pem, private_key=private, root_certs=pem, verify_peers=True)


def test_tls_with_client_certificates() -> None:
    ours, theirs = _self_signed(), _self_signed()
    data = random_bytes(2 << 20)
    server, client = _transport(store_with(a=data), tls=ours), _transport(BlobStore(), tls=ours)
    stranger = _transport(BlobStore(), tls=theirs)
    try:
        assert server.address.startswith("grpc+tls://")
        assert np.array_equal(client.fetch(server.address, ["a"], timeout_s=5, max_bytes=2 << 20)[0].data, data)
        with pytest.raises(PeerUnreachable):
            stranger.fetch(server.address, ["a"], timeout_s=5, max_bytes=2 << 20)
    finally:
        for transport in (client, stranger, server):
            transport.stop()
