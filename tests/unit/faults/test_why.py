"""`atoll why`: what is told of a made-up journal, and of one that the real controller wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from orchestrator.cli.main import main
from orchestrator.local import LocalRun
from orchestrator.segments import read_run
from orchestrator.why import NothingKnown, why_exchange, why_member, why_run
from tests.small_run import make_pack, small_config
from workers.records import (
    GENESIS_HASH,
    LEFT,
    CommitRecord,
    DropRecord,
    FaultRecord,
    FenceRecord,
    GenesisRecord,
    JoinRecord,
    LeaseRecord,
    Record,
    RosterEntry,
    Row,
    SettleRecord,
    StopRecord,
    TermRecord,
    make_row,
)


def journal(records: Sequence[Record]) -> list[Row]:
    rows: list[Row] = []
    for record in records:
        rows.append(make_row(len(rows), rows[-1].hash if rows else GENESIS_HASH, record))
    return rows


def join(member: str, incarnation: int = 1) -> JoinRecord:
    return JoinRecord(member=member, incarnation=incarnation, nonce=f"{member}{incarnation}", node="here")


def commit(n: int, *members: tuple[str, int]) -> CommitRecord:
    roster = tuple(
        RosterEntry(
            member=name, incarnation=life, seq=n, since=0, upto=8, ranges=((0, 8),), num_steps=2, coefficient=0.5
        )
        for name, life in members
    )
    return CommitRecord(
        fragment=0,
        n=n,
        prev_chain="",
        chain=str(n),
        serial=n,
        attempt=1 if n == 4 else 0,
        roster=roster,
        roster_digest="",
        chunk_digests=(),
        digest="",
        base_samples=0,
    )


def noticed(fault: str, member: str, t_s: float, detail: str, *, injected: bool = False) -> FaultRecord:
    return FaultRecord(fault=fault, member=member, injected=injected, t_s=t_s, detail=detail)


BOTH = (("a", 1), ("b", 1))
ROWS = journal(
    [
        TermRecord(lineage=0, number=1, controller="c1"),
        join("a"),
        join("b"),
        GenesisRecord(maker="a.1", digests=("x",), num_params=1000, num_chunks=(1,)),
        LeaseRecord(member="b", incarnation=1, index=0, ranges=((0, 8),)),
        commit(1, *BOTH),
        LeaseRecord(member="b", incarnation=1, index=8, ranges=((16, 24),)),
        commit(2, *BOTH),
        noticed("kill", "b", 7.0, "kill:b@round=2", injected=True),
        noticed("died", "b", 7.1, "its process is gone"),
        FenceRecord(member="b", incarnation=1, why="its process is gone"),
        SettleRecord(member="b", incarnation=1, lost=3),
        commit(3, ("a", 1)),
        join("b", 2),
        noticed("suspect", "a", 11.0, "silent for 3.1 s"),
        commit(4, ("b", 2)),
        commit(5, ("a", 1), ("b", 2)),
        DropRecord(member="a", incarnation=1, upto=9, why="older than 16 versions"),
        FenceRecord(member="a", incarnation=1, why=LEFT),
        commit(6, ("b", 2)),
        StopRecord(reason="done"),
    ]
)
TIMES = {(0, n): 2.0 * n for n in range(1, 7)}


def texts(lines: Sequence[object]) -> list[str]:
    return [getattr(line, "text") for line in lines]  # noqa: B009


def test_the_chain_of_a_member_goes_from_its_start_to_its_successor() -> None:
    lines = why_member(ROWS, TIMES, "b")
    assert texts(lines) == [
        "b.1 joined",
        "b.1 was leased its first 8 samples",
        "b.1 is in version 1 (coefficient 0.5000, 2 steps), and in those after it until said otherwise",
        "injected: kill b (kill:b@round=2)",
        "noticed: died b (its process is gone)",
        "b.1 was fenced: its process is gone",
        "what b.1 held and had not committed went back to be leased again, 3 of them trained on for nothing",
        "b.2 joined",
        "b.2 is in version 4 (coefficient 0.5000, 2 steps), and in those after it until said otherwise",
    ]
    assert [(line.seq, line.at_s) for line in lines][2:5] == [(5, 2.0), (8, 7.0), (9, 7.1)]


def test_what_happened_to_the_links_may_concern_everybody() -> None:
    cut = noticed("link_cut", "eu", 6.0, "cut eu at 6 s", injected=True)
    rows = journal([*(row.record for row in ROWS[:8]), cut, noticed("suspect", "a", 9.0, "silent for 3.0 s")])
    told = ["injected: link_cut eu (cut eu at 6 s)", "noticed: suspect a (silent for 3.0 s)"]
    assert texts(why_member(rows, TIMES, "a"))[-2:] == told
    assert texts(why_member(rows, TIMES, "b"))[-1:] == told[:1]


def test_one_incarnation_alone() -> None:
    assert texts(why_member(ROWS, TIMES, "b.2")) == [
        "b.2 joined",
        "b.2 is in version 4 (coefficient 0.5000, 2 steps), and in those after it until said otherwise",
    ]
    assert len(why_member(ROWS, TIMES, "b.1")) == 7


def test_a_living_member_that_was_left_out_is_told_so() -> None:
    assert texts(why_member(ROWS, TIMES, "a"))[-5:] == [
        "noticed: suspect a (silent for 3.1 s)",
        "version 4 was committed without it: its offer was not there when the roster was fixed",
        "a.1 is in version 5 (coefficient 0.5000, 2 steps), and in those after it until said otherwise",
        "work of a.1 up to its sample 9 was dropped: older than 16 versions",
        "a.1 left",
    ]


def test_an_exchange_names_who_was_in_and_why_somebody_was_not() -> None:
    assert texts(why_exchange(ROWS, TIMES, 0, 4)) == [
        "b.2 joined",
        "noticed: suspect a (silent for 3.1 s)",
        "version 4 of fragment 0 was committed (exchange 4, attempt 1)",
        "b.2 was in with coefficient 0.5000: 2 steps, 8 samples",
        "a.1 was not in: noticed: suspect a (silent for 3.1 s); it catches up and offers its work later",
    ]
    assert "a.1 was in with coefficient 0.5000: 2 steps, 8 samples" in texts(why_exchange(ROWS, TIMES, 0, 3))


def test_the_whole_run_sums_up_its_commits() -> None:
    told = texts(why_run(ROWS, TIMES))
    assert told[0] == "controller c1 took over as term 0.1"
    assert told[4] == "versions 1 to 2 committed, the last one from 2 members"
    assert told[9] == "version 3 committed, the last one from 1 member"
    assert told[-1] == "the run ended: done"
    assert [line.at_s for line in why_run(ROWS, TIMES)][4] == 4.0


@pytest.mark.parametrize("who", ["c", "b.3", ""])
def test_a_member_that_never_was(who: str) -> None:
    with pytest.raises(NothingKnown, match=r"knows no member .*; it has a\.1, b\.1, b\.2"):
        why_member(ROWS, TIMES, who)


def test_a_version_that_never_was() -> None:
    with pytest.raises(NothingKnown, match="there is no fragment 7: the run has 1, and the first is 0"):
        why_exchange(ROWS, TIMES, 7, 2)
    with pytest.raises(NothingKnown, match="version 9 of fragment 0 was never committed; the newest is 6"):
        why_exchange(ROWS, TIMES, 0, 9)


def test_the_command_tells_a_real_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack = make_pack(tmp_path)
    run_dir = tmp_path / "run"
    run = LocalRun(small_config(pack, "run.islands=2", "train.tokens=3840"), run_dir)
    run.start()
    run.run()
    run.close()
    versions = [row.record.n for row in read_run(run_dir).rows if isinstance(row.record, CommitRecord)]
    assert main(["why", "--run", str(run_dir)]) == 0
    assert f"versions 1 to {versions[-1]} committed, the last one from 2 members" in capsys.readouterr().out
    assert main(["why", "2", "--run", str(run_dir), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert sum("was in with coefficient" in line["text"] for line in told) == 2
    assert all(line["at_s"] is not None for line in told if "was in" in line["text"])
    assert main(["why", str(run_dir), "island-1"]) == 0, "as the other commands take a directory"
    assert "island-1.1 is in version 1" in capsys.readouterr().out
    assert main(["why", "island-9", "--run", str(run_dir)]) == 2
    assert "knows no member 'island-9'" in capsys.readouterr().err
