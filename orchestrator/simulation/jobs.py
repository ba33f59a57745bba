"""The work of one process that takes time, in symbols: the counterpart of `workers/jobs.py`.

A job is a generator: it yields what it waits for (a `Fetch` from another process, or some `Busy` seconds) and returns
the event that the machine is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestrator.simulation.requests import Fetch, FetchFailed, Job, busy, found
from orchestrator.simulation.state_fetch import fetch_state as fetch_whole_state
from orchestrator.simulation.symbols import BadPiece, Payload, StateChunk
from workers import member_events as ev
from workers.records import OfferId

if TYPE_CHECKING:
    from orchestrator.simulation.island import Island


def build_genesis(island: Island) -> Job:
    """Version 0."""
    yield busy(island)
    digests = island.replica.make_genesis("genesis", island.first_nonce)
    return ev.GenesisBuilt(digests=digests, num_params=sum(island.replica.num_chunks))


def fetch_pieces(island: Island, c: ev.FetchPieces) -> Job:
    """Chunks of an offer, from its contributor."""
    offer = OfferId(member=c.offer_by, seq=c.offer.seq)
    group = f"piece/{c.fragment}/{offer}"

    def look(server: Island) -> list[Payload] | None:
        return found(server.store.get(group, chunk) for chunk in c.chunks)

    try:
        payloads = yield Fetch(c.address, look)
    except FetchFailed as error:
        return ev.PiecesFailed(fragment=c.fragment, offer=offer, chunks=c.chunks, why=str(error))
    for chunk, payload in zip(c.chunks, payloads, strict=True):
        if payload.digest != c.offer.chunk_digests[chunk]:
            return ev.PieceRejected(fragment=c.fragment, offer=offer, why=f"chunk {chunk} is not what was announced")
        island.store.put(group, chunk, payload)
    return ev.PiecesFetched(fragment=c.fragment, offer=offer, chunks=c.chunks)


def knock(island: Island, c: ev.Knock) -> Job:
    """Whether a process answers."""

    def look(server: Island) -> list[Payload]:
        return []

    try:
        yield Fetch(c.address, look)
    except FetchFailed:
        return ev.Knocked(member=c.member, reached=False)
    return ev.Knocked(member=c.member, reached=True)


def reduce(island: Island, c: ev.Reduce) -> Job:
    """Reduce chunks under a roster, and publish."""
    yield busy(island)
    done: list[tuple[int, str]] = []
    measured: list[tuple[int, tuple[float, ...]]] = []
    fragment, recipe = c.assign.fragment, c.assign.recipe
    bits = -island.cluster.rng.randrange(1, 1 << 30) if island.distorts else island.device
    if island.distorts and island.machine.incarnation is not None:
        island.cluster.liars.add(island.machine.id)
    if recipe is not None and recipe.history and island.machine.fragments[fragment].version != c.assign.base:
        return None  # superseded meanwhile
    for chunk in c.chunks:
        pieces: list[tuple[Payload, float]] = []
        for entry in c.assign.roster:
            payload = island.store.get(f"piece/{fragment}/{entry.offer}", chunk)
            if payload is None:  # superseded meanwhile
                return None
            pieces.append((payload, entry.coefficient))
        if recipe is not None and c.assign.measures:
            num = len(recipe.rows) + bool(recipe.center)
            measured.append((chunk, (1.0,) * (num * (num - 1) // 2)))
            continue
        try:
            result = island.replica.reduce(fragment, chunk, pieces, bits, c.assign.base.n)
            if island.distorts:
                island.cluster.distorted.add(result.digest)
        except BadPiece as error:
            offer = c.assign.roster[error.args[1]].offer
            return ev.PieceRejected(fragment=fragment, offer=offer, why=f"chunk {chunk}: {error.args[0]}")
        publish_result(island, fragment, c.assign.roster_digest, chunk, result)
        done.append((chunk, result.digest))
    if c.assign.measures:
        return ev.ChunksMeasured(fragment=fragment, roster_digest=c.assign.roster_digest, chunks=tuple(measured))
    return ev.ChunksReduced(fragment=fragment, roster_digest=c.assign.roster_digest, chunks=tuple(done))


def publish_result(island: Island, fragment: int, roster: str, chunk: int, payload: Payload) -> None:
    """Serve a result chunk by name and by content; who waits for it gets it."""
    island.store.content[fragment, payload.digest] = payload  # and looked at after `put`
    island.store.put(f"result/{fragment}/{roster}", chunk, payload)
    if island.parked:
        island.cluster.look_again(island)


def fetch_results(island: Island, c: ev.FetchResults) -> Job:
    """Result chunks from one process."""
    group = f"result/{c.fragment}/{c.roster_digest}"

    def look(server: Island) -> list[Payload] | None:
        if c.digests:
            return found(server.store.content.get((c.fragment, digest)) for digest in c.digests)
        return found(server.store.get(group, chunk) for chunk in c.chunks)

    try:
        payloads = yield Fetch(c.address, look, 0.0 if c.digests else island.cluster.scenario.timeout_s)
    except FetchFailed as error:
        return ev.ResultsFailed(fragment=c.fragment, chunks=c.chunks, address=c.address, why=str(error))
    for chunk, payload in zip(c.chunks, payloads, strict=True):
        publish_result(island, c.fragment, c.roster_digest, chunk, payload)
    return ev.ResultsFetched(
        fragment=c.fragment, chunks=tuple((chunk, p.digest) for chunk, p in zip(c.chunks, payloads, strict=True))
    )


def stored_results(island: Island, fragment: int, digests: Sequence[str]) -> list[Payload] | None:
    """Result chunks that are here, or None."""
    return found(island.store.content.get((fragment, digest)) for digest in digests)


def compute_next(island: Island, c: ev.ComputeNext) -> Job:
    """Digest of the next version."""
    yield busy(island)
    payloads = stored_results(island, c.assign.fragment, c.chunk_digests)
    if payloads is None or island.replica.parts[c.assign.fragment].chain != c.assign.base.chain:
        return None
    digest = island.replica.next_digest(c.assign.fragment, payloads)
    return ev.NextComputed(
        fragment=c.assign.fragment, exchange=c.assign.exchange, attempt=c.assign.attempt, digest=digest
    )


def verify_anchor(island: Island, c: ev.VerifyAnchor) -> Job:
    """Compare the present version with what was sealed."""
    yield busy(island)
    if island.replica.parts[c.fragment].chain != c.chain:
        return None
    intact = island.replica.digest(c.fragment) == c.digest
    return ev.AnchorVerified(fragment=c.fragment, intact=intact, exchange=c.exchange, attempt=c.attempt)


def fetch_state(island: Island, c: ev.FetchState) -> Job:
    """A whole state from donors."""
    try:
        chunks = yield from fetch_whole_state(island, c.fragment, c.donors)
    except FetchFailed as error:
        return ev.StateFailed(fragment=c.fragment, why=str(error), mismatch=error.mismatch)
    island.cluster.counts["states fetched"] += 1
    return stage(island, c.fragment, chunks)


def load_state(island: Island, c: ev.LoadState) -> Job:
    """A whole state from the newest snapshot."""
    yield busy(island)
    snapshot = island.cluster.snapshots.newest_on_path(island.machine.log)
    if snapshot is None:
        return ev.StateFailed(fragment=c.fragment, why="there is no snapshot", from_disk=True)
    chunks = snapshot[c.fragment]
    if island.replica.digest_of_chunks(c.fragment, chunks) != island.machine.log.digest(c.fragment, chunks[0].n):
        return ev.StateFailed(fragment=c.fragment, why="it is not what the journal sealed", from_disk=True)
    island.cluster.counts["states loaded"] += 1
    return stage(island, c.fragment, chunks)


def stage(island: Island, fragment: int, chunks: list[StateChunk]) -> ev.Event:
    """Keep a state for the training thread."""
    island.staged_chunks[fragment, chunks[0].chain] = chunks
    return ev.StateStaged(fragment=fragment, n=chunks[0].n, chain=chunks[0].chain)
