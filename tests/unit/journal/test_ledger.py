from __future__ import annotations

import time
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from journal_histories import SEQ_LEN, Story, chain_rows, sealed_commit

from orchestrator.ledger import Ledger, recompute
from orchestrator.run_state import RunState
from workers import ranges
from workers.records import GENESIS_HASH, GenesisRecord, LeaseRecord, Record, RosterEntry, Row, TermRecord


def samples_of(spans: object) -> set[int]:
    return {x for start, stop in spans for x in range(start, stop)}  # type: ignore[attr-defined]


def fates_of(ledger: Ledger) -> dict[int, str]:
    out: dict[int, str] = {}
    sets = {"full": ledger.full, "dropped": ledger.dropped, "free": ledger.free, "in_progress": ledger.in_progress}
    sets |= {f"partial({k})": part for k, part in ledger.partial}
    for fate, spans in sets.items():
        for sample in samples_of(spans):
            assert sample not in out
            out[sample] = fate
    return dict(sorted(out.items()))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), num_fragments=st.integers(1, 3))
def test_a_legal_journal_has_no_findings_and_each_sample_its_true_fate(seed: int, num_fragments: int) -> None:
    story = Story(seed, num_fragments=num_fragments).run(120)
    ledger = recompute(chain_rows(story.records))
    assert [str(finding) for finding in ledger.findings] == []
    assert fates_of(ledger) == story.fates()
    assert samples_of(ledger.issued) == set(range(story.cursor))
    assert [samples_of(spans) for spans in ledger.committed] == story.committed
    assert ledger.num_reissued == story.reissued
    assert ledger.num_revoked == story.revoked
    assert ledger.heads == tuple(len(commits) for commits in story.commits)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), num_fragments=st.integers(1, 3))
def test_a_rollback_leaves_every_sample_with_one_fate(seed: int, num_fragments: int) -> None:
    story = Story(seed, num_fragments=num_fragments, revoke_dropped=num_fragments == 1, operations=True).run(120)
    ledger, state = recompute(chain_rows(story.records)), RunState()
    for record in story.records:
        state.apply(record)
    assert [str(finding) for finding in ledger.findings] == []
    assert fates_of(ledger) == story.fates()
    assert (state.samples_committed(), state.lost) == (ledger.samples()["full"], ledger.num_lost)
    assert (ranges.union(state.free, ()), state.dropped) == (ledger.free, ledger.dropped)
    assert state.partial == ranges.union((span for _, part in ledger.partial for span in part), ())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), num_fragments=st.integers(1, 3))
def test_every_partial_and_dropped_sample_is_named(seed: int, num_fragments: int) -> None:
    ledger = recompute(chain_rows(Story(seed, num_fragments=num_fragments).run(100).records))
    named: dict[str, set[int]] = defaultdict(set)
    for deviation in ledger.deviations:
        new = samples_of(deviation.ranges)
        if deviation.kind in ("partial", "dropped"):
            assert not new & named[deviation.kind]
        named[deviation.kind] |= new
    assert named["partial"] == {x for _, part in ledger.partial for x in samples_of(part)}
    assert named["dropped"] == samples_of(ledger.dropped)
    assert samples_of(ledger.free) <= named["returned"]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), num_fragments=st.integers(1, 3))
def test_it_agrees_with_the_controllers_own_state(seed: int, num_fragments: int) -> None:
    story = Story(seed, num_fragments=num_fragments, revoke_dropped=num_fragments == 1).run(120)
    state = RunState()
    for record in story.records:
        state.apply(record)
    ledger = recompute(chain_rows(story.records))
    assert state.samples_committed() == ledger.samples()["full"]
    assert ranges.union(state.free, ()) == ledger.free
    assert state.dropped == ledger.dropped
    assert state.partial == ranges.union((span for _, part in ledger.partial for span in part), ())
    assert state.reissued == ledger.num_reissued
    assert state.lost == ledger.num_lost
    assert tuple(head.digest for head in state.heads) == ledger.digests
    assert state.num_params == ledger.num_params
    losses = [evaluation.val_loss for evaluation in state.evaluations]
    assert ledger.final_val_loss == (losses[-1] if len(losses) > 1 else None)
    assert state.next_position == story.cursor


