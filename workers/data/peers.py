"""Shards from the other members of a run, over the transport that carries their tensors.

A member serves the files of its pack in pieces, under `pack/<digest of the pack>/<file>/<number>`; whoever lacks a
shard asks them in turn, another one first for each shard. What comes is checked on the way like any blob, and as a
whole against the index.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from workers.data.errors import DataError
from workers.data.index import PackIndex, ShardIndex, check_shared, shard_paths
from workers.digest import digest
from workers.store import StoredBlob
from workers.transport.base import MAX_KEYS, Transport
from workers.transport.errors import TransportError

PIECE_BYTES = 1 << 20
GROUP = 8
AGAIN_S = 0.5

Peers = Callable[[], Sequence[tuple[str, str]]]
"""`(member, address)` of whoever may have the pack, now."""


def shard_key(pack: str, file: str, piece: int) -> str:
    """Under which key a piece of a shard is served."""
    return f"pack/{pack}/{file}/{piece}"


class PackFiles:
    """What a member serves of its pack: shards that are complete on its disk."""

    def __init__(self, folder: Path, index: PackIndex) -> None:
        """`folder`: of the pack. Nothing is opened before it is asked for. Raises DataError for one island's own."""
        check_shared(folder, index)
        self.digest = index.digest
        self._files = {shard.file: file for _, shard, file in shard_paths(folder, index)}

    def find(self, key: str) -> StoredBlob | None:
        """A piece by its key; None for what is not here."""
        kind, pack, file, piece = (*key.split("/"), "", "", "")[:4]
        path = self._files.get(file)
        if kind != "pack" or pack != self.digest or path is None or not piece.isdecimal():
            return None
        try:
            with path.open("rb") as source:
                source.seek(int(piece) * PIECE_BYTES)
                data = source.read(PIECE_BYTES)
        except OSError:
            return None
        return StoredBlob(data=memoryview(data), digest=digest(data)) if data else None


class PeerShards:
    """Shards of one pack, from whoever has them."""

    def __init__(
        self, pack: str, transport: Transport, peers: Peers, *, timeout_s: float, patience_s: float = 0.0
    ) -> None:
        """`patience_s`: how long peers are waited for that are not known yet."""
        self.pack, self.transport, self.peers = pack, transport, peers
        self.timeout_s, self.patience_s = timeout_s, patience_s
        self._pause = threading.Event()

    def fetch(self, shard: ShardIndex, part: Path) -> None:
        """Go on with a part from the peers in turn. Raises DataError that says what each of them answered."""
        why: dict[str, str] = {}
        for _ in range(max(int(self.patience_s / AGAIN_S), 0) + 1):
            for name, address in self._in_turn(shard):
                try:
                    self._fetch_from(address, shard, part)
                    return
                except TransportError as error:
                    why[name] = str(error)
                except OSError as error:
                    raise DataError(f"{part}: cannot be written ({error.strerror})") from error
            if self.patience_s > 0:
                self._pause.wait(AGAIN_S)
        told = "; ".join(f"{name}: {text}" for name, text in sorted(why.items())) or "no peer is known"
        raise DataError(f"shard {shard.file} of pack {self.pack} is with no peer ({told})")

    def _in_turn(self, shard: ShardIndex) -> list[tuple[str, str]]:
        peers = sorted(self.peers())
        first = int(shard.digest[:8], 16) % len(peers) if peers else 0
        return peers[first:] + peers[:first]

    def _fetch_from(self, address: str, shard: ShardIndex, part: Path) -> None:
        num_pieces = -(-shard.num_bytes // PIECE_BYTES)
        with part.open("ab") as out:
            done = min(out.tell() // PIECE_BYTES, num_pieces)
            out.truncate(done * PIECE_BYTES)
            while done < num_pieces:
                pieces = range(done, min(done + min(GROUP, MAX_KEYS), num_pieces))
                blobs = self.transport.fetch(
                    address,
                    [shard_key(self.pack, shard.file, piece) for piece in pieces],
                    timeout_s=self.timeout_s,
                    max_bytes=len(pieces) * PIECE_BYTES,
                    background=1,
                )
                for blob in blobs:
                    out.write(blob.data)
                out.flush()
                done = pieces.stop
