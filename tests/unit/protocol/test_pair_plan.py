"""Which exchange a member begins next."""

from __future__ import annotations

from workers import pair as p
from workers.pair_plan import PairPlan
from workers.records import MemberId

A, B, C = (MemberId(name=name, incarnation=1) for name in "abc")


def meeting(round_: int, *members: MemberId) -> p.PairId:
    return p.PairId(round_=round_, members=members)


def offer(pair: p.PairId, sender: MemberId) -> p.Offer:
    return p.Offer(pair=pair, sender=sender, since=0, upto=1, digest="x")


def test_rounds_are_begun_one_after_the_other_and_sat_out_where_nobody_is_met() -> None:
    plan, machine = PairPlan(), p.PairMachine(me=A)
    assert plan.next(machine) is None
    rounds = [(3, meeting(3, A, B)), (4, None), (5, meeting(5, C, A)), (6, meeting(6, B, C))]
    plan.learn(rounds)
    assert plan.next(machine) == rounds[0]
    machine.handle(p.Begin(pair=meeting(3, A, B), since=0, upto=1, digest="x"))
    machine.handle(p.TimedOut(pair=meeting(3, A, B)))
    assert plan.next(machine) == (4, None)
    plan.sit_out(4)
    assert plan.next(machine) == rounds[2]
    (*_, told) = [c for c in machine.handle(p.Gone(pair=meeting(5, C, A), member=C)) if isinstance(c, p.Tell)]
    assert isinstance(told.message, p.Report) and not told.message.committed and not told.message.done_before
    assert machine.handle(p.Begin(pair=meeting(5, C, A), since=0, upto=1, digest="x")) == [], "it promised"
    assert plan.next(machine) == (5, None), "its partner is gone"
    plan.sit_out(5)
    assert plan.next(machine) == (6, None), "it is not in it"
    plan.sit_out(6)
    assert plan.next(machine) is None and plan.ahead(machine) == [meeting(5, C, A), meeting(6, B, C)]


def test_what_comes_late_is_not_heard_and_what_is_void_is_not_begun() -> None:
    plan, machine = PairPlan(), p.PairMachine(me=A)
    first, second = [(r, meeting(r, A, B)) for r in (0, 1)], [(r, meeting(r, A, C)) for r in (2, 3)]
    plan.learn(second)
    plan.learn(first)
    plan.learn([])
    assert plan.next(machine) == second[0]
    plan.learn(second[1:])
    plan.learn(second)
    assert plan.next(machine) == second[1]


def test_who_fell_behind_goes_where_somebody_waits() -> None:
    plan, machine = PairPlan(), p.PairMachine(me=A)
    plan.learn([(0, meeting(0, A, B)), (1, meeting(1, C, A)), (2, meeting(2, A, B))])
    machine.handle(p.Ready(pair=meeting(2, A, B), sender=B))
    assert plan.next(machine) == (0, meeting(0, A, B)), "no offer: nobody waits"
    machine.handle(offer(meeting(1, C, A), C))
    assert plan.next(machine) == (1, meeting(1, C, A))
    began = machine.handle(p.Begin(pair=meeting(1, C, A), since=0, upto=1, digest="x"))
    assert any(isinstance(command, p.FetchPayload) for command in began), "what was said before is not forgotten"
    machine.handle(p.TimedOut(pair=meeting(1, C, A)))
    assert plan.next(machine) == (2, meeting(2, A, B))
    machine.handle(p.Begin(pair=meeting(0, A, B), since=0, upto=1, digest="x"))
    assert machine.pair is None and machine.num_stale == 1, "a round that was passed over is over"


def test_who_comes_too_late_does_not_come_too_late_to_the_next_one() -> None:
    plan, machine = PairPlan(), p.PairMachine(me=A)
    plan.learn([(0, meeting(0, A, B)), (1, meeting(1, A, C)), (2, meeting(2, A, B))])
    for pair, other in ((meeting(0, A, B), B), (meeting(1, A, C), C)):
        machine.handle(offer(pair, other))
        machine.handle(p.Abort(pair=pair, sender=other, why="it did not come in time"))
    assert machine.invited() is None and plan.next(machine) == (2, meeting(2, A, B))
