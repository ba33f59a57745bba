"""Settings that change while a run goes on: which values hold for which version. Everybody replays the journal.

A change is a `SettingRecord` with the version from which it holds, always one that nobody has yet: whoever computes a
transition has been told of the change before, and all members compute it with the same values. What no member computes
with, `[exchange]`, may hold from the present version on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from pydantic import BaseModel

from workers.records import Scalar, SettingRecord

S = TypeVar("S", bound=BaseModel)


class LiveSettings:
    """All changes so far, in the journal's order. May be read on any thread while rows are added."""

    def __init__(self) -> None:
        """No changes: everything is as configured."""
        self._changes: tuple[SettingRecord, ...] = ()

    def __len__(self) -> int:
        """Changes so far."""
        return len(self._changes)

    def add(self, record: SettingRecord) -> None:
        """One more change."""
        self._changes = (*self._changes, record)

    def roll_back(self, versions: Sequence[int]) -> None:
        """The run went back to these versions: whatever was set holds from them on."""
        self._changes = tuple(
            replace(change, since=tuple(min(since, n) for since, n in zip(change.since, versions, strict=True)))
            for change in self._changes
        )

    def at(self, fragment: int, n: int) -> tuple[tuple[str, Scalar], ...]:
        """`(key, value)` of what holds for the transition of a fragment from version `n`, sorted by key."""
        if not self._changes:
            return ()
        values = {change.key: change.value for change in self._changes if change.since[fragment] <= n}
        return tuple(sorted(values.items()))

    def of_members(self, fragment: int, n: int) -> tuple[tuple[str, Scalar], ...]:
        """`at`, without what only the controller decides by: of that members may have heard or not."""
        if not self._changes:
            return ()
        return tuple((key, value) for key, value in self.at(fragment, n) if not holds_at_once(key))

    def newest(self) -> dict[str, Scalar]:
        """Key to value of everything that was set, whether it holds already or from the next version on."""
        return {change.key: change.value for change in self._changes}


def holds_at_once(key: str) -> bool:
    """Whether a change holds for the transition that is under way: only the controller decides by `[exchange]`."""
    return key.startswith("exchange.")


def with_changes(section: S, name: str, values: Sequence[tuple[str, Scalar]]) -> S:
    """The section called `name` with those of the values that are its own."""
    if not values:
        return section
    mine: Mapping[str, Scalar] = {
        key.partition(".")[2]: value for key, value in values if key.partition(".")[0] == name
    }
    return section.model_copy(update=mine) if mine else section
