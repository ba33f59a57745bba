"""Errors that the command line reports in one message, with the exit code of each."""

from __future__ import annotations

from typing import ClassVar


class UserError(ValueError):
    """A mistake of the user, or a condition only the user can change: reported without a traceback.

    Args:
        message: what is wrong, with the name of the setting and its value.
        place: where it was found (file and line, `--set`, a folder), or None.
        remedy: what to do about it; never empty, so that nobody is left with a message alone.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str, *, remedy: str, place: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.place = place
        self.remedy = remedy

    def __str__(self) -> str:
        notes = [f"place: {self.place}"] if self.place else []
        notes.append(f"try: {self.remedy}")
        return f"{self.message} ({'; '.join(notes)})"

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.place, self.remedy))


def _rebuild(kind: type[UserError], message: str, place: str | None, remedy: str) -> UserError:
    return kind(message, place=place, remedy=remedy)


class RunFailed(UserError):
    """A run ended without reaching its end; the summary has the reason."""

    exit_code: ClassVar[int] = 1


class ClusterUnreachable(UserError):
    """The Ray cluster that the configuration names does not answer."""

    exit_code: ClassVar[int] = 4


class VerificationFailed(UserError):
    """A check of what a run wrote (journal, ledger, digests) found a contradiction."""

    exit_code: ClassVar[int] = 5
