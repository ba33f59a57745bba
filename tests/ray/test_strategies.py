"""Every strategy on real processes: its preset, made small, with an island killed in the middle of an exchange; and a
run with members that do wrong, one of which is banned and comes back.

Three runs at a time go on side by side in one Ray: most of a run is waiting for processes to start.
"""

from __future__ import annotations

import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from rich.console import Console

from faults.inject import PairPoint, Point, read_anchors, read_marks, read_met
from orchestrator.client import RayRuns
from orchestrator.config import RunConfig, load_config
from orchestrator.ledger import recompute
from orchestrator.run_state import RunState
from orchestrator.segments import read_run
from orchestrator.status import Status, read_status, render
from orchestrator.summary import Summary
from tests.ray.live_run import POLL_S, Kill, LiveRun
from workers.pair_records import PairCommitRecord, PairRosterRecord
from workers.records import (
    CommitRecord,
    FaultRecord,
    FenceRecord,
    JoinRecord,
    MemberId,
    Record,
    RefusalRecord,
    SettleRecord,
    StandingRecord,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

PACE_S, PAIR_TIMEOUT_S = 0.2, 1.0  # so that the tokens last for half a minute: a successor comes in that time
ALONE_S, ALONE_TRIES = 4.0, 5
AT_ONCE = 3  # two of three islands at most, the others of two: the cluster has room for eight
TOKENS = 20_000
SMALL = (
    "run.islands=2", f"train.tokens={TOKENS}", "train.batch_size=4", "train.threads=1", "train.device=cpu",
    "model.layers=2", "model.dim=16", "model.heads=2", "strategy.inner_steps=8", "exchange.quorum=1.0",
    "exchange.heartbeat_s=0.2", "exchange.suspect_s=30", "eval.every=1.0", "eval.windows=4", "data.corpus=",
    "run.snapshot_every_s=1000.0",
)  # fmt: skip
# What a preset has too much of for two layers; and where the island dies.
CASES: dict[str, tuple[Point | PairPoint, tuple[str, ...]]] = {
    "robust": ("reducing", ("run.islands=3",)),  # a member that checks another one's part dies
    "noloco": ("reducing", ("strategy.merge_every=3", "strategy.pair_timeout_s=1", "strategy.topology=near")),
    "streaming": ("offered", ("strategy.num_fragments=2", "strategy.overlap_steps=6")),
    "eager": ("committed", ()),
    "delayed": ("before_offer", ()),
    "muloco": ("reducing", ()),
    "sparseloco": ("pulling", ()),
    "async-dn": ("reducing", ("exchange.quorum=0.5", "strategy.momentum_every=2")),
    "decoupled": (
        "offered",
        ("strategy.num_fragments=2", "strategy.overlap_steps=6", "exchange.quorum=0.5", "exchange.grace_s=0.5"),
    ),
    "gossip": ("meeting", ("run.islands=3", "strategy.merge_every=3", f"strategy.pair_timeout_s={PAIR_TIMEOUT_S}")),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Story:
    """One run, told from its files."""

    run_dir: Path
    config: RunConfig
    kill: Kill
    records: list[Record]
    anchors: dict[str, list[tuple[int, int, str]]]
    starts: dict[str, dict[str, object]]
    summary: Summary
    met_alone: int | None
    """`noloco`: the round in which both members met while the controller was stopped."""


def small(name: str, pack_dir: Path) -> RunConfig:
    overrides = [*SMALL, f"data.path={pack_dir}", *CASES[name][1]]
    return load_config(name, overrides=overrides).config


def meet_alone(run: LiveRun) -> int:
    """Stop the controller after the first meeting since a merge until the members have met again; in which round."""

    def between_merges() -> bool:
        kinds = [type(r) for r in run.records() if isinstance(r, PairCommitRecord | CommitRecord)]
        return kinds[-2:] == [CommitRecord, PairCommitRecord]

    for _ in range(ALONE_TRIES):  # the roster may not have reached the members yet when the controller stops
        run.until(between_merges, "a meeting after a merge")
        with run.stopped_controller():
            before, deadline = read_met(run.run_dir), time.monotonic() + ALONE_S
            while time.monotonic() < deadline:
                new = [n for n, who in read_met(run.run_dir).items() if n not in before and len(who) == 2]
                if new:
                    journal = [r.round_ for r in run.records() if isinstance(r, PairCommitRecord)]
                    assert new[0] not in journal, "the controller was not stopped"
                    return new[0]
                time.sleep(POLL_S)
    raise AssertionError(f"in {ALONE_TRIES} times {ALONE_S:g} s without a controller nobody met")


def tell(run: LiveRun, name: str, starting: threading.Lock) -> Story:
    """Train, kill island-1, let its successor contribute, finish."""
    with starting:
        run.start()
    run.until_training()
    met_alone = meet_alone(run) if name == "noloco" else None
    kill = run.kill_at("island-1", CASES[name][0])
    summary = run.finish()
    return Story(
        run_dir=run.run_dir,
        config=run.config,
        kill=kill,
        records=run.records(),
        anchors=read_anchors(run.run_dir),
        starts=read_marks(run.run_dir, "start"),
        summary=summary,
        met_alone=met_alone,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class WrongStory:
    """A run with members that do wrong, told from its files; and what was shown and answered when one was banned."""

    run_dir: Path
    records: list[Record]
    summary: Summary
    when_banned: Status
    shown: str
    answer: dict[str, Any]


WRONG = "wrong"
STEALTHY = ("copy_cat:island-0,for=4s", "little_is_enough:island-1,for=4s", "label_flip:island-2,for=4s")
WRONG_SETTINGS = ("run.islands=3", "train.tokens=48000")


def tell_wrong(run: LiveRun, starting: threading.Lock) -> WrongStory:
    """Have island-2 send wrong updates until it is banned, take it back, then have everybody attack by stealth."""
    with starting:
        run.start()
    run.until_training()

    def cause(*faults: str) -> None:
        answer = ray.get(run.controller.chaos.remote(list(faults)), timeout=30.0)
        assert answer["done"] == list(faults), answer

    def said(member: str, what: str) -> bool:
        return any(what in log.read_text() for log in (run.run_dir / "logs").glob(f"{member}*.log"))

    cause("sign_flip:island-2,for=300s")
    run.until(lambda: run.state().bans.standing("island-2") == "banned", "a ban")
    when_banned, page = read_status(run.run_dir), io.StringIO()
    Console(file=page, width=200).print(render(when_banned))
    cause("inner_product:island-2,for=0.05s")  # one attack at a time: the other one ends with it
    run.until(lambda: said("island-2", "over: inner_product"), "an honest island-2")
    start = len(run.commits())
    run.until(lambda: len(run.commits()) > start, "a commit without it")
    answer = RayRuns(run.run_dir.name).ask("unban", member="island-2")  # what `atoll unban island-2` does
    start = len(run.commits())
    run.until(lambda: any("island-2" in names(c) for c in run.commits()[start:]), "island-2 to contribute again")

    losses = [row.loss for row in run.steps() if row.member == "island-2" and row.loss is not None]
    cause(*STEALTHY)
    for attacker in ("island-0", "island-1"):
        run.until(lambda attacker=attacker: said(attacker, "it knows what island-"), f"{attacker} to hear others")  # type: ignore[misc]
    run.until(
        lambda: any(row.loss and row.loss > losses[-1] + 0.5 for row in run.steps() if row.member == "island-2"),
        "island-2 to train on flipped labels",
    )
    summary = run.finish()
    return WrongStory(
        run_dir=run.run_dir,
        records=run.records(),
        summary=summary,
        when_banned=when_banned,
        shown=page.getvalue(),
        answer=answer,
    )


def names(commit: CommitRecord) -> set[str]:
    return {entry.member for entry in commit.roster}


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """All stories of this module."""

    killed: dict[str, Story]
    wrong: WrongStory


@pytest.fixture(scope="module")
def told(ray_cluster: None, pack_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Told:
    folder, starting = tmp_path_factory.mktemp("strategies"), threading.Lock()
    configs = {name: small(name, pack_dir) for name in CASES}
    configs[WRONG] = load_config("robust", overrides=[*SMALL, f"data.path={pack_dir}", *WRONG_SETTINGS]).config
    runs = {name: LiveRun(config, pack_dir, folder / name, pace_s=PACE_S) for name, config in configs.items()}

    def whole(name: str) -> Story:
        try:
            return tell(runs[name], name, starting)
        finally:
            runs[name].stop()

    def whole_wrong() -> WrongStory:
        try:
            return tell_wrong(runs[WRONG], starting)
        finally:
            runs[WRONG].stop()

    with ThreadPoolExecutor(AT_ONCE) as pool:
        wrong = pool.submit(whole_wrong)
        killed = {name: pool.submit(whole, name) for name in CASES}
        return Told(killed={name: future.result() for name, future in killed.items()}, wrong=wrong.result())


@pytest.fixture(scope="module")
def stories(told: Told) -> dict[str, Story]:
    return told.killed


@pytest.fixture(params=CASES)
def story(request: pytest.FixtureRequest, stories: dict[str, Story]) -> Story:
    return stories[request.param]


def commits(story: Story) -> list[CommitRecord]:
    return [record for record in story.records if isinstance(record, CommitRecord)]


def test_exactly_the_killed_island_is_blamed_and_its_successor_contributes(story: Story) -> None:
    fences = [r for r in story.records if isinstance(r, FenceRecord)]
    assert [MemberId(name=f.member, incarnation=f.incarnation) for f in fences] == [story.kill.victim]
    successor = MemberId(name="island-1", incarnation=story.kill.victim.incarnation + 1)
    assert any(entry.offer.member == successor for record in commits(story) for entry in record.roster)
    assert story.starts[f"{successor.name}-{successor.incarnation}"]["displacement"] == 0.0


def test_every_sample_has_its_fate(story: Story) -> None:
    ledger = recompute(read_run(story.run_dir).rows)
    assert ledger.ok, ledger.findings
    fates = ledger.samples()
    assert story.summary.exit_reason == "done"
    assert fates["full"] + fates["partial"] + fates["dropped"] == -(-TOKENS // 16)
    if story.config.strategy.num_fragments == 1:
        assert fates["partial"] == 0, "a sample is in the one fragment or in none"


def test_everybody_holds_the_anchors_that_were_sealed(story: Story) -> None:
    sealed = {(record.fragment, record.n): record.digest for record in commits(story)}
    held = [(f, n, digest) for lines in story.anchors.values() for f, n, digest in lines if n > 0]
    assert len(held) > 4
    assert [(f, n) for f, n, digest in held if sealed[f, n] != digest] == []


def test_members_that_gossip_have_met_before_the_kill_and_after_it(stories: dict[str, Story]) -> None:
    pairs = [r for r in stories["noloco"].records if isinstance(r, PairCommitRecord)]
    lives = {dict(zip(r.members, r.incarnations, strict=True))["island-1"] for r in pairs}
    assert lives == {1, 2} and {len(r.members) for r in pairs} == {2}


def test_members_that_have_their_roster_meet_while_the_controller_is_stopped(stories: dict[str, Story]) -> None:
    story = stories["noloco"]
    (row,) = [r for r in story.records if isinstance(r, PairCommitRecord) and r.round_ == story.met_alone]
    assert set(row.members) == {"island-0", "island-1"}, "reported, and recorded when it went on"


def test_a_member_that_dies_in_a_pair_loses_its_work_since_the_last_one_and_nobody_else_anything(
    stories: dict[str, Story],
) -> None:
    story = stories["gossip"]
    victim, rows, state = story.kill.victim, story.records, RunState()
    for record in rows:
        state.apply(record)
    (fence,) = [at for at, record in enumerate(rows) if isinstance(record, FenceRecord)]
    met = [r for r in rows if isinstance(r, PairCommitRecord)]
    assert {len(r.members) for r in met} == {2}
    spans = [(r.round_, str(MemberId(name=name, incarnation=n)), upto)
             for r in met for name, n, upto in zip(r.members, r.incarnations, r.upto, strict=True)]  # fmt: skip
    planned = {r.round_ for r in rows[:fence] if isinstance(r, PairRosterRecord) if str(victim) in "+".join(r.groups)}
    round_ = int(story.kill.mark["about"].removeprefix("gossip/"))
    others = {n for n, member, _ in spans if member == str(victim)}
    assert round_ in planned - others and (not others or max(others) < round_), "the pair that it died in never commits"
    merged = [e.upto for record in commits(story) for e in record.roster if e.offer.member == victim]
    committed = max([upto for _, member, upto in spans if member == str(victim)] + merged)
    assert state.members[victim].watermarks == [committed], "what was in a pair or a merge counts, to the sample"
    losses = {(r.member, r.incarnation): r.lost for r in rows if isinstance(r, SettleRecord) and r.lost}
    assert set(losses) == {(victim.name, victim.incarnation)}, "its open work is trained on again, and nobody else's"
    # The others go on without it: before its successor is in anything, they have committed again.
    later = rows[fence:]
    back = next(at for at, r in enumerate(later) if isinstance(r, JoinRecord) and r.member == victim.name)
    names = [set(r.members) if isinstance(r, PairCommitRecord) else {e.member for e in r.roster}
             for r in later[:back] if isinstance(r, PairCommitRecord | CommitRecord)]  # fmt: skip
    assert {"island-0", "island-2"} in names


def test_fragments_are_sent_one_after_the_other_and_exchanges_overlap(stories: dict[str, Story]) -> None:
    # Founders of the run send fragment 0 first, after half of a period, and each once in every period.
    first = [record for record in commits(stories["streaming"]) if record.n == 1]
    # One of the two may be late on a busy machine, and is in the next version then.
    assert {(record.fragment, entry.num_steps) for record in first for entry in record.roster} == {(0, 4), (1, 8)}
    versions = [max(r.n for r in commits(stories["streaming"]) if r.fragment == f) for f in (0, 1)]
    assert min(versions) >= 5 and abs(versions[0] - versions[1]) <= 2


def test_who_sends_wrong_updates_is_refused_and_banned_with_reasons(told: Told) -> None:
    rows, status = told.wrong.records, told.wrong.when_banned
    assert {r.member for r in rows if isinstance(r, RefusalRecord)} == {"island-2"}, "nobody else is blamed"
    bans = [at for at, r in enumerate(rows) if isinstance(r, StandingRecord)]
    standings = [r for r in rows if isinstance(r, StandingRecord)]
    assert [(r.member, r.standing) for r in standings[:2]] == [("island-2", "banned"), ("island-2", "probation")]
    refused = [at for at, r in enumerate(rows) if isinstance(r, RefusalRecord)]
    assert len([at for at in refused if at < bans[0]]) == 3 and not [at for at in refused if at > bans[0]]
    attack = next(at for at, r in enumerate(rows) if isinstance(r, FaultRecord) and r.fault == "sign_flip")
    assert sum(isinstance(r, CommitRecord) for r in rows[attack : refused[0]]) <= 5, "named within five exchanges"
    member = status.members["island-2"]
    assert member.standing == "banned" and len(member.refusals) == 3
    assert all("times the median of 3" in why for why in member.refusals)
    assert status.members["island-0"].standing == "member" and not status.members["island-0"].refusals
    assert "island-2 is banned; atoll unban island-2 ends it" in told.wrong.shown
    between = [r for r in rows[bans[0] : bans[1]] if isinstance(r, CommitRecord)]
    assert between and not any("island-2" in names(commit) for commit in between), "nothing it sends counts"


def test_who_is_unbanned_contributes_again_with_a_small_weight(told: Told) -> None:
    assert told.wrong.answer["standing"] == "probation"
    rows = told.wrong.records
    back = next(at for at, r in enumerate(rows) if isinstance(r, StandingRecord) and r.standing == "probation")
    first = next(r for r in rows[back:] if isinstance(r, CommitRecord) and "island-2" in names(r))
    weights = {entry.member: entry.coefficient for entry in first.roster}
    assert 0.0 < weights["island-2"] < 0.2 * max(weights.values())


def test_stealthy_attacks_are_journalled_and_name_nobody(told: Told) -> None:
    injected = [r.detail for r in told.wrong.records if isinstance(r, FaultRecord) and r.injected]
    assert injected == ["sign_flip:island-2,for=300s", "inner_product:island-2,for=0.05s", *STEALTHY]
    ledger = recompute(read_run(told.wrong.run_dir).rows)
    assert ledger.ok and told.wrong.summary.exit_reason == "done", ledger.findings
