"""How an attacker on a real run knows what the others send: it hears their announcements, and fetches their pieces.

Both are open to any member. It sends last for that: at its own send point it waits until it has heard them, a few
seconds at most. Contributions are told apart by fragment and version, so that of an exchange each is used once.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Protocol

import torch
from torch import Tensor

from strategies.fragments import FragmentSpec
from strategies.registry import decode_payload
from workers.jobs import piece_key
from workers.messages import Announce
from workers.records import OfferId
from workers.transport.base import Transport, TransportError

log = logging.getLogger("atoll.chaos")

FIRST_WITHIN_S = 5.0
"""How long it waits for somebody's announcement; then it sends what is honest."""
ALL_WITHIN_S = 1.0
"""How much longer it waits for the rest of them."""
FETCH_S = 10.0


class Replicated(Protocol):
    """What is needed of the attacker's replica."""

    specs: tuple[FragmentSpec, ...]


class Eavesdropper:
    """What the others of a run have offered. Announcements come from any thread."""

    def __init__(self, name: str, transport: Transport) -> None:
        """`name`: of the attacker, which does not listen to itself."""
        self._name, self._transport = name, transport
        self._changed = threading.Condition()
        self._heard: dict[tuple[int, int], dict[str, Announce]] = {}  # fragment and version -> by member
        self._chosen: dict[int, tuple[int, list[Announce]]] = {}  # fragment -> version, and whose pieces are used

    def hear(self, body: Announce) -> None:
        """Somebody's offer was accepted."""
        if body.offer_by.name == self._name:
            return
        fragment, n = body.offer.fragment, body.offer.base.n
        with self._changed:
            self._heard = {key: value for key, value in self._heard.items() if key[0] != fragment or key[1] >= n}
            self._heard.setdefault((fragment, n), {})[body.offer_by.name] = body
            self._changed.notify_all()

    def others(self, replica: Replicated, fragment: int, version: int, where: slice, *, least: int) -> list[Tensor]:
        """What others send of a part for the transition from `version` on, by name; empty if nobody was heard.

        `least`: of how many it wants to know; it does with fewer if they do not come.
        """
        spec, out = replica.specs[fragment], []
        chunk, num = where.start // spec.chunk_values, where.stop - where.start
        for body in self._choose(fragment, version, least):
            key = piece_key(fragment, OfferId(member=body.offer_by, seq=body.offer.seq), chunk)
            try:
                (blob,) = self._transport.fetch(
                    body.address, [key], timeout_s=FETCH_S, max_bytes=body.offer.num_bytes
                )  # fmt: skip
            except TransportError as error:
                log.warning("%s is not heard: %s", body.offer_by, error)
                continue
            out.append(decode_payload(torch.from_numpy(blob.data), num_values=num))
        return out

    def _choose(self, fragment: int, version: int, least: int) -> list[Announce]:
        """Alike for all parts of a contribution."""
        known = self._chosen.get(fragment)
        if known is None or known[0] != version:
            heard = self._await(fragment, version, least)
            known = self._chosen[fragment] = (version, [heard[name] for name in sorted(heard)])
            names = ", ".join(str(body.offer_by) for body in known[1])
            log.warning("it knows what %s of version %d sends", names or "nobody", version)
        return known[1]

    def _await(self, fragment: int, version: int, least: int) -> dict[str, Announce]:
        first_until = time.monotonic() + FIRST_WITHIN_S
        all_until = first_until
        with self._changed:
            while len(heard := self._heard.get((fragment, version), {})) < least:
                if heard:
                    all_until = min(all_until, time.monotonic() + ALL_WITHIN_S)
                left_s = (all_until if heard else first_until) - time.monotonic()
                if left_s <= 0:
                    break
                self._changed.wait(left_s)
            return dict(heard)
