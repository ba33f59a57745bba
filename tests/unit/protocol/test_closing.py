"""When an exchange closes: pushes at once, those who were turned away with the next one, grace by what is to spare."""

from __future__ import annotations

import pytest
from control import Control

from orchestrator.closing import adaptive_grace_s
from orchestrator.exchange_rules import push_factor
from workers import messages as msg
from workers.records import CommitRecord, DropRecord

GRACE_S = 0.5


def pushing(**exchange: object) -> Control:
    control = Control(strategy={"name": "async-dn"}, exchange={"grace_s": GRACE_S, **exchange})
    control.start()
    return control


def roster(control: Control) -> list[str]:
    return [entry.member for entry in control.open().roster]


def finish(control: Control) -> None:
    """Owners reduce, everybody holds the result: the version is committed, and all move to it."""
    before = control.head()
    control.reduce()
    for name in sorted(control.state.current):
        if control.head() == before:
            control.have(name)
    assert control.head() == before + 1
    for name in sorted(control.state.current):
        control.ready(name)


def commits(control: Control) -> list[CommitRecord]:
    return [record for record in control.records(CommitRecord) if isinstance(record, CommitRecord)]


def test_a_push_closes_at_once_and_needs_two_holders() -> None:
    control = pushing()
    control.offer("island-1")
    assert control.open().state == "reducing" and roster(control) == ["island-1"]
    control.reduce()
    control.have("island-0")
    assert control.head() == 0, "one holder is not enough"
    control.have("island-1")
    assert control.head() == 1


def test_the_loss_of_one_holder_is_survived() -> None:
    control = pushing()
    control.offer("island-1")
    control.reduce()
    control.have("island-0")
    control.die("island-0")
    assert control.head() == 0 and control.open().attempt == 2, "its parts go to those who live"
    control.reduce()
    control.have("island-2")
    control.have("island-1")
    assert control.head() == 1 and [e.member for e in commits(control)[0].roster] == ["island-1"]


def test_holders_with_other_bits_stop_a_push() -> None:
    control = pushing()
    control.offer("island-1")
    control.reduce()
    control.have("island-0", digest="one")
    control.have("island-1", digest="another")
    assert control.head() == 0 and control.told("island-2", msg.Verify)


def test_who_is_turned_away_is_waited_for_next_time() -> None:
    control = pushing()
    control.offer("island-0")
    control.offer("island-1")  # too late for this one
    control.offer("island-2")
    assert roster(control) == ["island-0"]
    finish(control)
    control.offer("island-2", born=0)
    assert control.open().state == "open", "island-1 is about to push again"
    control.offer("island-1", born=0)
    assert control.open().state == "reducing" and roster(control) == ["island-1", "island-2"]
    finish(control)
    control.offer("island-0", born=1)
    assert control.open().state == "reducing", "nobody is turned away any more"


def test_who_was_turned_away_is_not_waited_for_beyond_the_grace() -> None:
    control = pushing()
    control.offer("island-0")
    control.offer("island-1")
    finish(control)
    control.offer("island-2")
    assert control.open().state == "open"
    control.tick(GRACE_S + 0.1)
    assert control.open().state == "reducing" and roster(control) == ["island-2"]
    assert "grace are over, not waiting for island-1" in control.open().closed_because


def test_who_was_turned_away_and_died_is_not_waited_for() -> None:
    control = pushing()
    control.offer("island-0")
    control.offer("island-1")
    finish(control)
    control.die("island-1")
    control.offer("island-2")
    assert control.open().state == "reducing"


def test_versions_are_pushes_in_the_order_of_the_journal() -> None:
    control = pushing()
    order = ["island-2", "island-0", "island-2", "island-1", "island-0"]
    for name in order:
        control.offer(name)
        finish(control)
    assert [[entry.member for entry in record.roster] for record in commits(control)] == [[name] for name in order]
    assert [record.n for record in commits(control)] == [1, 2, 3, 4, 5]


def test_a_push_weighs_its_share_of_all_times_its_staleness() -> None:
    control = pushing()
    for name in ("island-1", "island-2"):
        control.consumed[name] = 2
        control.hello(name)
    for _ in range(3):
        control.offer("island-0")
        finish(control)
    control.offer("island-1", born=0)
    [entry] = control.open().roster
    assert entry.coefficient == pytest.approx((1 / 3) * (1 + 3) ** -0.5)
    assert push_factor(0) == 1.0


def test_staleness_counts_for_each_member() -> None:
    control = pushing(staleness_limit=2)
    for _ in range(7):
        control.offer("island-0")
        finish(control)
    control.offer("island-1", born=1)  # 6 versions: 2 for each of 3 members
    assert control.open().state == "reducing" and not control.records(DropRecord)
    finish(control)
    control.offer("island-2", born=0)
    assert len(control.records(DropRecord)) == 1


def test_too_few_members_are_no_push() -> None:
    control = pushing(min_members=3)
    control.die("island-2")
    control.offer("island-0")
    assert control.open().state == "open"


@pytest.mark.parametrize(
    ("quorum_s", "sync_s", "share", "grace_s"),
    [(0.0, 0.0, 1.0, 2.0), (0.5, 0.25, 0.5, 0.625), (1.0, 1.5, 1.0, 0.0), (0.0, 0.0, 0.0, 0.0)],
)
def test_adaptive_grace(quorum_s: float, sync_s: float, share: float, grace_s: float) -> None:
    """gamma (tau xi_step - xi_quorum - xi_sync) with tau = 10 steps of 0.2 s."""
    found = adaptive_grace_s(overlap_steps=10, step_s=0.2, quorum_s=quorum_s, sync_s=sync_s, share=share)
    assert found == pytest.approx(grace_s)


def decoupled(step_s: float) -> Control:
    control = Control(
        strategy={"name": "decoupled", "inner_steps": 4, "overlap_steps": 2, "grace_share": 1.0},
        exchange={"grace_s": 60.0},  # of no meaning here
        step_s=dict.fromkeys(("island-0", "island-1", "island-2"), step_s),
    )
    control.start()
    for name in ("island-0", "island-1", "island-2"):
        control.hello(name)
    return control


def test_a_quorum_waits_while_nobody_is_held_up() -> None:
    control = decoupled(step_s=0.5)  # results are due a second after the offer
    control.offer("island-0")
    control.offer("island-1")
    control.tick(0.9)
    assert control.open().state == "open"
    control.tick(0.2)
    assert control.open().state == "reducing"
    assert roster(control) == ["island-0", "island-1"], "2 of 3 are a quorum"


def test_a_quorum_that_came_late_leaves_no_grace() -> None:
    control = decoupled(step_s=0.5)
    control.offer("island-0")
    control.tick(1.2)
    assert control.open().state == "open", "one of three is no quorum"
    control.offer("island-1")
    assert control.open().state == "reducing"


def test_the_time_of_an_exchange_is_taken_off_the_grace() -> None:
    control = decoupled(step_s=0.5)
    control.offer("island-0")
    control.offer("island-1")
    control.offer("island-2")
    control.reduce()
    control.now += 0.7  # until somebody holds the result
    control.have("island-0")
    control.have("island-1")
    assert control.head() == 1 and control.coordinator.exchanges[0].sync_s == pytest.approx(0.7)
    for name in ("island-0", "island-1", "island-2"):
        control.ready(name)
    control.offer("island-0")
    control.offer("island-1")
    control.tick(0.2)
    assert control.open().state == "open"
    control.tick(0.2)
    assert control.open().state == "reducing"
