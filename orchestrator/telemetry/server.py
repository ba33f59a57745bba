"""`/metrics` over HTTP: an aiohttp server on a thread of its own, which only ever hands out what was last published."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable, Iterable
from ipaddress import ip_address

from orchestrator.telemetry.catalogue import Sample
from orchestrator.telemetry.exposition import CONTENT_TYPE, render

log = logging.getLogger("atoll.controller")

PATH = "/metrics"
START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0


class MetricsServer:
    """Serves the newest samples. `start` and `stop` may be called once each, from any thread."""

    def __init__(self, *, host: str, port: int) -> None:
        """Nothing listens before `start`. `port` 0: any."""
        self.host, self.port = host, port
        self.newest: tuple[Sample, ...] = ()
        self._loop = asyncio.new_event_loop()
        self._listening = threading.Event()
        self._error: OSError | None = None
        self._stopping: Callable[[], object] = lambda: None
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def publish(self, samples: Iterable[Sample]) -> None:
        """What the next visitor gets."""
        self.newest = tuple(samples)

    @property
    def target(self) -> str:
        """`host:port`, as Prometheus wants it; the name of this machine where all of its addresses are listened at."""
        host = socket.gethostname() if self.host in ("0.0.0.0", "::") else self.host
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    def start(self) -> None:
        """Listen. Raises OSError where that is not possible."""
        self._thread.start()
        listening = self._listening.wait(START_TIMEOUT_S)
        if self._error is not None:
            self._thread.join(STOP_TIMEOUT_S)
            raise self._error
        if not listening:
            raise TimeoutError(f"the metrics server does not listen after {START_TIMEOUT_S:g} s")

    def stop(self) -> None:
        """Close the port."""
        self._stopping()
        self._thread.join(STOP_TIMEOUT_S)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except OSError as error:
            self._error = error
            self._listening.set()
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        from aiohttp import web

        app = web.Application()

        async def answer(request: web.Request) -> web.Response:
            if not may_ask(request.host, self.host):
                return web.Response(status=403, text=f"not served under the name {request.host!r}\n")
            return web.Response(body=render(self.newest).encode(), headers={"Content-Type": CONTENT_TYPE})

        app.router.add_get(PATH, answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, self.host, self.port).start()
            self.port = runner.addresses[0][1]
            stop = asyncio.Event()
            self._stopping = lambda: self._loop.call_soon_threadsafe(stop.set)
            self._listening.set()
            await stop.wait()
        finally:
            await runner.cleanup()


def may_ask(named: str, bound: str) -> bool:
    """Whether a request under the name `named` is meant for a server at `bound`.

    Behind a loopback address only loopback names are: a page from elsewhere, whose name was made to point here, is not.
    """
    name = named.rpartition("]")[0].removeprefix("[") or named.partition(":")[0]
    return not _is_loopback(bound) or _is_loopback(name)


def _is_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False
