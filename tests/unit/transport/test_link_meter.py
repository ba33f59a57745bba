"""What is learned of links from fetches that are made anyway."""

from __future__ import annotations

import pytest

from tests.unit.transport.support import TOKEN, random_bytes, store_with
from workers.link_rows import EVERY_S, LinkRows
from workers.transport.flight import FlightTransport
from workers.transport.link_meter import MIN_RATE_BYTES, LinkMeter


def test_the_rate_follows_and_the_round_trip_is_the_quickest() -> None:
    meter = LinkMeter()
    for answer_s, receive_s in ((0.30, 1.0), (0.08, 1.0), (0.20, 0.5)):
        meter.note("a", num_bytes=1_000_000, answer_s=answer_s, receive_s=receive_s)
    (report,) = meter.take()
    assert (report.address, report.num_bytes, report.rtt_s) == ("a", 3_000_000, 0.08)
    assert report.bytes_per_s == pytest.approx(1_000_000 + 0.3 * 1_000_000)
    assert meter.take() == ()
    meter.note("a", num_bytes=10, answer_s=0.5, receive_s=1e-6)  # too small to tell a rate
    (report,) = meter.take()
    assert (report.num_bytes, report.rtt_s) == (10, 0.5)
    assert report.bytes_per_s == pytest.approx(1_300_000)


def test_among_many_links_each_has_its_turn() -> None:
    meter, seen = LinkMeter(), set[str]()
    for _ in range(5):
        for peer in range(20):
            meter.note(f"p{peer}", num_bytes=1, answer_s=0.1, receive_s=0.1)
        taken = meter.take(4)
        assert len(taken) == 4
        seen |= {report.address for report in taken}
    assert len(seen) == 20


def test_fetches_over_flight_are_measured_and_waiting_ones_are_not() -> None:
    data = random_bytes(4 * MIN_RATE_BYTES)
    server = FlightTransport(store_with(k=data), host="127.0.0.1", token=TOKEN)
    client = FlightTransport(store_with(), host="127.0.0.1", token=TOKEN)
    server.start()
    client.start()
    try:
        client.fetch(server.address, ["k"], timeout_s=20, wait_s=1.0, max_bytes=len(data))
        assert client.take_links() == ()
        client.fetch(server.address, ["k"], timeout_s=20, max_bytes=len(data))
        (report,) = client.take_links()
        assert report.address == server.address and report.num_bytes == len(data)
        assert report.rtt_s is not None and 0 < report.rtt_s < 20
        assert report.bytes_per_s is not None and report.bytes_per_s > 0
        client.forget(server.address)
        assert client.take_links() == ()
    finally:
        client.stop()
        server.stop()


class Measured:
    def __init__(self) -> None:
        self.meter = LinkMeter()

    def take_links(self) -> tuple[object, ...]:
        return self.meter.take()


def test_rows_name_the_peer_and_come_every_few_seconds() -> None:
    transport, rows = Measured(), list[tuple[float, dict[str, object]]]()
    links = LinkRows(transport, lambda at_s, row: rows.append((at_s, row)))  # type: ignore[arg-type]
    peers = {"island-1.3": ("grpc://a", (4,))}
    for now in (100.0, 100.0 + EVERY_S / 2, 100.0 + EVERY_S):
        for address in ("grpc://a", "grpc://nobody"):
            transport.meter.note(address, num_bytes=7, answer_s=0.25, receive_s=1.0)
        links.note(now, peers)
    assert rows == [
        (100.0 + EVERY_S, {"kind": "link", "peer": "island-1", "bytes": 21, "bytes_per_s": None, "rtt_s": 0.25})
    ]
