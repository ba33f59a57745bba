"""The door of a cluster: where a machine asks before it joins. One request for each connection.

1. `GET /hello?nonce=N` (anybody): the door's nonce, its protocol, and its proof.
2. Any other request carries both nonces and the visitor's proof: `/info` (versions, Ray's address), `/reach?port=N`
   (the door dials the visitor back), `/bytes?num=N` (for the speed of the link), `/runs?request=JSON` (what
   `orchestrator.operate` answers about the runs of the cluster), `/jobs` (where Ray takes jobs; started if it is not
   there). The token is never sent.

Bounded in everything that a stranger can ask for: threads, size and time of a request, remembered nonces.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, BinaryIO, cast
from urllib.parse import parse_qs, urlsplit

from orchestrator.cluster import proof
from orchestrator.cluster.join_string import format_address
from orchestrator.errors import ClusterUnreachable
from orchestrator.version import PROTOCOL_VERSION

MAX_REQUEST_BYTES = 8192
MAX_TRANSFER_BYTES = 64 * 1024 * 1024
MAX_VISITS = 16
MAX_NONCES = 4096
NONCE_LIFE_S = 30.0
REQUEST_S = 10.0
TRANSFER_S = 120.0
OPERATE_S = 90.0
DIAL_S = 3.0
POLL_S = 0.25
CHUNK = os.urandom(64 * 1024)


class Nonces:
    """The door's nonces: each is good once, for a while; the oldest is forgotten where there are too many."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._issued: OrderedDict[str, float] = OrderedDict()

    def issue(self) -> str:
        """A new one."""
        nonce = secrets.token_hex(16)
        with self._lock:
            self._issued[nonce] = self._clock()
            while len(self._issued) > MAX_NONCES:
                self._issued.popitem(last=False)
        return nonce

    def use_up(self, nonce: str) -> bool:
        """Whether it was issued a short while ago and not used before."""
        with self._lock:
            issued = self._issued.pop(nonce, None)
        return issued is not None and self._clock() - issued <= NONCE_LIFE_S


class Door:
    """Serves on a thread of its own from `start` to `close`.

    Args:
        info: what `/info` says; asked each time.
        port: 0 for any.
        operate: answers a line of JSON about the runs with another one.
        jobs: what `/jobs` says.
    """

    def __init__(
        self,
        *,
        token: str,
        info: Callable[[], Mapping[str, object]],
        host: str,
        port: int = 0,
        operate: Callable[[str], str] | None = None,
        jobs: Callable[[], Mapping[str, object]] | None = None,
    ) -> None:
        self.token, self.info, self.host, self.port = token, info, host, port
        self.operate, self.jobs = operate, jobs
        self.nonces = Nonces()
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def address(self) -> str:
        """`HOST:PORT`."""
        return format_address(self.host, self.port)

    def start(self) -> None:
        """Listen and serve; raises OSError where the address cannot be had."""
        self._server = _Server(self)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(POLL_S,), name="door", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening and hang up."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
            self._server = None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 32

    def __init__(self, door: Door) -> None:
        self.door = door
        self.address_family = socket.AF_INET6 if ":" in door.host else socket.AF_INET
        self._free = threading.BoundedSemaphore(MAX_VISITS)
        self._lock = threading.Lock()
        self._deadlines: dict[socket.socket, float] = {}
        super().__init__((door.host, door.port), _Visit)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        self.allow(request, REQUEST_S)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._deadlines.pop(request, None)
            self._free.release()

    def allow(self, request: socket.socket, seconds: float) -> None:
        """From now on, the connection may take that long in all, however lively it is."""
        with self._lock:
            self._deadlines[request] = time.monotonic() + seconds

    def service_actions(self) -> None:
        now = time.monotonic()
        with self._lock:
            late = [request for request, deadline in self._deadlines.items() if deadline < now]
        for request in late:
            with suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def server_close(self) -> None:
        super().server_close()
        with self._lock:
            left = list(self._deadlines)
        for request in left:
            with suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A visitor that hung up is no concern of the door's."""


