from __future__ import annotations

import json
import math
from dataclasses import MISSING, fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from journal_histories import Story, chain_rows

from workers.pair_records import PairCommitRecord, PairRosterRecord
from workers.pipeline.records import (
    LeftRecord,
    PipelineGenesisRecord,
    ServeRecord,
    StageCommitRecord,
    StageCountRecord,
    StageSyncRecord,
    StepFenceRecord,
    StepRecord,
    WorkLostRecord,
)
from workers.records import (
    GENESIS_HASH,
    KINDS,
    AbandonRecord,
    CommitRecord,
    EvaluationRecord,
    FaultRecord,
    FenceRecord,
    MemberId,
    OfferId,
    OperatorRecord,
    Record,
    RecordError,
    RefusalRecord,
    RosterEntry,
    Scalar,
    ScopeRecord,
    SettingRecord,
    StandingRecord,
    StopRecord,
    Term,
    canonical,
    chain_hash,
    dump_row,
    from_body,
    load_row,
    make_row,
    roster_digest,
    to_body,
    version_chain,
)

OPERATOR = OperatorRecord(action="drain", member="island-1", by="dashboard, 127.0.0.1", outcome="asked", t_s=12.5)
PIPELINE = [
    PipelineGenesisRecord(digests=("a", "b"), num_params=7, num_microbatches=4, samples_per_step=8),
    ServeRecord(process="peer-0", peer="peer-0.2", stage=1, why="placed"),
    StepRecord(step=0, round=1, ranges=((0, 8),), trainers=("trainer-0.1",), why="trainer-1 is gone"),
    StepFenceRecord(peer="peer-0.2", step=0, round=1, why="it died"),
    StageCommitRecord(step=0, round=1, stage=1, digest="c", counted=("peer-1.2:0,1,2,3",), holders=("peer-1",)),
    StageCountRecord(step=1, round=1, stage=0, counted=("peer-0.3:0,3",)),
    StageSyncRecord(base=0, version=1, stage=0, digest="d", contributors=("peer-0.3",), holders=("peer-0.3",)),
    WorkLostRecord(peer="peer-2.1", stage=0, why="it died"),
    LeftRecord(process="peer-2", why="left: asked to"),
]
ROWS = [
    *chain_rows(
        [
            *Story(1, num_fragments=2, operations=True).run(150).records,
            OPERATOR,
            ScopeRecord(members=("island-1",), ranges=((400, 500),)),
            AbandonRecord(member="island-1", ranges=((400, 500),), why="it left"),
            *PIPELINE,
            PairRosterRecord(round_=0, groups=("island-0.1+island-1.1",)),
            PairCommitRecord(
                round_=0, members=("island-0", "island-1"), incarnations=(1, 1), since=(0, 0), upto=(4, 4)
            ),
            RefusalRecord(member="island-1", incarnation=1, why="too long"),
            StandingRecord(member="island-1", standing="banned", serial=3, why="refused 3 times"),
            StopRecord(reason="done", detail='a "quoted" \n detail, ünïcode'),
        ]
    )
]


def body_of(line: bytes) -> dict[str, Any]:
    body = json.loads(line)
    assert isinstance(body, dict)
    return body


def one_of(kind: str) -> bytes:
    return next(dump_row(row) for row in ROWS if row.record.kind == kind)


def test_the_rows_here_are_of_every_kind() -> None:
    assert {row.record.kind for row in ROWS} == set(KINDS)


def test_every_row_survives_a_round_trip() -> None:
    for row in ROWS:
        line = dump_row(row)
        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        assert load_row(line) == row


@given(st.builds(FaultRecord, fault=st.text(), member=st.text(), injected=st.booleans(), t_s=st.floats(0, 1e300)))
def test_any_text_and_number_survives_a_round_trip(record: FaultRecord) -> None:
    row = make_row(3, GENESIS_HASH, record)
    assert load_row(dump_row(row)) == row


@pytest.mark.parametrize("value", [None, 2, 0.5, "int8"])
def test_a_setting_that_is_set_or_unset_survives_a_round_trip(value: Scalar) -> None:
    row = make_row(3, GENESIS_HASH, SettingRecord(key="exchange.min_members", value=value, since=(4, 5)))
    assert load_row(dump_row(row)) == row


def test_a_whole_number_in_a_float_field_reads_as_a_float() -> None:
    record = from_body({"kind": "fault", "fault": "x", "member": "m", "injected": True, "t_s": 2})
    assert isinstance(record, FaultRecord)
    assert isinstance(record.t_s, float)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_one_changed_value_is_noticed(kind: str) -> None:
    line = one_of(kind)
    for name, value in body_of(line).items():
        if name == "kind" or isinstance(value, (list, dict)):
            continue
        other = not value if isinstance(value, bool) else value + 1 if isinstance(value, (int, float)) else value + "x"
        with pytest.raises(RecordError):
            load_row(json.dumps({**body_of(line), name: other}).encode())


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_missing_or_extra_field_is_named(kind: str) -> None:
    body = body_of(one_of(kind))
    with pytest.raises(RecordError, match="surplus"):
        load_row(json.dumps({**body, "surplus": 1}).encode())
    required = [field.name for field in fields(KINDS[kind]) if field.default is MISSING]
    for name in required:
        with pytest.raises(RecordError, match=name):
            from_body({k: v for k, v in body.items() if k not in ("seq", "prev", "hash", name)})


