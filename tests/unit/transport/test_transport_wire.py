"""The messages: round trips, strict refusal of anything else, and pieces that cover each blob exactly once."""

from __future__ import annotations

import itertools
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.transport import errors
from workers.transport.base import MAX_KEY_CHARS, MAX_KEYS
from workers.transport.wire import (
    BATCH_BYTES,
    MAX_TICKET_BYTES,
    MIN_PIECE_BYTES,
    Missing,
    PieceHeader,
    Ticket,
    Waiting,
    WireError,
    announces,
    batches_of,
    decode_message,
    decode_ticket,
    encode_message,
    encode_ticket,
    piece_of,
    streams_for,
)

TICKET = Ticket(keys=("piece/0/island-1.2/7/3", "b"), stream=1, num_streams=4, wait_s=2.5)
HEADER = PieceHeader(key=1, length=10, digest="ab" * 16, offset=2, size=8)


def test_messages_survive_the_trip() -> None:
    assert decode_ticket(encode_ticket(TICKET)) == TICKET
    for message in (HEADER, Waiting(num_keys=2), Missing(keys=(0, 1), cause="why")):
        assert decode_message(encode_message(message), num_keys=2) == message


def test_the_largest_allowed_ticket_fits() -> None:
    keys = tuple(f"{number:04}".rjust(MAX_KEY_CHARS, '"') for number in range(MAX_KEYS))
    raw = encode_ticket(Ticket(keys=keys, stream=0, num_streams=1, wait_s=0))
    assert len(raw) < MAX_TICKET_BYTES and decode_ticket(raw).keys == keys


@pytest.mark.parametrize(
    "change",
    [
        {"version": 1},
        {"keys": []},
        {"keys": ["a"] * (MAX_KEYS + 1)},
        {"keys": [1]},
        {"keys": "ab"},
        {"keys": ["x" * (MAX_KEY_CHARS + 1)]},
        {"keys": ["new\nline"]},
        {"num_streams": 0},
        {"num_streams": 65},
        {"stream": 4},
        {"stream": True},
        {"wait_s": -1},
        {"wait_s": float("nan")},
        {"wait_s": "1"},
        {"background": 1},
        {"urgent": "yes"},
    ],
)
def test_wrong_tickets_are_refused(change: dict[str, object]) -> None:
    fields = json.loads(encode_ticket(TICKET)) | change
    with pytest.raises(WireError):
        decode_ticket(json.dumps(fields).encode())


@pytest.mark.parametrize(
    "raw",
    [b"", b"\xff\xfe", b"[]", b"3", b"[" * 10_000, pickle.dumps({"key": 0}), b" " * 70_000],
    ids=["empty", "no text", "list", "number", "deep", "pickle", "long"],
)
def test_what_is_no_message_is_refused(raw: bytes) -> None:
    with pytest.raises(WireError):
        decode_message(raw, num_keys=2)


@pytest.mark.parametrize(
    "change",
    [
        {"key": 2},
        {"key": -1},
        {"key": 0.0},
        {"length": -1},
        {"length": 1 << 50},
        {"offset": 11},
        {"size": 9},
        {"digest": "ab"},
        {"digest": None},
        {"waiting": 3},
        {"missing": []},
        {"missing": [2]},
        {"missing": "0"},
    ],
)
def test_wrong_headers_are_refused(change: dict[str, object]) -> None:
    fields = json.loads(encode_message(HEADER)) | change
    with pytest.raises(WireError):
        decode_message(json.dumps(fields).encode(), num_keys=2)


LENGTHS = st.integers(0, 3 * MIN_PIECE_BYTES) | st.integers(0, 1 << 33)


@given(LENGTHS, st.integers(0, 100), st.integers(1, 64), st.integers(1, 400))
def test_pieces_cover_a_blob_once_and_evenly(length: int, key: int, num_streams: int, num_keys: int) -> None:
    places = [
        {"key": key, "num_keys": num_keys, "stream": stream, "num_streams": num_streams}
        for stream in range(num_streams)
    ]
    announced = [piece_of(length, **place) for place in places if announces(length, **place)]
    position = 0
    for offset, size in sorted(announced):
        assert offset == position
        position += size
    assert position == length and announced
    sizes = [size for _, size in announced]
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == 1 or min(sizes) >= (MIN_PIECE_BYTES if num_keys < 4 * num_streams else BATCH_BYTES)
    assert all(
        size == 0 for place in places if not announces(length, **place) for size in piece_of(length, **place)[1:]
    )


def test_small_blobs_go_round_the_streams() -> None:
    first = [
        next(s for s in range(4) if announces(1000, key=key, num_keys=6, stream=s, num_streams=4)) for key in range(6)
    ]
    assert first == [0, 1, 2, 3, 0, 1]


def test_of_many_blobs_each_travels_whole_and_of_few_in_pieces() -> None:
    """A chunk of a large model is a mebibyte and a header: one message where it is one of many, four by itself."""
    length = BATCH_BYTES + 16

    def pieces(num_keys: int) -> int:
        return sum(announces(length, key=0, num_keys=num_keys, stream=s, num_streams=8) for s in range(8))

    assert (pieces(1), pieces(31), pieces(32), pieces(96)) == (4, 4, 1, 1)
    assert batches_of(0, length, BATCH_BYTES) == [(0, length)]


@given(st.integers(0, 1 << 24), st.integers(1, 1 << 26), st.sampled_from([4096, BATCH_BYTES]))
def test_batches_cover_a_piece_and_none_is_much_longer_than_wanted(offset: int, size: int, wanted: int) -> None:
    batches = batches_of(offset, min(size, 1000 * wanted), wanted)
    assert batches[0][0] == offset
    assert all(a + n == b for (a, n), (b, _) in itertools.pairwise(batches))
    assert sum(n for _, n in batches) == min(size, 1000 * wanted)
    assert 0 < max(n for _, n in batches) <= wanted * 17 // 16


def test_small_fetches_use_one_stream() -> None:
    assert [streams_for(n, num_connections=4) for n in (0, 1000, 2 << 20, 1 << 30)] == [1, 1, 2, 4]


@pytest.mark.parametrize(
    "error",
    [
        kind(peer="grpc+tcp://h:1", key="piece/1", cause="because")
        for kind in (
            errors.PeerUnreachable,
            errors.TransportTimeout,
            errors.Cancelled,
            errors.Unauthorized,
            errors.BlobCorrupt,
            errors.BadMessage,
            errors.BlobTooLarge,
        )
    ]
    + [errors.BlobMissing(peer="grpc+tcp://h:1", keys=("piece/1", "piece/2"), cause="because")],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_pickling_and_say_everything(error: errors.TransportError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and vars(copy) == vars(error) and str(copy) == str(error)
    assert not isinstance(error, ValueError)
    for part in ("grpc+tcp://h:1", "piece/1", "because", "Remedy: " + error.remedy):
        assert part in str(error)
