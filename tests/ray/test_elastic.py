"""Machines join a run, leave it and die: real raylets on this machine, each with one place."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from orchestrator.build import OWN_PACK_LABEL, pack_path, resolve
from orchestrator.ledger import ledger_command
from orchestrator.metrics import ExchangeRow, SpanRow, StepRow, read_rows
from orchestrator.processes import WORKER_RESOURCE
from orchestrator.summary import Summary
from tests.ray.live_run import LiveRun
from tests.small_run import SEQ_LEN, small_config
from workers.data.index import load_index
from workers.data.pack import pack
from workers.data.shards import check_shard, map_shard
from workers.records import LEFT, CommitRecord, FenceRecord, JoinRecord, LeaseRecord, MemberId, Record, ScopeRecord

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

TOKENS = 96_000
OWN_TOKENS = 1_600  # of them, of a pack that only island-1 has
HAS_THE_PACK = {OWN_PACK_LABEL: "island-1"}
NODE = {"num_cpus": 1, "resources": {WORKER_RESOURCE: 1}, "object_store_memory": 80_000_000}
JOINED_WITHIN_S = 15.0
PACE_S = 0.2
SLOWER_BY = 1.05
STEPS_BEFORE = 15


@dataclass(frozen=True, kw_only=True, slots=True)
class Story:
    """What happened, from the run's files and the test's own clock."""

    run_dir: Path
    records: list[Record]
    summary: Summary
    contributed_after_s: float
    steps_before_s: list[float]
    steps_meanwhile_s: list[float]
    left: MemberId
    rejoined: MemberId
    killed: MemberId
    replaced: MemberId
    lost_when_it_left: int
    joiners_cache: Path


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without places."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80_000_000})
    ray.init(address=made.address, namespace="atoll", log_to_driver=False, logging_level="ERROR")
    yield made
    ray.shutdown()
    made.shutdown()


def take_away(cluster: Cluster, node: str, *, within_s: float) -> None:
    """What a provider's notice of pre-emption comes to: Ray is told to drain a node, with a deadline."""
    reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    deadline_ms = int(1000 * (time.time() + within_s))
    done, why = GcsClient(address=cluster.address).drain_node(node, reason, "a test takes it away", deadline_ms)
    assert done, why


def is_live(run: LiveRun, member: MemberId) -> bool:
    ended = {(r.member, r.incarnation) for r in run.records() if isinstance(r, FenceRecord)}
    return (member.name, member.incarnation) not in ended


def contributed(run: LiveRun, name: str, more_than: int) -> Callable[[], MemberId | None]:
    """An incarnation of `name` above `more_than` that is in a commit."""

    def look() -> MemberId | None:
        members = {entry.offer.member for commit in run.commits() for entry in commit.roster}
        return next((m for m in sorted(members) if m.name == name and m.incarnation > more_than), None)

    return look


def steps_s(run: LiveRun, name: str) -> list[float]:
    """What each of an island's steps took so far, pace and all, without its waits: from one row to the next."""
    rows = [row for row in run.steps() if row.member == name]
    return [
        (row.t_s - last.t_s - (row.data_wait_ms + row.sync_wait_ms) / 1000) / (row.step - last.step)
        for last, row in pairwise(rows)
    ]


