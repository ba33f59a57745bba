"""Who keeps whose local state, and what of a copy may be used: pure rules."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from orchestrator.buddies import AGAIN_S, Buddies, assign, choose
from tests.unit.protocol.mate import entry
from workers.copies import (
    Copy,
    CopyError,
    KeptFragment,
    Manifest,
    last_seq,
    newest_first,
    num_pieces,
    parse_manifest,
    residual_fate,
    why_unfit,
)
from workers.digest import digest
from workers.record_log import GENESIS_CHAIN, RecordLog
from workers.records import (
    GENESIS_HASH,
    CommitRecord,
    FenceRecord,
    GenesisRecord,
    MemberId,
    Record,
    RevokeRecord,
    Row,
    SettleRecord,
    make_row,
)


def member(name: str, incarnation: int = 1) -> MemberId:
    return MemberId(name=name, incarnation=incarnation)


A, B, C, D = (member(name) for name in "abcd")


def copy_of(who: MemberId, version: int = 1) -> Copy:
    return Copy(member=who, versions=(version,), digest=digest(f"{who}/{version}".encode()), num_bytes=8)


# ---------------------------------------------------------------- who keeps it


def test_a_buddy_is_on_another_node_if_there_is_one() -> None:
    places = {A: "x", B: "x", C: "y"}
    assert choose(A, places, {}) == C and choose(B, places, {}) == C and choose(C, places, {}) == A
    assert choose(A, {A: "x", B: "x"}, {}) == B, "another process at least"
    assert choose(A, {A: "x"}, {}) is None and choose(A, {}, {}) is None
    assert choose(A, {A: "x", member("a", 2): "y"}, {}) is None, "not itself under another incarnation"


@pytest.mark.parametrize("num_nodes", [2, 3, 7])
def test_load_is_even_and_everybody_has_a_buddy_elsewhere(num_nodes: int) -> None:
    places = {member(f"m{i:02}"): f"n{i % num_nodes}" for i in range(num_nodes * 3)}
    found = assign({}, places)
    assert found.keys() == places.keys()
    assert all(places[ward] != places[buddy] for ward, buddy in found.items())
    loads = [list(found.values()).count(who) for who in places]
    assert max(loads) - min(loads) <= 1


def test_assignments_stay_until_they_are_worse() -> None:
    places = {A: "x", B: "y", C: "z"}
    found = assign({}, places)
    assert assign(found, {**places, D: "w"}).items() >= found.items(), "a newcomer changes nothing for the others"
    lost = found[A]
    rest = {who: node for who, node in places.items() if who != lost}
    assert assign(found, rest)[A] in rest and assign(found, rest)[A] != A
    together = {A: "x", B: "x"}
    assert assign(assign({}, together), {**together, C: "y"})[A] == C, "a node of its own is worth the transfer"


def test_the_wards_copy_is_fetched_held_and_freed_and_told_once() -> None:
    buddies = Buddies()
    buddies.place({A: "x", B: "y"})
    first = buddies.orders(0.0)
    assert first[A].buddy == "b.1" and first[B].buddy == "a.1" and not first[A].wards
    assert buddies.orders(1.0) == {}, "nothing is new"
    assert buddies.heard(A, copy_of(A), ()) == []
    assert buddies.orders(1.0)[B].wards == (copy_of(A),)
    assert buddies.orders(1.0 + AGAIN_S / 2) == {}
    assert B in buddies.orders(1.0 + AGAIN_S), "what was not done is told again"
    assert buddies.heard(B, None, (copy_of(A),)) == [copy_of(A)]
    assert buddies.heard(B, None, (copy_of(A),)) is None, "once"
    assert buddies.orders(7.0)[A].held == copy_of(A).digest
    buddies.heard(A, None, ())
    assert buddies.orders(8.0)[B].keep == ("a",)


def test_a_copy_of_the_dead_is_kept_until_there_is_a_newer_one() -> None:
    buddies = Buddies()
    buddies.place({A: "x", B: "y", C: "z"})
    holder = buddies.of[A]
    buddies.heard(holder, None, (copy_of(A),))
    rest = {who: node for who, node in {A: "x", B: "y", C: "z"}.items() if who != A}
    buddies.place(rest)
    told = buddies.orders(0.0)
    assert told[holder].keep.count("a") == 1
    assert buddies.copies_of("a") == [(copy_of(A), holder)]
    successor, other = member("a", 2), next(who for who in rest if who != holder)
    buddies.place({**rest, successor: "x"})
    buddies.of[successor] = other
    told |= buddies.orders(1.0)
    assert "a" in told[holder].keep, "the successor's is not there yet"
    buddies.heard(other, None, (copy_of(successor),))
    told |= buddies.orders(2.0)
    assert "a" not in told[holder].keep and "a" in told[other].keep
    assert buddies.holder_of(successor) == (copy_of(successor), other)


def test_whoever_is_gone_keeps_nothing() -> None:
    buddies = Buddies()
    buddies.place({A: "x", B: "y"})
    buddies.orders(0.0)
    buddies.heard(B, None, (copy_of(A),))
    buddies.place({A: "x"})
    assert buddies.copies_of("a") == [] and buddies.of == {}
    assert buddies.orders(0.0)[A].buddy == ""


# ---------------------------------------------------------------- what may be used


def log_of(*records: Record) -> RecordLog:
    log = RecordLog()
    rows: list[Row] = []
    for record in records:
        rows.append(make_row(len(rows), rows[-1].hash if rows else GENESIS_HASH, record))
    assert log.extend(0, rows, rewrite=False) is not None
    return log


GENESIS = GenesisRecord(maker="a.1", digests=("d0",), num_params=4, num_chunks=(1,))


def history(*rosters: dict[MemberId, int]) -> list[Record]:
    """Commits of one fragment; each roster names offers by their number."""
    out: list[Record] = [GENESIS]
    chain = GENESIS_CHAIN
    for n, offers in enumerate(rosters, start=1):
        roster = tuple(entry(m.name, 0, 1, seq=seq, incarnation=m.incarnation) for m, seq in offers.items())
        record = CommitRecord(
            fragment=0, n=n, prev_chain=chain, chain=f"chain-{n}", serial=n, attempt=0, roster=roster,
            roster_digest="", chunk_digests=("c",), digest=f"d{n}", base_samples=0,
        )  # fmt: skip
        out.append(record)
        chain = record.chain
    return out


def manifest_at(n: int, *, seq: int, who: MemberId = A, residual: bool = True) -> Manifest:
    part = KeptFragment(n=n, chain=f"chain-{n}", seq=seq, has_residual=residual)
    return Manifest(run_id="r", member=who, steps=8, fragments=(part,), pieces=("ab",), num_bytes=8)


def fate(manifest: Manifest, fragment: int, log: RecordLog, *, incarnation: int = 2, held: int = 9) -> str:
    return residual_fate(manifest, fragment, log, incarnation=incarnation, held=held)


FENCE = FenceRecord(member="a", incarnation=1, why="died")
SETTLE = SettleRecord(member="a", incarnation=1)


def test_a_residual_waits_for_the_fate_of_its_makers_last_offer() -> None:
    records = history({A: 1, B: 1})
    manifest = manifest_at(1, seq=1)
    assert fate(manifest, 0, log_of(*records)) == "wait"
    assert fate(manifest, 0, log_of(*records, FENCE)) == "wait", "a fixed roster may still list it"
    assert fate(manifest, 0, log_of(*records, FENCE, SETTLE)) == "yes"
    assert fate(manifest_at(1, seq=1, residual=False), 0, log_of(*records)) == "no"


def test_a_residual_that_went_into_a_later_offer_is_not_owed_twice() -> None:
    records = history({A: 1, B: 1}, {A: 2, B: 2})
    assert last_seq(log_of(*records), 0, A) == 2
    assert last_seq(log_of(*records), 0, A, upto=1) == 1, "of what is applied, not of what is known"
    assert fate(manifest_at(1, seq=1), 0, log_of(*records, FENCE, SETTLE)) == "no"
    assert fate(manifest_at(2, seq=2), 0, log_of(*records, FENCE, SETTLE)) == "yes"
    others = history({A: 1, B: 1}, {B: 2})
    assert fate(manifest_at(1, seq=1), 0, log_of(*others, FENCE, SETTLE)) == "yes", "not its own commit"


def test_a_residual_of_a_version_that_was_taken_back_is_void() -> None:
    records = history({A: 1}, {A: 2})
    revoke = RevokeRecord(fragment=0, n=2, chain="chain-2")
    log = log_of(*records, revoke, FENCE, SETTLE)
    assert fate(manifest_at(2, seq=2), 0, log) == "no"
    assert "not in the history" in why_unfit(manifest_at(2, seq=2), log, incarnation=2, staleness_limit=16)


def test_moments_that_are_old_refused_or_of_another_life_are_not_taken() -> None:
    records = history(*({A: n} for n in range(1, 6)))
    log = log_of(*records)
    fit = manifest_at(3, seq=3)
    assert why_unfit(fit, log, incarnation=2, staleness_limit=2) == ""
    assert "2 versions ago (exchange.staleness_limit)" in why_unfit(fit, log, incarnation=2, staleness_limit=1)
    assert "not before incarnation 1" in why_unfit(fit, log, incarnation=1, staleness_limit=9)
    refused = log_of(*records, replace(FENCE, refused=True))
    assert "a.1 was refused" in why_unfit(fit, refused, incarnation=2, staleness_limit=9)
    later = log_of(*records, FENCE, FenceRecord(member="a", incarnation=2, why="nan", refused=True))
    assert "a.2 was refused" in why_unfit(fit, later, incarnation=3, staleness_limit=9)


def test_a_manifest_says_the_same_after_the_wire_and_another_one_is_refused() -> None:
    manifest = manifest_at(1, seq=1)
    copy = Copy(member=A, versions=(1,), digest=digest(manifest.encode()), num_bytes=8)
    assert parse_manifest(manifest.encode(), run_id="r", copy=copy) == manifest
    with pytest.raises(CopyError, match=r"is that of a\.1 in r"):
        parse_manifest(manifest.encode(), run_id="other", copy=copy)
    with pytest.raises(CopyError, match="schema 9"):
        parse_manifest(manifest.encode().replace(b'"schema":1', b'"schema":9'), run_id="r", copy=copy)
    with pytest.raises(CopyError, match="unreadable"):
        parse_manifest(b"{}", run_id="r", copy=copy)


def test_sizes_and_order() -> None:
    assert [num_pieces(n) for n in (0, 1, 1 << 20, (1 << 20) + 1)] == [0, 1, 1, 2]
    ordered = newest_first([copy_of(A, 3), copy_of(member("a", 2), 1), copy_of(A, 5)])
    assert [(c.member.incarnation, c.versions[0]) for c in ordered] == [(2, 1), (1, 5), (1, 3)]
    assert all(x != y for x, y in pairwise(ordered))


def test_a_residual_that_somebody_between_may_have_sent_is_not_owed_again() -> None:
    records = history({A: 1, B: 1}, {member("a", 2): 1, B: 2})
    between = [FENCE, SETTLE, replace(FENCE, incarnation=2)]
    settled = [*between, replace(SETTLE, incarnation=2)]
    manifest = manifest_at(1, seq=1)
    assert fate(manifest, 0, log_of(*records, *between), incarnation=3) == "wait"
    assert fate(manifest, 0, log_of(*records, *settled), incarnation=3) == "no"
    nothing_sent = history({A: 1, B: 1}, {B: 2})
    assert fate(manifest, 0, log_of(*nothing_sent, *settled), incarnation=3) == "yes"


def test_a_residual_waits_for_the_version_that_left_it() -> None:
    log = log_of(*history({B: 1}, {A: 1}), FENCE, SETTLE)
    assert [fate(manifest_at(2, seq=1), 0, log, held=n) for n in (-1, 1, 2)] == ["wait", "wait", "yes"]
