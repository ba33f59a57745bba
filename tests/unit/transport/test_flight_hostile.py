"""Flight against peers that lie, break off, stall or do not belong: one clear error each, and nothing is lost."""

from __future__ import annotations

import base64
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as fl
import pytest

from tests.unit.transport.support import TOKEN, Answer, HostileServer, batch, header, random_bytes, store_with
from workers.store import BlobStore
from workers.transport.base import (
    BadMessage,
    BlobCorrupt,
    BlobMissing,
    BlobTooLarge,
    PeerUnreachable,
    TransportError,
    TransportTimeout,
    Unauthorized,
)
from workers.transport.flight import FlightTransport
from workers.transport.flight_server import SCHEMA
from workers.transport.wire import Missing, Waiting, encode_message

DATA = random_bytes(300_000).tobytes()
OTHER = random_bytes(300_000, seed=1).tobytes()


@pytest.fixture
def client() -> Iterator[FlightTransport]:
    transport = FlightTransport(BlobStore(), host="127.0.0.1", token=TOKEN)
    transport.start()
    yield transport
    transport.stop()


@pytest.fixture
def hostile() -> Iterator[Callable[..., HostileServer]]:
    servers: list[HostileServer] = []

    def start(answer: Answer, **options: Any) -> HostileServer:
        servers.append(HostileServer(answer, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()


def _truncated(ticket: fl.Ticket) -> Iterator[Any]:
    yield batch(DATA[:100_000]), header(DATA)


def _nothing(ticket: fl.Ticket) -> Iterator[Any]:
    yield from ()


def _corrupted(ticket: fl.Ticket) -> Iterator[Any]:
    yield batch(OTHER), header(DATA)


def _wrong_digest(ticket: fl.Ticket) -> Iterator[Any]:
    yield batch(DATA), header(DATA, digest="00" * 16)


def _corrupted_empty(ticket: fl.Ticket) -> Iterator[Any]:
    yield batch(b""), header(b"", digest="00" * 16)


def _announced_too_large(ticket: fl.Ticket) -> Iterator[Any]:
    yield batch(DATA), header(DATA, length=1 << 39, size=1 << 39)


def _longer_than_announced(ticket: fl.Ticket) -> Iterator[Any]:
    yield batch(DATA), header(DATA[:-1])


def _endless(ticket: fl.Ticket) -> Iterator[Any]:
    yield batch(DATA), header(DATA)
    while True:
        yield batch(DATA), None


def _one_huge_message(ticket: fl.Ticket) -> Iterator[Any]:
    yield batch(bytes(16 << 20)), header(DATA)


def _bytes_of_no_blob(ticket: fl.Ticket) -> Iterator[Any]:
    yield batch(DATA), None


def _bytes_while_waiting(ticket: fl.Ticket) -> Iterator[Any]:
    yield batch(DATA), encode_message(Waiting(num_keys=1))


def _same_blob_twice(ticket: fl.Ticket) -> Iterator[Any]:
    yield batch(DATA), header(DATA)
    yield batch(DATA), header(DATA)


def _another_part(ticket: fl.Ticket) -> Iterator[Any]:
    yield batch(DATA[10:]), header(DATA, offset=10, size=len(DATA) - 10)


def _changes_its_mind(ticket: fl.Ticket) -> Iterator[Any]:
    yield batch(DATA[:10]), header(DATA)
    yield batch(OTHER), header(OTHER)


def _blob_not_asked_for(ticket: fl.Ticket) -> Iterator[Any]:
    yield batch(DATA), header(DATA, key=1)


def _pickle(ticket: fl.Ticket) -> Iterator[Any]:
    yield batch(DATA), pickle.dumps({"key": 0})


def _long_header(ticket: fl.Ticket) -> Iterator[Any]:
    yield batch(DATA), header(DATA) + b" " * 100_000


def _missing(ticket: fl.Ticket) -> Iterator[Any]:
    yield batch(b""), encode_message(Missing(keys=(0,), cause="I say so"))


def _breaks_off(ticket: fl.Ticket) -> Iterator[Any]:
    yield batch(DATA[:1000]), header(DATA)
    raise fl.FlightUnavailableError("gone")


def _fails(ticket: fl.Ticket) -> Iterator[Any]:
    yield batch(DATA[:1000]), header(DATA)
    raise KeyError("a bug over there")


def _cancels(ticket: fl.Ticket) -> Iterator[Any]:
    yield batch(DATA[:1000]), header(DATA)
    raise fl.FlightCancelledError("no more")


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (_truncated, BlobCorrupt, "cut short: 100000 of 300000 bytes"),
        (_nothing, BlobCorrupt, "cut short: 0 of unknown bytes"),
        (_corrupted, BlobCorrupt, "300000 bytes have digest"),
        (_wrong_digest, BlobCorrupt, "announced was 0000"),
        (_corrupted_empty, BlobCorrupt, "announced was 0000"),
        (_announced_too_large, BlobTooLarge, "announced as 549755813888 bytes"),
        (_longer_than_announced, BlobTooLarge, "300000 bytes came where 299999 were announced"),
        (_endless, BlobTooLarge, "600000 bytes came where 300000"),
        (_one_huge_message, BlobTooLarge, "one message of more than"),
        (_bytes_of_no_blob, BadMessage, "belong to no blob"),
        (_bytes_while_waiting, BadMessage, "belong to no blob"),
        (_same_blob_twice, BadMessage, "must not send it"),
        (_another_part, BadMessage, "another part than its own"),
        (_changes_its_mind, BlobCorrupt, "changed between"),
        (_blob_not_asked_for, BadMessage, "key=1 is not a whole number from 0 to 0"),
        (_pickle, BadMessage, "no JSON"),
        (_long_header, BadMessage, "at most 65536"),
        (_missing, BlobMissing, "I say so"),
        (_breaks_off, PeerUnreachable, "gone"),
        (_fails, BadMessage, "a bug over there"),
        (_cancels, PeerUnreachable, "no more"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_bad_answers_are_refused_and_nothing_is_lost(
    client: FlightTransport,
    hostile: Callable[..., HostileServer],
    answer: Answer,
    error: type[TransportError],
    words: str,
) -> None:
    server = hostile(answer)
    with pytest.raises(error, match=words) as caught:
        client.fetch(server.address, ["piece/0"], timeout_s=10, max_bytes=1_000_000)
    assert type(caught.value) is error and caught.value.peer == server.address
    # The same transport goes on fetching, and the blob comes from an honest holder.
    honest = FlightTransport(store_with(**{"piece/0": DATA}), host="127.0.0.1", token=TOKEN)
    honest.start()
    try:
        blob = client.fetch(honest.address, ["piece/0"], timeout_s=10, max_bytes=1_000_000)[0]
    finally:
        honest.stop()
    assert blob.data.tobytes() == DATA


@pytest.mark.parametrize(
    "schema",
    [
        pa.schema([pa.field("bytes", pa.int64())]),
        pa.schema([pa.field("bytes", pa.uint8())]),
        pa.schema([pa.field("bytes", pa.uint8(), nullable=False), pa.field("more", pa.uint8())]),
    ],
    ids=["type", "nullable", "columns"],
)
def test_another_schema_is_refused(
    client: FlightTransport, hostile: Callable[..., HostileServer], schema: pa.Schema
) -> None:
    server = hostile(lambda ticket: iter(()), schema=schema)
    with pytest.raises(BadMessage, match="schema"):
        client.fetch(server.address, ["a"], timeout_s=10, max_bytes=10)


def test_nulls_are_refused(client: FlightTransport, hostile: Callable[..., HostileServer]) -> None:
    def answer(ticket: fl.Ticket) -> Iterator[Any]:
        yield pa.RecordBatch.from_arrays([pa.array([1, None, 3], pa.uint8())], schema=SCHEMA), header(b"123")

    with pytest.raises(BadMessage, match="null"):
        client.fetch(hostile(answer).address, ["a"], timeout_s=10, max_bytes=10)


def test_streams_that_disagree_are_refused(client: FlightTransport, hostile: Callable[..., HostileServer]) -> None:
    """One stream announces one blob, the other another of the same size."""
    length = 1 << 20
    blobs = [random_bytes(length, seed=seed).tobytes() for seed in range(2)]

    def answer(ticket: fl.Ticket) -> Iterator[Any]:
        stream = 1 if b'"stream": 1' in ticket.ticket else 0
        offset = stream * length // 2
        yield (
            batch(blobs[stream][offset : offset + length // 2]),
            header(blobs[stream], offset=offset, size=length // 2),
        )

    with pytest.raises(BlobCorrupt, match="changed between two streams"):
        client.fetch(hostile(answer).address, ["a"], timeout_s=10, max_bytes=2 << 20)


def test_late_answer_is_dropped(client: FlightTransport, hostile: Callable[..., HostileServer]) -> None:
    release, is_first = threading.Event(), [True]

    def answer(ticket: fl.Ticket) -> Iterator[Any]:
        if is_first.pop() if is_first else False:
            yield batch(OTHER[:1000]), header(OTHER)
            release.wait(20)
            yield batch(OTHER[1000:]), None
        else:
            yield batch(DATA), header(DATA)

    server = hostile(answer)
    try:
        with pytest.raises(TransportTimeout, match=r"timeout_s=0\.2|time limit"):
            client.fetch(server.address, ["a"], timeout_s=0.2, max_bytes=1_000_000)
    finally:
        release.set()
    blob = client.fetch(server.address, ["a"], timeout_s=10, max_bytes=1_000_000)[0]
    assert blob.data.tobytes() == DATA


def test_server_that_never_answers_times_out(client: FlightTransport) -> None:
    release = threading.Event()

    class Mute(HostileServer):
        def do_get(self, context: Any, ticket: fl.Ticket) -> fl.FlightDataStream:
            release.wait(20)
            raise fl.FlightInternalError("never mind")

    server = Mute(_nothing)
    started = time.monotonic()
    try:
        with pytest.raises(TransportTimeout):
            client.fetch(server.address, ["a"], timeout_s=0.2, max_bytes=10)
        assert time.monotonic() - started < 2
    finally:
        release.set()
        server.shutdown()


@pytest.mark.parametrize("token", ["another-token", TOKEN[:-1], TOKEN + "x"])
def test_wrong_token_is_refused_before_anything_else(token: str) -> None:
    touched: list[str] = []

    class Spy(BlobStore):
        def find(self, key: str) -> Any:
            touched.append(key)
            return super().find(key)

    server = FlightTransport(Spy(), host="127.0.0.1", token=TOKEN)
    stranger = FlightTransport(BlobStore(), host="127.0.0.1", token=token)
    server.start()
    stranger.start()
    try:
        with pytest.raises(Unauthorized, match="another run"):
            stranger.fetch(server.address, ["a"], timeout_s=5, max_bytes=10)
        with pytest.raises(Unauthorized, match="another run"):
            stranger.warm(server.address, timeout_s=5)
    finally:
        server.stop()
        stranger.stop()
    assert touched == [] and server.bytes_sent == 0


def _call(address: str, ticket: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    flight = fl.FlightClient(address)
    options = fl.FlightCallOptions(timeout=5, headers=headers)
    flight.do_get(fl.Ticket(ticket), options).read_all()


def test_raw_clients_are_refused(client: FlightTransport) -> None:
    """None, two, in another header, no text: unauthenticated. With the token, but a bad ticket: invalid."""
    good = (b"x-atoll-token", TOKEN.encode())
    for headers in (
        [],
        [good, good],
        [(b"authorization", b"Bearer " + TOKEN.encode())],
        [(b"x-atoll-token-bin", base64.b64encode(b"\xff\x00"))],
        [(b"x-atoll-token", b"")],
    ):
        with pytest.raises(fl.FlightUnauthenticatedError):
            _call(client.address, b"{}", headers)
    for ticket in (b"", b"{}", pickle.dumps(["a"]), b"[" * 100_000, b'{"version": 99}', b" " * (5 << 20)):
        with pytest.raises(pa.ArrowInvalid, match="not understood"):
            _call(client.address, ticket, [good])
    for attempt in (
        lambda flight, options: list(flight.list_flights(options=options)),
        lambda flight, options: flight.get_flight_info(fl.FlightDescriptor.for_path("a"), options),
    ):
        with pytest.raises(NotImplementedError):
            attempt(fl.FlightClient(client.address), fl.FlightCallOptions(timeout=5, headers=[good]))


def test_memory_is_not_taken_on_the_word_of_a_peer(
    client: FlightTransport, hostile: Callable[..., HostileServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    empty = np.empty
    monkeypatch.setattr(np, "empty", lambda shape, **options: (taken.append(shape), empty(shape, **options))[1])
    with pytest.raises(BlobTooLarge):
        client.fetch(hostile(_announced_too_large).address, ["a"], timeout_s=10, max_bytes=1_000_000)
    assert taken == []
