"""What is done about failures: budgets for each kind, loops, waits, verdicts."""

from __future__ import annotations

import pytest

from faults.recovery import KINDS, Action, Budgets, GiveUp, Kind, RecoveryPolicy, Restart


def policy(**changes: object) -> RecoveryPolicy:
    limits: dict[Kind, int | None] = {"crash": 2, "died": 2, "hung": 2, "lost": None, "preempted": None}
    return RecoveryPolicy(budgets=Budgets(**{"per_kind": limits, "window_s": 100.0, "early": 4, **changes}))  # type: ignore[arg-type]


def fail(book: RecoveryPolicy, kind: Kind, at_s: float, *, stepped: bool = True, name: str = "a") -> Action:
    return book.failed(name, kind, at_s, stepped=stepped, why="it said so")


@pytest.mark.parametrize("kind", ["crash", "died", "hung"])
def test_a_budget_ends_with_a_verdict_that_says_what_and_why(kind: Kind) -> None:
    book = policy()
    assert [fail(book, kind, t) for t in (1.0, 2.0)] == [Restart(after_s=0.0, reason="it said so")] * 2
    given_up = fail(book, kind, 3.0)
    assert isinstance(given_up, GiveUp)
    for part in ("a is given up", "3 times", "within 100 s", "run.max_restarts is 2", "it said so"):
        assert part in given_up.verdict


def test_kinds_and_members_have_budgets_of_their_own() -> None:
    book = policy()
    for kind in KINDS:
        for name in ("a", "b"):
            assert [isinstance(fail(book, kind, t, name=name), Restart) for t in (1.0, 2.0)] == [True, True]


@pytest.mark.parametrize("kind", ["preempted", "lost"])
def test_what_is_taken_away_spends_no_budget_of_crashes(kind: Kind) -> None:
    book = policy()
    for t in range(50):
        assert fail(book, kind, float(t), stepped=False) == Restart(after_s=0.0, reason="it said so")
    assert isinstance(fail(book, "died", 51.0), Restart) and isinstance(fail(book, "crash", 52.0), Restart)


def test_old_failures_are_forgiven() -> None:
    book = policy()
    for t in range(0, 1000, 60):
        assert isinstance(fail(book, "died", float(t)), Restart), "two within any window of 100 s"


def test_a_loop_waits_longer_and_longer_and_ends() -> None:
    book = policy(per_kind={}, early=5, backoff_s=1.0, max_backoff_s=3.0)
    waits = [fail(book, "crash", float(t), stepped=False) for t in range(4)]
    assert [w.after_s for w in waits if isinstance(w, Restart)] == [0.0, 1.0, 2.0, 3.0]
    last = fail(book, "crash", 5.0, stepped=False)
    assert isinstance(last, GiveUp) and "5 processes in a row ended before their first step" in last.verdict


def test_a_step_ends_a_loop() -> None:
    book = policy(per_kind={})
    for t in range(20):
        assert fail(book, "died", float(t), stepped=False) == Restart(after_s=0.0, reason="it said so")
        book.stepped("a")


def test_failures_of_an_earlier_controller_count() -> None:
    book = policy()
    book.note("a", "died", 1.0)
    book.note("a", "died", 2.0)
    assert isinstance(fail(book, "died", 3.0), GiveUp)
