"""Three refusals in ten exchanges ban for twenty, then probation with a small weight."""

from __future__ import annotations

import random

import pytest

from orchestrator.bans import BAN_EXCHANGES, PROBATION_WEIGHT, WINDOW, Bans


def feed(bans: Bans, first: int, verdicts: str, member: str = "bad") -> list[tuple[int, str]]:
    """`x` refused, `.` fine; the changes of `member` as `(serial, standing)`."""
    changes = []
    for serial, verdict in enumerate(verdicts, first):
        taking_part = {member: "points the wrong way" if verdict == "x" else ""} if bans.may_contribute(member) else {}
        changes += bans.exchange(serial, {"good": "", **taking_part})
    return [(c.serial, c.standing) for c in changes if c.member == member]


def test_the_third_refusal_in_ten_bans_and_says_why() -> None:
    bans = Bans()
    assert feed(bans, 0, "xx.......") == []
    (change,) = bans.exchange(9, {"bad": "too far out", "good": ""})
    assert (change.member, change.standing) == ("bad", "banned")
    assert change.why == "refused 3 times in its last 10 exchanges: too far out"
    assert not bans.may_contribute("bad") and bans.weight("bad") == 0.0
    assert bans.weight("good") == 1.0 and bans.weight("never seen") == 1.0


def test_refusals_that_are_far_apart_ban_nobody() -> None:
    assert feed(Bans(), 0, "xx........x" + "....x....x...." * 20) == []


def test_a_ban_ends_after_twenty_exchanges_in_probation_and_that_in_membership() -> None:
    bans = Bans()
    assert feed(bans, 0, "xxx") == [(2, "banned")]
    assert feed(bans, 3, "." * BAN_EXCHANGES) == [(2 + BAN_EXCHANGES, "probation")]
    assert bans.weight("bad") == PROBATION_WEIGHT
    assert feed(bans, 23, "." * (WINDOW - 1)) == []
    assert feed(bans, 23 + WINDOW, ".") == [(23 + WINDOW, "member")]
    assert feed(bans, 50, "xx") == [], "it begins with a clean sheet"


def test_one_refusal_on_probation_bans_again() -> None:
    bans = Bans()
    feed(bans, 0, "xxx" + "." * BAN_EXCHANGES)
    assert feed(bans, 30, ".x") == [(31, "banned")]
    assert feed(bans, 32, "." * BAN_EXCHANGES) == [(31 + BAN_EXCHANGES, "probation")]


def test_unban_by_hand() -> None:
    bans = Bans()
    with pytest.raises(ValueError, match="bad is not banned: it is welcome"):
        bans.unban("bad", 0)
    feed(bans, 0, "xxx")
    assert [c.standing for c in bans.unban("bad", 5)] == ["probation"]
    with pytest.raises(ValueError, match="on probation"):
        bans.unban("bad", 6)


def test_replay_gives_the_same_standings_and_honest_members_are_never_banned() -> None:
    rng, bans, copy = random.Random(1), Bans(), Bans()
    for serial in range(500):
        verdicts = {f"m{i}": "refused" if rng.random() < 0.1 * i else "" for i in range(5)}
        for change in bans.exchange(serial, {m: why for m, why in verdicts.items() if bans.may_contribute(m)}):
            copy.replay(change)
    assert {m: bans.standing(m) for m in verdicts} == {m: copy.standing(m) for m in verdicts}
    assert {m: bans.entries[m].since for m in verdicts if bans.standing(m) == "banned"} == {
        m: copy.entries[m].since for m in verdicts if copy.standing(m) == "banned"
    }
    assert bans.standing("m0") == "member" and "m0" not in bans.entries
