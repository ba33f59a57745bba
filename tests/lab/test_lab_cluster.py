"""A real Ray cluster on three continents: training while a region, a pair, and a machine are lost and come back.

The clusters are made by `atoll up` and `atoll join`, the runs by `atoll train`; what happened is read from the journal.
One run goes through all faults, one after the other, as starting one takes longer than a fault. While a region of it is
cut off, the machine has time for a second cluster on starved links, and for the twin without faults.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
from tests.lab.live import WAIT_S, LabRun
from tests.small_run import small_config
from workers.records import CommitRecord, FaultRecord, FenceRecord, JoinRecord, MemberId

pytestmark = [pytest.mark.ray, pytest.mark.paired, pytest.mark.slow, pytest.mark.timeout(300)]

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
class Starved:
    """A run on `starved`, by the command line alone, and what its commands said."""

    up: subprocess.CompletedProcess[str]
    run: subprocess.CompletedProcess[str]
    status: subprocess.CompletedProcess[str]
    down: subprocess.CompletedProcess[str]
    name: str
    run_dir: Path


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
    twin_loss: float | None
    starved: Starved


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
        set_distances(lab, near=True)  # machines far apart take twice as long to find each other
        cluster = LabCluster(lab)
        cluster.start()
        run = LabRun(cluster, folder, small_config(pack_dir, *SETTINGS, "run.address=auto", *PACED))
        with run, ThreadPoolExecutor() as pool:

            def meanwhile() -> tuple[Future[float | None], Future[Starved]]:
                twin = pool.submit(run_twin, folder / "twin", pack_dir)
                return twin, pool.submit(run_starved, tmp_path_factory.mktemp("starved"), pack_dir)

            yield _live(lab, cluster, run, meanwhile)


def _live(
    lab: Lab, cluster: LabCluster, run: LabRun, meanwhile: Callable[[], tuple[Future[float | None], Future[Starved]]]
) -> Story:
    everybody = {"island-0", "island-1", "island-2"}
    run.until(lambda: run.last_commit_of(everybody), "a commit of all three")
    set_distances(lab, near=False)
    pids_before = run.pids()

    # A whole region, for longer than anybody is patient.
    lost = run.island_on("eu-1")
    before = len(run.commits())
    lab.cut("eu")
    cut_s = time.monotonic()
    twin, starved = meanwhile()
    time.sleep(max(0.0, cut_s + CUT_S - time.monotonic()))  # the fault itself
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
    # It finds its cluster sooner from near; the others exchange slowly meanwhile, so that there is work left for it.
    set_distances(lab, near=True)
    lab.set("us:eu", delay_ms=500)
    cluster.join("asia-1")
    run.until(lambda: run.current(victim).incarnation > killed.incarnation, f"{victim} to join again")
    set_distances(lab, near=True)

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
        twin_loss=twin.result(timeout=WAIT_S),
        starved=starved.result(timeout=WAIT_S),
    )


def set_distances(lab: Lab, *, near: bool) -> None:
    """Bring the continents together, or where they are."""
    for link, line in lab.topology.links.items():
        lab.set(link, delay_ms=0.1 if near else line.delay_ms, jitter_ms=0.0 if near else line.jitter_ms)


def run_twin(folder: Path, pack_dir: Path) -> float | None:
    """The final loss of the run without faults. Paired: the same seed, data and settings, in one process."""
    config = resolve(small_config(pack_dir, *SETTINGS))
    twin = LocalRun(config, folder)
    twin.start()
    twin.run()
    summary = build_summary(twin.host, config)
    twin.close()
    return summary.final_val_loss


def run_starved(folder: Path, pack_dir: Path) -> Starved:
    """10 Mbit/s, and a model that keeps them full for seconds in each exchange; all of it by the command line."""
    size = ["model.dim=128", "model.layers=2", "model.heads=4", "train.tokens=1280", "exchange.chunk_values=65536"]
    config = small_config(pack_dir, *size, "run.islands=2", "strategy.inner_steps=5")
    (folder / "run.toml").write_text(config.to_toml())
    # Once the run is there, and long after it: the links of a plan of faults are changed on its own clock.
    plan = '[[links]]\nat_s = %d\naction = "set"\ntarget = "a:b"\nvalues = { queue_ms = %d }\n'
    (folder / "plan.toml").write_text(plan % (0, 500) + plan % (3600, 100))
    name = f"test-{secrets.token_hex(4)}"

    def atoll(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "orchestrator.cli.main", "lab", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)

    up = atoll("up", "starved", "--name", name, "--json")
    try:
        arguments = [str(folder / "run.toml"), "--run-dir", str(folder / "run")]
        run = atoll("run", "--lab", name, *arguments, "--faults", str(folder / "plan.toml"))
        status = atoll("status", "--lab", name, "--json")
    finally:
        down = atoll("down", name)
    return Starved(up=up, run=run, status=status, down=down, name=name, run_dir=folder / "run")


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
    # Who learns of the cut tries in vain once: the exchange is made again, or goes on without the one who is late.
    attempts = [(commit.attempt, len(commit.roster)) for commit in story.pair]
    learnt = next(number for number, (attempt, num_members) in enumerate(attempts) if attempt > 1 or num_members < 3)
    later = {attempt for attempt, num_members in attempts[learnt + 1 :] if num_members == 3}
    assert later == {1}, f"once it is known, nobody is asked to reach whom it cannot: {attempts}"


def test_a_machine_that_died_comes_back(story: Story) -> None:
    assert story.rejoined.name == story.killed.name
    joins = [r for r in story.run.records() if isinstance(r, JoinRecord) and r.member == story.killed.name]
    assert len({join.node for join in joins}) == len(joins) == 2


def test_the_final_loss_is_that_of_a_run_without_faults(story: Story) -> None:
    uncut = story.twin_loss
    assert uncut is not None and story.summary.final_val_loss is not None
    print(f"final loss {story.summary.final_val_loss:.4f}, without faults {uncut:.4f}")
    assert ENTROPY < uncut < 1.05 * ENTROPY, "it has learnt what there is to learn"
    assert story.summary.final_val_loss == pytest.approx(uncut, rel=0.02)


def test_starved_links_are_no_reason_for_suspicion(story: Story) -> None:
    starved = story.starved
    assert starved.up.returncode == 0, starved.up.stderr
    assert json.loads(starved.up.stdout)["cluster"].startswith(json.loads(starved.up.stdout)["nodes"]["a"])
    assert starved.run.returncode == 0, starved.run.stdout + starved.run.stderr
    assert f"lab {starved.name} removed" in starved.down.stdout
    assert load_summary(starved.run_dir).tokens_committed == 1280
    link = next(link for link in json.loads(starved.status.stdout)["links"] if link["name"] == "a>b")
    assert link["num_bytes"] > 4e6, "it was full for seconds"
    records = [row.record for row in read_run(starved.run_dir).rows]
    noticed = [record for record in records if isinstance(record, FaultRecord) and not record.injected]
    assert noticed == [], "nobody was suspected either"


def test_changes_of_links_are_in_the_journal_of_the_run(story: Story) -> None:
    starved = story.starved
    records = [row.record for row in read_run(starved.run_dir).rows]
    faults = [record for record in records if isinstance(record, FaultRecord)]
    assert [(record.fault, record.member, record.detail) for record in faults] == [
        ("link_set", "a:b", "set a:b queue_ms=500 at 0 s")
    ]
    link = next(link for link in json.loads(starved.status.stdout)["links"] if link["name"] == "a>b")
    assert link["queue_ms"] == 500
    assert "warning: set a:b queue_ms=100 at 3600 s did not happen: the run was over before" in starved.run.stdout
