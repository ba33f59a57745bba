"""What became of each injected fault, from the journal and the metrics rows of a run (pure).

detected     the first fault that the controller journalled of the victim after the injection
next commit  the first commit after the injection, of whomever
back         the first step that the victim finished after it: of its next incarnation where the fault ended the one
             before, else once the fault was over
contributed  the first commit after that with the victim in its roster
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from faults.lab.schedule import LINK_FAULT
from faults.plan import CONTROLLER, KINDS, FaultPlanError, PlannedFault, parse_fault
from orchestrator.metrics import ExchangeRow, Row, StepRow
from workers.records import FaultRecord, JoinRecord, Record

RESTARTED = {"controller_kill": "controller_restarted", "head_kill": "head_restarted"}
MISMATCHES = ("digest_mismatch", "diverged", "unverified_state")
IDLE = ("stop", "hang")
"""Kinds that keep their victim from training, though its process is there."""
_STORM = re.compile(r" \(number \d+ of .*\)$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Followed:
    """One injected fault and what came of it; seconds since the start of the run, None: it never came to that.

    Attributes:
        over_s: when it was over by itself; infinite where it was not to be. detected_as: by what verdict.
        replaced: whether another incarnation took the victim's place.
    """

    kind: str
    member: str
    injected_s: float
    over_s: float
    detected_s: float | None = None
    detected_as: str = ""
    next_commit_s: float | None = None
    back_s: float | None = None
    contributed_s: float | None = None
    replaced: bool = False


def injected(records: Iterable[Record]) -> list[tuple[PlannedFault, FaultRecord]]:
    """The injected faults of a journal, without storms themselves and what was done to the links of a lab."""
    found = [r for r in records if isinstance(r, FaultRecord) and r.injected and r.fault != "storm"]
    found = [r for r in found if not r.fault.startswith(LINK_FAULT)]
    return [(_planned(record), record) for record in found]


def storm_time(records: Iterable[Record]) -> tuple[float, float]:
    """From when to when the first storm of a run lasted; all of the time where there was none."""
    for record in records:
        if isinstance(record, FaultRecord) and record.injected and record.fault == "storm":
            planned = _planned(record)
            return record.t_s, record.t_s + (planned.for_s if planned.for_s is not None else math.inf)
    return -math.inf, math.inf


def _planned(record: FaultRecord) -> PlannedFault:
    targets = tuple(name for name in record.member.split("+") if name)
    try:
        return parse_fault(_STORM.sub("", record.detail), [name for name in targets if name != CONTROLLER])
    except FaultPlanError:  # of an older journal
        return PlannedFault(kind=record.fault, targets=targets)


def follow(records: Sequence[Record], rows: Iterable[Row]) -> list[Followed]:
    """Every injected fault of a run, in order."""
    steps: list[StepRow] = []
    exchanges: list[ExchangeRow] = []
    for row in rows:
        if isinstance(row, StepRow):
            steps.append(row)
        elif isinstance(row, ExchangeRow):
            exchanges.append(row)
    faults = injected(records)
    verdicts = [r for r in records if isinstance(r, FaultRecord) and not r.injected]
    return [_follow(place, faults, verdicts, steps, exchanges) for place in range(len(faults))]


def _follow(
    place: int,
    faults: Sequence[tuple[PlannedFault, FaultRecord]],
    verdicts: Sequence[FaultRecord],
    steps: Sequence[StepRow],
    exchanges: Sequence[ExchangeRow],
) -> Followed:
    fault, record = faults[place]
    began_s, member = record.t_s, record.member
    later = (r.t_s for f, r in faults[place + 1 :] if r.member == member and f.kind != "heal")
    until_s = next(later, math.inf)
    over_s = began_s + fault.for_s if fault.for_s is not None else math.inf
    wanted = RESTARTED.get(fault.kind)
    seen = next(
        (
            v
            for v in verdicts
            if began_s <= v.t_s < until_s and (v.fault == wanted if wanted else v.member in fault.targets)
        ),
        None,
    )
    mine = [step for step in steps if step.member == member]
    before = max((s.incarnation for s in mine if s.t_s <= began_s), default=0)
    ends = fault.kind in KINDS and KINDS[fault.kind].ends
    back = next(
        (s for s in mine if s.t_s > began_s and (s.incarnation > before or (not ends and s.t_s > over_s))), None
    )
    return Followed(
        kind=fault.kind,
        member=member,
        injected_s=began_s,
        over_s=over_s,
        detected_s=seen.t_s if seen is not None else None,
        detected_as=seen.fault if seen is not None else "",
        next_commit_s=next((e.t_s for e in exchanges if e.t_s > began_s), None),
        back_s=back.t_s if back is not None else None,
        contributed_s=None
        if back is None
        else next((e.t_s for e in exchanges if e.t_s >= back.t_s and member in e.roster), None),
        replaced=back is not None and back.incarnation > before,
    )


def away(faults: Iterable[Followed], member: str, end_s: float, *, linked: bool = False) -> list[tuple[float, float]]:
    """When a member could not train because of faults, merged; `linked`: nor could it be reached."""
    spans = []
    for fault in faults:
        if fault.member != member or not (fault.replaced or _keeps_away(fault, linked)):
            continue
        until_s = fault.back_s if fault.back_s is not None else min(fault.over_s, end_s)
        spans.append((fault.injected_s, min(until_s, end_s)))
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _keeps_away(fault: Followed, linked: bool) -> bool:
    ends = fault.kind in KINDS and KINDS[fault.kind].ends
    return ends or fault.kind in IDLE or (linked and fault.kind == "cut")


def members_of(records: Iterable[Record]) -> list[str]:
    """Everybody who ever joined."""
    return sorted({r.member for r in records if isinstance(r, JoinRecord)})