@pytest.mark.parametrize(
    "line",
    [b"", b"null", b"[]", b"7", b'"row"', b"{}", b"\xff\xfe", b'{"seq":0', b'{"seq":0,"prev":"","hash":""}'],
)
def test_what_is_no_row_is_refused(line: bytes) -> None:
    with pytest.raises(RecordError):
        load_row(line)


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("commit", {"n": "1"}, "n is '1'"),
        ("commit", {"fragment": None}, "fragment"),
        ("commit", {"roster": [{"member": "a"}]}, "roster"),
        ("commit", {"roster": 5}, "commit"),
        ("lease", {"ranges": [[1]]}, "lease"),
        ("lease", {"ranges": [["a", "b"]]}, "lease"),
        ("lease", {"ranges": None}, "lease"),
        ("fence", {"refused": 1}, "refused"),
        ("join", {"member": 3}, "member"),
        ("setting", {"value": True}, "value is True"),
        ("setting", {"value": [1]}, r"value is \[1\]"),
        ("term", {"kind": "terms"}, "terms"),
        ("term", {"kind": 5}, "kind 5"),
    ],
)
def test_a_mistyped_field_is_refused(kind: str, changes: dict[str, Any], named: str) -> None:
    body = {k: v for k, v in body_of(one_of(kind)).items() if k not in ("seq", "prev", "hash")}
    with pytest.raises(RecordError, match=named):
        from_body({**body, **changes})


def test_numbers_that_json_does_not_have_are_refused() -> None:
    record = EvaluationRecord(member="m", versions=(1,), samples=1, val_loss=math.nan)
    with pytest.raises(ValueError, match="JSON"):
        make_row(0, GENESIS_HASH, record)
    with pytest.raises(ValueError, match="JSON"):
        canonical(to_body(record))


def test_the_hash_covers_number_predecessor_and_content() -> None:
    record = FenceRecord(member="a", incarnation=1, why="w")
    hashes = {
        make_row(1, GENESIS_HASH, record).hash,
        make_row(2, GENESIS_HASH, record).hash,
        make_row(1, "1" * 32, record).hash,
        make_row(1, GENESIS_HASH, FenceRecord(member="a", incarnation=1, why="w", refused=True)).hash,
    }
    assert len(hashes) == 4
    assert all(len(h) == 32 for h in hashes)


def test_the_hash_does_not_depend_on_the_order_of_fields() -> None:
    line = one_of("commit")
    shuffled = json.dumps(dict(reversed(body_of(line).items()))).encode()
    assert load_row(shuffled) == load_row(line)


def test_a_roster_digest_names_every_value() -> None:
    commit = next(row.record for row in ROWS if isinstance(row.record, CommitRecord))
    assert roster_digest(commit.roster) == commit.roster_digest
    first = commit.roster[0]
    for changed in (
        first._replace(coefficient=first.coefficient * 0.5),
        first._replace(upto=first.upto + 1),
        first._replace(ranges=((0, 1), *first.ranges)),
    ):
        assert roster_digest((changed, *commit.roster[1:])) != commit.roster_digest
    assert version_chain("a", {"n": 1}) != version_chain("b", {"n": 1}) != version_chain("b", {"n": 2})


def test_names() -> None:
    member = MemberId(name="island-1", incarnation=2)
    assert str(member) == "island-1.2"
    assert str(OfferId(member=member, seq=7)) == "island-1.2/7"
    assert str(Term(lineage=1, number=4, controller="c")) == "1.4"
    assert Term(lineage=1, number=1, controller="a").rank > Term(lineage=0, number=9, controller="b").rank
    assert member < MemberId(name="island-1", incarnation=3) < MemberId(name="island-2", incarnation=1)


def test_every_record_has_a_kind_of_its_own() -> None:
    assert all(kind == cls.kind and issubclass(cls, Record) for kind, cls in KINDS.items())
    with pytest.raises(RecordError, match="unknown record kind"):
        from_body({"kind": "nonsense"})


def entries(coefficient: float = 0.1) -> tuple[RosterEntry, ...]:
    name = 'island-"\u00e9\n'
    values = ((0, 7),), ((3, 4), (10, 2**40)), ()
    return tuple(
        RosterEntry(
            member=f"{name}{i}", incarnation=1 + i, seq=i, since=0, upto=7, ranges=spans, num_steps=3,
            coefficient=coefficient / 3**i,
        )
        for i, spans in enumerate(values)
    )  # fmt: skip


@pytest.mark.parametrize("coefficient", [0.1, 1e-30, 5e20, 1.0, 0.0])
def test_the_text_of_a_roster_is_its_canonical_json(coefficient: float) -> None:
    roster = entries(coefficient)
    body = [entry._asdict() for entry in roster]
    assert roster_digest(roster) == chain_hash("roster", canonical({"roster": body}))


def test_a_roster_with_a_coefficient_that_is_no_number_has_no_text() -> None:
    with pytest.raises(ValueError):
        roster_digest(entries(float("nan")))
