"""The messages of the Flight transport, as pure functions: no socket, no thread, no clock.

A fetch is one to ``num_streams`` Flight ``DoGet`` calls. Each carries the same `Ticket` but for its ``stream`` number
and returns record batches of one ``uint8`` column. A batch that carries JSON in ``app_metadata`` opens something; one
without continues the piece opened last:

- a `PieceHeader`: bytes ``offset`` to ``offset + size`` of blob number ``key`` follow, in this batch and the next ones;
- ``{"waiting": n}``: nothing yet, n keys are not here (sent every second, so that a dead peer is noticed);
- ``{"missing": [..], "cause": ".."}``: these keys will not come; the stream ends here.

Which part of a blob travels in which stream follows from its length and place alone (`piece_of`): both sides compute
it, so neither has to ask. JSON, never pickle: a peer can at worst send wrong numbers, and those are checked.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from workers.transport.base import MAX_KEY_CHARS, MAX_KEYS, is_key

VERSION = 2
BATCH_BYTES = 1 << 20
"""Payload of one record batch."""

MIN_PIECE_BYTES = 256 << 10
"""Blobs are cut for several streams only down to pieces of this size."""

MANY_KEYS_PER_STREAM = 4
"""With so many blobs for each stream all have enough to do: they are cut only down to whole batches, for less work."""

MAX_STREAMS = 64
MAX_TICKET_BYTES = 4 << 20
"""Above what the longest allowed keys come to."""

MAX_HEADER_BYTES = 64 << 10
MAX_BLOB_BYTES = 1 << 40


class WireError(ValueError):
    """A message that does not follow this protocol; says what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """What one stream of a fetch asks for; ``wait_s`` is how long the server may wait for keys not there yet.

    ``background`` streams are paced: to ``limit_bytes_per_s``, if that is above 0, and to the server's own share.
    ``urgent`` streams go before the others of their connection (`workers.transport.precedence`).
    ``seen_bytes_per_s`` tells the server how quickly it served this reader before; 0 = not measured.
    """

    keys: tuple[str, ...]
    stream: int
    num_streams: int
    wait_s: float
    background: bool = False
    urgent: bool = False
    limit_bytes_per_s: float = 0.0
    seen_bytes_per_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceHeader:
    """``size`` bytes at ``offset`` of blob number ``key`` of the ticket, which is ``length`` bytes long in all."""

    key: int
    length: int
    digest: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """The server still waits for ``num_keys`` keys."""

    num_keys: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """The server gives up on these keys (numbers in the ticket)."""

    keys: tuple[int, ...]
    cause: str


