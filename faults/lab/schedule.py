"""Changes of links at given times: data that a fault plan can hold, and what is left of them to do. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from faults.lab.errors import LabError
from faults.lab.targets import parse_target, routes_of
from faults.lab.topology import CROSS_CHECK, Topology, link_changes
from strategies.config import Section

LINK_FAULT = "link_"
"""How the names of all link changes begin in a journal."""


class LinkChange(Section):
    """One change: `{ at_s = 20, action = "cut", target = "eu" }`."""

    at_s: float = Field(ge=0, description="Seconds after the start.")
    action: Literal["cut", "heal", "set"] = Field(description="What to do.")
    target: str = Field(description="A node, a region, a pair (us:eu), or one way (us>eu).")
    values: dict[str, float] = Field(default_factory=dict, description="For set: the keys of a line or link.")

    @model_validator(mode="after")
    def _values_are_for_set(self) -> Self:
        if bool(self.values) != (self.action == "set"):
            message = f"{self.action} of {self.target!r} {'takes no' if self.values else 'needs'} values"
            context = {"key": "values", "message": message, "remedy": "values with action = 'set', and only there"}
            raise PydanticCustomError(CROSS_CHECK, "{message}; try {remedy}", context)
        return self

    @property
    def fault(self) -> str:
        """What a journal calls it."""
        return LINK_FAULT + self.action

    def __str__(self) -> str:
        """In words, for messages and the journal."""
        values = "".join(f" {key}={value:g}" for key, value in self.values.items())
        return f"{self.action} {self.target}{values} at {self.at_s:g} s"


def check_changes(changes: Sequence[LinkChange], topology: Topology, *, file: str | None = None) -> None:
    """Raise `LabError` for the first change that names nobody or sets what cannot be set in this topology.

    Args:
        changes: of a schedule.
        topology: the lab's.
        file: where they were read from, for the message.
    """
    for change in changes:
        try:
            if change.action == "set":
                link_changes(topology, change.target, change.values)
            else:
                routes_of(parse_target(change.target, topology.members), topology.members)
        except LabError as error:
            place = str(change) if file is None else f"{file}, {change}"
            raise LabError(error.message, place=place, remedy=error.remedy) from error


def due(changes: Sequence[LinkChange], *, after_s: float, until_s: float) -> list[LinkChange]:
    """The changes of a span of time (`after_s` excluded, `until_s` included), in order of time, then as given.

    Ask first with `after_s=-1`, so that those at 0 are in.
    """
    return sorted((change for change in changes if after_s < change.at_s <= until_s), key=lambda change: change.at_s)


class LinkSchedule:
    """The changes of a plan that are still to come; each is due once."""

    def __init__(self, changes: Sequence[LinkChange]) -> None:
        """In order of time, then as given."""
        self.waiting = sorted(changes, key=lambda change: change.at_s)

    def forget(self, done: Sequence[str]) -> None:
        """Leave out what was done before, by whoever had the schedule then: texts of changes."""
        for text in done:
            if found := next((change for change in self.waiting if str(change) == text), None):
                self.waiting.remove(found)

    def due(self, now_s: float) -> list[LinkChange]:
        """What is to be done now."""
        found = due(self.waiting, after_s=-1.0, until_s=now_s)
        self.waiting = self.waiting[len(found) :]
        return found
