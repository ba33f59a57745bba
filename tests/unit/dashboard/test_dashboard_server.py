"""Who may ask the server for what: over real sockets, with raw requests where a client would be too polite."""

from __future__ import annotations

import http.client
import json
import platform
import random
import socket
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from orchestrator.dashboard.security import make_gate
from orchestrator.dashboard.serve import on_thread
from orchestrator.dashboard.server import MAX_BODY_BYTES, Dashboard
from orchestrator.dashboard.sources import FileSource
from tests.unit.dashboard.synthetic_journal import write_run
from tests.unit.report.synthetic_run import SyntheticRun

NUM_RANDOM = 10_000


class Recorder(FileSource):
    """A run that can be acted on: every action that comes through is noted."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir)
        self.acted: list[tuple[str, str, str]] = []

    def able(self) -> tuple[str, ...]:
        return ("stop", "drain", "save")

    def act(self, action: str, member: str, by: str) -> str:
        self.acted.append((action, member, by))
        return "asked"


@dataclass(frozen=True, kw_only=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True, kw_only=True)
class Server:
    source: Recorder
    dashboard: Dashboard
    port: int
    token: str
    host: str = "127.0.0.1"
    cookie: dict[str, str] = field(default_factory=dict)

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)) as connection:
            named = {key.replace("_", "-"): value for key, value in headers.items()}
            connection.request(method, path, body, {"Host": f"127.0.0.1:{self.port}", **named})
            answer = connection.getresponse()
            return Answer(
                status=answer.status, headers={k.lower(): v for k, v in answer.getheaders()}, body=answer.read()
            )

    def act(self, body: object = None, **headers: str) -> Answer:
        """As our page would ask, except for `headers`."""
        given = {"Content_Type": "application/json", "Origin": self.origin, "Cookie": self.session, **headers}
        data = json.dumps({"action": "stop", "member": ""} if body is None else body).encode()
        return self.ask("POST", "/api/act", data, **{key: value for key, value in given.items() if value})

    @property
    def session(self) -> str:
        assert self.dashboard.gate is not None
        return f"{self.dashboard.gate.cookie}={self.dashboard.gate.session}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    run_dir = write_run(SyntheticRun(rounds=6, inner_steps=4, kill_round=3), tmp_path_factory.mktemp("web") / "run")
    source = Recorder(run_dir)
    dashboard = Dashboard(source)
    with on_thread(dashboard) as link:
        parts = urlsplit(link)
        assert parts.port is not None
        yield Server(source=source, dashboard=dashboard, port=parts.port, token=parts.fragment.removeprefix("token="))


@pytest.fixture(autouse=True)
def nothing_acted(server: Server) -> Iterator[None]:
    server.source.acted.clear()
    yield
    server.source.acted.clear()


def test_the_link_opens_the_door_and_its_cookie_stays_inside(server: Server) -> None:
    answer = server.ask(
        "POST", "/api/login", json.dumps({"token": server.token}).encode(), Content_Type="application/json",
        Origin=server.origin,
    )  # fmt: skip
    assert answer.status == 200
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and server.token not in cookie
    name, _, value = cookie.split(";")[0].partition("=")
    assert server.ask("GET", "/api/run", Cookie=f"{name}={value}").status == 200
    assert server.ask("GET", "/api/run", Authorization=f"Bearer {server.token}").status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/api/run",
        "/api/series?from=0&to=1&bins=9",
        "/api/timeline?from=0&to=1&bins=9",
        "/api/events",
        "/api/links?at=1",
    ],
)
def test_without_the_token_nothing_of_the_run_is_told(path: str, server: Server) -> None:
    for headers in (
        {},
        {"Cookie": f"atoll-{server.port}=guess"},
        {"Authorization": "Bearer guess"},
        {"Authorization": server.token},
    ):
        answer = server.ask("GET", path, **headers)
        assert answer.status == 401 and b"island" not in answer.body


def test_a_wrong_token_does_not_open(server: Server) -> None:
    for token in ("", "x", server.token[:-1], None, 7, ["a"], "\ud800"):
        body = json.dumps({"token": token}).encode()
        answer = server.ask("POST", "/api/login", body, Content_Type="application/json", Origin=server.origin)
        assert answer.status == 401 and "set-cookie" not in answer.headers


def test_another_host_name_is_refused_even_with_the_session(server: Server) -> None:
    for host in (
        "evil.example",
        f"evil.example:{server.port}",
        "127.0.0.1",
        "localhost:1",
        f"127.0.0.1.evil.example:{server.port}",
        "",
    ):
        assert server.ask("GET", "/api/run", Host=host, Cookie=server.session).status == 403
        assert server.ask("GET", "/", Host=host).status == 403
    assert server.ask("GET", "/api/run", Host=f"localhost:{server.port}", Cookie=server.session).status == 200


def test_only_our_own_page_may_act(server: Server) -> None:
    refused = [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": ""},  # none
        {"Origin": f"https://127.0.0.1:{server.port}"},
        {"Origin": f"http://127.0.0.1:{server.port + 1}"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Host": "evil.example"},
    ]
    for headers in refused:
        assert server.act(**headers).status == 403, headers
    assert server.act(Cookie="").status == 401
    assert server.act(Cookie=f"atoll-{server.port}=0").status == 401
    assert server.act(Content_Type="text/plain").status == 415  # what a form of another site could send
    assert server.ask("GET", "/api/act", Cookie=server.session).status == 405
    assert server.source.acted == []


def test_an_action_is_passed_on_with_who_asked(server: Server) -> None:
    assert server.act({"action": "drain", "member": "island-1"}).status == 200
    assert server.act(Origin="", Cookie="", Authorization=f"Bearer {server.token}").status == 200
    assert server.source.acted == [
        ("drain", "island-1", "dashboard, 127.0.0.1"),
        ("stop", "", "dashboard, 127.0.0.1"),
    ]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"action": "kill", "member": "island-1"}, 409),
        ({"action": "__init__"}, 409),
        ({"action": ["stop"]}, 400),
        ({"action": "stop", "member": {}}, 400),
        (["stop"], 400),
        ({}, 400),
    ],
)
def test_what_is_no_action_is_refused(body: object, status: int, server: Server) -> None:
    answer = server.act(body)
    assert answer.status == status and json.loads(answer.body)["error"]
    assert server.source.acted == []


def test_a_body_without_end_is_refused(server: Server) -> None:
    answer = server.act({"action": "stop", "member": "x" * 2 * MAX_BODY_BYTES})
    assert answer.status == 413 and server.source.acted == []


@pytest.mark.parametrize(
    "query",
    [
        "",
        "?from=0&to=1",
        "?from=0&to=1&bins=1e9",
        "?from=nan&to=1&bins=9",
        "?from=2&to=1&bins=9",
        "?from=0&to=1e300&bins=9",
        "?from=0&to=1&bins=0",
        "?from=a&to=1&bins=9",
        "?from=0&to=inf&bins=4",
    ],
)
def test_windows_that_make_no_sense_are_refused(query: str, server: Server) -> None:
    assert server.ask("GET", f"/api/series{query}", Cookie=server.session).status == 400


TRAVERSALS = [
    "/static/../server.py",
    "/static/..%2fserver.py",
    "/static/%2e%2e/%2e%2e/actors.py",
    "/static//etc/passwd",
    "//etc/passwd",
    "/static/....//server.py",
    "/../../../../etc/passwd",
    "/static/uplot.LICENSE/../../book.py",
    "/static/%00",
    "/static/",
    "/static/..\\server.py",
    "/%2e%2e/%2e%2e/etc/passwd",
    "/static/index.html/../../server.py",
]


@pytest.mark.parametrize("path", TRAVERSALS)
def test_no_path_leads_to_another_file(path: str, server: Server) -> None:
    for cookie in ("", server.session):
        request = (
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nCookie: {cookie}\r\nConnection: close\r\n\r\n"
        )
        answer = raw(server, request.encode())
        assert answer.split(b" ")[1] in (b"400", b"401", b"403", b"404"), answer[:200]
        assert b"import" not in answer and b"root:" not in answer


def raw(server: Server, data: bytes, *, complete: bool = True) -> bytes:
    """Send bytes and read to the end. What the server would wait for more of is ended by us."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(data)
        if not complete:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return answer


