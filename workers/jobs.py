"""What a member's machine asks to be carried out: fetch, reduce, compute, verify; each job ends in one event.

Jobs run on any thread. They read the replica under its lock and never touch live parameters.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from strategies.codecs.base import PayloadError
from workers import member_events as ev
from workers import messages as msg
from workers.ahead import Base, DigestsAhead
from workers.data.peers import PackFiles
from workers.digest import digest
from workers.memory import Room
from workers.record_log import RecordLog
from workers.records import OfferId
from workers.replica import BadPiece, Piece, Replica, StateChunk, as_bytes
from workers.saved import SnapshotError
from workers.snapshot import SnapshotPlace, load_chunks, newest_on_path
from workers.state_fetch import UnverifiedState, fetch_state
from workers.store import BlobStore, StoredBlob
from workers.transport.base import Blob, Transport
from workers.transport.errors import BlobMissing, TransportError

PIECES_AT_ONCE_BYTES = 16 << 20
"""Pieces are told of together: each time is a message inside the process, and one to the controller."""

KNOCK_TIMEOUT_S = 2.0


class MemberStore(BlobStore):
    """A member's blobs; besides, its present state (`state/<fragment>/<chunk>`) and what it serves of its pack."""

    replica: Replica | None = None
    pack: PackFiles | None = None

    def find(self, key: str) -> StoredBlob | None:
        """A stored blob, a chunk of the present state, or a piece of the pack."""
        if key.startswith("pack/"):
            return None if self.pack is None else self.pack.find(key)
        if not key.startswith("state/"):
            return super().find(key)
        _, fragment, chunk = key.split("/")
        try:
            assert self.replica is not None
            data = self.replica.serve(int(fragment), int(chunk))
        except (KeyError, IndexError, ValueError):
            return None
        return StoredBlob(data=memoryview(data), digest=digest(data))


class Pieces:
    """Which chunks of a fetch have come and been told of. Thread-safe; nothing counts that comes after the end."""

    def __init__(self, *, sum_bytes: int) -> None:
        """`sum_bytes`: of how many bytes together it is worth telling."""
        self._lock, self._sum_bytes = threading.Lock(), sum_bytes
        self._here: list[int] = []
        self._here_bytes = 0
        self._ended = False
        self.told: set[int] = set()
        self.wrong: list[int] = []  # other content than was announced

    def add(self, chunk: int, num_bytes: int, put: Callable[[], object]) -> tuple[int, ...]:
        """A chunk has come and is kept by `put`; those to tell of now, if any."""
        with self._lock:
            if self._ended:
                return ()
            put()
            self._here.append(chunk)
            self._here_bytes += num_bytes
            if self._here_bytes < self._sum_bytes:
                return ()
            several, self._here, self._here_bytes = tuple(sorted(self._here)), [], 0
            self.told.update(several)
            return several

    def end(self) -> tuple[int, ...]:
        """The fetch is over; those that were kept and that nobody was told of."""
        with self._lock:
            self._ended = True
            return tuple(self._here)


def piece_key(fragment: int, offer: object, chunk: int) -> str:
    """Key of one chunk of a contribution."""
    return f"piece/{fragment}/{offer}/{chunk}"


def content_key(fragment: int, digest_hex: str) -> str:
    """Key of a result chunk by its content: any holder may serve it."""
    return f"content/{fragment}/{digest_hex}"


def name_key(fragment: int, roster_digest: str, chunk: int) -> str:
    """Key of a result chunk by what it was made of: known before it exists."""
    return f"result/{fragment}/{roster_digest}/{chunk}"


class Payloads(Sequence[Tensor]):
    """Stored payloads as tensors, for reading only."""

    def __init__(self, stored: Sequence[memoryview]) -> None:
        self._stored = tuple(stored)

    def __len__(self) -> int:
        return len(self._stored)

    @overload
    def __getitem__(self, place: int) -> Tensor: ...
    @overload
    def __getitem__(self, place: slice) -> Payloads: ...
    def __getitem__(self, place: int | slice) -> Tensor | Payloads:
        if isinstance(place, slice):
            return Payloads(self._stored[place])
        return _tensor(self._stored[place])


