"""How samples are leased: how far ahead, in which order, and how the last ones are shared (protocol 1.8).

Pure functions on a `RunState`. Grants are made for all live members at once, in member order, from the lowest free
positions, when a commit (or a join, or a settlement) makes room: the same journal always gives the same grants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heapreplace

from orchestrator.run_state import Membership, RunState
from workers import ranges
from workers.ranges import Range
from workers.records import LeaseRecord, MemberId
from workers.scopes import SHARED

MIN_WINDOW_STEPS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How many samples the run has, and how many steps ahead a member may be leased.

    A member with fewer than `low_steps` ahead of its watermark is given more; at a commit it is filled up to
    `high_steps`; at most it may be `bound_steps` ahead.
    """

    total_samples: int
    inner_steps: int
    bound_rounds: float
    low_steps: int = field(init=False)
    high_steps: int = field(init=False)
    bound_steps: int = field(init=False)

    def __post_init__(self) -> None:
        """Reckoned once: every heartbeat asks."""
        high = max(2 * self.inner_steps, MIN_WINDOW_STEPS)
        object.__setattr__(self, "low_steps", max(self.inner_steps, MIN_WINDOW_STEPS // 2))
        object.__setattr__(self, "high_steps", high)
        object.__setattr__(self, "bound_steps", max(int(self.bound_rounds * self.inner_steps), high))


def free_of(state: RunState, name: str) -> tuple[Range, ...]:
    """What is free again of one member's own samples, or (`SHARED`) of everybody's."""
    if not state.scopes.own:
        return state.free if name == SHARED else ()
    first = state.scopes.shared_stop or 0
    return ranges.intersect(state.free, (state.scopes.own.get(name, (0, 0)) if name else (0, first),))


def left_to_issue(state: RunState, plan: Plan) -> int:
    """Shared samples that may still be leased: what is free again and what was never issued."""
    total = state.scopes.shared_stop
    fresh = max((plan.total_samples if total is None else total) - state.next_position, 0)
    return ranges.count(free_of(state, SHARED)) + fresh


def own_left(state: RunState, name: str) -> int:
    """Samples that only the member with this name may be leased, and has not."""
    if name not in state.scopes.own:
        return 0
    return ranges.count(free_of(state, name)) + state.scopes.own[name][1] - state.own_next[name]


def rest_of(state: RunState, name: str) -> tuple[Range, ...]:
    """Those of a member's own samples that it has not: given back ones first, then what was never leased."""
    at, stop = state.own_next[name], state.scopes.own[name][1]
    return (*free_of(state, name), *([(at, stop)] if at < stop else ()))


def waiting(state: RunState) -> dict[str, int]:
    """Samples that wait for one member which does not live: nobody else may have them."""
    lacking = {name: own_left(state, name) for name in state.scopes.own if name not in state.current}
    return {name: num for name, num in sorted(lacking.items()) if num}


def wanted(entry: Membership, batch: int, consumed: int, plan: Plan) -> int:
    """Samples that a member should be given now; whole batches; 0 if it has enough ahead."""
    marks = entry.watermarks
    watermark = marks[0] if len(marks) == 1 else min(marks, default=0)
    ahead = entry.num_leased - watermark
    if ahead < plan.low_steps * batch + 1:
        return max(plan.high_steps * batch - ahead, 0)
    unused = entry.num_leased - max(consumed, watermark)
    if unused < plan.low_steps * batch // 2 and ahead < plan.bound_steps * batch:
        return min(plan.low_steps * batch, plan.bound_steps * batch - ahead)
    return 0


def share_out(
    demands: Mapping[MemberId, tuple[int, int]], supply: int, steps: Mapping[MemberId, int] | None = None
) -> dict[MemberId, int]:
    """Grants for `{member: (wanted, batch)}`, in whole batches.

    A supply that is too small is shared equally, or in proportion to `steps` (those of a round) where they are given.
    """
    if sum(want for want, _ in demands.values()) <= supply:
        return {member: want for member, (want, _) in demands.items() if want}
    grants, known = dict.fromkeys(sorted(demands), 0), steps or {}
    # Whose next batch would be done first; with equal steps everybody has its turn, in member order.
    turns = [(1 / known.get(member, 1), member, 1) for member, (want, _) in demands.items() if want > 0]
    heapify(turns)
    while supply > 0 and turns:
        _, member, turn = turns[0]
        want, batch = demands[member]
        given = min(batch, supply, want - grants[member])
        grants[member] += given
        supply -= given
        if grants[member] < want:
            heapreplace(turns, ((turn + 1) / known.get(member, 1), member, turn + 1))
        else:
            heappop(turns)
    return {member: grant for member, grant in grants.items() if grant}


def _take_own(state: RunState, name: str, want: int) -> tuple[tuple[Range, ...], int]:
    """Samples of a member's own, and how many it still wants."""
    taken, _ = ranges.take(free_of(state, name), want)
    want -= ranges.count(taken)
    start, stop = state.own_next[name], state.scopes.own[name][1]
    fresh = min(want, stop - start)
    return (*taken, (start, start + fresh)) if fresh else taken, want - fresh


def grant(
    state: RunState,
    members: Mapping[MemberId, tuple[int, int]],
    plan: Plan,
    steps: Mapping[MemberId, int] | None = None,
) -> list[LeaseRecord]:
    """Lease records for `{member: (batch, consumed)}`; apply them in this order.

    `steps`: local steps of each member in a round, where they are not all `plan.inner_steps` (load by speed).
    """
    plans, known = {plan.inner_steps: plan}, steps or {}
    demands: dict[MemberId, tuple[int, int]] = {}
    own: dict[MemberId, tuple[Range, ...]] = {}
    for member, (batch, consumed) in sorted(members.items()):
        inner_steps = known.get(member, plan.inner_steps)
        if inner_steps not in plans:
            plans[inner_steps] = replace(plan, inner_steps=inner_steps)
        want = wanted(state.members[member], batch, consumed, plans[inner_steps])
        if want and member.name in state.scopes.own:  # its own samples first: nobody else can make up for them
            own[member], want = _take_own(state, member.name, want)
        demands[member] = (want, batch)
    records: list[LeaseRecord] = []
    free, position = free_of(state, SHARED), state.next_position
    shared = share_out(demands, left_to_issue(state, plan), steps)
    for member in sorted(shared.keys() | own.keys()) if own else shared:
        num = shared.get(member, 0)
        taken, free = ranges.take(free, num)
        fresh = num - ranges.count(taken)
        given: list[Range] = [*own.get(member, ()), *taken]
        if fresh:
            given.append((position, position + fresh))
            position += fresh
        if not given:
            continue
        records.append(
            LeaseRecord(
                member=member.name, incarnation=member.incarnation, index=state.members[member].num_leased,
                ranges=tuple(given),
            )
        )  # fmt: skip
    return records