def piece_of(length: int, *, key: int, num_keys: int, stream: int, num_streams: int) -> tuple[int, int]:
    """Return (offset, size) of the part of blob number ``key`` that travels in ``stream``; size 0 = no part.

    A blob is cut into as many nearly equal pieces as there are streams, but none under `MIN_PIECE_BYTES`, or under
    `BATCH_BYTES` where the ticket has many keys; piece j of blob i goes to stream (i + j) mod num_streams, so that
    small blobs go round. Only stream ``key mod num_streams`` announces an empty blob.
    """
    least = MIN_PIECE_BYTES if num_keys < MANY_KEYS_PER_STREAM * num_streams else BATCH_BYTES
    num_pieces = max(1, min(num_streams, length // least))
    piece = (stream - key) % num_streams
    if piece >= num_pieces:
        return 0, 0
    start = length * piece // num_pieces
    return start, length * (piece + 1) // num_pieces - start


def announces(length: int, *, key: int, num_keys: int, stream: int, num_streams: int) -> bool:
    """Return whether ``stream`` sends a `PieceHeader` for this blob."""
    if length == 0:
        return (stream - key) % num_streams == 0
    return piece_of(length, key=key, num_keys=num_keys, stream=stream, num_streams=num_streams)[1] > 0


def batches_of(offset: int, size: int, batch_bytes: int) -> list[tuple[int, int]]:
    """Return (offset, size) of the record batches of a piece; what is hardly longer than one batch travels in one."""
    if size <= batch_bytes + batch_bytes // 16:  # a chunk's payload has its header besides a round number of values
        return [(offset, size)]
    return [(start, min(batch_bytes, offset + size - start)) for start in range(offset, offset + size, batch_bytes)]


def streams_for(max_bytes: int, *, num_connections: int) -> int:
    """Return how many streams a fetch of at most ``max_bytes`` gets: one per `BATCH_BYTES`, as far as they go."""
    return max(1, min(num_connections, MAX_STREAMS, max_bytes // BATCH_BYTES))


def encode_ticket(ticket: Ticket) -> bytes:
    """Return the bytes of a ticket."""
    return json.dumps(
        {
            "version": VERSION,
            "keys": ticket.keys,
            "stream": ticket.stream,
            "num_streams": ticket.num_streams,
            "wait_s": ticket.wait_s,
            "background": ticket.background,
            "urgent": ticket.urgent,
            "limit_bytes_per_s": ticket.limit_bytes_per_s,
            "seen_bytes_per_s": ticket.seen_bytes_per_s,
        }
    ).encode()


def decode_ticket(raw: bytes) -> Ticket:
    """Return the ticket in ``raw``; raises `WireError`."""
    fields = _object(raw, limit_bytes=MAX_TICKET_BYTES, what="ticket")
    version = fields.get("version")
    if version != VERSION:
        raise WireError(f"ticket of version {version!r}, this side speaks {VERSION}")
    keys = fields.get("keys")
    if not isinstance(keys, list) or not 0 < len(keys) <= MAX_KEYS:
        raise WireError(f"ticket without 1 to {MAX_KEYS} keys")
    if not all(isinstance(key, str) and is_key(key) for key in keys):
        raise WireError(f"ticket with a key that is not 1 to {MAX_KEY_CHARS} printable ASCII characters")
    num_streams = _int(fields, "num_streams", 1, MAX_STREAMS)
    return Ticket(
        keys=tuple(keys),
        stream=_int(fields, "stream", 0, num_streams - 1),
        num_streams=num_streams,
        wait_s=_number(fields, "wait_s", None),
        background=_flag(fields, "background"),
        urgent=_flag(fields, "urgent"),
        limit_bytes_per_s=_number(fields, "limit_bytes_per_s", 0.0),
        seen_bytes_per_s=_number(fields, "seen_bytes_per_s", 0.0),
    )


def encode_message(message: PieceHeader | Waiting | Missing) -> bytes:
    """Return the ``app_metadata`` of a message of the server."""
    match message:
        case PieceHeader():
            fields: dict[str, Any] = {
                "key": message.key,
                "length": message.length,
                "digest": message.digest,
                "offset": message.offset,
                "size": message.size,
            }
        case Waiting():
            fields = {"waiting": message.num_keys}
        case Missing():
            fields = {"missing": message.keys, "cause": message.cause}
    return json.dumps(fields).encode()


def decode_message(raw: bytes, *, num_keys: int) -> PieceHeader | Waiting | Missing:
    """Return the message in ``raw``, an answer to a ticket of ``num_keys`` keys; raises `WireError`."""
    fields = _object(raw, limit_bytes=MAX_HEADER_BYTES, what="header")
    if "waiting" in fields:
        return Waiting(num_keys=_int(fields, "waiting", 1, num_keys))
    if "missing" in fields:
        return Missing(keys=_missing(fields["missing"], num_keys), cause=str(fields.get("cause", ""))[:200])
    length = _int(fields, "length", 0, MAX_BLOB_BYTES)
    offset = _int(fields, "offset", 0, length)
    digest = fields.get("digest")
    if not isinstance(digest, str) or len(digest) != 32:
        raise WireError(f"header with digest {str(digest)[:40]!r}")
    return PieceHeader(
        key=_int(fields, "key", 0, num_keys - 1),
        length=length,
        digest=digest,
        offset=offset,
        size=_int(fields, "size", 0, length - offset),
    )


def _missing(raw: object, num_keys: int) -> tuple[int, ...]:
    if not isinstance(raw, list) or not raw:
        raise WireError("list of missing keys that is empty or no list")
    return tuple(_int({"missing": item}, "missing", 0, num_keys - 1) for item in raw)


def _object(raw: bytes, *, limit_bytes: int, what: str) -> dict[str, Any]:
    if len(raw) > limit_bytes:
        raise WireError(f"{what} of {len(raw)} bytes, at most {limit_bytes} are allowed")
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise WireError(f"{what} that is no JSON ({type(error).__name__})") from None
    if not isinstance(fields, dict):
        raise WireError(f"{what} that is no JSON object")
    return fields


def _flag(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise WireError(f"ticket with {name}={str(value)[:40]}")
    return value


def _number(fields: dict[str, Any], name: str, default: float | None) -> float:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise WireError(f"ticket with {name}={str(value)[:40]}")
    return float(value)


def _int(fields: dict[str, Any], name: str, low: int, high: int) -> int:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise WireError(f"{name}={str(value)[:40]} is not a whole number from {low} to {high}")
    return value