class Jobs:
    """The work of one member that runs beside training."""

    def __init__(
        self,
        *,
        replica: Replica,
        store: BlobStore,
        transport: Transport,
        log: Callable[[], RecordLog],
        lock: threading.RLock | threading.Condition,
        timeout_s: float,
        threaded: bool,
        post: Callable[[ev.Event], None] | None = None,
        snapshots: SnapshotPlace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`log`: the member's present copy of the journal, read under `lock`; `threaded`: whether a fetch may wait.

        `post`: takes what a job has to say before its end. `snapshots`: where the run's durable snapshots are.
        """
        self.post = post
        self.replica, self.store, self.transport = replica, store, transport
        self.log, self.lock, self.timeout_s, self.threaded = log, lock, timeout_s, threaded
        self.snapshots, self.clock = snapshots, clock
        self.ahead = DigestsAhead()
        self.staged: dict[tuple[int, str], list[StateChunk]] = {}  # by fragment and chain

    def do(self, command: ev.Command) -> ev.Event | None:
        """Carry out a command that is a job; other commands are nobody's mistake but ours."""
        match command:
            case ev.FetchPieces():
                return self.fetch_pieces(command)
            case ev.Knock():
                return self.knock(command)
            case ev.Reduce():
                return self.reduce(command)
            case ev.FetchResults():
                return self.fetch_results(command)
            case ev.ComputeNext():
                return self.compute_next(command)
            case ev.VerifyAnchor():
                return self.verify_anchor(command)
            case ev.LoadState():
                return self.load_state(command)
            case ev.FetchState():
                return self.fetch_state(command)
        raise AssertionError(f"{type(command).__name__} is no job")

    def _fetch(
        self,
        address: str,
        keys: Sequence[str],
        max_bytes: int,
        *,
        give_up: Callable[[], bool] | None = None,
        urgent: bool = False,
        on_blob: Callable[[Blob], None] | None = None,
    ) -> list[Blob]:
        """Blobs, checked against the digests that come with them.

        `give_up`: the peer may wait for what it does not have yet, until this is true."""
        wait_s = self.timeout_s if give_up is not None and self.threaded else 0.0
        blobs = self.transport.fetch(
            address, keys, timeout_s=self.timeout_s + wait_s, wait_s=wait_s, give_up=give_up, max_bytes=max_bytes,
            urgent=urgent, on_blob=on_blob,
        )  # fmt: skip
        return blobs

    def _chunk_bytes(self, fragment: int, num_chunks: int) -> int:
        spec = self.replica.specs[fragment]
        return num_chunks * (4 * spec.chunk_values + 4096)

    def fetch_pieces(self, c: ev.FetchPieces) -> ev.Event:
        """Pull chunks of an offer, checked against what it announced; they are told of as they come.

        What is reduced meanwhile fills the other direction of the link: a member that has all pieces before it begins
        leaves the others' downlinks idle for as long.
        """
        offer = OfferId(member=c.offer_by, seq=c.offer.seq)
        keys = {piece_key(c.fragment, offer, chunk): chunk for chunk in c.chunks}
        here = Pieces(sum_bytes=PIECES_AT_ONCE_BYTES)

        def arrived(blob: Blob) -> None:
            chunk = keys[blob.key]
            if blob.digest != c.offer.chunk_digests[chunk]:
                here.wrong.append(chunk)
                return
            several = here.add(
                chunk, blob.data.nbytes, lambda: self.store.put(blob.key, blob.data, digest_hex=blob.digest)
            )
            if several and self.post is not None:
                self.post(ev.PiecesFetched(fragment=c.fragment, offer=offer, chunks=several))

        try:
            self._fetch(c.address, list(keys), self._chunk_bytes(c.fragment, len(keys)), urgent=True, on_blob=arrived)
        except TransportError as error:
            self._drop_untold(c.fragment, offer, here)
            rest = tuple(chunk for chunk in c.chunks if chunk not in here.told)
            return ev.PiecesFailed(fragment=c.fragment, offer=offer, chunks=rest, why=str(error))
        if here.wrong:
            self._drop_untold(c.fragment, offer, here)
            why = f"chunk {here.wrong[0]} is not what was announced"
            return ev.PieceRejected(fragment=c.fragment, offer=offer, why=why)
        rest = tuple(chunk for chunk in c.chunks if chunk not in here.told)
        return ev.PiecesFetched(fragment=c.fragment, offer=offer, chunks=rest)

    def knock(self, c: ev.Knock) -> ev.Event:
        """Ask a member for what nobody has: that it says so is an answer."""
        try:
            self.transport.fetch(c.address, ["knock"], timeout_s=min(KNOCK_TIMEOUT_S, self.timeout_s), max_bytes=0)
        except BlobMissing:
            return ev.Knocked(member=c.member, reached=True)
        except TransportError:
            return ev.Knocked(member=c.member, reached=False)
        raise AssertionError("somebody has what nobody makes")

    def _drop_untold(self, fragment: int, offer: OfferId, here: Pieces) -> None:
        """The machine forgets what it was told of; what it does not know of would stay for good."""
        self.store.discard_keys(piece_key(fragment, offer, chunk) for chunk in here.end())

    def reduce(self, c: ev.Reduce) -> ev.Event | None:
        """Reduce own chunks of the roster and publish the results, or measure its distances."""
        offers = {(m, o.seq): o for m, _, o in c.assign.offers}
        done: list[tuple[int, str]] = []
        measured: list[tuple[int, tuple[float, ...]]] = []
        room = Room(0 if c.assign.measures else self._chunk_bytes(c.assign.fragment, len(c.chunks)))
        part, history = self.replica.parts[c.assign.fragment], c.assign.recipe is not None and c.assign.recipe.history
        for chunk in c.chunks:
            if history and part.chain != c.assign.base.chain:  # superseded meanwhile
                return None
            pieces: list[Piece] = []
            for entry in c.assign.roster:
                data = self.store.get(piece_key(c.assign.fragment, entry.offer, chunk))
                if data is None:  # superseded meanwhile
                    return None
                sumsq = offers[entry.offer.member, entry.seq].sumsq[chunk]
                samples = entry.upto - entry.since
                pieces.append(
                    Piece(payload=_tensor(data), coefficient=entry.coefficient, sumsq=sumsq, num_samples=samples)
                )
            recipe = c.assign.recipe
            try:
                if recipe is not None and c.assign.measures:
                    measured.append((chunk, self.replica.measure(c.assign.fragment, chunk, pieces, recipe)))
                    continue
                payload = self.replica.reduce(c.assign.fragment, chunk, pieces, n=c.assign.base.n, recipe=recipe)
            except BadPiece as error:
                offer = c.assign.roster[error.args[1]].offer
                return ev.PieceRejected(fragment=c.assign.fragment, offer=offer, why=f"chunk {chunk}: {error.args[0]}")
            data = room.keep(as_bytes(payload))
            digest_hex = digest(data)
            self._publish_result(c.assign.fragment, c.assign.roster_digest, chunk, data, digest_hex)
            done.append((chunk, digest_hex))
            self._look_ahead(c.assign, chunk, payload, digest_hex)
        if c.assign.measures:
            return ev.ChunksMeasured(
                fragment=c.assign.fragment, roster_digest=c.assign.roster_digest, chunks=tuple(measured)
            )
        return ev.ChunksReduced(fragment=c.assign.fragment, roster_digest=c.assign.roster_digest, chunks=tuple(done))

    def _look_ahead(self, assign: msg.Assign, chunk: int, payload: Tensor, digest_hex: str) -> None:
        """Step and hash a chunk while the others are on the way; with gradients a step needs the whole result."""
        replica, f = self.replica, assign.fragment
        if not self.threaded or replica.strategy.contribution == "gradient":
            return
        with replica.lock:
            if replica.parts[f].chain == assign.base.chain:
                digests = replica.next_chunk_digests(f, chunk, payload, base_samples=assign.base_samples)
                self.ahead.put(f, self._base(assign), chunk, digest_hex, digests)

    def _base(self, assign: msg.Assign) -> Base:
        samples = assign.base_samples
        outer = self.replica.outer_of(assign.fragment, assign.base.n, samples)
        return Base(chain=assign.base.chain, outer=outer, base_samples=samples)

    def _publish_result(
        self, fragment: int, roster: str, chunk: int, data: np.ndarray[Any, Any], digest_hex: str
    ) -> None:
        self.store.put(content_key(fragment, digest_hex), data, digest_hex=digest_hex)
        self.store.put(name_key(fragment, roster, chunk), data, digest_hex=digest_hex)

    def fetch_results(self, c: ev.FetchResults) -> ev.Event:
        """Pull result chunks, by name while they are being made, else by content."""
        if c.digests:
            keys = [content_key(c.fragment, digest_hex) for digest_hex in c.digests]
        else:
            keys = [name_key(c.fragment, c.roster_digest, chunk) for chunk in c.chunks]
        chunk_of = dict(zip(keys, c.chunks, strict=True))
        malformed: list[str] = []

        def arrived(blob: Blob) -> None:
            try:
                if c.assign is not None:
                    self._look_ahead(c.assign, chunk_of[blob.key], torch.from_numpy(blob.data), blob.digest)
            except PayloadError as error:
                malformed.append(f"chunk {chunk_of[blob.key]} is malformed: {error}")

        try:
            give_up = None if c.digests else lambda: self._is_committed(c.fragment, c.n)
            num_bytes = self._chunk_bytes(c.fragment, len(keys))
            blobs = self._fetch(c.address, keys, num_bytes, give_up=give_up, on_blob=arrived)
        except TransportError as error:
            return ev.ResultsFailed(fragment=c.fragment, chunks=c.chunks, address=c.address, why=str(error))
        if malformed:
            return ev.ResultsFailed(fragment=c.fragment, chunks=c.chunks, address=c.address, why=malformed[0])
        done: list[tuple[int, str]] = []
        for place, (chunk, blob) in enumerate(zip(c.chunks, blobs, strict=True)):
            if c.digests and blob.digest != c.digests[place]:
                why = "the content is not what its name says"
                return ev.ResultsFailed(fragment=c.fragment, chunks=c.chunks, address=c.address, why=why)
            self._publish_result(c.fragment, c.roster_digest, chunk, blob.data, blob.digest)
            done.append((chunk, blob.digest))
        return ev.ResultsFetched(fragment=c.fragment, chunks=tuple(done))

    def _is_committed(self, fragment: int, n: int) -> bool:
        """Then it is fetched by its content, from whoever holds it; its name may be forgotten where it was made."""
        with self.lock:
            return self.log().head(fragment) >= n

    def payloads(self, fragment: int, digests: Sequence[str]) -> Payloads | None:
        """Result payloads by content, or None if one is not here."""
        out: list[memoryview] = []
        for digest_hex in digests:
            data = self.store.get(content_key(fragment, digest_hex))
            if data is None:
                return None
            out.append(data)
        return Payloads(out)

    def compute_next(self, c: ev.ComputeNext) -> ev.Event | None:
        """Digest of the next version under a complete result."""
        payloads = self.payloads(c.assign.fragment, c.chunk_digests)
        with self.replica.lock:
            if payloads is None or self.replica.parts[c.assign.fragment].chain != c.assign.base.chain:
                return None
            known = self.ahead.take(c.assign.fragment, self._base(c.assign), c.chunk_digests)
            digest_hex = self.replica.next_digest(
                c.assign.fragment, payloads, base_samples=c.assign.base_samples, known=known
            )
        return ev.NextComputed(
            fragment=c.assign.fragment, exchange=c.assign.exchange, attempt=c.assign.attempt, digest=digest_hex
        )

    def verify_anchor(self, c: ev.VerifyAnchor) -> ev.Event | None:
        """Hash the present version against its sealed digest."""
        with self.replica.lock:
            if self.replica.parts[c.fragment].chain != c.chain:
                return None
            intact = self.replica.digest(c.fragment) == c.digest
        return ev.AnchorVerified(fragment=c.fragment, intact=intact, exchange=c.exchange, attempt=c.attempt)

    def fetch_state(self, c: ev.FetchState) -> ev.Event:
        """Fetch a whole state; it is staged for the training thread."""
        try:
            chunks = fetch_state(self, c.fragment, c.donors)
        except TransportError as error:
            mismatch = isinstance(error, UnverifiedState)
            return ev.StateFailed(fragment=c.fragment, why=str(error), mismatch=mismatch)
        return self._stage(c.fragment, chunks)

    def load_state(self, c: ev.LoadState) -> ev.Event:
        """Load a state from the newest snapshot of the journal's history; it is staged like a fetched one."""
        try:
            return self._stage(c.fragment, self._load_state(c.fragment))
        except SnapshotError as error:
            return ev.StateFailed(fragment=c.fragment, why=str(error), from_disk=True)

    def _load_state(self, fragment: int) -> list[StateChunk]:
        if self.snapshots is None:
            raise SnapshotError("this process knows no place of snapshots")
        with self.lock:
            log = self.log()
            path = newest_on_path(self.snapshots, log)
        if path is None:
            raise SnapshotError(f"{self.snapshots} holds no snapshot of this run's history")
        chunks = load_chunks(path, fragment, self.replica.specs[fragment])
        if Replica.digest_of_chunks(chunks) != log.digest(fragment, chunks[0].n):
            raise SnapshotError(f"{path} is not what the journal sealed as version {chunks[0].n}")
        return chunks

    def _stage(self, fragment: int, chunks: list[StateChunk]) -> ev.Event:
        self.staged[fragment, chunks[0].chain] = chunks
        return ev.StateStaged(fragment=fragment, n=chunks[0].n, chain=chunks[0].chain)


def _tensor(data: memoryview) -> Tensor:
    """A stored blob as a tensor over the same memory, which nobody may write to: it is served to others.

    torch knows no read-only memory, so numpy is told that this is writable. A copy of each piece and each result, as
    long as the model, took a third of the time of an exchange.
    """
    if data.nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    address = np.frombuffer(data, dtype=np.uint8).ctypes.data
    memory = (ctypes.c_uint8 * data.nbytes).from_address(address)
    memory.owner = data  # type: ignore[attr-defined]  # lives as long as the tensor
    return torch.from_numpy(np.frombuffer(memory, dtype=np.uint8))
