"""Looking at a process of a run, from outside, until it has said its first word."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from ray.actor import ActorHandle
from ray.exceptions import ActorUnschedulableError, RayActorError, RayTaskError

from faults.arrival import Arrival
from faults.recovery import Kind
from orchestrator.ending import whereabouts

LOOK_S = 1.0


async def not_arriving(
    handle: ActorHandle[Any],
    *,
    is_awaited: Callable[[], bool],
    seen: Callable[[tuple[int, str]], object],
    patience_s: float,
    waited: bool = False,
) -> tuple[Kind, str] | None:
    """The verdict on a process that is stopped, cut off, or hangs before it has joined; None once it is not awaited.

    Ray tells when a process dies, and nothing else. `seen` is called with its id and node once it is on a machine: as
    long as there is no place for it nothing is wrong with it. `waited`: it ran before, as a standby.
    """
    arrival: Arrival | None = None
    answer: asyncio.Future[bool] | None = None
    while is_awaited():
        if arrival is None:
            where = await asyncio.get_running_loop().run_in_executor(None, whereabouts, handle)
            if where is not None:
                seen(where)
                arrival = Arrival(patience_s=patience_s, began_s=time.monotonic(), has_answered=waited)
        elif (verdict := arrival.look(time.monotonic(), answered=_is_there(answer))) is not None:
            return verdict
        if arrival is not None and (answer is None or answer.done()):
            answer = asyncio.ensure_future(_answers(handle))
        await asyncio.sleep(LOOK_S)
    return None


def _is_there(answer: asyncio.Future[bool] | None) -> bool:
    return answer is not None and answer.done() and answer.result()


async def _answers(handle: ActorHandle[Any]) -> bool:
    """Whether it does, sooner or later; of its death whoever waits for its end hears."""
    try:
        await handle.pid.remote()
    except (RayActorError, RayTaskError, ActorUnschedulableError):
        return False
    return True
