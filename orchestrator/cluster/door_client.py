"""The visitor's side of a door, see `orchestrator.cluster.door`."""

from __future__ import annotations

import http.client
import json
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from orchestrator.cluster import proof
from orchestrator.cluster.join_string import JoinString
from orchestrator.cluster.versions import Versions
from orchestrator.errors import ClusterUnreachable, UserError
from orchestrator.version import PROTOCOL_VERSION

TIMEOUT_S = 8.0
CALL_S = 60.0
WARM_S, LIMIT_S = 1.0, 4.0
MAX_ANSWER_BYTES = 64 * 1024
# About runs: a dashboard's first questions are answered with a whole history, a mebibyte at a time.
MAX_RUNS_BYTES = 8 * 1024 * 1024
CHUNK_BYTES = 256 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterInfo:
    """What a door says of its cluster.

    Attributes:
        gcs_address: of Ray.
        wan: whether Ray is set for wide area links there; it has to be the same on all machines.
        clock_offset_s: the clock there minus the clock here, to within half of `round_trip_s`.
        my_address: this machine's, as seen on the way there.
    """

    versions: Versions
    gcs_address: str
    wan: bool
    clock_offset_s: float
    round_trip_s: float
    my_address: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Reach:
    """Whether the door could dial back."""

    host: str
    port: int
    reached: bool
    why: str


def greet(place: JoinString, timeout_s: float = TIMEOUT_S) -> None:
    """See whether there is a door of this protocol that has the same token; raises as `visit` does."""
    _greet(place, secrets.token_hex(16), timeout_s)


