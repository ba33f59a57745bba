"""The control thread of a member: handles what arrives while the training thread trains, and says that it lives.

What a member knows is behind one lock. The training thread holds it while it encodes, applies or copies tensors at a
step boundary, with large models for seconds. Events wait for the lock; heartbeats do not: while it cannot be had the
last `Hello` is said again, with what the training thread does by now (ADR 56). Messages may be doubled and late, so
that is nothing new for who hears it, and a boundary that never ends is told as what it is.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import replace

from workers import member_events as ev
from workers import messages as msg
from workers.pace import Pace

JOIN_S = 10.0


class ControlThread:
    """Takes events off a queue and gives them to `handle` under `lock`, and a `Tick` every `heartbeat_s` besides."""

    def __init__(
        self,
        *,
        name: str,
        events: queue.SimpleQueue[ev.Event | None],
        lock: threading.Condition,
        clock: Callable[[], float],
        heartbeat_s: float,
        handle: Callable[[ev.Event], None],
        say_again: Callable[[], None],
    ) -> None:
        """`say_again` is called, without the lock, whenever a heartbeat was due and the lock could not be had."""
        self.events, self.lock, self.clock, self.heartbeat_s = events, lock, clock, heartbeat_s
        self.handle, self.say_again = handle, say_again
        self._thread = threading.Thread(target=self._run, name=f"sync-{name}", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def join(self) -> None:
        """Wait until it has ended, after None was put into the queue."""
        self._thread.join(timeout=JOIN_S)

    def _run(self) -> None:
        next_tick = self.clock() + self.heartbeat_s
        while True:
            try:
                event = self.events.get(timeout=max(next_tick - self.clock(), 0.001))
            except queue.Empty:
                event = ev.Tick()
            if event is None:
                return
            if isinstance(event, ev.Tick) or self.clock() >= next_tick:
                next_tick = self.clock() + self.heartbeat_s
                self._do(ev.Tick())
            if not isinstance(event, ev.Tick):
                self._do(event)

    def _do(self, event: ev.Event) -> None:
        while not self.lock.acquire(timeout=self.heartbeat_s):
            self.say_again()
        try:
            self.handle(event)
        finally:
            self.lock.release()


class Echo:
    """The last heartbeat of a member, to be said again without a look at the member's state."""

    def __init__(self) -> None:
        """Nothing was said yet."""
        self._said: tuple[msg.Envelope, msg.Hello] | None = None

    def heard(self, envelope: msg.Envelope) -> None:
        """This goes out now; the heartbeat in it, if there is one, is the last."""
        for body in envelope.bodies:
            if isinstance(body, msg.Hello):
                self._said = (envelope, body)

    def again(self, pace: Pace, now: float) -> msg.Envelope | None:
        """The last heartbeat with what the training thread does now, or None before the first one."""
        said = self._said
        if said is None:
            return None
        pace.tick(now)
        envelope, hello = said
        hello = replace(hello, doing=pace.doing, doing_s=max(now - pace.since_s, 0.0))
        return replace(envelope, bodies=(hello,))