def test_the_page_allows_nothing_from_elsewhere(server: Server) -> None:
    page = server.ask("GET", "/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "script-src 'self'" in policy
    assert page.headers["x-content-type-options"] == "nosniff" and page.headers["referrer-policy"] == "no-referrer"
    assert b"<style" not in page.body and b"style=" not in page.body and b"onclick" not in page.body
    for path in server.dashboard._files:
        body = server.ask("GET", path).body
        assert b"://" not in body.replace(b"http://www.w3.org/", b"").replace(
            b"https://github.com/leeoniya/uPlot", b""
        ), path


def test_everything_that_is_served_has_its_licence(server: Server) -> None:
    from importlib import resources

    names = {file.name for file in resources.files("orchestrator.dashboard").joinpath("static").iterdir()}
    assert {"uplot.js", "uplot.css", "uplot.LICENSE"} <= names
    assert "/static/uplot.LICENSE" not in server.dashboard._files


def random_request(rng: random.Random, server: Server) -> tuple[bytes, bool]:
    """Something like a request: right and wrong methods, paths, heads and bodies, now and then plain noise.

    Also, whether it is complete.
    """
    if rng.random() < 0.05:
        return rng.randbytes(rng.randrange(1, 300)) + b"\r\n\r\n", False
    method = rng.choice(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "PATCH", "stop", "\x00"])
    known = ["/", "/api/act", "/api/login", "/api/run", "/api/events", "/api/series", "/static/app.js", *TRAVERSALS]
    path = rng.choice([*known, "/" + "".join(rng.choices("abc/%.?&=\\~#", k=rng.randrange(40)))])
    if path == "/api/events":
        path = "/api/eventz"
    heads = [f"Host: {rng.choice([f'127.0.0.1:{server.port}', 'evil.example', '', 'localhost'])}"]
    heads += rng.sample(
        [
            f"Origin: {server.origin}",
            "Origin: http://evil.example",
            "Content-Type: application/json",
            "Content-Type: text/plain",
            f"Cookie: atoll-{server.port}={rng.getrandbits(256):064x}",
            "Authorization: Bearer x",
            "Sec-Fetch-Site: cross-site",
            "Transfer-Encoding: chunked",
            "Expect: 100-continue",
            "X: " + "y" * rng.randrange(200),
        ],
        k=rng.randrange(6),
    )
    body = rng.choice(
        [b"", b'{"action":"stop","member":""}', b'{"token":"x"}', rng.randbytes(rng.randrange(64)), b"[" * 2000]
    )
    length = rng.choice([len(body), len(body), 0, 10**9, -1])
    heads.append(f"Content-Length: {length}")
    complete = length <= len(body) and not any(head.startswith(("Transfer", "Expect")) for head in heads)
    head = f"{method} {path} HTTP/1.1\r\n".encode() + "\r\n".join([*heads, "Connection: close", "", ""]).encode()
    return head + body, complete


