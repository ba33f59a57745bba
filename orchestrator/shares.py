"""Load by speed: how many local steps each member makes, so that all arrive at the exchange together.

Pure. Source: dynamic local updates (DyLU) of Asynchronous Local-SGD (arXiv 2401.09135), section 5:
`steps_i = floor(v_i / max_j v_j * H)`, v in steps a second. What differs: it is used in synchronous rounds too, nobody
has less than one step, and shares are journalled and change only when they are off by more than `HYSTERESIS`, so that
noise in the step times changes nothing and a replay of the journal gives the shares that every member acted on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.membership import Process
from workers.records import MemberId, SharesRecord
from workers.shares import share_of

HYSTERESIS = 0.1
"""Share by which somebody's steps must be off before new shares are made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """What a member was measured to need: seconds for one inner step, samples in it."""

    step_s: float
    batch_size: int


def speeds_of(processes: Mapping[MemberId, Process]) -> dict[MemberId, Speed]:
    """The speeds that heartbeats told, of those members that have made enough steps to be measured."""
    return {
        member: Speed(step_s=process.hello.median_step_s, batch_size=process.info.batch_size)
        for member, process in sorted(processes.items())
        if process.hello is not None and process.hello.median_step_s > 0.0
    }


def steps_by_speed(step_s: Mapping[MemberId, float], inner_steps: int) -> dict[MemberId, int]:
    """Local steps of each member: all of `inner_steps` for the quickest, whole steps rounded down, at least one."""
    quickest = min(step_s.values(), default=0.0)
    return {member: max(int(inner_steps * quickest / time_s + 1e-9), 1) for member, time_s in step_s.items()}


def is_off(planned: int, wanted: int) -> bool:
    """Whether a share is worth changing: by more than `HYSTERESIS`, and by more than the rounding of one step."""
    return abs(wanted - planned) > max(HYSTERESIS * planned, 1.0)


def new_shares(current: SharesRecord | None, speeds: Mapping[MemberId, Speed], inner_steps: int) -> SharesRecord | None:
    """The shares to journal now, or None if those in force will do. With equal speeds there never are any.

    `current`: the record in force; without one everybody makes `inner_steps`.
    """
    if len(speeds) < 2 or inner_steps < 2:
        return None
    wanted = steps_by_speed({member: speed.step_s for member, speed in speeds.items()}, inner_steps)
    reasons = []
    for member, steps in wanted.items():
        share = share_of(current, str(member)) if current is not None else None
        planned = share[0] * inner_steps // current.inner_steps if current is not None and share else inner_steps
        if current is not None and share is None and steps < inner_steps:
            reasons.append(f"{member} was measured")
        elif is_off(max(planned, 1), steps):
            reasons.append(f"{member} needs {1e3 * speeds[member].step_s:.3g} ms a step: {planned} -> {steps} steps")
    if not reasons:
        return None
    return SharesRecord(
        inner_steps=inner_steps,
        members=tuple(str(member) for member in wanted),
        steps=tuple(wanted.values()),
        batch_sizes=tuple(speeds[member].batch_size for member in wanted),
        why="; ".join(reasons),
    )


def unmeasured(
    current: SharesRecord | None, processes: Mapping[MemberId, Process], speeds: Mapping[MemberId, Speed]
) -> list[MemberId]:
    """Members that have a speed and that the shares in force do not name, once nobody's first speed is awaited.

    Shares are looked at again after a commit, and when this is not empty: at the start, and for a newcomer, which so
    has its share from its second round on. While others are still to be measured it is empty: one record, not many.
    """
    if any(process.ready() and member not in speeds for member, process in processes.items()):
        return []
    return [member for member in speeds if current is None or share_of(current, str(member)) is None]
