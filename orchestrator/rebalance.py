"""Which peers serve which stage: the first placement, and one move at a time afterwards (pure).

Source: SWARM (arXiv 2301.11913), algorithm 2, which its authors never released: the least loaded peer of the least
loaded stage goes to the most loaded one. What differs: load is the time that a stage takes for a microbatch, 1 / sum of
its peers' throughputs, so that the effect of a move is known before; a move must leave both the slowest stage and the
one that gives quicker by the hysteresis than the slowest was; no stage goes below its minimum; the decision is one
place's, and a claim is atomic (`Rebalancer.claim`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

from orchestrator.errors import UserError

HYSTERESIS = 1.25
MAX_FOR_PAIRS = 10
MAX_FOR_ALL = 20_000


@dataclass(frozen=True, kw_only=True, slots=True)
class StageNeed:
    """`work`: what a microbatch costs in the stage, in any unit (seconds on a reference, or parameters).

    `tensors`: boundary tensors of a microbatch that cross the link of its peer, in the busier direction.
    """

    work: float
    bytes: int
    tensors: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerPower:
    """`speed`: work a second, in the unit of `StageNeed.work`; `memory_bytes`: what a stage may take of it.

    `link_s`: seconds that a boundary tensor takes from a trainer to it, by whom all tensors go; None: not known.
    """

    name: str
    speed: float
    memory_bytes: int
    link_s: float | None = None


Assignment = Mapping[str, int]
"""Peer -> stage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """One peer goes to another stage."""

    peer: str
    source: int
    target: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """A move, or none, and why."""

    move: Move | None
    reason: str


def stage_loads(stages: Sequence[StageNeed], peers: Sequence[PeerPower], assignment: Assignment) -> list[float]:
    """Seconds that each stage takes for a microbatch with all its peers; infinite without any."""
    speeds = [0.0] * len(stages)
    for peer in peers:
        if peer.name in assignment:
            speeds[assignment[peer.name]] += peer.speed
    return [stage.work / speed if speed > 0 else math.inf for stage, speed in zip(stages, speeds, strict=True)]


def decide(
    stages: Sequence[StageNeed],
    peers: Sequence[PeerPower],
    assignment: Assignment,
    *,
    minimum: int = 1,
    hysteresis: float = HYSTERESIS,
) -> Decision:
    """Return the move that helps the slowest stage most, if one helps enough.

    A stage below its minimum is filled without regard to the hysteresis. A move never leaves its source below the
    minimum, except that an empty stage may take from one with two peers. Of stages that are equally slow the first one
    is helped, and the others by the moves that follow; until then the pipeline is as slow as before.
    """
    counts = [sum(stage == s for stage in assignment.values()) for s in range(len(stages))]
    loads = stage_loads(stages, peers, assignment)
    short = [s for s in range(len(stages)) if counts[s] < minimum]
    target = max(short or range(len(stages)), key=lambda s: (-counts[s] if short else 0, loads[s], -s))
    options, spread = [], max(loads) - min(loads)
    for peer in peers:
        source = assignment.get(peer.name)
        if source is None or source == target or not may_leave(counts, source, target, minimum):
            continue
        if peer.memory_bytes < stages[target].bytes:
            continue
        after = stage_loads(stages, peers, {**assignment, peer.name: target})
        both = max(after[source], after[target])
        helps = both * hysteresis <= loads[target] and max(after) - min(after) < spread
        options.append((not (helps or short), sorted(after, reverse=True), peer.name, source, both))
    state = f"stage {target} takes {loads[target]:.3g} s a microbatch with {counts[target]} peers"
    if not options:
        return Decision(move=None, reason=f"{state}; nobody may move there")
    idle, _, name, source, both = min(options)
    move = Move(peer=name, source=source, target=target)
    if short:
        return Decision(move=move, reason=f"{state}, fewer than {minimum}: {name} moves from stage {source}")
    if idle:
        return Decision(
            move=None, reason=f"{state}; the best move ({name}) would make that {both:.3g} s, not {hysteresis} x less"
        )
    return Decision(move=move, reason=f"{state}; with {name} from stage {source} neither takes more than {both:.3g} s")


def may_leave(counts: Sequence[int], source: int, target: int, minimum: int) -> bool:
    """Whether a stage may give one peer to another."""
    return counts[source] > (1 if counts[target] == 0 else minimum)


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """The one move that is under way; `number` is in everything that is said about it."""

    number: int
    move: Move
    until_s: float


