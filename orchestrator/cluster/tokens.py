"""Where the token of a cluster comes from, and how it stays out of the process list."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from orchestrator.cluster.join_string import SCHEME, JoinString, check_token, parse, parse_address
from orchestrator.errors import UserError

TOKEN_VARIABLE = "ATOLL_TOKEN"
HANDED_OVER = "handed-over"
MAX_FILE_BYTES = 4096


def new_token() -> str:
    """256 random bits, in the form that Ray takes as its own token."""
    return secrets.token_hex(32)


def read_place(argument: str, token_file: Path | None, environ: Mapping[str, str]) -> JoinString:
    """The place that `STRING` or `HOST:PORT` names, with the token from the string, `token_file` or `ATOLL_TOKEN`.

    Raises:
        UserError: the argument has another form, or there is no token.
    """
    if argument.startswith(SCHEME) or "@" in argument:  # no address has one: a join string without its beginning
        return parse(argument)
    host, port = parse_address(argument)
    if token_file is not None:
        return JoinString(host=host, port=port, token=read_token_file(token_file))
    if token := environ.get(TOKEN_VARIABLE):
        return JoinString(host=host, port=port, token=check_token(token, place=TOKEN_VARIABLE))
    raise UserError(
        f"{argument} says where the cluster is, its token is missing",
        remedy=f"give the whole join string, --token-file FILE, or set {TOKEN_VARIABLE}",
    )


def read_token_file(path: Path) -> str:
    """The token in a file; a file that `hide_token` wrote is removed.

    Raises:
        UserError: there is no such file, or no token in it.
    """
    try:
        with path.open(encoding="ascii", errors="replace") as file:
            text = file.read(MAX_FILE_BYTES)
    except OSError as error:
        raise UserError(
            f"the token cannot be read: {error.strerror}",
            place=str(path),
            remedy=f"a file that this user can read, with the token of the join string in it; or {TOKEN_VARIABLE}",
        ) from error
    if path.parent.name == HANDED_OVER:
        path.unlink(missing_ok=True)
        with suppress(OSError):
            path.parent.rmdir()
    return check_token(text, place=str(path))


def write_token(path: Path, token: str) -> None:
    """Write a token where only this user can read it."""
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w", encoding="ascii") as file:
        file.write(token)


def hide_token(place: JoinString, arguments: Sequence[str], state_root: Path) -> list[str]:
    """The command line of this process without its token, which is in a file of the user's from now on."""
    folder = state_root / HANDED_OVER
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / secrets.token_hex(8)
    write_token(path, place.token)
    return without_token(arguments, place, path)


def without_token(arguments: Sequence[str], place: JoinString, token_file: Path) -> list[str]:
    """The same command with `HOST:PORT` and `--token-file` instead of the join string."""
    shown: list[str] = []
    for argument in arguments:
        option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        if value == str(place):
            shown += [f"{option}{equals}{place.door}", "--token-file", str(token_file)]
        else:
            shown.append(argument)
    assert not any(place.token in argument for argument in shown), "the token is in another argument too"
    return shown
