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
from workers.transport.base import MAX_KEYS
from workers.transport.errors import BlobMissing, TransportError

if TYPE_CHECKING:
    from workers.jobs import Jobs

Donor = tuple[str, str]
MAX_ROUNDS = 6
FIRST_GROUP_BYTES = 1 << 20
GROUP_S = 2.0


class NoState(TransportError):
    """No donor could give a whole, verified state."""


class UnverifiedState(NoState):
    """What the donors gave is not what the journal sealed: one of them has another state without knowing it."""


def deal(chunks: Sequence[int], donors: Sequence[Donor]) -> dict[Donor, list[int]]:
    """Chunks to donors, round robin."""
    out: dict[Donor, list[int]] = {}
    for place, chunk in enumerate(chunks):
        out.setdefault(donors[place % len(donors)], []).append(chunk)
    return out


def fetch_state(jobs: Jobs, fragment: int, donors: Sequence[Donor]) -> list[StateChunk]:
    """The newest state of a fragment that the donors have; raises `NoState` or another `TransportError`."""
    replica = jobs.replica
    num_chunks = replica.specs[fragment].num_chunks
    held: dict[int, StateChunk] = {}
    good = list(donors)
    mismatch = False
    for turn in range(MAX_ROUNDS):
        missing = [chunk for chunk in range(num_chunks) if chunk not in held]
        if missing:
            good = _fetch_round(jobs, fragment, missing, good, held) or list(donors)
            missing = [chunk for chunk in range(num_chunks) if chunk not in held]
        if missing:
            continue
        target = max(chunk.n for chunk in held.values())
        for chunk in sorted(held):
            brought = _bring_forward(jobs, fragment, chunk, held[chunk], target, good)
            if brought is None:
                del held[chunk]
            else:
                held[chunk] = brought
        if len(held) < num_chunks:
            continue
        chunks = [held[chunk] for chunk in range(num_chunks)]
        with jobs.lock:
            sealed = jobs.log().digest(fragment, target)
        if sealed is not None and Replica.digest_of_chunks(chunks) == sealed:
            return chunks
        mismatch = mismatch or sealed is not None
        held, good = {}, [donors[turn % len(donors)]]  # one of them lies: all from one, each in turn
    names = ", ".join(name for name, _ in donors)
    error = UnverifiedState if mismatch else NoState
    raise error(peer=names, key=f"state/{fragment}", cause="no whole, verified state after several rounds")


def _fetch_round(
    jobs: Jobs, fragment: int, missing: Sequence[int], donors: Sequence[Donor], held: dict[int, StateChunk]
) -> list[Donor]:
    """One try from all donors at once; returns those who delivered."""
    tasks = list(deal(missing, donors).items())
    if not jobs.threaded or len(tasks) == 1:
        results = [_from_donor(jobs, fragment, donor, chunks, len(tasks)) for donor, chunks in tasks]
    else:
        with ThreadPoolExecutor(max_workers=len(tasks), thread_name_prefix="state") as pool:
            results = list(pool.map(lambda task: _from_donor(jobs, fragment, *task, len(tasks)), tasks))
    good: list[Donor] = []
    for (donor, chunks), result in zip(tasks, results, strict=True):
        held.update(zip(chunks, result, strict=False))
        if len(result) == len(chunks):
            good.append(donor)
    return good + [donor for donor in donors if donor not in dict(tasks)]


def _from_donor(jobs: Jobs, fragment: int, donor: Donor, chunks: Sequence[int], num_donors: int) -> list[StateChunk]:
    """What a donor gives of these chunks, in their order: all, or those before it failed.

    They are asked for in groups that take a few seconds each, so that the time limit of a call says how long a donor
    may be silent, and not how large a state may be on a slow link; and in the background (`workers.transport.pacing`).
    """
    spec = jobs.replica.specs[fragment]
    chunk_bytes = 4 * (1 + jobs.replica.strategy.num_states) * spec.chunk_values + 8192
    held: list[StateChunk] = []
    num = max(FIRST_GROUP_BYTES // chunk_bytes, 1)
    try:
        while len(held) < len(chunks):
            group = chunks[len(held) : len(held) + num]
            keys = [f"state/{fragment}/{chunk}" for chunk in group]
            began_s = jobs.clock()
            blobs = jobs.transport.fetch(
                donor[1], keys, timeout_s=jobs.timeout_s, max_bytes=len(keys) * chunk_bytes, background=num_donors
            )
            held += [
                jobs.replica.parse_state(fragment, chunk, blob.data.data)
                for chunk, blob in zip(group, blobs, strict=True)
            ]
            seconds = jobs.clock() - began_s
            num = min(2 * num, MAX_KEYS) if seconds < GROUP_S else max(int(num * GROUP_S / seconds), 1)
    except (TransportError, BadPiece):
        pass  # who gave less than asked for loses the rest to the others
    return held


def _bring_forward(
    jobs: Jobs, fragment: int, chunk: int, state: StateChunk, target: int, donors: Sequence[Donor]
) -> StateChunk | None:
    while state.n < target:
        with jobs.lock:
            record = jobs.log().next(fragment, state.chain)
        if record is None:
            return None
        payloads = _results(jobs, fragment, record.chunk_digests, donors)
        if payloads is None:
            return None
        state = jobs.replica.step_chunk(
            fragment, chunk, state, payloads, n=record.n, chain=record.chain, base_samples=record.base_samples
        )
    return state


def _results(jobs: Jobs, fragment: int, digests: Sequence[str], donors: Sequence[Donor]) -> list[torch.Tensor] | None:
    """Result chunks of one version, from this member's store or any donor."""
    keys = [f"content/{fragment}/{digest_hex}" for digest_hex in digests]
    lacking = [(key, d) for key, d in zip(keys, digests, strict=True) if jobs.store.find(key) is None]
    if lacking:
        for _, address in donors:
            try:
                blobs = jobs.transport.fetch(
                    address,
                    [key for key, _ in lacking],
                    timeout_s=jobs.timeout_s,
                    max_bytes=len(lacking) * (4 * jobs.replica.specs[fragment].chunk_values + 4096),
                    background=1,
                )
            except (BlobMissing, TransportError):
                continue
            if all(blob.digest == wanted for blob, (_, wanted) in zip(blobs, lacking, strict=True)):
                for blob, (key, wanted) in zip(blobs, lacking, strict=True):
                    jobs.store.put(key, blob.data, digest_hex=wanted)
                break
        else:
            return None
    found = [jobs.store.get(key) for key in keys]
    if any(data is None for data in found):
        return None
    return [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in found if data is not None]