class Rebalancer:
    """One move at a time: claimed, drained, pulled, joined, or given up.

    `view` counts the changes of membership. A decision from an older view is refused: two decisions can never both
    believe that a peer is the spare one.
    """

    def __init__(self, *, minimum: int = 1, move_timeout_s: float = 300.0) -> None:
        self.minimum, self._move_timeout_s = minimum, move_timeout_s
        self.view = 0
        self.open: Claim | None = None
        self.history: list[tuple[int, Move, str]] = []
        self._number = 0

    def changed(self) -> None:
        """A peer joined, left, died or moved."""
        self.view += 1

    def claim(self, decision: Decision, *, view: int, now_s: float) -> Claim | None:
        """Take the decision's move, if none is open and nothing changed since its view."""
        if decision.move is None or self.open is not None or view != self.view:
            return None
        self._number += 1
        self.open = Claim(number=self._number, move=decision.move, until_s=now_s + self._move_timeout_s)
        return self.open

    def join(self, number: int, assignment: Assignment) -> bool:
        """The mover holds the new state. False: it stays, as its source would be left too small, or the claim is over.

        Until then it keeps its old state, so that it can stay.
        """
        if self.open is None or self.open.number != number:
            return False
        move = self.open.move
        rest = sum(stage == move.source for name, stage in assignment.items() if name != move.peer)
        has_target = any(stage == move.target for stage in assignment.values())
        enough = rest >= (self.minimum if has_target else 1)
        self._close("joined" if enough else f"stays: stage {move.source} would be left with {rest}")
        return enough

    def give_up(self, number: int, why: str) -> None:
        """The mover died, or could not pull. An old number changes nothing."""
        if self.open is not None and self.open.number == number:
            self._close(why)

    def expire(self, now_s: float) -> Claim | None:
        """Give up a move that takes too long; return it."""
        claim = self.open
        if claim is None or now_s < claim.until_s:
            return None
        self._close(f"not done within {self._move_timeout_s:g} s")
        return claim

    def _close(self, how: str) -> None:
        assert self.open is not None, "no move is open"
        self.history.append((self.open.number, self.open.move, how))
        self.open = None
        self.changed()


# ---------------------------------------------------------------- the first placement


def place(stages: Sequence[StageNeed], peers: Sequence[PeerPower], *, minimum: int = 1) -> dict[str, int]:
    """Assign every peer that can hold a stage to one, so that the slowest stage is as quick as possible.

    First `minimum` peers for each stage, by augmenting paths (so that a peer that fits anywhere does not take the place
    of one that fits nowhere else), then the rest, then exchanges with the slowest stage while they help; with few peers
    every assignment is looked at. Of placements that are equally quick, the one whose tensors cross the quicker links:
    a stage in the middle sends and receives more of them than the ends do. Raises UserError with numbers.
    """
    slots = [stage for stage in range(len(stages)) for _ in range(minimum)]
    ranked = sorted(peers, key=lambda peer: (-peer.speed, peer.name))
    holder: dict[int, PeerPower] = {}
    for slot in sorted(range(len(slots)), key=lambda slot: -stages[slots[slot]].bytes):
        if not _fill(slot, slots, stages, ranked, holder, set()):
            _refuse(slots[slot], stages, peers, minimum)
    assignment = {peer.name: slots[slot] for slot, peer in holder.items()}
    for peer in ranked:
        fitting = [s for s, stage in enumerate(stages) if stage.bytes <= peer.memory_bytes]
        if peer.name not in assignment and fitting:
            loads = stage_loads(stages, peers, assignment)
            assignment[peer.name] = max(fitting, key=lambda s: (loads[s], -s))
    return _improve(stages, peers, assignment, minimum)


def _fill(
    slot: int,
    slots: Sequence[int],
    stages: Sequence[StageNeed],
    peers: Sequence[PeerPower],
    holder: dict[int, PeerPower],
    tried: set[str],
) -> bool:
    """Find a peer for a slot, moving others to other slots where need be (Kuhn's matching)."""
    for peer in peers:
        if peer.name in tried or peer.memory_bytes < stages[slots[slot]].bytes:
            continue
        tried.add(peer.name)
        theirs = next((other for other, held in holder.items() if held.name == peer.name), None)
        if theirs is None or _fill(theirs, slots, stages, peers, holder, tried):
            holder[slot] = peer
            return True
    return False


def _refuse(stage: int, stages: Sequence[StageNeed], peers: Sequence[PeerPower], minimum: int) -> None:
    need = stages[stage].bytes
    fit = sum(peer.memory_bytes >= need for peer in peers)
    raise UserError(
        f"stage {stage} needs {need:,} bytes and at least {minimum} of {len(peers)} peers; {fit} can hold it, "
        f"and other stages may need them; the largest has {max((peer.memory_bytes for peer in peers), default=0):,}",
        remedy="more stages (each is smaller then), more or larger machines, a smaller minimum per stage, or "
        "pipeline.peer_memory_bytes where a peer may take more than its share of its machine",
    )


def _improve(
    stages: Sequence[StageNeed], peers: Sequence[PeerPower], assignment: dict[str, int], minimum: int
) -> dict[str, int]:
    power = {peer.name: peer for peer in peers}

    if len(stages) ** len(assignment) <= MAX_FOR_ALL:
        return _best(stages, power, assignment, minimum)

    def score(option: Mapping[str, int]) -> tuple[float, ...]:
        return tuple(sorted(stage_loads(stages, peers, option), reverse=True))

    while True:
        found = min(_neighbours(stages, power, assignment, minimum), key=score, default=assignment)
        if not score(found) < score(assignment):
            return _by_links(stages, peers, assignment)
        assignment = found


