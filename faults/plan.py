"""Faults that are asked for: `kind:member@round=N`, parsed and checked (pure).

`kill:island-1@round=15` = SIGKILL to the process of island-1 once version 15 of the first fragment is committed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

KINDS = ("kill",)
_FORM = re.compile(r"(?P<kind>[a-z_]+):(?P<member>[A-Za-z0-9._-]+)@round=(?P<round>[0-9]+)")


class FaultPlanError(ValueError):
    """A fault that cannot be understood or names nobody; says what would be right."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedFault:
    """One fault: what, to whom, after which committed round."""

    kind: str
    member: str
    round: int

    def __str__(self) -> str:
        """The form it was written in."""
        return f"{self.kind}:{self.member}@round={self.round}"


def parse_fault(text: str, members: Collection[str]) -> PlannedFault:
    """Parse one `--fault`; `members` are the names that exist in the run."""
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise FaultPlanError(f"--fault {text!r}: expected kind:member@round=N, for example kill:island-1@round=15")
    kind, member, at = match["kind"], match["member"], int(match["round"])
    if kind not in KINDS:
        raise FaultPlanError(f"--fault {text!r}: unknown kind {kind!r}; known: {', '.join(KINDS)}")
    if member not in members:
        raise FaultPlanError(
            f"--fault {text!r}: there is no member {member!r}; this run has {', '.join(sorted(members))}"
        )
    return PlannedFault(kind=kind, member=member, round=at)


def due(plan: Sequence[PlannedFault], version: int) -> list[PlannedFault]:
    """The faults whose round is committed."""
    return [fault for fault in plan if version >= fault.round]
