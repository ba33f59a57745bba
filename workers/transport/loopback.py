"""The transport of members that share a process: the rules of the real one without its sockets.

The bytes are copied, bounded and checked against their digest as if they had travelled, so that a fault injected by a
wrapped store or a wrapped transport has the effect that it would have on a network.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from workers.store import BlobSource, StoredBlob
from workers.transport.assembly import Assembly
from workers.transport.base import MAX_WAIT_S, Blob, CallSet, CancelToken, check_fetch
from workers.transport.errors import BlobMissing, Cancelled, PeerUnreachable, TransportTimeout
from workers.transport.link_meter import LinkReport
from workers.transport.wire import PieceHeader

SIGN_S = 1.0
"""How often a fetch that waits asks whether it should; as often as the real transport hears from its peer."""


class LoopbackNetwork:
    """Who can be reached by name in this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._members: dict[str, LoopbackTransport] = {}

    def attach(self, member: LoopbackTransport) -> None:
        """Make a member reachable at its address; raises ``ValueError`` where the address is taken."""
        with self._lock:
            if self._members.setdefault(member.address, member) is not member:
                raise ValueError(f"{member.address} is taken: two members of one network need different names")

    def detach(self, member: LoopbackTransport) -> None:
        """Make a member unreachable; nothing happens if it is already."""
        with self._lock:
            if self._members.get(member.address) is member:
                del self._members[member.address]

    def find(self, address: str) -> LoopbackTransport | None:
        """Return the member at ``address``, if it runs."""
        with self._lock:
            return self._members.get(address)


class LoopbackTransport:
    """A `workers.transport.base.Transport` on a `LoopbackNetwork`."""

    def __init__(self, network: LoopbackNetwork, name: str, store: BlobSource) -> None:
        self._network = network
        self._address = f"loopback://{name}"
        self._store = store
        self._calls = CallSet()
        self._serving = False
        self._count_lock = threading.Lock()
        self._bytes_sent = 0
        self._bytes_received = 0

    @property
    def address(self) -> str:
        """Where others reach this member."""
        return self._address

    @property
    def bytes_sent(self) -> int:
        """Payload bytes served since the start."""
        return self._bytes_sent

    @property
    def bytes_received(self) -> int:
        """Payload bytes that arrived since the start, refused ones included."""
        return self._bytes_received

    def start(self) -> None:
        """Begin to serve; may be called again after `stop`."""
        self._network.attach(self)
        self._serving = True
        self._calls.open()

    def stop(self) -> None:
        """End serving (waiting peers get `PeerUnreachable`) and own fetches (`Cancelled`)."""
        self._serving = False
        self._network.detach(self)
        self._calls.close("this transport was stopped")
        self._store.interrupt()

    def fetch(
        self,
        address: str,
        keys: Sequence[str],
        *,
        timeout_s: float,
        wait_s: float = 0.0,
        give_up: Callable[[], bool] | None = None,
        max_bytes: int,
        cancel: CancelToken | None = None,
        background: int = 0,
        urgent: bool = False,
        on_blob: Callable[[Blob], None] | None = None,
    ) -> list[Blob]:
        """See `workers.transport.base.Transport.fetch`; there is no link here that could be filled."""
        del background, urgent
        check_fetch(keys, timeout_s=timeout_s, wait_s=wait_s, max_bytes=max_bytes)
        started = time.monotonic()
        with self._calls.call(address, cancel) as call:
            peer = self._network.find(address)
            if peer is None:
                raise PeerUnreachable(peer=address, cause="nobody serves at this address in this process")
            until = started + min(wait_s, MAX_WAIT_S)
            peer.await_keys(keys, call, wait_until=until, deadline=started + timeout_s, give_up=give_up)
            assembly = Assembly(peer=address, keys=keys, num_streams=1, max_bytes=max_bytes, on_blob=on_blob)
            for number, blob in enumerate(peer.read(keys)):
                size = blob.data.nbytes
                header = PieceHeader(key=number, length=size, digest=blob.digest, offset=0, size=size)
                assembly.open(header, stream=0).write(np.frombuffer(blob.data, dtype=np.uint8))
                with self._count_lock:
                    self._bytes_received += size
            return assembly.blobs()

    def forget(self, address: str) -> None:
        """Nothing to drop here: there are no connections."""

    def take_links(self) -> tuple[LinkReport, ...]:
        """Nothing is measured inside one process."""
        return ()

    def await_keys(
        self,
        keys: Sequence[str],
        call: CancelToken,
        *,
        wait_until: float,
        deadline: float,
        give_up: Callable[[], bool] | None = None,
    ) -> None:
        """Called by a fetching peer: return once all keys are in this member's store, or raise why not."""
        unhook = call.on_cancel(self._store.interrupt)
        try:
            for key in keys:
                here = False
                while not here:
                    left_s = max(0.0, min(wait_until, deadline) - time.monotonic())
                    here = self._store.wait_any(
                        (key,), timeout_s=min(left_s, SIGN_S), stop=lambda: call.cancelled or not self._serving
                    )
                    over = left_s <= SIGN_S or call.cancelled or not self._serving
                    if over or (give_up is not None and not here and give_up()):
                        break
                if call.cancelled:
                    raise Cancelled(peer=self.address, key=key, cause=call.reason)
                if not self._serving:
                    raise PeerUnreachable(peer=self.address, key=key, cause="it was stopped")
                if not here and deadline <= wait_until:
                    raise TransportTimeout(peer=self.address, key=key, cause="timeout_s was over while the peer waited")
        finally:
            unhook()

    def read(self, keys: Sequence[str]) -> list[StoredBlob]:
        """Called by a fetching peer: return these blobs of this member's store, or raise `BlobMissing`."""
        found = [self._store.find(key) for key in keys]
        missing = tuple(key for key, blob in zip(keys, found, strict=True) if blob is None)
        if missing:
            raise BlobMissing(
                peer=self.address, keys=missing, cause=f"not in the peer's store ({len(missing)} of {len(keys)} keys)"
            )
        blobs = [blob for blob in found if blob is not None]
        with self._count_lock:
            self._bytes_sent += sum(blob.data.nbytes for blob in blobs)
        return blobs
