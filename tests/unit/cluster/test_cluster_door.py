from __future__ import annotations

import http.client
import json
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

import pytest

from orchestrator.cluster import door as doors
from orchestrator.cluster import door_client, proof
from orchestrator.cluster.door import Door, Nonces
from orchestrator.cluster.join_string import JoinString
from orchestrator.cluster.tokens import new_token
from orchestrator.cluster.versions import my_versions
from orchestrator.errors import ClusterUnreachable, UserError

pytestmark = pytest.mark.timeout(20)

HOST = "127.0.0.1"
TOKEN = new_token()
INFO = {"versions": asdict(my_versions()), "gcs_address": "127.0.0.2:6379", "wan": True}


@pytest.fixture(autouse=True)
def quick_to_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors, "POLL_S", 0.02)


@pytest.fixture
def place() -> Iterator[JoinString]:
    door = Door(token=TOKEN, info=lambda: INFO, host=HOST)
    door.start()
    try:
        yield JoinString(host=HOST, port=door.port, token=TOKEN)
    finally:
        door.close()


def raw(place: JoinString, data: bytes) -> bytes:
    """Everything that the door answers to some bytes."""
    with socket.create_connection((place.host, place.port), timeout=10) as line:
        line.sendall(data)
        answer = b""
        try:
            while chunk := line.recv(65536):
                answer += chunk
        except ConnectionResetError:
            pass
        return answer


def get(place: JoinString, path: str, headers: dict[str, str]) -> tuple[int, dict[str, object]]:
    connection = http.client.HTTPConnection(place.host, place.port, timeout=10)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    values = json.loads(response.read())
    connection.close()
    return response.status, values


def signed(place: JoinString, path: str, token: str = TOKEN) -> dict[str, str]:
    visitor = secrets.token_hex(16)
    _, hello = get(place, f"/hello?nonce={visitor}", {})
    nonce = str(hello["nonce"])
    return {
        proof.NONCE_HEADER: nonce,
        proof.VISITOR_NONCE_HEADER: visitor,
        proof.PROOF_HEADER: proof.visitor_proof(token, visitor, nonce, path),
    }


@contextmanager
def fake_door(answer: Callable[[bytes], bytes | None]) -> Iterator[JoinString]:
    """Something that listens, and answers a request with bytes; None: never."""
    with socket.create_server((HOST, 0)) as listener:
        held: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    line, _ = listener.accept()
                except OSError:
                    return
                reply = answer(line.recv(65536))
                if reply is None:
                    held.append(line)
                    continue
                line.sendall(reply)
                line.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield JoinString(host=HOST, port=listener.getsockname()[1], token=TOKEN)
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(timeout=10)
            for line in held:
                line.close()
            assert not thread.is_alive()


# ---------------------------------------------------------------- with the token


def test_a_visitor_learns_of_the_cluster(place: JoinString) -> None:
    info = door_client.visit(place)
    assert info.versions == my_versions()
    assert info.gcs_address == "127.0.0.2:6379"
    assert info.wan
    assert info.my_address == HOST
    assert abs(info.clock_offset_s) <= info.round_trip_s / 2 + 0.1


def test_the_way_back_is_dialled(place: JoinString) -> None:
    assert door_client.way_back(place, HOST).reached
    with socket.create_server((HOST, 0)) as server:
        closed = server.getsockname()[1]
    result = door_client.reach(place, closed)
    assert not result.reached
    assert "refused" in result.why


def test_bytes_come_for_the_speed_of_the_link(place: JoinString) -> None:
    assert door_client.measure_link(place, 300_001) > 300_001 / 10
    assert door_client.measure_link(place, doors.MAX_TRANSFER_BYTES, warm_s=0.0, limit_s=0.0) > 0
    with pytest.raises(UserError, match="num is a number from 1 to"):
        door_client.measure_link(place, doors.MAX_TRANSFER_BYTES + 1)


def test_the_token_is_never_sent() -> None:
    seen = []

    def answer(request: bytes) -> bytes:
        seen.append(request)
        return b"HTTP/1.0 500 no\r\nContent-Length: 2\r\n\r\n{}"

    with fake_door(answer) as place, pytest.raises(ClusterUnreachable):
        door_client.visit(place)
    assert seen
    assert not any(TOKEN.encode() in request for request in seen)


# ---------------------------------------------------------------- without it


def test_a_wrong_token_is_refused_on_both_sides(place: JoinString) -> None:
    with pytest.raises(UserError, match="the token is not that of this cluster") as caught:
        door_client.visit(replace(place, token=new_token()))
    assert caught.value.exit_code == 2
    assert caught.value.place == place.door
    status, values = get(place, "/info", signed(place, "/info", token=new_token()))
    assert status == 403
    assert values["error"] == "the token is not that of this cluster"


@pytest.mark.parametrize("path", ["/info", "/reach?port=1", "/bytes?num=1", "/nothing"])
def test_nothing_is_answered_without_a_proof(place: JoinString, path: str) -> None:
    status, values = get(place, path, {})
    assert status == 403
    assert values["error"] == "this needs a proof of the cluster's token"
    assert "gcs_address" not in values


def test_a_proof_is_good_for_one_request_and_for_none_other(place: JoinString) -> None:
    headers = signed(place, "/info")
    assert get(place, "/reach?port=1", headers)[0] == 403
    headers = signed(place, "/info")
    assert get(place, "/info", headers)[0] == 200
    status, values = get(place, "/info", headers)
    assert status == 403
    assert values["error"] == "this proof was used before, or is too old"


