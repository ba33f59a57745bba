"""Digests of the next version, chunk by chunk, made while the rest of its result is still on the way.

A holder says `Have` with the digest of the whole next version. What an owner has reduced itself it can step and hash at
once, while the results of the others fill the link; what is left to do when the last of them comes is theirs alone.
Nothing here is trusted longer than it is true: an entry is of one anchor, one result chunk and one progress.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from strategies.outer import OuterStep


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """What the digests of the next version follow from, besides the result: the anchor, the outer step, progress."""

    chain: str
    outer: OuterStep
    base_samples: int


class DigestsAhead:
    """Of each fragment the chunks that are known for its newest base. Thread-safe."""

    def __init__(self) -> None:
        """Nothing is known."""
        self._lock = threading.Lock()
        self._known: dict[int, tuple[Base, dict[int, tuple[str, tuple[str, ...]]]]] = {}

    def put(self, fragment: int, base: Base, chunk: int, result: str, digests: Sequence[str]) -> None:
        """Under the result chunk with digest `result` the next version of this chunk has `digests`."""
        with self._lock:
            at, chunks = self._known.get(fragment, (base, {}))
            if at != base:
                chunks = {}
            chunks[chunk] = (result, tuple(digests))
            self._known[fragment] = (base, chunks)

    def take(self, fragment: int, base: Base, results: Sequence[str]) -> dict[int, tuple[str, ...]]:
        """What is known under these result chunks, and forget it: `{chunk: digests}`."""
        with self._lock:
            at, chunks = self._known.pop(fragment, (base, {}))
        if at != base:
            return {}
        return {chunk: digests for chunk, (result, digests) in chunks.items() if results[chunk] == result}
