"""What can be made to go wrong in a process of a pipeline while it runs; `faults.chaos` is the same of islands.

`StageChaos.after` runs at the end of each call of a trainer, while the peer's one device is taken: there it is slowed
down, or hangs. Death, memory and a stop are of the process as a whole, also of a trainer's; so are its links, which the
actor's shell has its calls, its messages and its transport pass (`ProcessChaos.links`).
"""

from __future__ import annotations

import logging
import threading
import time

from faults.links import OF_LINKS, Lasting, Links
from faults.plan import PlannedFault
from faults.process import strike_process
from workers.pipeline.host import PeerHost

log = logging.getLogger("atoll.chaos")


class ProcessChaos:
    """The faults of any process of a pipeline: of a trainer these are all."""

    what = "trainer"

    def __init__(self, links: Links) -> None:
        """`links`: of the process; nothing is wrong yet."""
        self.links = links

    def apply(self, fault: PlannedFault) -> None:
        """Begin a fault. Raises ValueError for one that such a process does not have."""
        if strike_process(fault):
            return
        log.warning("injected: %s", fault)
        if fault.kind in OF_LINKS:
            self.links.apply(fault)
            if fault.kind == "heal" and fault.targets == (self.links.name,):
                self._recover()
        else:
            self._begin(fault)

    def _begin(self, fault: PlannedFault) -> None:
        raise ValueError(f"{fault.kind} is no fault of a {self.what}")

    def _recover(self) -> None:
        """Whatever lasts here beside its links is over."""


class StageChaos(ProcessChaos):
    """The faults of one stage peer."""

    what = "stage peer"

    def __init__(self, host: PeerHost, links: Links) -> None:
        """From now on each call of `host` ends in `after`."""
        super().__init__(links)
        self._host = host
        self._changed = threading.Condition()
        self._factor, self._hung = 1.0, False
        self._lasting = Lasting(self._change)
        host.after_call = self.after

    def _begin(self, fault: PlannedFault) -> None:
        match fault.kind:
            case "nan":
                self._host.lose_a_number()
            case "hang" | "slow":
                self._lasting.set(fault, on=True)
            case _:
                super()._begin(fault)

    def _change(self, fault: PlannedFault, on: bool) -> None:
        with self._changed:
            if fault.kind == "hang":
                self._hung = on
            else:
                self._factor = (fault.factor or 1.0) if on else 1.0
            self._changed.notify_all()

    def _recover(self) -> None:
        with self._changed:
            self._hung, self._factor = False, 1.0
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
