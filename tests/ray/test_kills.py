"""SIGKILL to an island at each point of an exchange: one run goes through them all, the tests look at its files."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest

from faults.inject import Point, read_marks
from orchestrator.ledger import ledger_command
from orchestrator.metrics import StepRow
from orchestrator.summary import Summary
from tests.ray.live_run import Kill, LiveRun
from tests.small_run import small_config
from workers.records import CommitRecord, FaultRecord, FenceRecord, MemberId, Record, TermRecord

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

PACE_S = 0.25
TOKENS = 57_600
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
    members: tuple[dict[str, MemberId], dict[str, MemberId]]  # before and after the controller alone was killed
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
        before = run.state().current
        run.kill_controller()
        after = run.state().current
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
        members=(before, after),
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
    dead = [*(one.victim for one in story.kills), story.members[1]["island-0"]]
    assert [MemberId(name=f.member, incarnation=f.incarnation) for f in fences] == dead
    assert not any(fence.refused for fence in fences)
    faults = [record for record in story.records if isinstance(record, FaultRecord)]
    assert [fault.member for fault in faults] == [member.name for member in dead], faults


def test_the_successor_starts_from_a_committed_anchor(kill: Kill, story: Story) -> None:
    successor = MemberId(name=kill.member, incarnation=kill.victim.incarnation + 1)
    note = story.starts[f"{successor.name}-{successor.incarnation}"]
    assert note["displacement"] == 0.0
    assert note["version"] >= kill.mark["version"]
    entries = [e for r in commits(story) for e in r.roster if e.offer.member == successor]
    assert entries[0].since == 0


def test_survivors_hardly_wait(kill: Kill, story: Story) -> None:
    """No gap between two steps exceeds twice the median step plus 0.5 s, beyond what undisturbed rounds have."""
    fault = kill.fault
    assert fault.detected_s is not None and fault.contributed_s is not None
    for member in {step.member for step in story.steps} - {kill.member}:
        times = [step.t_s for step in story.steps if step.member == member]
        gaps = [(start, end - start) for start, end in itertools.pairwise(times)]
        median = statistics.median(gap for _, gap in gaps)
        first_kill = min(one.fault.detected_s or 0.0 for one in story.kills)
        usual = max(gap for start, gap in gaps[1:] if start + gap < first_kill - 1)
        longest = max(gap for start, gap in gaps if fault.detected_s - 2 <= start <= fault.contributed_s)
        assert longest <= 2 * median + 0.5 + (usual - median), f"{member}: median {median:.2f} s, usually {usual:.2f} s"


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


def test_the_run_finishes_and_its_ledger_adds_up(story: Story) -> None:
    summary = story.summary
    assert summary.exit_reason == "done"
    assert summary.tokens_committed == TOKENS
    assert summary.tokens_lost <= summary.tokens_reissued
    assert ledger_command(story.run_dir, False) == 0
    assert len(summary.faults) == len(story.kills) + 1


def test_islands_outlive_the_controller(story: Story) -> None:
    before, after = story.members
    assert before == after
    assert sum(isinstance(record, TermRecord) for record in story.records) == 3


def test_an_island_that_dies_with_the_controller_is_replaced(story: Story) -> None:
    lost = story.members[1]["island-0"]
    successor = MemberId(name=lost.name, incarnation=lost.incarnation + 1)
    assert any(entry.offer.member == successor for record in commits(story) for entry in record.roster)
    assert story.starts[f"{successor.name}-{successor.incarnation}"]["displacement"] == 0.0


def commits(story: Story) -> list[CommitRecord]:
    return [record for record in story.records if isinstance(record, CommitRecord)]
