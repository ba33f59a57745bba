"""The one error of this package that a user can cause."""

from __future__ import annotations


class DataError(ValueError):
    """Text, a pack or a request that cannot be used; the message names the place, the cause and what to do."""
