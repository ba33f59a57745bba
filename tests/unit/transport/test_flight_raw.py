"""Flight against bytes that no Flight library would send: cut and scrambled messages from a bare gRPC server."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pyarrow as pa
import pytest

from tests.unit.transport.support import TOKEN, batch, header
from workers.store import BlobStore
from workers.transport.base import BadMessage, BlobCorrupt, TransportError
from workers.transport.flight import FlightTransport
from workers.transport.flight_server import SCHEMA

DATA = b"0123456789" * 500
NUM_SCRAMBLED = 200


class RawServer:
    """Answers every DoGet with the given protobuf messages, unseen by any Arrow code."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self._pool = ThreadPoolExecutor(4)
        self._server = grpc.server(self._pool)
        handler = grpc.unary_stream_rpc_method_handler(lambda request, context: iter(self.messages))
        service = "arrow.flight.protocol.FlightService"
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {"DoGet": handler})])
        self.address = f"grpc+tcp://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(0).wait(10)
        self._pool.shutdown()


@pytest.fixture
def server() -> Iterator[RawServer]:
    raw = RawServer()
    yield raw
    raw.stop()


@pytest.fixture
def client(server: RawServer) -> Iterator[FlightTransport]:
    transport = FlightTransport(BlobStore(), host="127.0.0.1", token=TOKEN)
    transport.start()
    yield transport
    transport.stop()


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _flight_data(head: bytes, body: bytes = b"", app_metadata: bytes = b"") -> bytes:
    """One FlightData message: header, metadata and body are its fields 2, 3 and 1000."""
    fields = ((2, head), (3, app_metadata), (1000, body))
    return b"".join(_field(number, data) for number, data in fields if data)


def _split(message: pa.Buffer) -> tuple[bytes, bytes]:
    """Return flatbuffer and body of an encapsulated IPC message (marker, length, flatbuffer, body)."""
    raw = message.to_pybytes()
    end = 8 + int.from_bytes(raw[4:8], "little")
    return raw[8:end], raw[end:]


SCHEMA_HEAD, _ = _split(SCHEMA.serialize())
BATCH_HEAD, BATCH_BODY = _split(batch(DATA).serialize())
GOOD = [_flight_data(SCHEMA_HEAD), _flight_data(BATCH_HEAD, BATCH_BODY, header(DATA))]


def test_the_untouched_messages_are_understood(server: RawServer, client: FlightTransport) -> None:
    server.messages = GOOD
    assert client.fetch(server.address, ["a"], timeout_s=5, max_bytes=5000)[0].data.tobytes() == DATA


@pytest.mark.parametrize(
    "messages",
    [
        [GOOD[0], _flight_data(BATCH_HEAD, BATCH_BODY[:100], header(DATA))],
        [GOOD[0], _flight_data(BATCH_HEAD[:40], BATCH_BODY, header(DATA))],
        [GOOD[0], GOOD[1][: len(GOOD[1]) // 2]],
        [GOOD[0], b"\xff\xff\xff"],
        [GOOD[0], GOOD[0]],
        [GOOD[1]],
        [_flight_data(b"junk" * 30), GOOD[1]],
        [b""],
        [],
    ],
    ids=["body", "header", "protobuf", "no protobuf", "two schemas", "no schema", "junk", "empty", "nothing"],
)
def test_cut_messages_are_refused(server: RawServer, client: FlightTransport, messages: list[bytes]) -> None:
    server.messages = messages
    with pytest.raises(BlobCorrupt) as caught:
        client.fetch(server.address, ["a"], timeout_s=5, max_bytes=5000)
    assert isinstance(caught.value, BadMessage) or "cut short" in str(caught.value)


def test_scrambled_messages_never_pass_for_the_blob(server: RawServer, client: FlightTransport) -> None:
    """With a few bytes of Arrow metadata changed there is a clear error, or (a harmless change) the right bytes."""
    rng = random.Random(0)
    refused = 0
    for _ in range(NUM_SCRAMBLED):
        heads = [bytearray(SCHEMA_HEAD), bytearray(BATCH_HEAD)]
        for _ in range(rng.randint(1, 4)):
            head = rng.choice(heads)
            head[rng.randrange(len(head))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        server.messages = [
            _flight_data(bytes(heads[0])),
            _flight_data(bytes(heads[1]), BATCH_BODY, header(DATA)),
        ]
        try:
            assert client.fetch(server.address, ["a"], timeout_s=5, max_bytes=5000)[0].data.tobytes() == DATA
        except TransportError as error:
            assert error.peer == server.address
            refused += 1
    assert refused > NUM_SCRAMBLED // 2