def visit(place: JoinString, timeout_s: float = TIMEOUT_S) -> ClusterInfo:
    """Ask a door about its cluster.

    Raises:
        ClusterUnreachable: nobody answers, or somebody else does.
        UserError: the door speaks another protocol, or the token is not that of its cluster.
    """
    answer = _ask(place, "/info", timeout_s)
    values = answer.values
    try:
        return ClusterInfo(
            versions=Versions(**values["versions"]),
            gcs_address=str(values["gcs_address"]),
            wan=bool(values["wan"]),
            clock_offset_s=float(values["time_s"]) - answer.middle_s,
            round_trip_s=answer.round_trip_s,
            my_address=answer.my_address,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _another_protocol(place, f"its answer has no proper {error}") from error


def call(place: JoinString, request: Mapping[str, Any], timeout_s: float = CALL_S) -> dict[str, Any]:
    """Ask about the runs of the cluster, see `orchestrator.operate`; raises as `visit` does."""
    path = f"/runs?request={quote(json.dumps(request), safe='')}"
    return _ask(place, path, timeout_s, MAX_RUNS_BYTES).values


@dataclass(frozen=True, kw_only=True, slots=True)
class JobPlace:
    """Where a cluster takes jobs.

    Attributes:
        address: `http://HOST:PORT` of Ray's job server.
        python: of the head, where jobs run: it has Atoll.
        folder: in which `atoll up` was started there.
    """

    address: str
    python: str
    folder: str


def job_place(place: JoinString, timeout_s: float = CALL_S) -> JobPlace:
    """Ask where jobs are taken; the server is started for the first who asks. Raises as `visit` does."""
    values = _ask(place, "/jobs", timeout_s).values
    return JobPlace(address=str(values["address"]), python=str(values["python"]), folder=str(values["folder"]))


def reach(place: JoinString, port: int, timeout_s: float = TIMEOUT_S) -> Reach:
    """Let the door dial a port of this machine; raises as `visit` does."""
    values = _ask(place, f"/reach?port={port}", timeout_s).values
    return Reach(host=values["host"], port=values["port"], reached=values["reached"] is True, why=values["why"])


def way_back(place: JoinString, my_address: str, timeout_s: float = TIMEOUT_S) -> Reach:
    """Listen for a moment and let the door dial; raises as `visit` does."""
    with socket.create_server((my_address, 0), family=_family(my_address)) as listener:
        return reach(place, listener.getsockname()[1], timeout_s)


def measure_link(place: JoinString, num_bytes: int, *, warm_s: float = WARM_S, limit_s: float = LIMIT_S) -> float:
    """Let the door send up to that many bytes for up to `limit_s`; returns bytes per second. Raises as `visit` does.

    What comes in the first `warm_s` is not counted, unless it is all: one connection begins slowly on a long way.
    """
    visitor_nonce = secrets.token_hex(16)
    path = f"/bytes?num={num_bytes}"
    headers = _headers(place, visitor_nonce, _greet(place, visitor_nonce, TIMEOUT_S), path)
    with _Connection(place, TIMEOUT_S) as connection:
        response = connection.get(path, headers)
        if response.status != 200:
            _check_status(place, response.status, connection.read(response, MAX_ANSWER_BYTES))
        started, read, warm = time.monotonic(), 0, (0.0, 0)
        while True:
            chunk = connection.read(response, min(num_bytes - read, CHUNK_BYTES))
            read, passed = read + len(chunk), time.monotonic() - started
            if read == num_bytes or passed > limit_s:
                return (read - warm[1]) / max(passed - warm[0], 1e-6)
            if not chunk:
                raise _unreachable(place, f"it stopped sending after {read} of {num_bytes} bytes")
            if warm == (0.0, 0) and passed > warm_s:
                warm = (passed, read)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answer:
    values: dict[str, Any]
    middle_s: float
    round_trip_s: float
    my_address: str


def _ask(place: JoinString, path: str, timeout_s: float, most_bytes: int = MAX_ANSWER_BYTES) -> _Answer:
    visitor_nonce = secrets.token_hex(16)
    door_nonce = _greet(place, visitor_nonce, timeout_s)
    with _Connection(place, timeout_s) as connection:
        sent, started = time.time(), time.monotonic()
        response = connection.get(path, _headers(place, visitor_nonce, door_nonce, path))
        round_trip_s = time.monotonic() - started
        body = connection.read(response, most_bytes)
        _check_status(place, response.status, body)
        right = proof.answer_proof(place.token, visitor_nonce, door_nonce, body)
        if not proof.is_same(response.headers.get(proof.PROOF_HEADER, ""), right):
            raise _not_proven(place)
        return _Answer(
            values=_json(place, body),
            middle_s=sent + round_trip_s / 2,
            round_trip_s=round_trip_s,
            my_address=connection.my_address,
        )


def _greet(place: JoinString, visitor_nonce: str, timeout_s: float) -> str:
    with _Connection(place, timeout_s) as connection:
        response = connection.get(f"/hello?nonce={visitor_nonce}", {})
        values = _json(place, connection.read(response, MAX_ANSWER_BYTES))
    if values.get("door") != "atoll":
        raise _no_door(place)
    if values.get("protocol") != PROTOCOL_VERSION:
        raise _another_protocol(
            place, f"it speaks protocol {str(values.get('protocol'))[:20]}, this is {PROTOCOL_VERSION}"
        )
    nonce, given = str(values.get("nonce", "")), str(values.get("proof", ""))
    if not proof.NONCE_FORM.fullmatch(nonce):
        raise _no_door(place)
    if not proof.is_same(given, proof.door_proof(place.token, visitor_nonce, nonce)):
        raise _not_proven(place)
    return nonce


def _headers(place: JoinString, visitor_nonce: str, door_nonce: str, path: str) -> dict[str, str]:
    return {
        proof.NONCE_HEADER: door_nonce,
        proof.VISITOR_NONCE_HEADER: visitor_nonce,
        proof.PROOF_HEADER: proof.visitor_proof(place.token, visitor_nonce, door_nonce, path),
    }


class _Connection:
    """One request; what goes wrong with it becomes `ClusterUnreachable`."""

    def __init__(self, place: JoinString, timeout_s: float) -> None:
        self._place = place
        self._http = http.client.HTTPConnection(place.host, place.port, timeout=timeout_s)
        self.my_address = ""

    def __enter__(self) -> _Connection:
        try:
            self._http.connect()
        except TimeoutError as error:
            raise _unreachable(self._place, f"no answer within {self._http.timeout:g} s") from error
        except OSError as error:
            raise _unreachable(self._place, error.strerror or str(error)) from error
        self.my_address = self._http.sock.getsockname()[0]
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, path: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        try:
            self._http.request("GET", path, headers=headers)
            return self._http.getresponse()
        except http.client.HTTPException as error:
            raise _no_door(self._place) from error
        except OSError as error:
            raise _unreachable(self._place, f"connected, then: {error}") from error

    def read(self, response: http.client.HTTPResponse, num_bytes: int) -> bytes:
        try:
            return response.read(num_bytes)
        except (OSError, http.client.HTTPException) as error:
            raise _unreachable(self._place, f"connected, then: {error}") from error


def _check_status(place: JoinString, status: int, body: bytes) -> None:
    if status == 200:
        return
    reason = str(_json(place, body).get("error", f"status {status}"))[:1000]
    if status == http.client.SERVICE_UNAVAILABLE:
        raise ClusterUnreachable(reason, place=place.door, remedy="see supervisor.log and job_server.log there")
    raise UserError(f"the door refuses: {reason}", place=place.door, remedy="copy the line that `atoll up` printed")


def _json(place: JoinString, body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body)
    except ValueError as error:
        raise _no_door(place) from error
    if not isinstance(values, dict):
        raise _no_door(place)
    return values


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _unreachable(place: JoinString, why: str) -> ClusterUnreachable:
    return ClusterUnreachable(
        f"the cluster's door does not answer: {why}",
        place=place.door,
        remedy="see that `atoll up` runs there, and that a firewall lets its port through (atoll doctor says which)",
    )


def _no_door(place: JoinString) -> ClusterUnreachable:
    return ClusterUnreachable(
        "something answers there, but it is no door of Atoll",
        place=place.door,
        remedy="use the address and port of the line that `atoll up` printed; Ray's own port is another one",
    )


def _not_proven(place: JoinString) -> UserError:
    return UserError(
        "the token is not that of this cluster",
        place=place.door,
        remedy="copy the line that `atoll up` printed; a cluster that was started anew has a new token",
    )


def _another_protocol(place: JoinString, what: str) -> UserError:
    return UserError(
        f"the cluster runs another version of Atoll: {what}",
        place=place.door,
        remedy="install the same version on all machines",
    )
