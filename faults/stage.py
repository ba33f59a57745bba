"""What can be made to go wrong in a stage peer's process while it runs; `faults.chaos` is the same of islands.

`StageChaos.after` runs at the end of each call of a trainer, while the peer's one device is taken: there it is slowed
down, or hangs. Death, memory and a stop are of the process as a whole, also of a trainer's.
"""

from __future__ import annotations

import logging
import threading
import time

from faults.plan import PlannedFault
from faults.process import strike_process
from workers.pipeline.host import PeerHost

log = logging.getLogger("atoll.chaos")


class StageChaos:
    """The faults of one stage peer."""

    def __init__(self, host: PeerHost) -> None:
        self._host = host
        self._changed = threading.Condition()
        self._factor, self._hung = 1.0, False
        self._serial: dict[str, int] = {}  # of the newest fault of a kind: an older one's end does not end it
        host.after_call = self.after

    def apply(self, fault: PlannedFault) -> None:
        """Begin a fault. Raises ValueError for one that stage peers do not have."""
        if strike_process(fault):
            return
        log.warning("injected: %s", fault)
        match fault.kind:
            case "nan":
                self._host.lose_a_number()
            case "hang" | "slow":
                self._set(fault)
            case _:
                raise ValueError(f"{fault.kind} is no fault of a stage peer")

    def _set(self, fault: PlannedFault) -> None:
        with self._changed:
            serial = self._serial[fault.kind] = self._serial.get(fault.kind, 0) + 1
            self._change(fault, on=True)
        if fault.for_s is not None:
            timer = threading.Timer(fault.for_s, self._end, (fault, serial))
            timer.daemon = True
            timer.start()

    def _end(self, fault: PlannedFault, serial: int) -> None:
        with self._changed:
            if self._serial[fault.kind] == serial:
                log.warning("over: %s", fault)
                self._change(fault, on=False)

    def _change(self, fault: PlannedFault, *, on: bool) -> None:
        if fault.kind == "hang":
            self._hung = on
        else:
            self._factor = (fault.factor or 1.0) if on else 1.0
        self._changed.notify_all()

    def after(self, seconds: float) -> None:
        """A call has taken so long: it takes longer, or does not end."""
        with self._changed:
            more_s = (self._factor - 1.0) * seconds
        if more_s > 0:
            time.sleep(more_s)
        with self._changed:
            while self._hung:
                self._changed.wait()
