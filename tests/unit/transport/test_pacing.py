"""Pacing: the bucket and the meter on a virtual clock, and background streams of a real server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.transport.support import TOKEN, random_bytes, store_with
from workers.transport.errors import PeerUnreachable
from workers.transport.flight import FlightTransport
from workers.transport.pacing import (
    KEPT_MEASUREMENTS,
    MIN_MEASURED_BYTES,
    LinkShare,
    Pacer,
    SpeedMeter,
    TokenBucket,
    batch_bytes_at,
)
from workers.transport.wire import Ticket, WireError, decode_ticket, encode_ticket


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(0, 2)), min_size=1, max_size=50), st.floats(1e3, 1e8))
def test_never_more_than_the_rate_and_one_burst(sends: list[tuple[int, float]], rate: float) -> None:
    """In every window, what was sent is at most the window's length times the rate, and one burst and batch."""
    bucket, now = TokenBucket(bytes_per_s=rate), 0.0
    sent: list[tuple[float, int]] = []
    for num_bytes, idle_s in sends:
        now += idle_s
        now += bucket.take(num_bytes, now)
        sent.append((now, num_bytes))
    for first, (from_s, _) in enumerate(sent):
        total = 0
        for until_s, num_bytes in sent[first:]:
            allowed = rate * (until_s - from_s + bucket.burst_s)
            assert total <= allowed * (1 + 1e-9) + 1e-3
            total += num_bytes


def test_bucket_that_was_idle_gives_no_more_than_one_burst() -> None:
    bucket = TokenBucket(bytes_per_s=1000, burst_s=1.0)
    assert bucket.take(1000, 0.0) == 0.0
    assert bucket.take(500, 0.0) == 0.0 and bucket.take(500, 0.0) == pytest.approx(0.5)
    assert bucket.take(2000, 1000.0) == 0.0, "a burst, however long it was idle"
    assert bucket.take(1, 1000.0) == pytest.approx(1.0)


def test_pacer_follows_a_rate_that_changes() -> None:
    now, rate = [0.0], [0.0]
    pacer = Pacer(lambda: rate[0], lambda: now[0])
    assert [pacer.delay(10**9) for _ in range(3)] == [0.0, 0.0, 0.0], "no limit is known"
    rate[0] = 1000.0
    assert pacer.delay(1000) == 0.0 and pacer.delay(1000) == pytest.approx(0.98)
    rate[0] = 10_000.0
    assert pacer.delay(1000) == pytest.approx(1.98) and pacer.delay(1000) == pytest.approx(2.08)


def test_meter_takes_the_quickest_of_the_last_large_transfers() -> None:
    meter = SpeedMeter()
    meter.add(MIN_MEASURED_BYTES - 1, 1e-9)
    assert meter.bytes_per_s == 0.0
    meter.add(10 << 20, 1.0)
    meter.add(20 << 20, 10.0)
    assert meter.bytes_per_s == 10 << 20
    for _ in range(KEPT_MEASUREMENTS):
        meter.heard(5.0)
    assert meter.bytes_per_s == 5.0


def test_share_of_what_is_configured_or_measured() -> None:
    assert LinkShare(share=0.25, bytes_per_s=1000).limit() == 250
    measured = LinkShare(share=0.5)
    assert measured.limit() == 0
    measured.meter.add(4 << 20, 2.0)
    assert measured.limit() == 1 << 20
    with pytest.raises(ValueError, match="link_share"):
        LinkShare(share=0.0)


def test_batches_occupy_a_slow_link_for_a_moment_only() -> None:
    assert batch_bytes_at(0, 1 << 20) == 1 << 20 == batch_bytes_at(1e9, 1 << 20)
    assert batch_bytes_at(1.25e6, 1 << 20) == 25_000
    assert batch_bytes_at(1e3, 1 << 20) == 16 << 10


def test_ticket_carries_the_pace() -> None:
    ticket = Ticket(
        keys=("a",), stream=0, num_streams=1, wait_s=0.0, background=True, limit_bytes_per_s=5.5, seen_bytes_per_s=7.0
    )
    assert decode_ticket(encode_ticket(ticket)) == ticket
    for bad in (b'"background": 1', b'"background": true, "limit_bytes_per_s": -1', b'"seen_bytes_per_s": "x"'):
        raw = encode_ticket(Ticket(keys=("a",), stream=0, num_streams=1, wait_s=0.0))
        with pytest.raises(WireError):
            decode_ticket(raw[:-1] + b", " + bad + b"}")


# ---------------------------------------------------------------- a real server


@contextmanager
def two(size: int, **settings: float) -> Iterator[tuple[FlightTransport, FlightTransport]]:
    server = FlightTransport(store_with(blob=random_bytes(size)), host="127.0.0.1", token=TOKEN, **settings)  # type: ignore[arg-type]
    client = FlightTransport(store_with(), host="127.0.0.1", token=TOKEN, num_connections=2)
    server.start()
    client.start()
    try:
        yield server, client
    finally:
        client.stop()
        server.stop()


def fetch_s(client: FlightTransport, server: FlightTransport, size: int, *, background: int) -> float:
    began = time.monotonic()
    [blob] = client.fetch(server.address, ["blob"], timeout_s=30, max_bytes=size, background=background)
    assert blob.data.tobytes() == random_bytes(size).tobytes()
    return time.monotonic() - began


def test_background_fetch_keeps_to_the_share_of_the_link() -> None:
    size = 2 << 20
    with two(size, link_share=0.5, link_bytes_per_s=4.0 * size) as (server, client):
        assert fetch_s(client, server, size, background=0) < 0.4, "an exchange is not paced"
        paced_s = fetch_s(client, server, size, background=1)
    assert 0.44 <= paced_s < 5.0


def test_two_background_readers_share_one_line() -> None:
    size = 1 << 20
    with two(size, link_share=0.5, link_bytes_per_s=8.0 * size) as (server, client):
        began = time.monotonic()
        readers = [
            threading.Thread(target=fetch_s, args=(client, server, size), kwargs={"background": 2}) for _ in range(2)
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        seconds = time.monotonic() - began
    assert seconds >= 2 * size / (4.0 * size) - 0.06


def test_measured_share_comes_from_foreground_transfers() -> None:
    size = 2 << 20
    with two(size) as (server, client):
        assert server._uplink.limit() == client._downlink.limit() == 0.0
        fetch_s(client, server, size, background=1)
        assert client._downlink.limit() == 0.0, "what may be paced says nothing"
        fetch_s(client, server, size, background=0)
        measured = client._downlink.limit()
        assert measured > 0
        fetch_s(client, server, size, background=0)
        assert server._uplink.limit() == pytest.approx(measured), "the reader tells what it saw"


def test_stop_does_not_wait_for_a_paced_stream() -> None:
    size = 1 << 20
    with two(size, link_share=0.01, link_bytes_per_s=1e5) as (server, client):
        failed: list[PeerUnreachable] = []

        def read() -> None:
            try:
                fetch_s(client, server, size, background=1)
            except PeerUnreachable as error:
                failed.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        began = time.monotonic()
        while server.bytes_sent == 0 and time.monotonic() - began < 10:
            threading.Event().wait(0.01)
        server.stop()
        reader.join(10)
        assert failed and time.monotonic() - began < 10
