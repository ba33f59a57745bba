"""A virtual clock, network and disk: everything that is slow, lossy or random about a cluster, under one seed.

Nothing here knows the protocol. `VirtualTime` runs actions in order of virtual time; `VirtualNetwork` delays, loses,
doubles and re-orders what is sent and can be cut in either direction; `VirtualDisk` keeps the journal's segments and
tells what is written from what would survive a crash of the machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any, Generic, Protocol, TypeVar

Action = Callable[..., object]


class VirtualTime:
    """Actions in order of virtual time; those of one moment in the order in which they were asked for."""

    __slots__ = ("_count", "_queue", "now", "num_events")

    def __init__(self) -> None:
        self.now = 0.0
        self.num_events = 0
        self._count = 0
        self._queue: list[tuple[float, int, Action, tuple[Any, ...]]] = []

    def after(self, delay_s: float, action: Action, *args: Any) -> None:
        """Run `action(*args)` in `delay_s` seconds."""
        self._count += 1
        heappush(self._queue, (self.now + delay_s, self._count, action, args))

    def run_next(self) -> bool:
        """Advance to the next action and run it; False if there is none."""
        if not self._queue:
            return False
        self.now, _, action, args = heappop(self._queue)
        self.num_events += 1
        action(*args)
        return True

    def __len__(self) -> int:
        """Actions that wait for their time."""
        return len(self._queue)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkQuality:
    """Delays in seconds; `loss`, `duplicate` and `straggle` are shares of all messages, the last come much later."""

    min_delay_s: float = 0.001
    max_delay_s: float = 0.02
    loss: float = 0.0
    duplicate: float = 0.0
    straggle: float = 0.0
    straggle_s: float = 2.0


class VirtualNetwork:
    """Sends between named places. A direction can be blocked; what is under way when it is blocked is lost too."""

    def __init__(self, time: VirtualTime, rng: random.Random, quality: LinkQuality) -> None:
        """`quality` may be replaced at any time."""
        self.time, self.rng, self.quality = time, rng, quality
        self._blocked: dict[tuple[str, str], int] = {}
        self.num_lost = 0
        self.num_doubled = 0

    def block(self, source: str, target: str) -> None:
        """Nothing from `source` reaches `target` until `unblock`; calls nest."""
        self._blocked[source, target] = self._blocked.get((source, target), 0) + 1

    def unblock(self, source: str, target: str) -> None:
        """Take back one `block`."""
        left = self._blocked.get((source, target), 0) - 1
        if left > 0:
            self._blocked[source, target] = left
        else:
            self._blocked.pop((source, target), None)

    def reaches(self, source: str, target: str) -> bool:
        """Whether the direction is open."""
        return (source, target) not in self._blocked

    def linked(self, one: str, other: str) -> bool:
        """Whether both directions are open."""
        return self.reaches(one, other) and self.reaches(other, one)

    def heal(self) -> None:
        """Open everything, and be reliable from now on (delays stay)."""
        self._blocked.clear()
        quality = self.quality
        self.quality = LinkQuality(min_delay_s=quality.min_delay_s, max_delay_s=quality.max_delay_s)

    def delay_s(self) -> float:
        """Delay of one message."""
        quality = self.quality
        delay = quality.min_delay_s + (quality.max_delay_s - quality.min_delay_s) * self.rng.random()
        if quality.straggle and self.rng.random() < quality.straggle:
            delay += quality.straggle_s * self.rng.random()
        return delay

    def send(self, source: str, target: str, action: Action, *args: Any) -> None:
        """Run `action(*args)` when the message arrives: once, twice or never."""
        quality, rng = self.quality, self.rng
        if not self.reaches(source, target) or (quality.loss and rng.random() < quality.loss):
            self.num_lost += 1
            return
        self.time.after(self.delay_s(), self._arrive, source, target, action, args)
        if quality.duplicate and rng.random() < quality.duplicate:
            self.num_doubled += 1
            self.time.after(self.delay_s() * 3, self._arrive, source, target, action, args)

    def _arrive(self, source: str, target: str, action: Action, args: tuple[Any, ...]) -> None:
        if (source, target) in self._blocked:
            self.num_lost += 1
        else:
            action(*args)


class Linked(Protocol):
    """A row of a journal: it knows its number, and which row it follows."""

    @property
    def seq(self) -> int:
        """Number of the row in the whole journal."""
        ...

    @property
    def prev(self) -> str:
        """Hash of the row before it."""
        ...

    @property
    def hash(self) -> str:
        """Hash of this row."""
        ...


R = TypeVar("R", bound=Linked)


@dataclass(kw_only=True, slots=True)
class Segment(Generic[R]):
    """One controller life's file: rows that are written, and how many of them would survive a crash of the machine."""

    number: int
    rows: list[R] = field(default_factory=list)
    num_durable: int = 0


class VirtualDisk(Generic[R]):
    """The journal's directory: segments by number, created exclusively, each written by one controller."""

    def __init__(self) -> None:
        self.segments: list[Segment[R]] = []
        self.full = False

    def create(self) -> Segment[R]:
        """Create the next segment, which fences all older ones."""
        segment: Segment[R] = Segment(number=self.newest() + 1)
        self.segments.append(segment)
        return segment

    def newest(self) -> int:
        """Number of the newest segment; 0 if there is none."""
        return self.segments[-1].number if self.segments else 0

    def history(self, *, before: int) -> list[R]:
        """What the segments older than `before` say: from the newest that was begun back, by the rows' hashes.

        A controller that was overtaken may have begun its segment after its successor had read: nothing continues it.
        """
        begun = [segment for segment in self.segments if segment.number < before and segment.rows]
        rows = list(begun.pop().rows) if begun else []
        while rows and rows[0].seq:
            older = begun.pop().rows
            at = rows[0].seq - 1 - older[0].seq
            if 0 <= at < len(older) and older[at].hash == rows[0].prev:
                rows[:0] = older[: at + 1]
        return rows

    def write(self, segment: Segment[R], rows: Sequence[R]) -> None:
        """Write rows: others see them, a crash of the machine may lose them."""
        segment.rows += rows

    def sync(self, segment: Segment[R]) -> None:
        """Make everything written to a segment durable."""
        segment.num_durable = len(segment.rows)

    def crash(self, rng: random.Random) -> None:
        """The machine goes down: of what was not synced, any beginning survives."""
        for segment in self.segments:
            kept = rng.randint(segment.num_durable, len(segment.rows))
            del segment.rows[kept:]
            segment.num_durable = kept
