"""Fetching a whole state from several donors, in symbols: the counterpart of `workers/state_fetch.py`."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.simulation.requests import Fetch, FetchFailed, found
from orchestrator.simulation.symbols import Payload, StateChunk

if TYPE_CHECKING:
    from orchestrator.simulation.island import Island

Donor = tuple[str, str]
MAX_ROUNDS = 6

Steps = Generator["Fetch", Any, Any]


def deal(chunks: Sequence[int], donors: Sequence[Donor]) -> dict[Donor, list[int]]:
    """Chunks to donors, round robin."""
    out: dict[Donor, list[int]] = {}
    for place, chunk in enumerate(chunks):
        out.setdefault(donors[place % len(donors)], []).append(chunk)
    return out


def fetch_state(island: Island, fragment: int, donors: Sequence[Donor]) -> Steps:
    """The newest state of a fragment that the donors have; raises `FetchFailed`."""
    replica, log = island.replica, island.machine.log
    num_chunks = replica.num_chunks[fragment]
    held: dict[int, StateChunk] = {}
    good = list(donors)
    mismatch = False
    for turn in range(MAX_ROUNDS):
        missing = [chunk for chunk in range(num_chunks) if chunk not in held]
        if missing:
            good = (yield from _fetch_round(island, fragment, missing, good, held)) or list(donors)
            missing = [chunk for chunk in range(num_chunks) if chunk not in held]
        if missing:
            continue
        target = max(chunk.n for chunk in held.values())
        for chunk in sorted(held):
            brought = yield from _bring_forward(island, fragment, chunk, held[chunk], target, good)
            if brought is None:
                del held[chunk]
            else:
                held[chunk] = brought
        if len(held) < num_chunks:
            continue
        chunks = [held[chunk] for chunk in range(num_chunks)]
        sealed = log.digest(fragment, target)
        if sealed is not None and replica.digest_of_chunks(fragment, chunks) == sealed:
            return chunks
        mismatch = mismatch or sealed is not None
        held, good = {}, [donors[turn % len(donors)]]  # one of them lies: all from one, each in turn
    names = ", ".join(name for name, _ in donors)
    raise FetchFailed(f"fragment {fragment}: no whole state from {names}", mismatch=mismatch)


def _fetch_round(
    island: Island, fragment: int, missing: Sequence[int], donors: Sequence[Donor], held: dict[int, StateChunk]
) -> Steps:
    good: list[Donor] = []
    jobs = deal(missing, donors)
    for donor, chunks in jobs.items():
        result = yield from _from_donor(fragment, donor, chunks)
        if result is not None:
            good.append(donor)
            held.update(zip(chunks, result, strict=True))
    return good + [donor for donor in donors if donor not in jobs]


def _from_donor(fragment: int, donor: Donor, chunks: Sequence[int]) -> Steps:
    found: list[StateChunk] = []
    for chunk in chunks:  # one by one: the donor may move on between two of them

        def look(server: Island, chunk: int = chunk) -> StateChunk | None:
            return server.replica.serve(fragment, chunk)

        try:
            found.append((yield Fetch(donor[1], look)))
        except FetchFailed:
            return None
    return found


def _bring_forward(
    island: Island, fragment: int, chunk: int, state: StateChunk, target: int, donors: Sequence[Donor]
) -> Steps:
    while state.n < target:
        record = island.machine.log.next(fragment, state.chain)
        if record is None:
            return None
        payloads = yield from _results(island, fragment, record.chunk_digests, donors)
        if payloads is None:
            return None
        state = island.replica.step_chunk(fragment, chunk, state, payloads, n=record.n, chain=record.chain)
    return state


def _results(island: Island, fragment: int, digests: Sequence[str], donors: Sequence[Donor]) -> Steps:
    content = island.store.content
    lacking = [(fragment, digest) for digest in digests if (fragment, digest) not in content]

    def look(server: Island) -> list[Payload] | None:
        return found(server.store.content.get(key) for key in lacking)

    if lacking:
        for _, address in donors:
            try:
                payloads = yield Fetch(address, look)
            except FetchFailed:
                continue
            content.update(zip(lacking, payloads, strict=True))
            break
        else:
            return None
    return found(content.get((fragment, digest)) for digest in digests)