def test_what_the_door_signs_is_no_proof_of_a_visitor(place: JoinString) -> None:
    visitor = secrets.token_hex(16)
    _, hello = get(place, f"/hello?nonce={visitor}", {})
    stolen = {
        proof.NONCE_HEADER: str(hello["nonce"]),
        proof.VISITOR_NONCE_HEADER: visitor,
        proof.PROOF_HEADER: str(hello["proof"]),
    }
    assert get(place, "/info", stolen)[0] == 403


def test_a_door_that_repeats_what_it_is_told_proves_nothing() -> None:
    body = json.dumps({"door": "atoll", "protocol": 1, "nonce": "0" * 32, "proof": "0" * 64}).encode()
    with fake_door(lambda _: b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body) as place:
        with pytest.raises(UserError, match="the token is not that of this cluster"):
            door_client.visit(place)


def test_nonces_are_used_once_grow_old_and_are_bounded() -> None:
    now = [0.0]
    nonces = Nonces(lambda: now[0])
    first = nonces.issue()
    assert nonces.use_up(first)
    assert not nonces.use_up(first)
    old = nonces.issue()
    now[0] = doors.NONCE_LIFE_S + 1
    assert not nonces.use_up(old)
    forgotten = nonces.issue()
    for _ in range(doors.MAX_NONCES):
        nonces.issue()
    assert not nonces.use_up(forgotten)


# ---------------------------------------------------------------- garbage


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00garbage\r\n\r\n",
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\xff" * 100 + b"\n\n",
    ],
)
def test_garbage_does_no_harm(place: JoinString, data: bytes) -> None:
    raw(place, data)
    assert door_client.visit(place).wan


@pytest.mark.parametrize("query", ["", "?nonce=", "?nonce=xyz", f"?nonce={'A' * 32}", f"?nonce={'0' * 33}"])
def test_a_nonce_has_one_form(place: JoinString, query: str) -> None:
    assert get(place, f"/hello{query}", {})[0] == 400


def test_other_methods_are_refused(place: JoinString) -> None:
    assert b" 501 " in raw(place, b"POST /info HTTP/1.0\r\nContent-Length: 999999999\r\n\r\n").splitlines()[0]


@pytest.mark.parametrize(
    "data",
    [
        b"GET /hello?nonce=" + b"a" * 100_000 + b" HTTP/1.0\r\n\r\n",
        b"GET /info HTTP/1.0\r\n" + b"A: b\r\n" * 20_000 + b"\r\n",
        b"GET /info HTTP/1.0\r\nA: " + b"b" * 100_000 + b"\r\n\r\n",
    ],
)
def test_an_oversized_request_is_cut_off(place: JoinString, data: bytes) -> None:
    answer = raw(place, data)
    assert b" 200 " not in answer.partition(b"\r\n")[0]
    assert door_client.visit(place).wan


def test_slow_visitors_are_hung_up_on_and_do_not_keep_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors, "REQUEST_S", 0.5)
    door = Door(token=TOKEN, info=lambda: INFO, host=HOST)
    door.start()
    place = JoinString(host=HOST, port=door.port, token=TOKEN)
    lines = [socket.create_connection((HOST, door.port), timeout=10) for _ in range(doors.MAX_VISITS + 4)]
    try:
        for line in lines[: doors.MAX_VISITS]:
            line.sendall(b"GET /info HT")
        for line in lines:
            try:
                assert line.recv(1) == b""
            except ConnectionResetError:
                pass
        assert door_client.visit(place).wan
    finally:
        for line in lines:
            line.close()
        door.close()


def test_closing_hangs_up_and_frees_the_port(place: JoinString) -> None:
    door = Door(token=TOKEN, info=lambda: INFO, host=HOST)
    door.start()
    with socket.create_connection((HOST, door.port), timeout=10) as line:
        door_client.visit(replace(place, port=door.port))
        door.close()
        assert line.recv(1) == b""
    again = Door(token=TOKEN, info=lambda: INFO, host=HOST, port=door.port)
    again.start()
    again.close()


# ---------------------------------------------------------------- what a client meets


def test_nobody_listens() -> None:
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ClusterUnreachable, match="refused") as caught:
        door_client.visit(JoinString(host=HOST, port=port, token=TOKEN))
    assert caught.value.exit_code == 4
    assert caught.value.place == f"{HOST}:{port}"
    assert "atoll up" in str(caught.value.remedy)


def test_somebody_listens_and_says_nothing() -> None:
    with fake_door(lambda _: None) as place, pytest.raises(ClusterUnreachable, match="timed out"):
        door_client.visit(place, timeout_s=0.2)


@pytest.mark.parametrize(
    "reply",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
        b'HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n{"door": "no"}',
        b"",
    ],
)
def test_something_else_answers(reply: bytes) -> None:
    with fake_door(lambda _: reply) as place, pytest.raises(ClusterUnreachable) as caught:
        door_client.visit(place)
    assert "no door of Atoll" in caught.value.message or "connected, then" in caught.value.message


def test_an_endless_answer_is_not_read_to_its_end() -> None:
    with fake_door(lambda _: b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n" + b" " * 70_000) as place:
        with pytest.raises(ClusterUnreachable, match="no door of Atoll"):
            door_client.visit(place)


def test_a_door_of_another_protocol() -> None:
    body = json.dumps({"door": "atoll", "protocol": 2}).encode()
    with fake_door(lambda _: b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body) as place:
        with pytest.raises(UserError, match="it speaks protocol 2, this is 1") as caught:
            door_client.visit(place)
    assert caught.value.remedy == "install the same version on all machines"
