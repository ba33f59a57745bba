"""What one machine needs to join a cluster, as one line of text: `atoll://TOKEN@HOST:PORT`."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field

from orchestrator.errors import UserError

SCHEME = "atoll://"
FORM = "atoll://TOKEN@HOST:PORT"
TOKEN_FORM = re.compile(r"[0-9a-f]{64}")
HOST_FORM = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,252})")


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinString:
    """A cluster's door, and the token that it asks for.

    Attributes:
        host: name or address, an IPv6 address without brackets.
        port: of the door, not of Ray.
        token: 64 hexadecimal digits; not shown in `repr`.
    """

    host: str
    port: int
    token: str = field(repr=False)

    def __str__(self) -> str:
        return f"{SCHEME}{self.token}@{self.door}"

    @property
    def door(self) -> str:
        """`HOST:PORT`, which may be shown to anybody."""
        return format_address(self.host, self.port)


def parse(text: str) -> JoinString:
    """Read `atoll://TOKEN@HOST:PORT`. Errors never repeat the token.

    Raises:
        UserError: it has another form.
    """
    if not text.startswith(SCHEME):
        raise UserError(
            f"this is no join string: it does not begin with {SCHEME}",
            remedy=f"copy the line that `atoll up` printed; it has the form {FORM}",
        )
    token, separator, door = text.removeprefix(SCHEME).rpartition("@")
    if not separator:
        raise UserError("the join string has no token", remedy=f"it has the form {FORM}")
    host, port = parse_address(door)
    return JoinString(host=host, port=port, token=check_token(token, place="the join string"))


def check_token(token: str, *, place: str) -> str:
    """The token, if it has the form of one.

    Raises:
        UserError: it has not; the message says how long it is, not what it is.
    """
    token = token.strip()
    if not TOKEN_FORM.fullmatch(token):
        raise UserError(
            f"a token is 64 hexadecimal digits, this is something else of {len(token)} characters",
            place=place,
            remedy="copy the whole line that `atoll up` printed",
        )
    return token


def parse_address(text: str) -> tuple[str, int]:
    """Read `HOST:PORT` or `[IPv6]:PORT`.

    Raises:
        UserError: it has another form.
    """
    host, separator, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if not separator or not (_is_ipv6(host) if bracketed else HOST_FORM.fullmatch(host)):
        raise UserError(
            f"{text!r} is not of the form HOST:PORT", remedy="an IPv6 address stands in brackets: [::1]:4321"
        )
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise UserError(f"{port!r} is no port", place=text, remedy="a number from 1 to 65535")
    return host, int(port)


def format_address(host: str, port: int) -> str:
    """`HOST:PORT`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False
