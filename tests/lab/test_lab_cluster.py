"""A real Ray cluster on three continents: training while a region, a pair, and a machine are lost and come back.

The clusters are made by `atoll up` and `atoll join`, the runs by `atoll train`; what happened is read from the journal.
One run goes through all faults, one after the other, as starting one takes longer than a fault.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from faults.lab.cluster import LabCluster
from faults.lab.lab import Lab
from faults.lab.namespaces import has_rto_max
from orchestrator.build import resolve
from orchestrator.finish import build_summary
from orchestrator.ledger import ledger_command
from orchestrator.local import LocalRun
from orchestrator.segments import read_run
from orchestrator.summary import Summary, load_summary
from orchestrator.topology import load_topology
from tests.lab.chain import ENTROPY, make_chain_pack
from tests.lab.live import LabRun
from tests.small_run import small_config
from workers.records import CommitRecord, FaultRecord, FenceRecord, JoinRecord, MemberId

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
CUT_S = 20.0
SETTINGS = [
    "run.islands=3",
    "exchange.quorum=0.5",
    "exchange.staleness_limit=64",
    "strategy.inner_steps=10",
    "train.tokens=56000",
    "train.lr=2e-2",
    "eval.windows=64",
]
PACED = ["run.elastic=true", "train.pace_s=0.1"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Story:
    """One run through all faults."""

    run: LabRun
    summary: Summary
    pids_before: dict[str, int]
    pids_after: dict[str, int]
    num_commits_cut: int
    cut_packets: int
    after_heal: CommitRecord
    before_pair: int
    pair: list[CommitRecord]
    pair_packets: int
    killed: MemberId
    rejoined: MemberId


@pytest.fixture(scope="module")
def pack_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chain_pack(tmp_path_factory.mktemp("pack"))


@pytest.fixture(scope="module")
def story(labs: Path, tmp_path_factory: pytest.TempPathFactory, pack_dir: Path) -> Iterator[Story]:
    root, folder = labs / secrets.token_hex(4), tmp_path_factory.mktemp("story")
    # Where the kernel can, TCP does not wait twice as long each time: a way that is healed is found within seconds.
    rto_max_ms = 2000 if has_rto_max() else None
    topology = load_topology("three-continents").model_copy(update={"rto_max_ms": rto_max_ms})
    with Lab(topology, root=root) as lab:
        cluster = LabCluster(lab)
        cluster.start()
        run = LabRun(cluster, folder, small_config(pack_dir, *SETTINGS, "run.address=auto", *PACED))
        with run:
            yield _live(lab, cluster, run)


def _live(lab: Lab, cluster: LabCluster, run: LabRun) -> Story:
    everybody = {"island-0", "island-1", "island-2"}
    run.until(lambda: run.last_commit_of(everybody), "a commit of all three")
    pids_before = run.pids()

    # A whole region, for longer than anybody is patient.
    lost = run.island_on("eu-1")
    before = len(run.commits())
    lab.cut("eu")
    time.sleep(CUT_S)  # the fault itself
    cut_packets = sum(link.dropped_cut for link in lab.status().links)
    num_commits_cut = len(run.commits()) - before
    known = len(run.commits())
    lab.heal("eu")
    after_heal = run.until(lambda: run.last_commit_of({lost}, after=known), f"{lost} in a commit again")
    run.until(lambda: run.last_commit_of(everybody, after=known), "a commit of all three")

    # Between two of them only; the controller, on the third, reaches both.
    lab.cut("eu:asia")
    dropped = sum(link.dropped_cut for link in lab.status().links)
    before_pair = len(run.commits())
    run.until(lambda: len(run.commits_with(everybody, after=before_pair)) >= 4, "four commits of all three")
    pair = run.commits()[before_pair:]
    pair_packets = sum(link.dropped_cut for link in lab.status().links) - dropped
    lab.heal()
    pids_after = run.pids()

    # A machine dies, and comes back.
    victim = run.island_on("asia-1")
    killed = run.current(victim)
    lab.kill("asia-1")
    run.until(lambda: run.fenced(killed), f"{killed} to be fenced")
    cluster.join("asia-1")

    def contributes_again() -> MemberId | None:
        members = {entry.offer.member for commit in run.commits() for entry in commit.roster}
        return next((m for m in members if m.name == victim and m.incarnation > killed.incarnation), None)

    rejoined = run.until(contributes_again, f"{victim} in a commit from its new process")
    return Story(
        run=run,
        summary=run.finish(),
        pids_before=pids_before,
        pids_after=pids_after,
        num_commits_cut=num_commits_cut,
        cut_packets=cut_packets,
        after_heal=after_heal,
        before_pair=before_pair,
        pair=pair,
        pair_packets=pair_packets,
        killed=killed,
        rejoined=rejoined,
    )


def test_three_continents_train_one_model(story: Story) -> None:
    joins = [record for record in story.run.records() if isinstance(record, JoinRecord) and record.incarnation == 1]
    assert len({join.node for join in joins}) == 3, "an island on each machine"
    assert story.summary.exit_reason == "done"
    assert story.summary.tokens_committed == 56_000
    assert ledger_command(story.run.run_dir, False) == 0


def test_no_process_is_restarted_by_a_cut(story: Story) -> None:
    assert story.cut_packets > 0, "the cut was real"
    assert story.pids_before == story.pids_after
    fences = [record for record in story.run.records() if isinstance(record, FenceRecord)]
    assert [(fence.member, fence.incarnation) for fence in fences] == [(story.killed.name, story.killed.incarnation)]


def test_the_others_train_on_and_the_work_of_the_cut_region_counts(story: Story) -> None:
    assert story.num_commits_cut >= 4
    [entry] = [e for e in story.after_heal.roster if e.offer.member.name == story.run.island_on("eu-1")]
    assert entry.num_steps > 10, "it trained while it was cut off, and all of that is in one offer"
    log = (story.run.run_dir / "logs" / "controller.log").read_text()
    assert f"{story.run.island_on('eu-1')}.1 is suspect" in log


def test_two_that_cannot_reach_each_other_both_contribute(story: Story) -> None:
    assert story.pair_packets > 0, "the cut was real"
    shares = [{entry.member for entry in commit.roster} for commit in story.pair]
    assert sum(len(members) == 3 for members in shares) >= 4
    later = [commit for commit in story.pair if len(commit.roster) == 3][1:]
    assert min(commit.attempt for commit in later) == 1, "once it is known, nobody is asked to reach whom it cannot"


def test_a_machine_that_died_comes_back(story: Story) -> None:
    assert story.rejoined.name == story.killed.name
    joins = [r for r in story.run.records() if isinstance(r, JoinRecord) and r.member == story.killed.name]
    assert len({join.node for join in joins}) == len(joins) == 2


def test_the_final_loss_is_that_of_a_run_without_faults(story: Story, pack_dir: Path, tmp_path: Path) -> None:
    """Paired: the same seed, data and settings, in one process."""
    config = resolve(small_config(pack_dir, *SETTINGS))
    twin = LocalRun(config, tmp_path / "twin")
    twin.start()
    twin.run()
    uncut = build_summary(twin.host, config).final_val_loss
    twin.close()
    assert uncut is not None and story.summary.final_val_loss is not None
    print(f"final loss {story.summary.final_val_loss:.4f}, without faults {uncut:.4f}")
    assert ENTROPY < uncut < 1.05 * ENTROPY, "it has learnt what there is to learn"
    assert story.summary.final_val_loss == pytest.approx(uncut, rel=0.02)


def test_starved_links_are_no_reason_for_suspicion(tmp_path: Path, pack_dir: Path) -> None:
    """10 Mbit/s, and a model that keeps them full for seconds in each exchange; all of it by the command line."""
    size = ["model.dim=128", "model.layers=2", "model.heads=4", "train.tokens=1280", "exchange.chunk_values=65536"]
    config = small_config(pack_dir, *size, "run.islands=2", "strategy.inner_steps=5")
    (tmp_path / "run.toml").write_text(config.to_toml())
    # Once the run is there, and long after it: the links of a plan of faults are changed on its own clock.
    plan = '[[links]]\nat_s = %d\naction = "set"\ntarget = "a:b"\nvalues = { queue_ms = %d }\n'
    (tmp_path / "plan.toml").write_text(plan % (0, 500) + plan % (3600, 100))
    name = f"test-{secrets.token_hex(4)}"

    def atoll(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "orchestrator.cli.main", "lab", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)

    up = atoll("up", "starved", "--name", name, "--json")
    try:
        assert up.returncode == 0, up.stderr
        assert json.loads(up.stdout)["cluster"].startswith(json.loads(up.stdout)["nodes"]["a"])
        arguments = [str(tmp_path / "run.toml"), "--run-dir", str(tmp_path / "run")]
        run = atoll("run", "--lab", name, *arguments, "--faults", str(tmp_path / "plan.toml"))
        assert run.returncode == 0, run.stdout + run.stderr
        assert "did not come, as it was over before: set a:b queue_ms=100 at 3600 s" in run.stderr
        links = json.loads(atoll("status", "--lab", name, "--json").stdout)["links"]
    finally:
        down = atoll("down", name)
    assert f"lab {name} removed" in down.stdout
    assert load_summary(tmp_path / "run").tokens_committed == 1280
    link = next(link for link in links if link["name"] == "a>b")
    assert link["num_bytes"] > 4e6, "it was full for seconds"
    assert link["queue_ms"] == 500
    rows = read_run(tmp_path / "run").rows
    assert [row.record for row in rows if isinstance(row.record, FaultRecord)] == [], "nobody was suspected either"
