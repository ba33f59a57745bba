"""Fetching a whole state from several donors at once (protocol 1.4, H10; algorithms.md 10).

Chunks are dealt to the donors; each comes with the version it had at its donor when it was read. Donors move on
meanwhile: chunks of an older version are brought forward with the kept results of the versions in between (the outer
step is elementwise). The whole is checked against the digest that the journal sealed. A donor that dies or lies loses
its chunks to the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from workers.replica import BadPiece, Replica, StateChunk
from workers.transport.errors import BlobMissing, TransportError

if TYPE_CHECKING:
    from workers.sync import IslandSync

Donor = tuple[str, str]
MAX_ROUNDS = 6


class NoState(TransportError):
    """No donor could give a whole, verified state."""


def deal(chunks: Sequence[int], donors: Sequence[Donor]) -> dict[Donor, list[int]]:
    """Chunks to donors, round robin."""
    out: dict[Donor, list[int]] = {}
    for place, chunk in enumerate(chunks):
        out.setdefault(donors[place % len(donors)], []).append(chunk)
    return out


def fetch_state(sync: IslandSync, fragment: int, donors: Sequence[Donor]) -> list[StateChunk]:
    """The newest state of a fragment that the donors have; raises `NoState` or another `TransportError`."""
    replica, log = sync.replica, sync.machine.log
    num_chunks = replica.specs[fragment].num_chunks
    held: dict[int, StateChunk] = {}
    good = list(donors)
    for _ in range(MAX_ROUNDS):
        missing = [chunk for chunk in range(num_chunks) if chunk not in held]
        if missing:
            good = _fetch_round(sync, fragment, missing, good, held) or list(donors)
            missing = [chunk for chunk in range(num_chunks) if chunk not in held]
        if missing:
            continue
        target = max(chunk.n for chunk in held.values())
        for chunk in sorted(held):
            brought = _bring_forward(sync, fragment, chunk, held[chunk], target, good)
            if brought is None:
                del held[chunk]
            else:
                held[chunk] = brought
        if len(held) < num_chunks:
            continue
        chunks = [held[chunk] for chunk in range(num_chunks)]
        with sync.changed:
            sealed = log.digest(fragment, target)
        if sealed is not None and Replica.digest_of_chunks(chunks) == sealed:
            return chunks
        held = {}
    raise NoState(f"fragment {fragment}: no whole state from {', '.join(name for name, _ in donors)}")


def _fetch_round(
    sync: IslandSync, fragment: int, missing: Sequence[int], donors: Sequence[Donor], held: dict[int, StateChunk]
) -> list[Donor]:
    """One try from all donors at once; returns those who delivered."""
    jobs = list(deal(missing, donors).items())
    if sync.executor is None or len(jobs) == 1:
        results = [_from_donor(sync, fragment, donor, chunks) for donor, chunks in jobs]
    else:
        with ThreadPoolExecutor(max_workers=len(jobs), thread_name_prefix="state") as pool:
            results = list(pool.map(lambda job: _from_donor(sync, fragment, *job), jobs))
    good: list[Donor] = []
    for (donor, chunks), result in zip(jobs, results, strict=True):
        if result is not None:
            good.append(donor)
            held.update(zip(chunks, result, strict=True))
    return good + [donor for donor in donors if donor not in dict(jobs)]


def _from_donor(sync: IslandSync, fragment: int, donor: Donor, chunks: Sequence[int]) -> list[StateChunk] | None:
    spec = sync.replica.specs[fragment]
    vectors = 1 + sync.replica.strategy.num_states
    keys = [f"state/{fragment}/{chunk}" for chunk in chunks]
    max_bytes = len(keys) * (4 * vectors * spec.chunk_values + 8192)
    try:
        blobs = sync.transport.fetch(donor[1], keys, timeout_s=sync.settings.timeout_s, max_bytes=max_bytes)
        return [
            sync.replica.parse_state(fragment, chunk, memoryview(blob.data))
            for chunk, blob in zip(chunks, blobs, strict=True)
        ]
    except (TransportError, BadPiece):
        return None


def _bring_forward(
    sync: IslandSync, fragment: int, chunk: int, state: StateChunk, target: int, donors: Sequence[Donor]
) -> StateChunk | None:
    while state.n < target:
        with sync.changed:
            record = sync.machine.log.next(fragment, state.chain)
        if record is None:
            return None
        payloads = _results(sync, fragment, record.chunk_digests, donors)
        if payloads is None:
            return None
        state = sync.replica.step_chunk(
            fragment, chunk, state, payloads, n=record.n, chain=record.chain, base_samples=record.base_samples
        )
    return state


def _results(
    sync: IslandSync, fragment: int, digests: Sequence[str], donors: Sequence[Donor]
) -> list[torch.Tensor] | None:
    """Result chunks of one version, from this member's store or any donor."""
    keys = [f"content/{fragment}/{digest_hex}" for digest_hex in digests]
    lacking = [(key, d) for key, d in zip(keys, digests, strict=True) if sync.store.find(key) is None]
    if lacking:
        for _, address in donors:
            try:
                blobs = sync.transport.fetch(
                    address, [key for key, _ in lacking], timeout_s=sync.settings.timeout_s,
                    max_bytes=len(lacking) * (4 * sync.replica.specs[fragment].chunk_values + 4096),
                )  # fmt: skip
            except (BlobMissing, TransportError):
                continue
            if all(blob.digest == wanted for blob, (_, wanted) in zip(blobs, lacking, strict=True)):
                for blob, (key, wanted) in zip(blobs, lacking, strict=True):
                    sync.store.put(key, blob.data, digest_hex=wanted)
                break
        else:
            return None
    found = [sync.store.get(key) for key in keys]
    if any(data is None for data in found):
        return None
    return [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in found if data is not None]