@pytest.fixture(scope="module")
def story(cluster: Cluster, pack_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("elastic")
    far, caches = folder / "far", {name: {"XDG_CACHE_HOME": str(folder / name)} for name in ("here", "there")}
    shutil.copytree(pack_dir, far)
    letters = [folder / f"letter-{number}.txt" for number in range(40)]
    for number, letter in enumerate(letters):
        letter.write_text(f"Dear friend {number}, the reef is far. " * 20)
    pack(letters, folder / "own", seq_len=SEQ_LEN, val_fraction=0.2, scope="island")
    values = [
        f"data.per_island.island-1.path={folder / 'own'}",
        f"data.per_island.island-1.tokens={OWN_TOKENS}",
        f"data.path={far.as_uri()}",
        f"train.tokens={TOKENS}",
        "run.islands=auto",
        f"run.address={cluster.address}",
        "exchange.suspect_s=30",
    ]
    config = small_config(pack_dir, *values, "strategy.inner_steps=4", "exchange.quorum=0.5", "exchange.limbo_s=60")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", caches["here"]["XDG_CACHE_HOME"])
        run = LiveRun(config, pack_path(resolve(config)), folder / "run", pace_s=PACE_S)
    assert (run.config.run.islands, run.config.run.elastic) == (1, True)
    cluster.add_node(**NODE, env_vars=caches["here"])
    run.start()
    try:
        run.until(contributed(run, "island-0", 0), "the first machine's island in a commit")

        shutil.rmtree(far)  # whoever joins from now on has to ask the others for the tokens
        before = run.until(
            lambda: found if len(found := steps_s(run, "island-0")) >= STEPS_BEFORE else None, "steps of one island"
        )
        began = time.monotonic()
        second = cluster.add_node(**NODE, labels=HAS_THE_PACK, env_vars=caches["there"])
        left = run.until(contributed(run, "island-1", 0), "the second machine's island in a commit")
        contributed_after_s = time.monotonic() - began
        meanwhile = steps_s(run, "island-0")[len(before) :]

        take_away(cluster, second.node_id, within_s=60)
        run.until(lambda: not is_live(run, left), "the second machine's island to leave, as Ray drains its machine")
        lost = run.state().lost
        cluster.remove_node(second)

        third = cluster.add_node(**NODE, labels=HAS_THE_PACK, env_vars=caches["there"])
        rejoined = run.until(contributed(run, "island-1", left.incarnation), "the third machine's island in a commit")
        cluster.remove_node(third, allow_graceful=False)
        run.until(
            lambda: any(isinstance(r, FenceRecord) and r.incarnation == rejoined.incarnation for r in run.records()),
            "the third machine's death to be noticed",
        )
        cluster.add_node(**NODE, labels=HAS_THE_PACK, env_vars=caches["there"])
        replaced = run.until(contributed(run, "island-1", rejoined.incarnation), "its island on the fourth machine")
        unknown = ray.get(run.controller.leave.remote(["island-77"], None, False), timeout=30)
        assert unknown == {"leaving": [], "unknown": ["island-77"]}
        summary = run.finish()
    finally:
        run.stop()
    yield Story(
        run_dir=run.run_dir,
        records=run.records(),
        summary=summary,
        contributed_after_s=contributed_after_s,
        steps_before_s=before,
        steps_meanwhile_s=meanwhile,
        left=left,
        rejoined=rejoined,
        killed=rejoined,
        replaced=replaced,
        lost_when_it_left=lost,
        joiners_cache=folder / "there" / "atoll" / "packs",
    )


def test_a_machine_that_joins_contributes_soon(story: Story) -> None:
    print(f"contributed {story.contributed_after_s:.1f} s after the machine was there")
    assert story.contributed_after_s < JOINED_WITHIN_S


def test_a_machine_that_joins_is_in_the_next_exchange_that_closes(story: Story) -> None:
    rows = list(read_rows(story.run_dir / "metrics.jsonl"))
    back_s = next(row.t_s for row in rows if isinstance(row, StepRow) and row.member == "island-1")
    closed = [row for row in rows if isinstance(row, ExchangeRow) and row.t_s - row.seconds > back_s]
    assert "island-1" in closed[0].roster


def test_who_trains_already_is_not_held_up_by_a_machine_that_joins(story: Story) -> None:
    """While Ray starts there, processes are started, and state and tokens are fetched."""
    before_s, meanwhile_s = median(story.steps_before_s), median(story.steps_meanwhile_s)
    num = len(story.steps_meanwhile_s)
    print(f"steps of {before_s:.4f} s before, {meanwhile_s:.4f} s in the {num} steps until the machine contributed")
    assert before_s > PACE_S and num >= STEPS_BEFORE
    assert meanwhile_s < SLOWER_BY * before_s


def test_who_leaves_hands_over_everything(story: Story) -> None:
    fences = [record for record in story.records if isinstance(record, FenceRecord) and record.why == LEFT]
    assert [MemberId(name=fence.member, incarnation=fence.incarnation) for fence in fences] == [story.left]
    assert story.lost_when_it_left == 0
    commits = [record for record in story.records if isinstance(record, CommitRecord)]
    upto = max(e.upto for c in commits for e in c.roster if e.offer.member == story.left)
    assert upto > 0 and not any(fault.member == "island-1" and fault.kind == "left" for fault in story.summary.faults)


def test_a_machine_that_dies_loses_only_what_it_had_not_offered(story: Story) -> None:
    assert [(fault.kind, fault.member) for fault in story.summary.faults] == [("kill", "island-1")]
    assert story.summary.tokens_lost <= story.summary.tokens_reissued
    assert story.replaced.incarnation == story.killed.incarnation + 1


def test_machines_are_told_apart_in_the_journal(story: Story) -> None:
    joins = [record for record in story.records if isinstance(record, JoinRecord) and record.member == "island-1"]
    assert len({join.node for join in joins}) == len(joins) == 3


def test_the_run_finishes_and_its_ledger_adds_up(story: Story) -> None:
    assert story.summary.exit_reason == "done"
    assert story.summary.tokens_committed == TOKENS
    assert ledger_command(story.run_dir, False) == 0


def test_a_pack_of_its_own_is_leased_to_nobody_else_wherever_its_machine_comes_from(story: Story) -> None:
    (scope,) = [record for record in story.records if isinstance(record, ScopeRecord)]
    ((start, stop),) = scope.ranges
    leases = [record for record in story.records if isinstance(record, LeaseRecord)]
    given = [(lease.member, b - a) for lease in leases for a, b in lease.ranges if start <= a < stop]
    assert (scope.members, stop - start) == (("island-1",), OWN_TOKENS // SEQ_LEN)
    assert {member for member, _ in given} == {"island-1"} and sum(num for _, num in given) >= OWN_TOKENS // SEQ_LEN


def test_time_away_is_no_time_dead(story: Story) -> None:
    spans = [row for row in read_rows(story.run_dir / "metrics.jsonl") if isinstance(row, SpanRow)]
    assert [span.member for span in spans if span.phase == "away"] == ["island-1"]
    assert [span.member for span in spans if span.phase == "dead"] == ["island-1"]


def test_a_machine_without_the_tokens_gets_them_from_the_others(story: Story, pack_dir: Path) -> None:
    (cached,) = story.joiners_cache.iterdir()
    index = load_index(cached)
    assert cached.name == index.digest == load_index(pack_dir).digest
    for shard in index.splits["train"].shards:
        file = cached / shard.file
        check_shard(file, shard, map_shard(file, shard, index.token_type), index.vocab_size)
