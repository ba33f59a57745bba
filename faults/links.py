"""The links of one process, cut or slow on purpose: what is the same for islands, stage peers and trainers.

A link that is cut carries nothing and says nothing, like a cable that was pulled: a fetch hangs until a keepalive would
have noticed, then its peer is unreachable; control messages arrive late, in their order, once the link is healed. Who
has its own code around messages puts a `Line` into each direction; who is called waits in `Links.hold`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from faults.plan import CONTROLLER, PlannedFault
from workers.transport.base import Blob, Transport
from workers.transport.errors import PeerUnreachable

log = logging.getLogger("atoll.chaos")

NOTICED_S = 4.0
"""Seconds after which a fetch over a cut link fails: keepalive time and time-out of the real transport."""
LOOK_S = 0.05
OF_LINKS = ("cut", "heal", "delay")
Message = TypeVar("Message")


class Line(Generic[Message]):
    """Messages in one direction, in order: at once, late, or not before the line is healed."""

    def __init__(self, send: Callable[[Message], None], *, name: str) -> None:
        """`send` takes the messages that get through."""
        self._send, self._name = send, name
        self._changed = threading.Condition()
        self._queue: deque[tuple[float, Message]] = deque()
        self._cut = self._busy = False
        self._delay_s = 0.0

    def put(self, message: Message) -> None:
        """Send a message; never blocks longer than `send`, unless messages are waiting."""
        with self._changed:
            at_once = not (self._cut or self._delay_s or self._busy)
            if not at_once:
                self._queue.append((time.monotonic() + self._delay_s, message))
                if not self._busy:
                    self._busy = True
                    threading.Thread(target=self._run, name=f"line-{self._name}", daemon=True).start()
        if at_once:
            self._send(message)

    def set(self, *, cut: bool, delay_s: float) -> None:
        """Cut it or heal it, and delay what is put from now on."""
        with self._changed:
            self._cut, self._delay_s = cut, delay_s
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._queue and (self._cut or self._queue[0][0] > time.monotonic()):
                    self._changed.wait(None if self._cut else max(self._queue[0][0] - time.monotonic(), 0.0))
                if not self._queue:
                    self._busy = False
                    return
                _, message = self._queue.popleft()
            self._send(message)


class Lasting:
    """Faults that last: each begins at once and ends after its time, unless a newer one of its kind has begun."""

    def __init__(self, change: Callable[[PlannedFault, bool], None]) -> None:
        """`change` begins a fault (True) or ends it, on any thread."""
        self._change = change
        self._lock = threading.Lock()
        self._serial: dict[str, int] = {}

    def set(self, fault: PlannedFault, *, on: bool, what: str | None = None) -> None:
        """Begin or end one; `what` tells those of a kind apart."""
        key = fault.kind if what is None else what
        with self._lock:
            serial = self._serial[key] = self._serial.get(key, 0) + 1
            self._change(fault, on)
        if on and fault.for_s is not None:
            timer = threading.Timer(fault.for_s, self._end, (fault, key, serial))
            timer.daemon = True
            timer.start()

    def _end(self, fault: PlannedFault, key: str, serial: int) -> None:
        with self._lock:
            if self._serial[key] == serial:
                log.warning("over: %s", fault)
                self._change(fault, False)


class Links:
    """See the module. `name`: of the process's member; `addresses`: transport address -> member, as far as known."""

    def __init__(self, name: str) -> None:
        """Nothing is cut."""
        self.name = name
        self.addresses: dict[str, str] = {}
        self._changed = threading.Condition()
        self._lines: list[Line[Any]] = []
        self._is_off = False
        self._cut_from: set[str] = set()
        self._delay_s = 0.0
        self._lasting = Lasting(self._change)

    def line(self, send: Callable[[Message], None], *, name: str) -> Line[Message]:
        """A direction of messages from or to the controller, which only a cut of this member stops."""
        made = Line(send, name=name)
        self._lines.append(made)
        return made

    def apply(self, fault: PlannedFault) -> None:
        """Begin one of `OF_LINKS`: of this member, or of a link to it."""
        others = "+".join(name for name in fault.targets if name != self.name)
        what = fault.kind if fault.kind == "delay" else f"cut:{others}"
        self._lasting.set(fault, on=fault.kind != "heal", what=what)

    def _change(self, fault: PlannedFault, on: bool) -> None:
        others = [name for name in fault.targets if name != self.name]
        with self._changed:
            if fault.kind == "delay":
                self._delay_s = (fault.by_s or 0.0) if on else 0.0
            elif others:
                (self._cut_from.update if on else self._cut_from.difference_update)(others)
            else:
                self._is_off = on
                if fault.kind == "heal":
                    self._cut_from.clear()
                    self._delay_s = 0.0
            for line in self._lines:
                line.set(cut=self._is_off, delay_s=self._delay_s)
            self._changed.notify_all()

    # ------------------------------------------------------------ what passes

    def is_cut(self, other: str | None) -> bool:
        """Whether nothing goes between this member and another one, or the controller."""
        return self._is_off or other in self._cut_from

    def hold(self, other: str = CONTROLLER) -> None:
        """A call or its answer comes by: it is late, and waits while the link is cut."""
        self.late()
        with self._changed:
            while self.is_cut(other):
                self._changed.wait()

    async def hold_async(self, other: str = CONTROLLER) -> None:
        """The same in an event loop."""
        if self._delay_s:
            await asyncio.sleep(self._delay_s)
        while self.is_cut(other):
            await asyncio.sleep(LOOK_S)

    def late(self) -> None:
        """Something waits for its delay."""
        if self._delay_s:
            time.sleep(self._delay_s)

    def pass_fetch(self, address: str, timeout_s: float) -> None:
        """A fetch comes by: it waits while the link is cut, and fails as it would. Raises PeerUnreachable."""
        deadline_s = time.monotonic() + min(timeout_s, NOTICED_S)
        with self._changed:
            while self.is_cut(self.addresses.get(address)):
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise PeerUnreachable(peer=address, cause="no answer on a link that is cut on purpose")
                self._changed.wait(left_s)


class LinkedTransport:
    """A transport whose fetches pass `Links`."""

    def __init__(self, inner: Transport, links: Links) -> None:
        """Everything but fetches is the inner one's."""
        self._inner, self._links = inner, links

    def __getattr__(self, name: str) -> Any:
        """Of the inner one."""
        return getattr(self._inner, name)

    def fetch(self, address: str, keys: Sequence[str], *, timeout_s: float, **how: Any) -> list[Blob]:
        """As the transport does."""
        self._links.late()
        self._links.pass_fetch(address, timeout_s)
        blobs = self._inner.fetch(address, keys, timeout_s=timeout_s, **how)
        self._links.pass_fetch(address, timeout_s)  # what was under way when the link was cut does not arrive
        return blobs
