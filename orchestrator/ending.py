"""The end of a run's process for good, on whichever node it is: also of one that is stopped."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError, TaskUnschedulableError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

TITLES = (b"ray::IslandActor", b"ray::TrainerActor", b"ray::StagePeerActor")
WITHIN_S = 30.0

log = logging.getLogger("atoll.controller")


@ray.remote(num_cpus=0, max_retries=0)
def end_stopped(pid: int) -> bool:
    """SIGKILL to a worker's process on this machine that `ray.kill` could not end; whether it was there.

    Ray asks a process to end itself, which one that is stopped (SIGSTOP) cannot do.
    """
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    if not title.startswith(TITLES):  # the number may be another process's by now
        return False
    os.kill(pid, signal.SIGKILL)
    return True


async def make_sure(name: str, pid: int, node: str, *, timeout_s: float = WITHIN_S) -> None:
    """After `ray.kill`: end what is left of a process that could not do it, and would keep its memory for ever.

    Where the way to its node is cut nothing can be done; once it is healed the process learns that it is not wanted.
    """
    place = NodeAffinitySchedulingStrategy(node, soft=False)
    try:
        if await asyncio.wait_for(end_stopped.options(scheduling_strategy=place).remote(pid), timeout_s):
            log.info("process %d of %s did not end by itself", pid, name)
    except (RayActorError, RayTaskError, TaskUnschedulableError, WorkerCrashedError, TimeoutError) as error:
        log.warning("whether process %d of %s ended is not known: %s", pid, name, error or "no answer")


def whereabouts(handle: ActorHandle[Any]) -> tuple[int, str] | None:
    """Process id and node of an actor as Ray has them, without asking its process; None where it runs nowhere."""
    from ray._private.state import state

    told = state.actor_table(handle._actor_id.hex())
    pid, node = told.get("Pid", 0), told.get("Address", {}).get("NodeID", "")
    return (pid, node) if pid and node else None
