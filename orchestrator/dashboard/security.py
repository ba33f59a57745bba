"""Who may ask a dashboard for what. Pure functions and one frozen value.

A page in the same browser is the likely attacker: it can send requests to 127.0.0.1 (cross-site POST), and by DNS
rebinding even read answers. So every request must name this server as its Host, everything about the run needs the
session, and what changes something must come from our own page.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import platform
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")
EVERYWHERE = ("0.0.0.0", "::")
HTTP_PORT = 80  # left out of Host and Origin


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """The checks of one server.

    `hosts`: what a Host header may be; `token`: what the printed link carries; `any_address`: the server listens at all
    addresses of its machine, so that any of them may be its Host. Rebinding needs a name, which no address is.
    """

    token: str
    hosts: frozenset[str]
    cookie: str
    port: int
    any_address: bool = False

    @property
    def session(self) -> str:
        """What the cookie holds: made from the token, which cannot be had from it."""
        return hmac.new(self.token.encode(), b"atoll dashboard session", hashlib.sha256).hexdigest()

    def host_is_ours(self, host: str | None) -> bool:
        """Whether a request means this server."""
        if host is None:
            return False
        return host.lower() in self.hosts or (self.any_address and _is_address(host, self.port))

    def may_enter(self, token: object) -> bool:
        """Whether this is the token of the link."""
        return isinstance(token, str) and same(token, self.token)

    def is_known(self, cookies: Mapping[str, str], authorization: str | None) -> bool:
        """Whether a request has the session cookie, or the token as a bearer (for programs)."""
        if authorization is not None:
            kind, _, token = authorization.partition(" ")
            return kind.lower() == "bearer" and self.may_enter(token)
        return same(cookies.get(self.cookie, ""), self.session)

    def is_our_page(self, host: str, origin: str | None, site: str | None, authorization: str | None) -> bool:
        """Whether a request that changes something was sent by our page, or by a program that knows the token.

        `host`: its Host header, which `host_is_ours`.
        """
        if site is not None and site != "same-origin":
            return False
        if origin is None:
            return authorization is not None
        return origin.lower() in {f"http://{name}" for name in (*self.hosts, host.lower())}


def same(given: str, right: str) -> bool:
    """Compare in a time that does not depend on where they differ; `given` may hold what is no character."""
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), right.encode())


def make_gate(host: str, port: int, token: str | None = None) -> Gate:
    """The gate of a server at `host:port`; a new token of 256 bits unless one is given."""
    names = {*LOOPBACK_NAMES, name_of(host).lower()}
    hosts = {f"{name}:{port}" for name in names} | (names if port == HTTP_PORT else set())
    return Gate(
        token=token or secrets.token_urlsafe(32),
        hosts=frozenset(hosts),
        cookie=f"atoll-{port}",  # cookies know no ports: two dashboards must not take each other's
        port=port,
        any_address=host in EVERYWHERE,
    )


def name_of(host: str) -> str:
    """How others write the address that a server listens at: this machine's name where it listens at all of them."""
    if host in EVERYWHERE:
        return platform.node() or "localhost"
    return f"[{host}]" if ":" in host else host


def _is_address(host: str, port: int) -> bool:
    """Whether a Host header is an address, no name, with this port."""
    address, _, given = host.rpartition(":") if not host.endswith("]") and ":" in host else (host, "", str(HTTP_PORT))
    try:
        ipaddress.ip_address(address.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return given == str(port)
