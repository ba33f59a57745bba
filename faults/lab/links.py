"""One direction of one link: rate, queue, delay, jitter, loss. Pure: the clock and the randomness are given.

A packet waits until those before it are sent (rate), longer than `queue_ms` it does not wait (it is dropped), then it
travels (delay, jitter), and may be lost on the way: the lost ones have used the link too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

DEFAULT_QUEUE_MS = 200.0
MTU_BYTES = 1500
TRAIN_S = 0.002
"""Packets that travel as one frame take no longer than this on the wire, unless it is a single one."""

DECK_PACKETS = 10_000
DECK_LOSSES = 200
"""How many packets are dealt their fates at once (`gaps_between_losses`), and most losses among them."""

TOGETHER_S = 2.5e-4
"""Packets of a frame that jitter parts by no more than this (and an eighth of it) stay one frame."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What one direction of a link does to packets.

    Attributes:
        rate_mbit: million bits of IP packets a second; None = unlimited.
        delay_ms: one way.
        jitter_ms: each packet is late by up to this much more, uniformly; the order is kept.
        loss: share of packets that is lost, anywhere (`gaps_between_losses`).
        queue_ms: longest a packet waits for the rate; None = as `DEFAULT_QUEUE_MS`.
    """

    rate_mbit: float | None = None
    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    loss: float = 0.0
    queue_ms: float = DEFAULT_QUEUE_MS

    @property
    def is_plain(self) -> bool:
        """Whether packets pass at once and unharmed."""
        return self.rate_mbit is None and not (self.delay_ms or self.jitter_ms or self.loss)


@dataclass(kw_only=True, slots=True)
class Counters:
    """What one direction of a link has carried and dropped: bytes of IP packets, packets of MTU size."""

    num_bytes: int = 0
    num_packets: int = 0
    dropped_queue: int = 0
    dropped_loss: int = 0
    dropped_cut: int = 0


@dataclass(slots=True)
class Link:
    """One direction of a link in operation; every time is in seconds on the caller's clock.

    Attributes:
        random: a float of [0, 1) for each call.
        is_ordered: what a packet does here depends on those before it, so they must come in order of time.
        max_packets: most packets that may travel as one frame.
    """

    name: str
    random: Callable[[], float]
    shape: Shape = field(default_factory=Shape)
    counters: Counters = field(default_factory=Counters)
    is_plain: bool = field(init=False)
    is_ordered: bool = field(init=False)
    has_jitter: bool = field(init=False)
    has_loss: bool = field(init=False)
    max_packets: int = field(init=False)
    _s_per_byte: float = field(init=False)
    _queue_s: float = field(init=False)
    _delay_s: float = field(init=False)
    _jitter_s: float = field(init=False)
    _together_s: float = field(init=False)
    _gaps: Iterator[int] = field(init=False)
    _until_loss: int = field(init=False)
    _free_at_s: float = field(default=-math.inf, init=False)
    _last_arrival_s: float = field(default=-math.inf, init=False)

    def __post_init__(self) -> None:
        self._set_loss(self.shape.loss)
        self.configure(self.shape)

    def configure(self, shape: Shape) -> None:
        """Act otherwise from the next packet on; what is on the way arrives as it would have."""
        if shape.loss != self.shape.loss:
            self._set_loss(shape.loss)
        self.shape = shape
        rate = shape.rate_mbit
        self._s_per_byte = 0.0 if rate is None else 8e-6 / rate
        self._queue_s = shape.queue_ms / 1e3
        self._delay_s = shape.delay_ms / 1e3
        self._jitter_s = shape.jitter_ms / 1e3
        self._together_s = min(TOGETHER_S, self._jitter_s / 8)
        self.is_plain = shape.is_plain
        self.has_jitter = shape.jitter_ms > 0
        self.has_loss = shape.loss > 0
        self.is_ordered = rate is not None or self.has_jitter
        self.max_packets = max_train(shape)

    def carry(self, at_s: float, num_bytes: int, num_packets: int) -> float | None:
        """Take a frame that comes at `at_s`; return when it arrives without jitter, or None if the queue is full."""
        counters = self.counters
        if self._s_per_byte:
            leaves_s = self._free_at_s if self._free_at_s > at_s else at_s
            if leaves_s - at_s > self._queue_s:
                counters.dropped_queue += num_packets
                return None
            at_s = self._free_at_s = leaves_s + num_bytes * self._s_per_byte
        counters.num_bytes += num_bytes
        counters.num_packets += num_packets
        return at_s + self._delay_s

    def stray(self, arrival_s: float) -> float:
        """When a packet that would arrive then does arrive, with jitter; it overtakes none (`scatter` of one)."""
        own_s = arrival_s + self._jitter_s * self.random()
        if own_s > self._last_arrival_s:
            self._last_arrival_s = own_s
        return self._last_arrival_s

    def scatter(self, arrival_s: float, num_packets: int) -> list[tuple[int, float]]:
        """When packets that would arrive together do arrive, with jitter: (how many, when), in order.

        Each is late by a time of its own, but none overtakes: what catches up with the one before comes with it, and so
        does what would come less than `TOGETHER_S` later, in the same turn of the switch.
        """
        groups: list[tuple[int, float]] = []
        last_s, num = self._last_arrival_s, 0
        for _ in range(num_packets):
            own_s = arrival_s + self._jitter_s * self.random()
            if own_s > last_s and (not num or own_s > last_s + self._together_s):
                if num:
                    groups.append((num, last_s))
                last_s, num = own_s, 0
            num += 1
        self._last_arrival_s = last_s
        return [*groups, (num, last_s)]

    def lose(self, num_packets: int) -> list[int]:
        """The numbers of those of the next `num_packets` packets that are lost."""
        if num_packets <= self._until_loss:
            self._until_loss -= num_packets
            return []
        lost, at = [], self._until_loss
        while at < num_packets:
            lost.append(at)
            at += 1 + next(self._gaps)
        self._until_loss = at - num_packets
        self.counters.dropped_loss += len(lost)
        return lost

    def _set_loss(self, loss: float) -> None:
        self._gaps = gaps_between_losses(loss, self.random)
        self._until_loss = next(self._gaps)


def gaps_between_losses(loss: float, random: Callable[[], float]) -> Iterator[int]:
    """How many packets pass before the next one is lost, again and again.

    Fates are dealt from a deck of `DECK_PACKETS` cards (fewer where more than `DECK_LOSSES` of them would be losses,
    more where not one would be), of which just as many are losses as were asked for: any packet may be lost, as likely
    as any other, and a burst is as likely as with a coin for each, but luck evens out over a deck (ADR 65). With coins,
    100,000 packets of which one in a thousand is to be lost would lose more than a tenth more or less than that in
    every third run.
    """
    if loss <= 0 or loss >= 1:
        while True:
            yield 1 << 62 if loss <= 0 else 0
    num_cards = round(max(min(DECK_PACKETS, DECK_LOSSES / loss), 1 / loss))
    passed, owed = 0, random()
    while True:
        owed += num_cards * loss
        num_lost = int(owed)
        owed -= num_lost
        lost: set[int] = set()
        while len(lost) < num_lost:
            lost.add(int(num_cards * random()))
        at = 0
        for card in sorted(lost):
            yield passed + card - at
            passed, at = 0, card + 1
        passed += num_cards - at


def max_train(shape: Shape) -> int:
    """Most packets of MTU size that may travel as one frame: what passes in `TRAIN_S`."""
    if shape.rate_mbit is None:
        return 1 << 16
    return max(1, int(TRAIN_S * shape.rate_mbit * 1e6 / 8 / MTU_BYTES))
