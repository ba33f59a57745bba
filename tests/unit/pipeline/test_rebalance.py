"""Moves between stages and the first placement: properties, guards, refusals."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import UserError
from orchestrator.rebalance import (
    Decision,
    Move,
    PeerPower,
    Rebalancer,
    StageNeed,
    decide,
    measured,
    place,
    stage_loads,
)

EQUAL = [StageNeed(work=1.0, bytes=1)] * 3


def power(name: str, speed: float, memory: int = 1) -> PeerPower:
    return PeerPower(name=name, speed=speed, memory_bytes=memory)


assignments = st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0.5, 1.0, 2.0, 4.0])), min_size=3, max_size=9)


@given(assignments, st.sampled_from([1, 2]), st.sampled_from([1.0, 1.25, 2.0]))
def test_a_move_keeps_the_peers_empties_nothing_and_helps(
    drawn: list[tuple[int, float]], minimum: int, hysteresis: float
) -> None:
    peers = [power(f"p{i}", speed) for i, (_, speed) in enumerate(drawn)]
    before = {f"p{i}": stage for i, (stage, _) in enumerate(drawn)}
    decision = decide(EQUAL, peers, before, minimum=minimum, hysteresis=hysteresis)
    assert decision.reason
    if (move := decision.move) is None:
        return
    assert before[move.peer] == move.source != move.target
    after = {**before, move.peer: move.target}
    counts = [[list(one.values()).count(s) for s in range(3)] for one in (before, after)]
    assert all(new > 0 for old, new in zip(*counts, strict=True) if old > 0)
    old, new = (stage_loads(EQUAL, peers, one) for one in (before, after))
    if min(counts[0]) >= minimum:
        assert max(new) * hysteresis <= max(old) and max(new) - min(new) < max(old) - min(old)
        assert min(counts[1]) >= minimum


def test_hysteresis_keeps_what_is_nearly_even() -> None:
    peers = [power(name, 1.0) for name in "abcdefg"]
    assignment = dict(zip("abcdefg", (0, 0, 0, 1, 1, 2, 2), strict=True))
    assert decide(EQUAL, peers, assignment).move is None
    moved = decide(EQUAL, peers, {**assignment, "d": 0, "e": 0, "f": 0, "g": 1})
    assert moved.move is not None and moved.move.target == 2


def test_repeated_decisions_come_to_rest() -> None:
    peers = [power(f"p{i}", 1.0 + i % 3) for i in range(9)]
    assignment = {peer.name: 0 for peer in peers}
    for _ in range(20):
        if (move := decide(EQUAL, peers, assignment).move) is None:
            break
        assignment[move.peer] = move.target
    else:
        pytest.fail("it never came to rest")
    loads = stage_loads(EQUAL, peers, assignment)
    assert max(loads) < 1.5 * min(loads)


def test_a_peer_without_the_memory_does_not_move() -> None:
    stages = [StageNeed(work=1.0, bytes=1), StageNeed(work=9.0, bytes=50)]
    peers = [power("a", 1.0, 10), power("b", 1.0, 10), power("c", 1.0, 99)]
    assert decide(stages, peers, {"a": 0, "b": 0, "c": 1}).move is None


def test_one_claim_at_a_time_from_the_current_view() -> None:
    desk = Rebalancer()
    wanted = Decision(move=Move(peer="a", source=0, target=1), reason="")
    old = desk.view
    desk.changed()
    assert desk.claim(wanted, view=old, now_s=0.0) is None, "an old view"
    claim = desk.claim(wanted, view=desk.view, now_s=0.0)
    assert claim is not None and desk.claim(wanted, view=desk.view, now_s=0.0) is None, "one is open"
    assert desk.expire(299.0) is None and desk.expire(300.0) == claim
    assert not desk.join(claim.number, {"a": 0, "b": 0, "c": 1}), "too late"


def test_a_mover_stays_when_its_old_stage_lost_the_others_meanwhile() -> None:
    desk = Rebalancer()
    claim = desk.claim(Decision(move=Move(peer="a", source=0, target=1), reason=""), view=0, now_s=0.0)
    assert claim is not None
    assert not desk.join(claim.number, {"a": 0, "c": 1})
    assert desk.open is None and "would be left with 0" in desk.history[-1][2]


@given(
    st.lists(st.sampled_from([1.0, 2.0, 4.0]), min_size=3, max_size=6),
    st.lists(st.sampled_from([1.0, 2.0]), min_size=2, max_size=3),
)
def test_a_placement_is_nearly_the_best(speeds: list[float], works: list[float]) -> None:
    stages = [StageNeed(work=work, bytes=1) for work in works]
    peers = [power(f"p{i}", speed) for i, speed in enumerate(speeds)]
    names = [peer.name for peer in peers]
    every = (dict(zip(names, choice, strict=True)) for choice in product(range(len(works)), repeat=len(names)))
    best = min(max(stage_loads(stages, peers, option)) for option in every)
    assert best >= 0.9 * max(stage_loads(stages, peers, place(stages, peers)))


def test_a_large_machine_is_left_for_the_stage_that_needs_it() -> None:
    stages = [StageNeed(work=1.0, bytes=10), StageNeed(work=1.0, bytes=100)]
    placed = place(stages, [power("small", 1.0, 10), power("large", 5.0, 100)])
    assert placed == {"small": 0, "large": 1}


def test_a_stage_that_fits_nobody_is_refused_with_the_numbers() -> None:
    stages = [StageNeed(work=1.0, bytes=10), StageNeed(work=1.0, bytes=5000)]
    with pytest.raises(UserError, match=r"stage 1 needs 5,000 bytes .* 2 peers; 0 can hold it.* has 100"):
        place(stages, [power("a", 1.0, 100), power("b", 1.0, 100)])


def test_a_measured_speed_is_in_units_of_work() -> None:
    stages = [StageNeed(work=3.0, bytes=1), StageNeed(work=1.0, bytes=1)]
    found = measured([power("a", 1.0), power("b", 1.0)], {"a": 2.0}, stages, {"a": 0, "b": 1})
    assert [peer.speed for peer in found] == [6.0, 1.0]