@pytest.mark.slow
def test_ten_thousand_random_requests_change_nothing(server: Server) -> None:
    rng = random.Random(7)
    statuses: dict[int, int] = {}
    for _ in range(NUM_RANDOM):
        data, complete = random_request(rng, server)
        answer = raw(server, data, complete=complete)
        status = int(answer.split(b" ")[1]) if answer.startswith(b"HTTP/1.") else 0
        statuses[status] = statuses.get(status, 0) + 1
        assert b"island-" not in answer and b"set-cookie" not in answer.lower()
    assert server.source.acted == []
    assert {400, 401, 403} <= statuses.keys() and statuses.get(500, 0) == 0, statuses
    assert server.ask("GET", "/api/run", Cookie=server.session).status == 200


def test_events_bring_the_figures_and_then_what_changes(server: Server) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as connection:
        connection.request("GET", "/api/events", headers={"Cookie": server.session})
        answer = connection.getresponse()
        assert answer.status == 200 and answer.getheader("Content-Type") == "text/event-stream"
        first = read_event(answer)
        assert first["figures"]["num_members"] == 3
        with (server.source.run_dir.metrics).open("a") as file:
            file.write(
                '{"kind":"eval","t_s":99.0,"member":"island-0","version":1,"progress":1,"val_loss":0.5,"tokens_committed":1}\n'
            )
        changed = read_event(answer)
        assert changed["figures"]["val_loss"] == 0.5 and changed["version"] > first["version"]


def read_event(answer: http.client.HTTPResponse) -> dict[str, Any]:
    while not (line := answer.readline()).startswith(b"data: "):
        assert line, "the stream ended"
    event: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
    return event


def test_a_gate_names_every_way_to_write_its_host() -> None:
    gate = make_gate("box.example", 81)
    assert gate.host_is_ours("BOX.example:81") and gate.host_is_ours("[::1]:81")
    assert not gate.host_is_ours("box.example") and not gate.host_is_ours(None)
    assert make_gate("::1", 1).host_is_ours("[::1]:1")
    assert make_gate("box.example", 80).host_is_ours("box.example"), "browsers leave the port of HTTP out"
    assert len(gate.token) >= 43 and gate.token != make_gate("box.example", 81).token


@pytest.mark.parametrize("everywhere", ["0.0.0.0", "::"])
def test_a_server_at_all_addresses_takes_addresses_and_no_foreign_names(everywhere: str) -> None:
    gate = make_gate(everywhere, 81)
    for host in ("192.168.1.5:81", "[fe80::1]:81", f"{platform.node()}:81", "localhost:81"):
        assert gate.host_is_ours(host), host
    for host in (
        "evil.example:81",
        "192.168.1.5:82",
        "192.168.1.5",
        "[fe80::1]",
        "1.evil.example:81",
        "",
        ":81",
        "a:b:81",
    ):
        assert not gate.host_is_ours(host), host
    assert gate.is_our_page("192.168.1.5:81", "http://192.168.1.5:81", "same-origin", None)
    assert not gate.is_our_page("192.168.1.5:81", "http://192.168.1.6:81", None, None), "another machine's page"
    assert not make_gate("127.0.0.1", 81).host_is_ours("192.168.1.5:81")
