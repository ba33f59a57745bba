"""A stop that saves: no version is committed that the saved states lack."""

from __future__ import annotations

from collections import deque

from control import Control
from mate import Mate, entry

from orchestrator import events as ev
from workers import member_events as mev
from workers import messages as msg
from workers.actions import Action, Finished
from workers.orders import DECISION_S, Order, next_order


def closed_exchange(mate: Mate) -> msg.Assign:
    """One that is decided any moment: everything is here and reported."""
    assign = mate.assign(entry("island-1", 0, 4), owners=("island-1", "island-1"))
    mate.tell(assign)
    mate.happen(mev.ResultsFetched(fragment=0, chunks=((0, "r1-0"), (1, "r1-1"))))
    mate.tell(mate.spread(assign, ("r1-0", "r1-1")))
    return assign


class Thread:
    """The training thread's side of orders."""

    def __init__(self, mate: Mate) -> None:
        self.mate = mate
        self.orders: deque[Order] = deque()

    def stop(self, *, save: bool) -> None:
        self.mate.tell(msg.Stop(save=save))
        self.orders += [order.body for order in self.mate.found(mev.Order)]

    def next(self) -> Action | None:
        return next_order(self.orders, self.mate.machine, base_samples=0)


def test_a_member_saves_once_it_knows_what_became_of_the_exchange_that_rests_on_its_word() -> None:
    mate = Mate().start()
    assign = closed_exchange(mate)
    mate.happen(mev.NextComputed(fragment=0, exchange=assign.exchange, attempt=1, digest="anchor1"))
    assert mate.found(msg.Have)
    thread = Thread(mate)
    thread.stop(save=True)
    assert thread.next() is None
    mate.commit(entry("island-1", 0, 4))
    mate.tell()
    assert thread.next() == Finished(save=True)


def test_a_member_saves_when_the_exchange_is_discarded_or_after_a_while() -> None:
    for discarded in (True, False):
        mate = Mate().start()
        assign = closed_exchange(mate)
        thread = Thread(mate)
        thread.stop(save=True)
        assert thread.next() is None
        if discarded:
            mate.tell(msg.Discarded(fragment=0, exchange=assign.exchange, why="a stop"))
        else:
            mate.tick(DECISION_S)
        assert thread.next() == Finished(save=True)


def test_a_member_that_has_saved_gives_its_word_for_nothing_newer() -> None:
    mate = Mate().start()
    assign = closed_exchange(mate)
    thread = Thread(mate)
    thread.stop(save=True)
    mate.tick(DECISION_S)
    assert thread.next() == Finished(save=True)
    mate.happen(mev.NextComputed(fragment=0, exchange=assign.exchange, attempt=1, digest="anchor1"))
    assert not mate.found(msg.Have)


def test_a_stop_at_once_waits_for_nothing() -> None:
    mate = Mate().start()
    closed_exchange(mate)
    thread = Thread(mate)
    thread.stop(save=False)
    assert thread.next() == Finished(save=False)


def test_no_exchange_is_closed_after_a_stop_was_asked_for_and_a_closed_one_is_committed() -> None:
    for closed in (True, False):
        control = Control()
        control.start()
        names = ("island-0", "island-1", "island-2")
        for name in names if closed else names[:2]:
            control.offer(name)
        control.handle(ev.StopRequested(save=True))
        if not closed:
            control.offer(names[2])
        assert bool(control.told("island-0", msg.Assign)) == closed
        if closed:
            control.reduce()
            control.have("island-0")
            control.have("island-1")
        assert control.head() == int(closed)