def test_sums_and_tokens() -> None:
    ledger = recompute(chain_rows(Story(1, num_fragments=2).run(150).records))
    samples = ledger.samples()
    assert samples["issued"] == sum(samples[fate] for fate in ("full", "partial", "dropped", "free", "in_progress"))
    assert all(samples[fate] for fate in samples)
    tokens = ledger.tokens(SEQ_LEN)
    assert tokens["committed"] == samples["full"] * SEQ_LEN
    assert tokens["reissued"] == ledger.num_reissued * SEQ_LEN


def test_an_empty_journal() -> None:
    ledger = recompute([])
    assert ledger.ok
    assert ledger.num_rows == 0
    assert ledger.samples() == dict.fromkeys(ledger.samples(), 0)


def long_journal(num_rounds: int, num_members: int = 3) -> list[Row]:
    """Leases of many members take turns, so that no two leases of one are neighbours; hashes are made up."""
    story = Story(0, num_members=num_members)
    story.term()
    for name in story.names:
        story.join(name)
    records: list[Record] = [*story.records, GenesisRecord(maker="island-0.1", digests=("d",), num_params=1)]
    prev, cursor = "genesis", 0
    for n in range(num_rounds):
        entries = []
        for name in story.names:
            span = (cursor, cursor + 10)
            records.append(LeaseRecord(member=name, incarnation=1, index=10 * n, ranges=(span,)))
            entries.append(
                RosterEntry(
                    member=name, incarnation=1, seq=n, since=10 * n, upto=10 * n + 10, ranges=(span,), num_steps=1,
                    coefficient=1 / num_members,
                )
            )  # fmt: skip
            cursor += 10
        record = sealed_commit(
            fragment=0, n=n + 1, prev_chain=prev, serial=n + 1, attempt=1, roster=tuple(entries),
            chunk_digests=("c",), digest="d", base_samples=0,
        )  # fmt: skip
        records.append(record)
        prev = record.chain
    hashes = [GENESIS_HASH, *(f"{i:032x}" for i in range(1, len(records) + 1))]
    return [Row(seq=i, prev=hashes[i], hash=hashes[i + 1], record=record) for i, record in enumerate(records)]


def test_a_long_journal_takes_time_in_proportion() -> None:
    rows = long_journal(3_000)
    started_s = time.perf_counter()
    ledger = recompute(rows)
    took_s = time.perf_counter() - started_s
    assert ledger.ok
    assert ledger.samples()["full"] == 90_000
    assert took_s < 5  # 12,000 rows; about 0.5 s on a slow core


def test_it_goes_on_after_a_bad_row_and_names_it_alone() -> None:
    rows = chain_rows(Story(3).run(80).records)
    first = next(i for i, row in enumerate(rows) if isinstance(row.record, LeaseRecord))
    record = rows[first].record
    assert isinstance(record, LeaseRecord)
    records = [row.record for row in rows]
    records[first] = LeaseRecord(
        member=record.member, incarnation=record.incarnation, index=record.index + 1, ranges=record.ranges
    )
    ledger = recompute(chain_rows(records), place=lambda seq: f"journal.jsonl:{seq + 1}")
    assert [(f.seq, f.place, f.rule) for f in ledger.findings] == [(first, f"journal.jsonl:{first + 1}", "lease")]


def test_hostile_types_become_findings() -> None:
    records: list[Record] = [TermRecord(lineage=0, number=1, controller="c")]
    records.append(LeaseRecord(member=[], incarnation=1, index=0, ranges=()))  # type: ignore[arg-type]
    ledger = recompute(chain_rows(records))
    assert [f.seq for f in ledger.findings] == [1]


@pytest.mark.parametrize("first", [0, 1])
def test_a_journal_begins_with_row_0_and_a_term(first: int) -> None:
    records = Story(1).run(10).records
    rows = chain_rows(records[1:]) if first == 0 else chain_rows(records)[1:]
    assert {f.rule for f in recompute(rows).findings} & {"chain", "term"}
