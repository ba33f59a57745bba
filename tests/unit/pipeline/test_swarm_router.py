"""The router's shares, newcomers and bans."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from workers.pipeline.router import Router


def router_of(speeds: dict[str, float]) -> Router:
    router = Router(trainer="t")
    for peer, speed in speeds.items():
        router.announce(peer, stage=0, announcement=1)
        router.answered(peer, size=1.0, seconds=1 / speed)
    return router


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_everybody_is_within_one_of_its_share(speeds: list[int]) -> None:
    router = router_of({f"p{i}": float(speed) for i, speed in enumerate(speeds)})
    chosen = Counter(router.choose(0) for _ in range(3 * sum(speeds)))
    assert all(abs(chosen[f"p{i}"] - 3 * speed) <= 1 for i, speed in enumerate(speeds))


def test_a_newcomer_gets_its_share_and_no_burst() -> None:
    router = router_of({"a": 1.0, "b": 1.0})
    for _ in range(100):
        router.choose(0)
    router.announce("c", stage=0, announcement=1)
    chosen = [router.choose(0) for _ in range(9)]
    assert Counter(chosen) == {"a": 3, "b": 3, "c": 3}


def test_the_first_measurement_gives_the_loads_their_unit() -> None:
    router = Router(trainer="t")
    for peer in "ab":
        router.announce(peer, stage=0, announcement=1)
    first = [router.choose(0) for _ in range(3)]
    router.answered(first[0] or "", size=1.0, seconds=0.01)
    chosen = Counter(router.choose(0) for _ in range(11))
    assert max(chosen.values()) - min(chosen.values()) <= 2, chosen


def test_a_ban_lasts_until_a_newer_announcement() -> None:
    router = router_of({"a": 1.0, "b": 1.0})
    router.ban("a", "no answer")
    router.announce("a", stage=0, announcement=1)  # one that was under way when it failed
    assert {router.choose(0) for _ in range(20)} == {"b"}
    assert router.banned() == {"a": "no answer"}
    router.announce("a", stage=0, announcement=2)
    assert Counter(router.choose(0) for _ in range(10)) == {"a": 5, "b": 5}, "it caught up in a burst"


def test_nobody_left_is_none_and_stages_do_not_mix() -> None:
    router = router_of({"a": 1.0})
    assert router.choose(1) is None
    assert router.choose(0, avoid={"a"}) is None
    router.announce("a", stage=1, announcement=2)
    assert (router.choose(0), router.choose(1)) == (None, "a")
