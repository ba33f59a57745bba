"""Runs on real processes: kills at each point of an exchange, Ctrl-C and resume, the same bits as in one process.

One run goes through all the kills, and the tests look at its files; the others are `atoll train` as a user calls it.
"""

from __future__ import annotations

import bisect
import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest

from faults.inject import Point, read_anchors, read_marks
from orchestrator.ledger import ledger_command
from orchestrator.metrics import ExchangeRow, StepRow, read_rows
from orchestrator.summary import Summary
from tests.ray.live_run import Kill, LiveRun
from tests.small_run import small_config
from workers.records import (
    CommitRecord,
    FaultRecord,
    FenceRecord,
    GenesisRecord,
    MemberId,
    Record,
    TermRecord,
)

pytestmark = [pytest.mark.ray, pytest.mark.alone, pytest.mark.timeout(400)]

BACK_WITHIN_S = 15.0
COMMIT_LATER_BY_S = 1.0
PACE_S = 0.3
TOKENS = 64_000
# Who dies where. island-0 made version 0; each point of an exchange once.
KILLS: tuple[tuple[str, Point], ...] = (
    ("island-1", "before_offer"),
    ("island-2", "offered"),
    ("island-0", "pulling"),
    ("island-1", "reducing"),
    ("island-2", "committed"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Story:
    """The whole run, told from its files."""

    run_dir: Path
    kills: tuple[Kill, ...]
    records: list[Record]
    steps: list[StepRow]
    starts: dict[str, dict[str, Any]]
    anchors: dict[str, list[tuple[int, int, str]]]
    members: dict[str, MemberId]  # when the controller and island-0 were killed
    summary: Summary


@pytest.fixture(scope="module")
def story(ray_cluster: None, pack_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    # A busy machine must not make anybody suspect: this is about deaths.
    config = small_config(
        pack_dir, "run.islands=3", f"train.tokens={TOKENS}", "strategy.inner_steps=4", "exchange.suspect_s=30"
    )
    run = LiveRun(config, pack_dir, tmp_path_factory.mktemp("kills") / "run", pace_s=PACE_S)
    run.start()
    try:
        run.until_training()
        kills = tuple(run.kill_at(member, point) for member, point in KILLS)
        members = run.state().current
        run.kill_controller(with_island="island-0")
        summary = run.finish()
    finally:
        run.stop()
    yield Story(
        run_dir=run.run_dir,
        kills=kills,
        records=run.records(),
        steps=run.steps(),
        starts=read_marks(run.run_dir, "start"),
        anchors=read_anchors(run.run_dir),
        members=members,
        summary=summary,
    )


@pytest.fixture(params=KILLS, ids=[point for _, point in KILLS])
def kill(request: pytest.FixtureRequest, story: Story) -> Kill:
    member, point = request.param
    return next(kill for kill in story.kills if (kill.member, kill.point) == (member, point))


def test_every_point_of_an_exchange_is_there() -> None:
    assert {point for _, point in KILLS} == set(get_args(Point))


def test_the_dead_is_blamed_and_nobody_else(kill: Kill, story: Story) -> None:
    assert kill.mark["incarnation"] == kill.victim.incarnation
    fences = [r for r in story.records if isinstance(r, FenceRecord)]
    dead = [*(one.victim for one in story.kills), story.members["island-0"]]
    assert [MemberId(name=f.member, incarnation=f.incarnation) for f in fences] == dead
    assert not any(fence.refused for fence in fences)
    faults = [r for r in story.records if isinstance(r, FaultRecord) and r.member != "controller"]
    assert [fault.member for fault in faults] == [member.name for member in dead], faults


def test_the_successor_starts_from_a_committed_anchor(kill: Kill, story: Story) -> None:
    successor = MemberId(name=kill.member, incarnation=kill.victim.incarnation + 1)
    note = story.starts[f"{successor.name}-{successor.incarnation}"]
    assert note["displacement"] == 0.0
    assert note["version"] >= kill.mark["version"]
    entries = [e for r in commits(story) for e in r.roster if e.offer.member == successor]
    assert entries[0].since == 0


def test_everybody_holds_the_anchors_that_were_sealed(story: Story) -> None:
    """What lies in the memory of each process at its offers, hashed anew, against the journal."""
    sealed = {(record.fragment, record.n): record.digest for record in commits(story)}
    (genesis,) = (record for record in story.records if isinstance(record, GenesisRecord))
    sealed |= {(fragment, 0): digest for fragment, digest in enumerate(genesis.digests)}
    for process, held in story.anchors.items():
        for fragment, n, digest in held:
            assert digest == sealed[fragment, n], f"{process} holds another anchor {fragment}.{n}"
    lives = {str(e.offer.member).replace(".", "-") for record in commits(story) for e in record.roster}
    assert lives <= set(story.anchors)
    holders = [sum((f, n, d) in held for held in story.anchors.values()) for (f, n), d in sealed.items()]
    assert max(holders) >= 3 and sum(num >= 2 for num in holders) > len(holders) / 2


def test_survivors_hardly_wait(kill: Kill, story: Story) -> None:
    """No gap between two steps, from before the death until the successor contributes, exceeds 2 x median + 0.5 s.

    Rows that were on their way to a controller when it was killed are missing: of a gap over several steps, all but one
    took `PACE_S` at least.
    """
    fault = kill.fault
    assert fault.detected_s is not None and fault.contributed_s is not None
    records = [r for r in story.records if isinstance(r, FaultRecord)]
    controller_back_s = [record.t_s for record in records if record.fault == "controller_restarted"]
    assert controller_back_s, "the controller was killed after the last of them"
    paced_until_s = max(one.fault.contributed_s or 0.0 for one in story.kills)
    for member in {step.member for step in story.steps} - {kill.member}:
        mine = [step for step in story.steps if step.member == member]
        gaps = [
            (a.t_s, b.t_s - a.t_s - (b.step - a.step - 1) * PACE_S)
            for a, b in itertools.pairwise(mine)
            if a.incarnation == b.incarnation and a.t_s <= paced_until_s
        ]
        median = statistics.median(gap for _, gap in gaps)
        inside = [gap for start, gap in gaps if start + gap >= fault.detected_s - 2 and start <= fault.contributed_s]
        print(f"{kill.point} {member}: longest {max(inside):.2f} s, median {median:.2f} s")
        assert max(inside) <= 2 * median + 0.5, f"{member}: median {median:.2f} s"


def test_survivors_commit_hardly_later(kill: Kill, story: Story) -> None:
    """The commit after a death comes at most 1 s later than it would have: by then there is one on average."""
    rows = [row for row in read_rows(story.run_dir / "metrics.jsonl") if isinstance(row, ExchangeRow)]
    paced_until_s = max(one.fault.contributed_s or 0.0 for one in story.kills)
    times_s = [row.t_s for row in rows if row.t_s <= paced_until_s]
    usual_s = statistics.median(later - sooner for sooner, later in itertools.pairwise(times_s))
    assert kill.fault.detected_s is not None
    place = bisect.bisect(times_s, kill.fault.detected_s)
    waited_s = times_s[place] - times_s[place - 1]
    print(f"{kill.point}: {waited_s:.2f} s from commit to commit, usually {usual_s:.2f} s")
    assert waited_s <= usual_s + COMMIT_LATER_BY_S


def test_what_the_dead_had_offered_counts_once_or_goes_back(kill: Kill, story: Story) -> None:
    """Its last watermark is what a commit lists; nothing of it is committed after its samples got their fate."""
    entries = [e for r in commits(story) for e in r.roster if e.offer.member == kill.victim]
    assert [e.since for e in entries] == [0, *(e.upto for e in entries[:-1])]


def test_the_summary_tells_the_recovery(kill: Kill, story: Story) -> None:
    place = story.kills.index(kill)
    row = story.summary.faults[place]
    assert (row.kind, row.member) == ("kill", kill.member)
    known = (row.detected_after_s, row.next_commit_after_s, row.back_after_s, row.contributed_after_s)
    assert None not in known
    assert row.detected_after_s <= row.next_commit_after_s <= row.contributed_after_s
    assert row.back_after_s <= row.contributed_after_s
    assert row.back_after_s < BACK_WITHIN_S


def test_the_run_finishes_and_its_ledger_adds_up(story: Story) -> None:
    summary = story.summary
    assert summary.exit_reason == "done"
    assert summary.tokens_committed == TOKENS
    assert summary.tokens_lost <= summary.tokens_reissued
    assert ledger_command(story.run_dir, False) == 0
    assert len(summary.faults) == len(story.kills) + 1


def test_islands_outlive_the_controller_and_one_that_does_not_is_replaced(story: Story) -> None:
    assert sum(isinstance(record, TermRecord) for record in story.records) == 2
    rosters = [entry.offer.member for record in commits(story) for entry in record.roster]
    assert {story.members["island-1"], story.members["island-2"]} <= set(rosters[-3:])
    lost = story.members["island-0"]
    successor = MemberId(name=lost.name, incarnation=lost.incarnation + 1)
    assert successor in rosters
    assert story.starts[f"{successor.name}-{successor.incarnation}"]["displacement"] == 0.0


def commits(story: Story) -> list[CommitRecord]:
    return [record for record in story.records if isinstance(record, CommitRecord)]
