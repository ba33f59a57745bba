"""Puts the pieces of a fetch together and refuses whatever does not fit: the receiver's side of every transport.

The peer is not trusted about anything: sizes are bounded before memory is taken, each piece must be the one that
`wire.piece_of` demands, no byte beyond it is accepted, and the digest is computed here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from workers.digest import digest
from workers.memory import Room
from workers.transport.base import Blob
from workers.transport.errors import BadMessage, BlobCorrupt, BlobTooLarge
from workers.transport.wire import PieceHeader, announces, piece_of


class Piece:
    """A part of one blob on its way in through one stream; used by one thread."""

    def __init__(self, assembly: Assembly, part: _Part, target: NDArray[np.uint8]) -> None:
        self._assembly = assembly
        self._part = part
        self._target = target
        self._num_written = 0

    @property
    def num_missing(self) -> int:
        """Bytes still to come."""
        return len(self._target) - self._num_written

    def write(self, data: NDArray[np.uint8]) -> None:
        """Take the next bytes; checks the blob when it is whole. Raises `BlobTooLarge` and `BlobCorrupt`."""
        if len(data) > self.num_missing:
            raise BlobTooLarge(
                peer=self._assembly.peer,
                key=self._part.key,
                cause=f"{self._num_written + len(data)} bytes came where {len(self._target)} were announced",
            )
        self._target[self._num_written : self._num_written + len(data)] = data
        self._num_written += len(data)
        self._assembly.note_written(self._part, len(data))


class Assembly:
    """All blobs of one fetch, filled by ``num_streams`` threads."""

    def __init__(
        self,
        *,
        peer: str,
        keys: Sequence[str],
        num_streams: int,
        max_bytes: int,
        on_blob: Callable[[Blob], None] | None = None,
    ) -> None:
        """`on_blob`: told of each blob that is whole, by the thread that brought its last bytes."""
        self.peer = peer
        self._on_blob = on_blob
        self._parts = [_Part(key) for key in keys]
        self._num_streams = num_streams
        self._max_bytes = max_bytes
        self._claimed_bytes = 0
        self._room = Room(max_bytes)
        self._lock = threading.Lock()

    def open(self, header: PieceHeader, *, stream: int) -> Piece:
        """Begin the piece that a header announces; raises `BlobTooLarge`, `BlobCorrupt` and `BadMessage`.

        Memory for the whole blob is taken at its first piece, once the sum of all announced lengths is known to be
        within ``max_bytes``.
        """
        part = self._parts[header.key]
        with self._lock:
            if part.data is None:
                self._admit(part, header)
            elif (part.data.nbytes, part.digest) != (header.length, header.digest):
                raise BlobCorrupt(peer=self.peer, key=part.key, cause="its size or digest changed between two streams")
            self._check_place(part, header, stream)
            part.streams_opened.add(stream)
            assert part.data is not None
            piece = Piece(self, part, part.data[header.offset : header.offset + header.size])
        if header.length == 0:
            self._check_digest(part)
        return piece

    def blobs(self) -> list[Blob]:
        """Return all blobs in the order of their keys; raises `BlobCorrupt` where one was cut short."""
        blobs = []
        for part in self._parts:
            if part.data is None or not part.whole:
                length = "unknown" if part.data is None else part.data.nbytes
                raise BlobCorrupt(
                    peer=self.peer, key=part.key, cause=f"cut short: {part.num_written} of {length} bytes came"
                )
            blobs.append(Blob(key=part.key, data=part.data, digest=part.digest))
        return blobs

    def note_written(self, part: _Part, num_bytes: int) -> None:
        """Count bytes of a part (called by its pieces) and check its digest when the last one is there."""
        assert part.data is not None
        with self._lock:
            part.num_written += num_bytes
            complete = part.num_written == part.data.nbytes
        if complete and num_bytes:
            self._check_digest(part)

    def _admit(self, part: _Part, header: PieceHeader) -> None:
        if self._claimed_bytes + header.length > self._max_bytes:
            raise BlobTooLarge(
                peer=self.peer,
                key=part.key,
                cause=f"announced as {header.length} bytes after {self._claimed_bytes} others, "
                f"max_bytes={self._max_bytes}",
            )
        self._claimed_bytes += header.length
        part.data = self._room.take(header.length)
        part.digest = header.digest

    def _check_place(self, part: _Part, header: PieceHeader, stream: int) -> None:
        place = {
            "key": header.key, "num_keys": len(self._parts), "stream": stream, "num_streams": self._num_streams,
        }  # fmt: skip
        if stream in part.streams_opened or not announces(header.length, **place):
            raise BadMessage(peer=self.peer, key=part.key, cause=f"stream {stream} must not send it (again)")
        if (header.offset, header.size) != piece_of(header.length, **place):
            raise BadMessage(
                peer=self.peer,
                key=part.key,
                cause=f"stream {stream} sent {header.size} bytes at {header.offset}, another part than its own",
            )

    def _check_digest(self, part: _Part) -> None:
        assert part.data is not None
        actual = digest(part.data)
        if actual != part.digest:
            raise BlobCorrupt(
                peer=self.peer,
                key=part.key,
                cause=f"its {part.data.nbytes} bytes have digest {actual}, announced was {part.digest}",
            )
        part.whole = True
        if self._on_blob is not None:
            self._on_blob(Blob(key=part.key, data=part.data, digest=part.digest))


class _Part:
    __slots__ = ("data", "digest", "key", "num_written", "streams_opened", "whole")

    def __init__(self, key: str) -> None:
        self.key = key
        self.data: NDArray[np.uint8] | None = None
        self.digest = ""
        self.num_written = 0
        self.streams_opened: set[int] = set()
        self.whole = False
