"""The nearest of some names to one that was mistyped."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

SIMILAR_ENOUGH = 0.6


def nearest(name: str, choices: Sequence[str]) -> str | None:
    """The choice that looks most like a name, or None when none does."""
    matches = difflib.get_close_matches(name.lower(), choices, n=1, cutoff=SIMILAR_ENOUGH)
    return matches[0] if matches else None
