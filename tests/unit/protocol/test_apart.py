"""Members that could not be reached: when they are knocked at, and when no more."""

from __future__ import annotations

from workers.apart import KNOCK_EVERY_S, KNOCK_FOR_S, TRUST_S, Apart
from workers.records import MemberId

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
