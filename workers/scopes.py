"""Which positions of a run are whose, where islands train on data of their own that never leave their machine. Pure.

The positions of a run are samples in the order in which they are leased. Those of the pack that everybody has come
first; then, in the order of their names, those of each island that has a pack of its own (`[data.per_island.NAME]`).
The controller writes this into the journal before it leases anything (`ScopeRecord`), and the islands reckon it from
the same configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from workers.ranges import Range

SHARED = ""
"""Owner of what everybody may have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scopes:
    """`own`: the positions of each owner; what is before the first of them is everybody's."""

    own: Mapping[str, Range]

    @property
    def shared_stop(self) -> int | None:
        """Where the shared positions end; None: nowhere, all are shared."""
        return min((start for start, _ in self.own.values()), default=None)

    def owners(self, start: int, stop: int) -> set[str]:
        """Whose the positions of a range are; more than one if it crosses a border."""
        found = {name for name, (low, high) in self.own.items() if low < stop and start < high}
        first = self.shared_stop
        return found | {SHARED} if first is None or start < first or not found else found

    def may_have(self, name: str, ranges: Iterable[Range]) -> bool:
        """Whether a member may be leased these: what is shared, and what is its own."""
        if not self.own:
            return True
        return all(self.owners(start, stop) in ({SHARED}, {name}) for start, stop in ranges)


ALL_SHARED = Scopes(own={})


def scopes_of(total_samples: int, own_samples: Mapping[str, int]) -> Scopes:
    """The positions of `total_samples`, of which so many are each island's own. Raises ValueError: there are fewer."""
    num_own = sum(own_samples.values())
    if num_own > total_samples:
        raise ValueError(f"{num_own} samples are of one island each, the run has only {total_samples}")
    own: dict[str, Range] = {}
    start = total_samples - num_own
    for name, num in sorted(own_samples.items()):
        own[name] = (start, start + num)
        start += num
    return Scopes(own=own)