class _Limited:
    """A reader that ends after `MAX_REQUEST_BYTES`."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw, self.left = raw, MAX_REQUEST_BYTES

    def readline(self, size: int = -1) -> bytes:
        line = self.raw.readline(min(self.left, size if size >= 0 else self.left))
        self.left -= len(line)
        return line

    def close(self) -> None:
        self.raw.close()

    @property
    def closed(self) -> bool:
        return self.raw.closed


class _Refused(Exception):
    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class _Visit(BaseHTTPRequestHandler):
    server: _Server
    timeout = REQUEST_S
    server_version = "atoll-door"
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        self.limited = _Limited(cast(BinaryIO, self.rfile))
        self.rfile = cast(Any, self.limited)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: a stranger cannot fill the log."""

    def do_GET(self) -> None:
        try:
            if self.limited.left <= 0:
                raise _Refused(431, f"a request has at most {MAX_REQUEST_BYTES} bytes")
            url = urlsplit(self.path)
            values = {key: value[-1] for key, value in parse_qs(url.query).items()}
            if url.path == "/hello":
                self._hello(values)
            else:
                self._answer_member(url.path, values)
        except _Refused as refused:
            self._send(refused.status, {"door": "atoll", "protocol": PROTOCOL_VERSION, "error": refused.reason})

    def _hello(self, values: Mapping[str, str]) -> None:
        nonce = values.get("nonce", "")
        if not proof.NONCE_FORM.fullmatch(nonce):
            raise _Refused(400, "nonce is not 32 hexadecimal digits")
        own = self.server.door.nonces.issue()
        signed = proof.door_proof(self.server.door.token, nonce, own)
        self._send(200, {"door": "atoll", "protocol": PROTOCOL_VERSION, "nonce": own, "proof": signed})

    def _answer_member(self, path: str, values: Mapping[str, str]) -> None:
        nonces = self._check_visitor()
        door = self.server.door
        if path == "/info":
            body: dict[str, object] = {**door.info(), "time_s": time.time()}
        elif path == "/reach":
            body = dial(self.client_address[0], _number(values, "port", 65535))
        elif path == "/runs" and door.operate is not None:
            self.server.allow(self.connection, OPERATE_S)
            body = json.loads(door.operate(values.get("request", "")))
        elif path == "/jobs" and door.jobs is not None:
            self.server.allow(self.connection, OPERATE_S)
            try:
                body = dict(door.jobs())
            except ClusterUnreachable as error:
                raise _Refused(503, error.message) from error
        elif path == "/bytes":
            return self._transfer(_number(values, "num", MAX_TRANSFER_BYTES))
        else:
            raise _Refused(404, f"there is no {path[:100]!r} here")
        self._send(200, body, sign=lambda data: proof.answer_proof(door.token, *nonces, data))

    def _check_visitor(self) -> tuple[str, str]:
        """Both nonces of a visitor who knows the token."""
        door, headers = self.server.door, self.headers
        own, theirs = headers.get(proof.NONCE_HEADER, ""), headers.get(proof.VISITOR_NONCE_HEADER, "")
        given = headers.get(proof.PROOF_HEADER, "")
        if not (proof.NONCE_FORM.fullmatch(own) and proof.NONCE_FORM.fullmatch(theirs) and given):
            raise _Refused(403, "this needs a proof of the cluster's token")
        right = proof.visitor_proof(door.token, theirs, own, self.path)
        # Both in any case: a wrong proof uses its nonce up as well.
        fresh, proven = door.nonces.use_up(own), proof.is_same(given, right)
        if not proven:
            raise _Refused(403, "the token is not that of this cluster")
        if not fresh:
            raise _Refused(403, "this proof was used before, or is too old")
        return theirs, own

    def _transfer(self, num_bytes: int) -> None:
        self.server.allow(self.connection, TRANSFER_S)
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(num_bytes))
        self.end_headers()
        for start in range(0, num_bytes, len(CHUNK)):
            self.wfile.write(CHUNK[: num_bytes - start])

    def _send(self, status: int, values: Mapping[str, object], sign: Callable[[bytes], str] | None = None) -> None:
        data = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if sign is not None:
            self.send_header(proof.PROOF_HEADER, sign(data))
        self.end_headers()
        self.wfile.write(data)


def dial(host: str, port: int) -> dict[str, object]:
    """Whether something accepts a connection there, and if not, why."""
    try:
        socket.create_connection((host, port), timeout=DIAL_S).close()
    except OSError as error:
        return {"host": host, "port": port, "reached": False, "why": str(error)}
    return {"host": host, "port": port, "reached": True, "why": ""}


def _number(values: Mapping[str, str], key: str, largest: int) -> int:
    text = values.get(key, "")
    if not (text.isascii() and text.isdigit() and len(text) < 12 and 0 < int(text) <= largest):
        raise _Refused(400, f"{key} is a number from 1 to {largest}")
    return int(text)
