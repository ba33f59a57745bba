"""What a member's shell is told of `[train]` and `[exchange]`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncSettings:
    """Times in seconds; see `[exchange]`."""

    batch_size: int
    timeout_s: float
    wait_s: float
    heartbeat_s: float
    bound_rounds: float
    total_samples: int
