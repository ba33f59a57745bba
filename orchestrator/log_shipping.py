"""Logs of islands on machines that do not share the run's directory: copied to it as they grow, with a bound.

The controller asks each such island for what its log has beyond what was copied. What was written in the last moment
before a process died may be missing; what it had said until then is here.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

EVERY_S = 1.0
PIECE_BYTES = 256 * 1024
LIMIT_BYTES = 16 * 1024 * 1024
CUT = b"\n... this log is longer than %d bytes: the rest stays on its machine ...\n"

log = logging.getLogger("atoll.controller")

Read = Callable[[int, int], Awaitable[bytes]]


@dataclass(kw_only=True, slots=True)
class LogCopy:
    """The copy of one log. `read(offset, num_bytes)` gives what the original has there."""

    path: Path
    read: Read
    limit_bytes: int = LIMIT_BYTES
    piece_bytes: int = PIECE_BYTES
    full: bool = False

    async def grow(self) -> int:
        """Copy what is new; returns the number of bytes. After `limit_bytes` nothing more is copied."""
        added = 0
        while not self.full:
            offset = self.path.stat().st_size if self.path.exists() else 0
            room = min(self.piece_bytes, self.limit_bytes - offset)
            data = await self.read(offset, room) if room > 0 else b""
            if room <= 0:
                data, self.full = CUT % self.limit_bytes, True
            if not data:
                break
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(data)
            added += len(data)
        return added


def read_piece(path: Path, offset: int, num_bytes: int) -> bytes:
    """What a log has at an offset."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(num_bytes)
