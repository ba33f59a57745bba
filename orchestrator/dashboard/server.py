"""The web server of a dashboard: static files, JSON, server-sent events, and actions by POST.

All work on the book is done on one thread beside the event loop, under a lock. Nothing is asked of the source while
nobody watches.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from importlib import resources
from typing import Any

from aiohttp import web

from orchestrator.dashboard.columns import Window
from orchestrator.dashboard.figures import run_figures, run_links
from orchestrator.dashboard.security import HEADERS, Gate, make_gate, name_of
from orchestrator.dashboard.series import run_series, run_timeline
from orchestrator.dashboard.sources import Source
from orchestrator.segments import JournalError

POLL_S = 0.7
WATCHED_S = 10.0
MAX_BODY_BYTES = 4096
MAX_VIEWERS = 64
MAX_BINS = 2000
BEAT_S = 10.0
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = logging.getLogger("atoll.dashboard")


def static_files() -> dict[str, tuple[bytes, str]]:
    """Every file that is served, by its path: there is no other way to the disk."""
    files: dict[str, tuple[bytes, str]] = {}
    for file in resources.files("orchestrator.dashboard").joinpath("static").iterdir():
        kind = TYPES.get(file.name.rpartition(".")[2])
        if kind is not None:
            files[f"/static/{file.name}"] = (file.read_bytes(), kind)
    files["/"] = files["/static/index.html"]
    return files


class Dashboard:
    """Serves one run."""

    def __init__(self, source: Source, *, host: str = "127.0.0.1", port: int = 0, poll_s: float = POLL_S) -> None:
        """Nothing is opened before `start`. `port` 0: any free one; `poll_s`: how often the source is asked."""
        self.source, self.host, self.port, self.poll_s = source, host, port, poll_s
        self.gate: Gate | None = None
        self._files = static_files()
        self._lock = threading.Lock()
        self._viewers: set[asyncio.Event] = set()
        self._asked_s = float("-inf")
        self._news = ""
        self._reading = False
        self._runner: web.AppRunner | None = None
        self._poller: asyncio.Task[None] | None = None

    # ------------------------------------------------------------ life

    async def start(self) -> str:
        """Open the port and serve; returns the link with the token. Raises OSError where the port is taken."""
        app = web.Application(middlewares=[self._guard], client_max_size=MAX_BODY_BYTES)
        app.router.add_post("/api/login", self._login)
        app.router.add_get("/api/run", self._run)
        app.router.add_get("/api/series", self._series)
        app.router.add_get("/api/timeline", self._timeline)
        app.router.add_get("/api/links", self._links)
        app.router.add_get("/api/events", self._events)
        app.router.add_post("/api/act", self._act)
        for path in self._files:
            app.router.add_get(path, self._file)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self.host, self.port).start()
        except OSError:
            await self._runner.cleanup()
            raise
        self.port = int(self._runner.addresses[0][1])
        self.gate = make_gate(self.host, self.port)
        await asyncio.to_thread(self._refresh)
        self._poller = asyncio.create_task(self._poll())
        return self.link()

    def link(self) -> str:
        """The address with the token in its fragment, which a browser does not send."""
        assert self.gate is not None, "link() before start()"
        return f"http://{name_of(self.host)}:{self.port}/#token={self.gate.token}"

    async def stop(self) -> None:
        """Close the port and the connections."""
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.gather(self._poller, return_exceptions=True)
        for viewer in self._viewers:
            viewer.set()
        if self._runner is not None:
            await self._runner.cleanup()
        await asyncio.to_thread(self.source.close)

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self.poll_s)
            if not self._viewers and time.monotonic() - self._asked_s > WATCHED_S:
                continue
            before = self._standing()
            more = await asyncio.to_thread(self._refresh)
            while more:
                more = await asyncio.to_thread(self._refresh)
            if before != self._standing():
                self._news = await asyncio.to_thread(self._figures, None)
                for viewer in self._viewers:
                    viewer.set()

    def _standing(self) -> tuple[int, str, bool]:
        return self.source.book.version, self.source.book.about.state, self._reading

    def _refresh(self) -> bool:
        with self._lock:
            try:
                self._reading = self.source.refresh()
                return self._reading
            except (JournalError, OSError) as error:
                self.source.book.problem = str(error)
                self.source.book.version += 1
                return False

    # ------------------------------------------------------------ who may

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Every request passes here, known path or not."""
        assert self.gate is not None
        authorization = request.headers.get("Authorization")
        refusal = ""
        host = request.headers.get("Host")
        if host is None or not self.gate.host_is_ours(host):
            refusal = "this is not the server that the Host header names"
        elif request.method == "POST" and not self.gate.is_our_page(
            host, request.headers.get("Origin"), request.headers.get("Sec-Fetch-Site"), authorization
        ):
            refusal = "another site may not ask for this"
        elif request.path not in self._files and request.path != "/api/login":
            if not self.gate.is_known(request.cookies, authorization):
                return self._answer({"error": "the link with the token is needed"}, status=401)
        if refusal:
            return self._answer({"error": refusal}, status=403)
        try:
            response = await handler(request)
        except web.HTTPException as error:
            return self._answer({"error": error.reason}, status=error.status)
        if not response.prepared:
            response.headers.update(HEADERS)
        return response

    def _answer(self, value: object, *, status: int = 200) -> web.Response:
        return web.json_response(value, status=status, headers=dict(HEADERS))

    async def _login(self, request: web.Request) -> web.StreamResponse:
        assert self.gate is not None
        body = await _json_body(request)
        if not self.gate.may_enter(body.get("token")):
            return self._answer({"error": "this is not the token of this dashboard"}, status=401)
        response = self._answer({"ok": True})
        response.set_cookie(self.gate.cookie, self.gate.session, httponly=True, samesite="Strict", path="/")
        return response

    # ------------------------------------------------------------ answers

    async def _file(self, request: web.Request) -> web.StreamResponse:
        data, kind = self._files[request.path]
        response = web.Response(body=data, content_type=kind, charset="utf-8")
        response.enable_compression()
        return response

    async def _run(self, request: web.Request) -> web.StreamResponse:
        at_s = _number(request, "at") if "at" in request.query else None
        return await self._computed(partial(self._figures, at_s))

    async def _series(self, request: web.Request) -> web.StreamResponse:
        picked = [name for name in request.query.get("pick", "").split(",") if name]
        return await self._computed(partial(self._reduced, run_series, _window(request), picked))

    async def _timeline(self, request: web.Request) -> web.StreamResponse:
        return await self._computed(partial(self._reduced, run_timeline, _window(request)))

    async def _links(self, request: web.Request) -> web.StreamResponse:
        return await self._computed(partial(self._link_rows, _number(request, "at")))

    def _link_rows(self, at_s: float) -> str:
        with self._lock:
            return _dump(run_links(self.source.book, at_s))

    async def _computed(self, make: Callable[[], str]) -> web.StreamResponse:
        self._asked_s = time.monotonic()
        response = web.Response(text=await asyncio.to_thread(make), content_type="application/json")
        response.enable_compression()
        return response

    def _figures(self, at_s: float | None) -> str:
        with self._lock:
            figures = run_figures(self.source.book, at_s)
            return _dump(figures | {"able": self.source.able(), "reading": self._reading})

    def _reduced(self, reduce: Callable[..., dict[str, Any]], window: Window, *arguments: object) -> str:
        with self._lock:
            return _dump(reduce(self.source.book, window, *arguments))

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """The figures, whenever they have changed."""
        if len(self._viewers) >= MAX_VIEWERS:
            return self._answer({"error": f"{MAX_VIEWERS} viewers are here already"}, status=503)
        response = web.StreamResponse(headers={**HEADERS, "Content-Type": "text/event-stream"})
        await response.prepare(request)
        changed = asyncio.Event()
        self._viewers.add(changed)
        try:
            news = await asyncio.to_thread(self._figures, None)
            while self._poller is not None and not self._poller.done():
                await response.write(f"data: {news}\n\n".encode() if news else b": beat\n\n")
                changed.clear()
                try:
                    await asyncio.wait_for(changed.wait(), BEAT_S)
                    news = self._news
                except TimeoutError:
                    news = ""
        except ConnectionError:
            log.debug("a viewer went away")
        finally:
            self._viewers.discard(changed)
        return response

    async def _act(self, request: web.Request) -> web.StreamResponse:
        body = await _json_body(request)
        action, member = body.get("action"), body.get("member", "")
        if not isinstance(action, str) or not isinstance(member, str):
            return self._answer({"error": "action and member are texts"}, status=400)
        if action not in self.source.able():
            return self._answer({"error": f"{action[:40]} is not available in this run"}, status=409)
        by = f"dashboard, {request.remote}"
        outcome = await asyncio.to_thread(self.source.act, action, member, by)
        log.warning("%s %s asked for by %s: %s", action, member, by, outcome)
        return self._answer({"outcome": outcome}, status=200 if outcome in ("asked", "done") else 409)


# ---------------------------------------------------------------- requests


async def _json_body(request: web.Request) -> dict[str, Any]:
    if request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType(reason="JSON is expected")
    try:
        body = json.loads(await request.read())
    except (ValueError, RecursionError):
        raise web.HTTPBadRequest(reason="this is not JSON") from None
    if not isinstance(body, dict):
        raise web.HTTPBadRequest(reason="a JSON object is expected")
    return body


def _number(request: web.Request, name: str) -> float:
    try:
        value = float(request.query[name])
    except (KeyError, ValueError):
        raise web.HTTPBadRequest(reason=f"{name} must be a number") from None
    if not math.isfinite(value) or not 0 <= value <= 1e9:
        raise web.HTTPBadRequest(reason=f"{name} must be between 0 and 1e9")
    return value


def _window(request: web.Request) -> Window:
    start_s, end_s, bins = (_number(request, name) for name in ("from", "to", "bins"))
    if not 1 <= bins <= MAX_BINS or end_s < start_s:
        raise web.HTTPBadRequest(reason=f"bins must be 1 to {MAX_BINS}, and to must not lie before from")
    return Window(start_s=start_s, end_s=end_s, num_bins=int(bins))


def _dump(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
