"""What the controller's actor leans on: calls through cut links, and an end for whatever must not fail."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray.exceptions import ActorUnavailableError

from orchestrator.processes import has_ended

ASK_AGAIN_S = 1.0

log = logging.getLogger("atoll.controller")


async def through_cuts(call: Callable[[], Any], node: str | None, name: str) -> Any:
    """What a call to an island answers. Where the way to it is cut it may live: it is called again, until Ray says.

    Raises what the call raises, `ActorUnavailableError` only if Ray on its node has ended, which ends it as well.
    """
    told = False
    while True:
        try:
            return await call()
        except ActorUnavailableError:
            ended = node is not None and await asyncio.get_running_loop().run_in_executor(None, has_ended, node)
            if ended:
                raise
        if not told:
            log.info("%s cannot be reached: a cut is no death", name)
            told = True
        await asyncio.sleep(ASK_AGAIN_S)


@contextmanager
def must_not_fail() -> Iterator[None]:
    """Whatever goes wrong in here, or a journal that cannot be trusted, ends this process: the next life replays it."""
    done = False
    try:
        yield
        done = True
    finally:
        if not done and not isinstance(sys.exc_info()[1], asyncio.CancelledError):
            log.exception("this controller ends")
            logging.shutdown()
            os._exit(1)
