"""Why a transfer failed. Every message names the peer, the key, the cause and the remedy; every error can be pickled.

These are not `ValueError`s: none of them is the user's mistake in a setting. A fetch that raises one has changed
nothing: what arrived so far is dropped, the peer keeps what it serves, and the same fetch may be made again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar


class TransportError(Exception):
    """A transfer from ``peer`` (an address) failed; ``key`` is the blob concerned, "" where it concerns all."""

    remedy: ClassVar[str] = "try again"

    def __init__(self, *, peer: str, key: str = "", cause: str) -> None:
        super().__init__(peer, key, cause)
        self.peer = peer
        self.key = key
        self.cause = cause

    def __str__(self) -> str:
        """One line: what, from whom, why, and what to do."""
        what = f"blob {self.key!r} from {self.peer}" if self.key else f"fetch from {self.peer}"
        return f"{type(self).__name__}: {what}: {self.cause}. Remedy: {self.remedy}."

    def __reduce__(self) -> tuple[Callable[..., TransportError], tuple[object, ...]]:
        """Rebuild from the keyword arguments, so that the error survives an actor call."""
        return _rebuild, (type(self), {"peer": self.peer, "key": self.key, "cause": self.cause})


class PeerUnreachable(TransportError):
    """Nobody answers at the address, or the connection broke."""

    remedy = "fetch from another holder, or again once the peer is back; if it never was reachable, check its firewall"


class TransportTimeout(TransportError):
    """The peer lives, but the fetch did not end within its ``timeout_s``."""

    remedy = "fetch from another holder, or allow more time if the link is slow"


class Cancelled(TransportError):
    """The fetch was cancelled by its token, or its transport was stopped."""

    remedy = "none needed if this was meant; else look for who cancelled it"


class Unauthorized(TransportError):
    """The peer refused the token of this run."""

    remedy = "check that both members belong to the same run; a member that was left behind must join again"


class BlobMissing(TransportError):
    """The peer does not have the blob (``keys``: all that were missing), not even after waiting ``wait_s``."""

    remedy = "fetch from another holder, or wait longer if it is still being made"

    def __init__(self, *, peer: str, keys: tuple[str, ...], cause: str) -> None:
        super().__init__(peer=peer, key=keys[0] if keys else "", cause=cause)
        self.keys = keys

    def __reduce__(self) -> tuple[Callable[..., TransportError], tuple[object, ...]]:
        """Rebuild from the keyword arguments, so that the error survives an actor call."""
        return _rebuild, (type(self), {"peer": self.peer, "keys": self.keys, "cause": self.cause})


class BlobCorrupt(TransportError):
    """What arrived is not what the peer said it would send: cut short, or with another digest."""

    remedy = (
        "fetch from another holder; if it happens again with the same peer, exclude it and check its memory and link"
    )


class BadMessage(BlobCorrupt):
    """The peer sent something that is no message of this protocol."""

    remedy = "check that the peer runs the same version of Atoll; exclude it if it does"


class BlobTooLarge(TransportError):
    """The peer wants to send more than ``max_bytes``, or more than it announced; it was stopped there."""

    remedy = "do not trust this peer's sizes; if the blob is meant to be that large, raise max_bytes"


def _rebuild(kind: Callable[..., TransportError], arguments: dict[str, object]) -> TransportError:
    return kind(**arguments)
