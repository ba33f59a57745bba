"""What goes wrong with a lab, in words for whoever asked for it."""

from __future__ import annotations


class LabError(ValueError):
    """A lab that cannot be made or does not understand what it is asked; says what would be right.

    Args:
        message: what is wrong, with the name and the value.
        place: where it was found, or None.
        remedy: what to do about it, or None.
    """

    def __init__(self, message: str, *, place: str | None = None, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.place = place
        self.remedy = remedy

    def __str__(self) -> str:
        notes = [f"place: {self.place}"] if self.place else []
        notes += [f"try: {self.remedy}"] if self.remedy else []
        return f"{self.message} ({'; '.join(notes)})" if notes else self.message

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.message, self.place, self.remedy))


def _rebuild(message: str, place: str | None, remedy: str | None) -> LabError:
    return LabError(message, place=place, remedy=remedy)
