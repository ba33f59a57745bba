"""What a check of several settings together finds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Two settings that do not fit: the key that is most likely wrong, what is wrong, what to do."""

    key: str
    message: str
    remedy: str
