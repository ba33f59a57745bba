"""One small journal, one row of it made wrong (and the chain mended): each rule of the ledger finds its violation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from journal_histories import chain_rows, sealed_commit

from orchestrator.ledger import recompute
from workers.records import (
    CommitRecord,
    DropRecord,
    EvaluationRecord,
    FenceRecord,
    GenesisRecord,
    JoinRecord,
    LeaseRecord,
    Record,
    RevokeRecord,
    RosterEntry,
    SettleRecord,
    SnapshotRecord,
    TermRecord,
)

Records = dict[str, Record]


def entry(member: str, since: int, upto: int, *ranges: tuple[int, int], share: float = 0.5) -> RosterEntry:
    return RosterEntry(
        member=member, incarnation=1, seq=1, since=since, upto=upto, ranges=ranges, num_steps=1, coefficient=share
    )


def commit(fragment: int, n: int, prev: str, serial: int, *roster: RosterEntry, base_samples: int = 0) -> CommitRecord:
    return sealed_commit(
        fragment=fragment, n=n, prev_chain=prev, serial=serial, attempt=1, roster=roster, chunk_digests=("c",),
        digest="d", base_samples=base_samples,
    )  # fmt: skip


def lease(member: str, index: int, *ranges: tuple[int, int], incarnation: int = 1) -> LeaseRecord:
    return LeaseRecord(member=member, incarnation=incarnation, index=index, ranges=ranges)


def sound() -> Records:
    """Two members, two fragments; `b` is fenced with ten samples uncommitted, which `a` is leased again."""
    first = commit(0, 1, "genesis", 1, entry("a", 0, 10, (0, 10)), entry("b", 0, 10, (20, 30)))
    second = commit(0, 2, first.chain, 2, entry("a", 10, 20, (10, 20)), base_samples=10)
    return {
        "term": TermRecord(lineage=0, number=1, controller="c1"),
        "join a": JoinRecord(member="a", incarnation=1, nonce="na", node="x"),
        "join b": JoinRecord(member="b", incarnation=1, nonce="nb", node="y"),
        "genesis": GenesisRecord(maker="a.1", digests=("g0", "g1"), num_params=7),
        "lease a": lease("a", 0, (0, 20)),
        "lease b": lease("b", 0, (20, 40)),
        "commit 0": first,
        "commit 1": commit(1, 1, "genesis", 1, entry("a", 0, 10, (0, 10))),
        "evaluation": EvaluationRecord(member="a.1", versions=(1, 1), samples=10, val_loss=1.0),
        "snapshot": SnapshotRecord(name="s", versions=(1, 0)),
        "fence b": FenceRecord(member="b", incarnation=1, why="dead"),
        "settle b": SettleRecord(member="b", incarnation=1),
        "lease again": lease("a", 20, (30, 40), (40, 45)),
        "second": second,
        "term 2": TermRecord(lineage=0, number=2, controller="c2"),
        "revoke": RevokeRecord(fragment=0, n=2, chain=second.chain),
        "drop a": DropRecord(member="a", incarnation=1, upto=12, why="stale"),
    }


def findings(records: Records) -> list[tuple[str, str, str]]:
    """`(name of the row, rule, text)` of every finding."""
    names = list(records)
    ledger = recompute(chain_rows(list(records.values())))
    return [(names[f.seq], f.rule, f.text) for f in ledger.findings]


def test_the_journal_is_sound_before_anything_is_changed() -> None:
    assert findings(sound()) == []
    ledger = recompute(chain_rows(list(sound().values())))
    assert ledger.full == ((0, 10),)
    assert ledger.partial == ((1, ((20, 30),)),)
    assert ledger.dropped == ((10, 12),)
    assert ledger.in_progress == ((12, 20), (30, 45))
    assert ledger.free == ()
    assert ledger.num_reissued == 10
    assert [d.kind for d in ledger.deviations] == ["returned", "partial", "reissued", "revoked", "dropped"]


def change(name: str, **values: object) -> Callable[[Records], None]:
    def do(records: Records) -> None:
        records[name] = replace(records[name], **values)

    return do


def reseal(name: str, **values: object) -> Callable[[Records], None]:
    """Change a commit and give it the digests of its new content: only the rules can find it then."""

    def do(records: Records) -> None:
        record = records[name]
        assert isinstance(record, CommitRecord)
        fields = {field: getattr(record, field) for field in CommitRecord.__slots__}
        records[name] = sealed_commit(**{**fields, **values})

    return do


def insert(name: str, record: Record, before: str | None = None) -> Callable[[Records], None]:
    def do(records: Records) -> None:
        items = list(records.items())
        at = len(items) if before is None else list(records).index(before)
        items.insert(at, (name, record))
        records.clear()
        records.update(items)

    return do


def drop_row(name: str) -> Callable[[Records], None]:
    def do(records: Records) -> None:
        del records[name]

    return do


CASES: dict[str, tuple[Callable[[Records], None], str, str, str]] = {
    "no term at first": (drop_row("term"), "join a", "term", "begins with a join"),
    "term does not rise": (change("term 2", number=1), "term 2", "term", "does not rise"),
    "second genesis": (
        insert("again", GenesisRecord(maker="a.1", digests=("g",), num_params=7)),
        "again",
        "genesis",
        "already",
    ),
    "genesis without fragments": (change("genesis", digests=()), "genesis", "genesis", "no fragment"),
    "incarnation skipped": (change("join b", incarnation=2), "join b", "join", "expected incarnation 1"),
    "joins while it lives": (
        insert("j", JoinRecord(member="a", incarnation=2, nonce="n", node="x")),
        "j",
        "join",
        "lives",
    ),
    "nonce used before": (change("join b", nonce="na"), "join b", "join", "nonce"),
    "fence of a stranger": (change("fence b", member="z"), "fence b", "fence", "never joined"),
    "fenced twice": (insert("f", FenceRecord(member="b", incarnation=1, why="")), "f", "fence", "before"),
    "settled without a fence": (drop_row("fence b"), "settle b", "settle", "not fenced"),
    "settled twice": (insert("s", SettleRecord(member="b", incarnation=1)), "s", "settle", "before"),
    "lease to the fenced": (insert("l", lease("b", 20, (45, 50))), "l", "lease", "was fenced"),
    "lease to a stranger": (insert("l", lease("a", 0, (45, 50), incarnation=9)), "l", "lease", "never joined"),
    "lease index": (change("lease again", index=19), "lease again", "lease", "20 samples before"),
    "lease of nothing": (insert("l", lease("a", 35)), "l", "lease", "no samples"),
    "backward range": (insert("l", lease("a", 35, (50, 45))), "l", "lease", "no range"),
    "leased to two": (change("lease b", ranges=((19, 39),)), "lease b", "lease", "19:20 are leased again"),
    "leased before it was settled": (drop_row("settle b"), "lease again", "lease", "30:40 are leased again"),
    "the same sample twice in a lease": (
        insert("l", lease("a", 35, (45, 50), (48, 52))),
        "l",
        "lease",
        "48:50 are leased again",
    ),
    "samples skipped": (change("lease b", ranges=((21, 41),)), "lease b", "lease", "20:21 are skipped"),
    "unknown fragment": (reseal("commit 1", fragment=2), "commit 1", "commit", "fragment 2 of 2"),
    "does not extend the head": (reseal("second", n=3), "second", "commit", "does not extend"),
    "continues another version": (reseal("commit 0", prev_chain="f" * 32), "commit 0", "commit", "does not extend"),
    "roster digest": (change("commit 0", roster_digest="0" * 32), "commit 0", "commit", "roster_digest"),
    "chain": (change("commit 0", digest="e"), "commit 0", "commit", "chain is not"),
    "serial": (reseal("second", serial=1), "second", "commit", "serial"),
    "base samples": (reseal("commit 1", base_samples=11), "commit 1", "commit", "base_samples"),
    "empty roster": (reseal("commit 1", roster=()), "commit 1", "commit", "empty"),
    "roster out of order": (
        reseal("commit 0", roster=(entry("b", 0, 10, (20, 30)), entry("a", 0, 10, (0, 10)))),
        "commit 0",
        "commit",
        "not ascending",
    ),
    "coefficients above 1": (
        reseal("commit 1", roster=(entry("a", 0, 10, (0, 10), share=1.01),)),
        "commit 1",
        "commit",
        "coefficients",
    ),
    "coefficient below 0": (
        reseal("commit 1", roster=(entry("a", 0, 10, (0, 10), share=-0.1),)),
        "commit 1",
        "commit",
        "coefficients",
    ),
    "a stranger in the roster": (
        reseal("commit 1", roster=(entry("z", 0, 10, (0, 10)),)),
        "commit 1",
        "commit",
        "never joined",
    ),
    "a gap": (reseal("commit 1", roster=(entry("a", 1, 10, (1, 10)),)), "commit 1", "commit", "since 1"),
    "counted twice": (
        reseal("second", roster=(entry("a", 0, 20, (0, 20)),)),
        "second",
        "commit",
        "0:10 are counted twice",
    ),
    "no steps": (
        reseal("commit 1", roster=(entry("a", 0, 10, (0, 10))._replace(num_steps=0),)),
        "commit 1",
        "commit",
        "0 steps",
    ),
    "beyond the lease": (
        reseal("commit 1", roster=(entry("a", 0, 21, (0, 21)),)),
        "commit 1",
        "commit",
        "no slice",
    ),
    "other ranges than leased": (
        reseal("commit 1", roster=(entry("a", 0, 10, (1, 11)),)),
        "commit 1",
        "commit",
        "was not leased",
    ),
    "commit of the settled": (
        insert("c", commit(1, 2, "", 2, entry("b", 0, 10, (20, 30))), before="lease again"),
        "c",
        "commit",
        "was settled",
    ),
    "revoke of an old version": (change("revoke", n=1), "revoke", "revoke", "not the head"),
    "revoke of another version": (change("revoke", chain="0" * 32), "revoke", "revoke", "not the head"),
    "drop of the fenced": (
        insert("d", DropRecord(member="b", incarnation=1, upto=15, why=""), before="settle b"),
        "d",
        "drop",
        "does not live",
    ),
    "drop below what is committed": (change("drop a", upto=9), "drop a", "drop", "not in 10:35"),
    "drop beyond the lease": (change("drop a", upto=36), "drop a", "drop", "not in 10:35"),
    "evaluation of the future": (change("evaluation", versions=(2, 1)), "evaluation", "evaluation", "highest"),
    "evaluation of too much": (change("evaluation", samples=11), "evaluation", "evaluation", "at most 10"),
    "snapshot of one fragment": (change("snapshot", versions=(1,)), "snapshot", "snapshot", "highest"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_violation_is_found_at_its_row(case: str) -> None:
    damage, name, rule, text = CASES[case]
    records = sound()
    damage(records)
    found = findings(records)
    assert any(text in told for at, kind, told in found if (at, kind) == (name, rule)), found
    assert found[0][0] == name, found


def fenced_commit(n: int, prev: str, serial: int, since: int) -> CommitRecord:
    return commit(0, n, prev, serial, entry("b", since, since + 2, (20 + since, 22 + since)))


def test_a_fenced_member_is_committed_once_by_the_exchange_that_was_open() -> None:
    records = sound()
    head = records["commit 0"]
    assert isinstance(head, CommitRecord)
    once = fenced_commit(2, head.chain, 2, 10)
    insert("once", once, before="settle b")(records)
    for name in ("lease again", "second", "revoke", "drop a"):
        del records[name]
    assert findings(records) == []
    insert("twice", fenced_commit(3, once.chain, 3, 12), before="settle b")(records)
    assert [(at, rule) for at, rule, _ in findings(records)] == [("twice", "commit")]


def test_a_fenced_member_is_not_committed_in_a_later_term() -> None:
    records = sound()
    head = records["commit 0"]
    assert isinstance(head, CommitRecord)
    for name in ("settle b", "lease again", "second", "revoke", "drop a"):
        del records[name]
    insert("late", fenced_commit(2, head.chain, 1, 10))(records)
    assert [(at, text) for at, _, text in findings(records)] == [
        ("late", "b.1 was fenced in an earlier term; the exchanges of then are gone")
    ]


def test_after_a_recovery_the_old_incarnations_are_given_nothing() -> None:
    records = sound()
    change("term 2", lineage=1)(records)
    insert("l", lease("a", 35, (45, 50)))(records)
    assert [(at, rule) for at, rule, _ in findings(records)] == [("l", "lease")]


def test_samples_refused_twice_are_dropped() -> None:
    records: Records = {"term": TermRecord(lineage=0, number=1, controller="c")}
    for i, member in enumerate("abc"):
        records[f"join {member}"] = JoinRecord(member=member, incarnation=1, nonce=member, node="x")
        records[f"lease {member}"] = lease(member, 0, (0, 10), *([(10, 15)] if i == 1 else []))
        records[f"fence {member}"] = FenceRecord(member=member, incarnation=1, why="nan", refused=i < 2)
        records[f"settle {member}"] = SettleRecord(member=member, incarnation=1)
        if i == 1:
            break
    ledger = recompute(chain_rows(list(records.values())))
    assert ledger.ok
    assert ledger.dropped == ((0, 10),)
    assert ledger.free == ((10, 15),)


def test_a_revoked_commit_of_a_settled_member_returns_only_what_no_fragment_holds() -> None:
    records = sound()
    for name in ("lease again", "second", "term 2", "revoke", "drop a"):
        del records[name]
    insert("one more", commit(1, 2, records["commit 1"].chain, 2, entry("b", 0, 4, (20, 24))), before="settle b")(
        records
    )  # type: ignore[attr-defined]
    head = records["commit 0"]
    assert isinstance(head, CommitRecord)
    assert recompute(chain_rows(list(records.values()))).full == ((0, 10), (20, 24))
    insert("revoke", RevokeRecord(fragment=0, n=1, chain=head.chain))(records)
    ledger = recompute(chain_rows(list(records.values())))
    assert ledger.ok
    assert ledger.partial == ((1, ((20, 24),)),)
    assert ledger.free == ((24, 40),)
    assert ledger.full == ()
    assert ledger.in_progress == ((0, 20),)
