"""Drives the installed Chromium over its debugging pipe: no driver download, no port, nothing fetched.

    with Chromium.launch(binary, tmp_path) as browser:
        page = browser.open(path.as_uri())
        assert page.evaluate("document.title") == "..."
        assert page.problems == []

The protocol is Chrome DevTools: JSON objects, each ended by a zero byte, on file descriptors 3 (in) and 4 (out).
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Where tests keep what a page looked like, for people and for a CI that collects it.
SHOTS = Path(__file__).resolve().parents[2] / "build" / "screenshots"
WIDE, NARROW = 1280, 390
# Resolves when everything that was changed before is on the screen.
PAINTED = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


def find_chromium() -> str | None:
    """Path of an installed browser, None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class BrowserError(Exception):
    """The browser answered with an error, did not answer in time, or is gone."""


@dataclass(kw_only=True)
class Page:
    """One page; `problems` collects console messages, exceptions, log entries, `requests` every address asked for."""

    browser: Chromium
    session: str
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    loaded: bool = False

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command to this page."""
        return self.browser.call(method, session=self.session, **params)

    def wait_until_loaded(self) -> None:
        """Return after the load event of the address that was asked for last."""
        self.browser.pump(lambda: self.loaded, "the load event")

    def evaluate(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression; a thrown error is raised here."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise BrowserError(answer["exceptionDetails"]["exception"].get("description", "exception"))
        return answer["result"].get("value")

    def colours(self, scheme: str) -> None:
        """'light' or 'dark', as the operating system would ask for."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def resize(self, width: int, height: int) -> None:
        """The size of the window in CSS pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def hover(self, x: float, y: float) -> None:
        """Move the mouse to a point of the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, x: float, y: float) -> None:
        """Click on a point of the window."""
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """Press and release a key, e.g. 'ArrowRight' or 'Tab'."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38}
        codes |= {"ArrowRight": 39, "ArrowDown": 40}
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown" if text else "rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key], **text)

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Write a PNG of the page, or of its visible part."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    def keep(self, name: str) -> list[Path]:
        """Screenshots of the whole page, wide and narrow, in light and dark, into `SHOTS`; returns their paths."""
        SHOTS.mkdir(parents=True, exist_ok=True)
        kept = []
        for width in (NARROW, WIDE):
            self.resize(width, 900)
            for scheme in ("light", "dark"):
                self.colours(scheme)
                self.evaluate(PAINTED)
                kept.append(SHOTS / f"{name}-{'narrow' if width == NARROW else 'wide'}-{scheme}.png")
                self.screenshot(kept[-1])
        return kept


class Chromium:
    """A running browser. Use `Chromium.launch`."""

    def __init__(self, process: subprocess.Popen[bytes], to_browser: int, from_browser: int, timeout_s: float) -> None:
        """Wrap a started process and our ends of its two pipes."""
        self._process = process
        self._to_browser = to_browser
        self._from_browser = from_browser
        self._timeout_s = timeout_s
        self._buffer = b""
        self._last_id = 0
        self._answers: dict[int, dict[str, Any]] = {}
        self._pages: dict[str, Page] = {}

    @classmethod
    @contextlib.contextmanager
    def launch(cls, binary: str, profile: Path, *, timeout_s: float = 30.0) -> Iterator[Chromium]:
        """Start `binary` with an empty profile; the process group it started is ended on leaving."""
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        # Out of the way of 3 and 4, which the child's dup2 overwrites.
        child_in, child_out = fcntl.fcntl(theirs_in, fcntl.F_DUPFD, 10), fcntl.fcntl(theirs_out, fcntl.F_DUPFD, 10)

        def hand_over() -> None:
            os.dup2(child_in, 3)
            os.dup2(child_out, 4)

        process = subprocess.Popen(
            [binary, *_FLAGS, f"--user-data-dir={profile}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,  # Python's own descriptors are not inheritable; 3 and 4 must be
            start_new_session=True,
            preexec_fn=hand_over,
        )
        for fd in (theirs_in, theirs_out, child_in, child_out):
            os.close(fd)
        browser = cls(process, ours_out, ours_in, timeout_s)
        try:
            yield browser
        finally:
            browser._stop()

    def open(self, url: str, *, width: int = 1280, height: int = 900) -> Page:
        """A new page at `url` when its load event has fired; in a window of its own, so that no page is hidden."""
        target = self.call("Target.createTarget", url="about:blank", newWindow=True)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(browser=self, session=session)
        page.resize(width, height)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.call("Page.navigate", url=url)
        page.wait_until_loaded()
        return page

    def call(self, method: str, *, session: str | None = None, **params: Any) -> dict[str, Any]:
        """One command and its answer."""
        self._last_id += 1
        number = self._last_id
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to_browser, json.dumps(message).encode() + b"\0")
        self.pump(lambda: number in self._answers, f"the answer to {method}")
        answer = self._answers.pop(number)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def pump(self, done: Callable[[], bool], awaited: str) -> None:
        """Take what the browser sends until `done()`; raises BrowserError after the timeout."""
        deadline = time.monotonic() + self._timeout_s
        while not done():
            ready, _, _ = select.select([self._from_browser], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise BrowserError(f"waited {self._timeout_s} s for {awaited}")
            data = os.read(self._from_browser, 1 << 20)
            if not data:
                raise BrowserError(f"the browser is gone (exit code {self._process.poll()}) before {awaited}")
            *messages, self._buffer = (self._buffer + data).split(b"\0")
            for message in messages:
                self._take(json.loads(message))

    def _take(self, message: dict[str, Any]) -> None:
        if "id" in message:
            self._answers[message["id"]] = message
            return
        page = self._pages.get(message.get("sessionId", ""))
        if page is None:
            return
        method, params = message["method"], message["params"]
        if method == "Page.loadEventFired":
            page.loaded = True
        elif method == "Runtime.consoleAPICalled":
            page.problems.append(f"console.{params['type']}: {params['args']}")
        elif method == "Runtime.exceptionThrown":
            page.problems.append(f"exception: {params['exceptionDetails']}")
        elif method == "Log.entryAdded":
            page.problems.append(f"log: {params['entry']['text']}")
        elif method == "Network.requestWillBeSent":
            page.requests.append(params["request"]["url"])

    def _stop(self) -> None:
        with contextlib.suppress(BrowserError, BrokenPipeError):
            self.call("Browser.close")
        for fd in (self._to_browser, self._from_browser):
            os.close(fd)
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)  # its own session: only what we started
            self._process.wait(timeout=5)