def link_cost(stages: Sequence[StageNeed], peers: Sequence[PeerPower], assignment: Assignment) -> float:
    """Seconds that a microbatch's tensors take on the links of all peers; an unknown link is as quick as the mean."""
    known = [peer.link_s for peer in peers if peer.link_s is not None]
    usual = math.fsum(known) / len(known) if known else 0.0
    return math.fsum(
        stages[assignment[peer.name]].tensors * (usual if peer.link_s is None else peer.link_s)
        for peer in sorted(peers, key=lambda peer: peer.name)
        if peer.name in assignment
    )


def _by_links(stages: Sequence[StageNeed], peers: Sequence[PeerPower], assignment: dict[str, int]) -> dict[str, int]:
    """Let peers of equal speed change places while their links gain by it."""
    fits = {peer.name: [stage.bytes <= peer.memory_bytes for stage in stages] for peer in peers}
    pairs = [(a, b) for a, b in combinations(sorted(peers, key=lambda peer: peer.name), 2) if a.speed == b.speed]
    pairs = [(a, b) for a, b in pairs if a.name in assignment and b.name in assignment]
    gained = True
    while gained:
        gained = False
        for a, b in pairs:
            here, there = assignment[a.name], assignment[b.name]
            if here == there or not (fits[a.name][there] and fits[b.name][here]):
                continue
            changed = {**assignment, a.name: there, b.name: here}
            if link_cost(stages, peers, changed) < link_cost(stages, peers, assignment):
                assignment, gained = changed, True
    return assignment


def _best(
    stages: Sequence[StageNeed], power: Mapping[str, PeerPower], assignment: dict[str, int], minimum: int
) -> dict[str, int]:
    """The best of all assignments; of equals the one with the quicker links, and of those the one that comes first."""
    names = sorted(assignment)
    choices = [[s for s, stage in enumerate(stages) if stage.bytes <= power[name].memory_bytes] for name in names]
    speeds = [power[name].speed for name in names]
    known = [peer.link_s for peer in power.values() if peer.link_s is not None]
    usual = math.fsum(known) / len(known) if known else 0.0
    links = [usual if (link_s := power[name].link_s) is None else link_s for name in names]
    best: tuple[list[float], float, tuple[int, ...]] | None = None
    for option in product(*choices):
        totals, counts = [0.0] * len(stages), [0] * len(stages)
        for s, speed in zip(option, speeds, strict=True):
            totals[s] += speed
            counts[s] += 1
        if min(counts) < minimum or min(totals) <= 0:
            continue
        loads = sorted((stage.work / total for stage, total in zip(stages, totals, strict=True)), reverse=True)
        if best is not None and loads > best[0]:
            continue
        crossing = math.fsum(stages[s].tensors * link_s for s, link_s in zip(option, links, strict=True))
        if best is None or (loads, crossing, option) < best:
            best = (loads, crossing, option)
    return dict(zip(names, best[2], strict=True)) if best is not None else assignment


def _neighbours(
    stages: Sequence[StageNeed], power: Mapping[str, PeerPower], assignment: dict[str, int], minimum: int
) -> Iterator[dict[str, int]]:
    """Every assignment in which the slowest stage and another one exchange up to two peers each (one in large ones)."""
    loads = stage_loads(stages, list(power.values()), assignment)
    slowest = max(range(len(stages)), key=lambda s: (loads[s], -s))
    members = [sorted(name for name, stage in assignment.items() if stage == s) for s in range(len(stages))]
    for other in range(len(stages)):
        if other == slowest:
            continue
        for given, taken in product(_few(members[slowest]), _few(members[other])):
            sizes = (
                len(members[slowest]) - len(given) + len(taken),
                len(members[other]) + len(given) - len(taken),
            )
            fits = all(power[name].memory_bytes >= stages[other].bytes for name in given) and all(
                power[name].memory_bytes >= stages[slowest].bytes for name in taken
            )
            if min(sizes) >= minimum and fits:
                yield {**assignment, **dict.fromkeys(given, other), **dict.fromkeys(taken, slowest)}


def _few(names: list[str]) -> list[tuple[str, ...]]:
    """None, one or two of them; none or one where pairs would be too many."""
    pairs = list(combinations(names, 2)) if len(names) <= MAX_FOR_PAIRS else []
    return [(), *((name,) for name in names), *pairs]


def measured(
    peers: Sequence[PeerPower], throughputs: Mapping[str, float], stages: Sequence[StageNeed], assignment: Assignment
) -> list[PeerPower]:
    """Peers with their measured speed: microbatches a second, times the work of the stage they were measured in."""
    return [
        replace(peer, speed=throughputs[peer.name] * stages[assignment[peer.name]].work)
        if peer.name in throughputs and peer.name in assignment
        else peer
        for peer in peers
    ]
