"""What an exchange asks for: frozen values that the coordinator carries out in order."""

from __future__ import annotations

from dataclasses import dataclass

from workers import messages as msg
from workers.records import MemberId, Record


@dataclass(frozen=True, kw_only=True, slots=True)
class ToAll:
    """Send a body to every live member."""

    body: msg.ControllerBody


@dataclass(frozen=True, kw_only=True, slots=True)
class ToOne:
    """Send a body (or, with `None`, only the journal rows it lacks) to one member."""

    member: MemberId
    body: msg.ControllerBody | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ToSome:
    """Send bodies to some members."""

    members: tuple[MemberId, ...]
    bodies: tuple[msg.ControllerBody, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Journal:
    """Append a record; whoever hears of it hears after the flush."""

    record: Record


@dataclass(frozen=True, kw_only=True, slots=True)
class Fence:
    """End an incarnation."""

    member: MemberId
    why: str
    refused: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Blame:
    """A member gave a wrong answer about a part that it worked on for others."""

    member: MemberId
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Drop:
    """Drop a living member's uncommitted work by rule."""

    member: MemberId
    upto: int
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """A decision with its reason, for the log; `fault` when something misbehaved."""

    text: str
    fault: str = ""
    member: str = ""


Effect = ToAll | ToOne | ToSome | Journal | Fence | Blame | Drop | Note
