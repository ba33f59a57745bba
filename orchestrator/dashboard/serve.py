"""Running a dashboard: in the foreground for the command line, on a thread for tests and scripts."""

from __future__ import annotations

import asyncio
import errno
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from orchestrator.dashboard.server import Dashboard
from orchestrator.errors import UserError


def serve(dashboard: Dashboard, ready: Callable[[str], None]) -> None:
    """Serve until Ctrl-C or SIGTERM; `ready` gets the link. Raises UserError where the port is taken."""
    asyncio.run(_serve(dashboard, ready))


async def _serve(dashboard: Dashboard, ready: Callable[[str], None]) -> None:
    over = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, over.set)
    try:
        ready(await dashboard.start())
    except OSError as error:
        taken = error.errno in (errno.EADDRINUSE, errno.EACCES)
        raise UserError(
            f"cannot listen on {dashboard.host} port {dashboard.port}: {error.strerror}",
            place="--port" if taken else "--host",
            remedy="--port 0 takes any free one" if taken else "an address or a name of this machine",
        ) from error
    await over.wait()
    await dashboard.stop()


@contextmanager
def on_thread(dashboard: Dashboard) -> Iterator[str]:
    """Serve on a thread of its own while the block runs; gives the link."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="dashboard", daemon=True)
    thread.start()
    try:
        yield asyncio.run_coroutine_threadsafe(dashboard.start(), loop).result(timeout=30)
    finally:
        asyncio.run_coroutine_threadsafe(_end(dashboard), loop).result(timeout=30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=10)
        loop.close()


async def _end(dashboard: Dashboard) -> None:
    """Stop, and whatever a visitor left open."""
    await dashboard.stop()
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
