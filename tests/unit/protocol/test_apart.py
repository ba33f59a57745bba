"""Members that could not be reached: when they are knocked at, and when no more; who owns parts meanwhile."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import pytest
from control import Control
from mate import Mate, entry, member_id, offer_id

from orchestrator.exchange import PARTED_S
from workers import member_events as ev
from workers import messages as msg
from workers.apart import KNOCK_EVERY_S, KNOCK_FOR_S, TRUST_S, Apart, Reached
from workers.jobs import Jobs
from workers.record_log import RecordLog
from workers.records import MemberId
from workers.replica import Replica
from workers.store import BlobStore
from workers.transport.flight import FlightTransport

TOKEN = "of this run"
A, B = (MemberId(name=name, incarnation=1) for name in ("a", "b"))
PEERS = {"a.1": ("at-a", (0,)), "b.1": ("at-b", (0,))}


def test_each_is_knocked_at_once_in_a_while_until_it_answers() -> None:
    apart = Apart()
    apart.miss(A, 0.0)
    apart.miss(B, 0.5)
    assert apart.due(PEERS, 0.5) == [(A, "at-a"), (B, "at-b")]
    assert not apart.answered(A, 0.6, reached=False)
    assert apart.answered(B, 0.6, reached=True)
    assert apart.due(PEERS, 0.5 + KNOCK_EVERY_S - 0.1) == []
    assert apart.due(PEERS, 0.5 + KNOCK_EVERY_S) == [(A, "at-a")]
    assert not apart.answered(B, 2.0, reached=True), "it is known"


def test_who_left_and_who_never_answers_is_forgotten() -> None:
    apart = Apart()
    apart.miss(A, 0.0)
    apart.miss(B, 0.0)
    assert apart.due({"a.1": PEERS["a.1"]}, 0.0) == [(A, "at-a")]
    apart.answered(A, 1.0, reached=False)
    assert apart.due(PEERS, KNOCK_FOR_S + 1.0) == []
    assert not apart.missed_s


def test_where_knocks_pass_and_pieces_do_not_nobody_is_knocked_at() -> None:
    """A link that carries little: the controller would deal parts to the pair in each exchange, in vain."""
    apart = Apart()
    apart.miss(A, 0.0)
    assert apart.due(PEERS, 0.0)
    assert apart.answered(A, 0.1, reached=True)
    apart.miss(A, 10.0)
    assert apart.due(PEERS, 10.0) == []
    apart.miss(A, 0.2 + TRUST_S)
    assert apart.due(PEERS, 0.2 + TRUST_S) == [(A, "at-a")]


# ---------------------------------------------------------------- a member


def test_who_could_not_be_reached_is_knocked_at_until_it_answers() -> None:
    mate = Mate().start()
    mate.tell(mate.assign(entry("island-1", 0, 4), owners=("island-0", "island-2")))
    mate.tick(5.0)
    assert mate.found(ev.Knock) == []
    mate.happen(ev.PiecesFailed(fragment=0, offer=offer_id("island-1"), chunks=(0,), why="no answer"))
    mate.tick(0.5)
    assert mate.found(ev.Knock) == [ev.Knock(member=member_id("island-1"), address="at-1")]
    mate.tick(5.0)
    assert len(mate.found(ev.Knock)) == 1, "one at a time"
    mate.happen(ev.Knocked(member=member_id("island-1"), reached=False))
    mate.tick(0.5)
    assert len(mate.found(ev.Knock)) == 2 and mate.found(Reached) == []
    mate.happen(ev.Knocked(member=member_id("island-1"), reached=True))
    assert mate.found(Reached) == [Reached(member=member_id("island-1"))]
    mate.tick(5.0)
    assert len(mate.found(ev.Knock)) == 2


# ---------------------------------------------------------------- over sockets


def test_who_is_there_again_is_noticed_by_the_next_knock(jobs: Jobs) -> None:
    """Refused at first (the port is held, nobody listens), then let in; one of another run is no answer."""
    held, other = socket.socket(), member_id("island-1")
    held.bind(("127.0.0.1", 0))
    port = held.getsockname()[1]
    address = f"grpc+tcp://127.0.0.1:{port}"
    mate = Mate().start()
    mate.tell(msg.Peers(peers=((str(other), address, (0,)),)))
    mate.tell(mate.assign(entry("island-1", 0, 4), owners=("island-0", "island-2")))
    mate.happen(ev.PiecesFailed(fragment=0, offer=offer_id("island-1"), chunks=(0,), why="no answer"))

    def knock() -> list[Reached]:
        mate.commands.clear()
        mate.tick(KNOCK_EVERY_S)
        (command,) = mate.found(ev.Knock)
        assert command.address == address
        event = jobs.do(command)
        assert event is not None
        mate.happen(event)
        return mate.found(Reached)

    assert knock() == []
    held.close()
    with serving(port, "of another run"):
        assert knock() == []
    with serving(port, TOKEN):
        assert knock() == [Reached(member=other)]
        mate.commands.clear()
        mate.tick(KNOCK_EVERY_S)
        assert mate.found(ev.Knock) == []


@contextmanager
def serving(port: int, token: str) -> Iterator[FlightTransport]:
    transport = FlightTransport(BlobStore(), host="127.0.0.1", port=port, token=token, num_connections=1)
    transport.start()
    try:
        yield transport
    finally:
        transport.stop()


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    """Of a member whose transport is that of runs on Ray; knocks need no replica."""
    with serving(0, TOKEN) as transport:
        yield Jobs(
            replica=cast(Replica, None), store=BlobStore(), transport=transport, log=RecordLog, lock=threading.RLock(),
            timeout_s=10.0, threaded=True,
        )  # fmt: skip


# ---------------------------------------------------------------- the controller


def owners(control: Control) -> set[str]:
    return {owner.name for owner in control.open().owners}


def contributors(control: Control) -> set[str]:
    return {one.member for one in control.open().roster}


def next_round(control: Control, offering: Iterable[str], *, after_s: float = 0.0) -> None:
    """The open exchange is committed by two of three; all have it after a while, and these offer again."""
    control.reduce()
    for name in ("island-0", "island-1"):
        control.have(name)
    if after_s:
        control.tick(after_s)
    for name in ("island-0", "island-1", "island-2"):
        control.ready(name)
    for name in offering:
        control.offer(name)


def test_two_that_cannot_reach_each_other_own_nothing_while_a_third_reaches_both() -> None:
    """A cut between two members only: the first exchange finds out, the next ones need not."""
    control = Control(chunks=6)
    control.start()
    offers = {name: control.offer(name) for name in ("island-0", "island-1", "island-2")}
    control.missing("island-1", offers["island-2"])
    control.missing("island-2", offers["island-1"])
    assert owners(control) == {"island-0"}
    assert contributors(control) == set(offers), "both keep contributing"
    next_round(control, offers)
    assert owners(control) == {"island-0"}
    assert control.open().attempt == 1
    next_round(control, offers, after_s=PARTED_S + 1)
    assert owners(control) == set(offers), "in the end they are tried again"


def test_two_that_reach_each_other_again_own_parts_at_once() -> None:
    control = Control(chunks=6)
    control.start()
    offers = {name: control.offer(name) for name in ("island-0", "island-1", "island-2")}
    control.missing("island-1", offers["island-2"])
    control.missing("island-2", offers["island-1"])

    control.say("island-1", Reached(member=control.id("island-2")))
    next_round(control, offers)
    assert owners(control) == {"island-0"}, "one of them cannot reach the other one yet"
    control.say("island-2", Reached(member=control.id("island-1")))
    next_round(control, offers)
    assert owners(control) == set(offers)


def test_who_is_late_for_a_roster_can_fetch_its_result_from_all_its_owners() -> None:
    """Two that cannot reach each other, and one of them late: the other one would be an owner it asks in vain."""
    control = Control(chunks=6)
    control.start()
    offers = {name: control.offer(name) for name in ("island-0", "island-1", "island-2")}
    control.missing("island-2", offers["island-1"])
    next_round(control, ("island-0", "island-2"))
    control.tick(2.5)
    assert control.open().state == "reducing" and contributors(control) == {"island-0", "island-2"}
    assert owners(control) == {"island-0"}
