"""The head of a cluster is killed, with everything on it, and started again; then a run's directory is lost with it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.cluster.state import ClusterState, dead_heads, known_clusters
from orchestrator.segments import read_run, segment_paths
from orchestrator.summary import load_summary
from tests.ray.command import ROOT, Command
from tests.small_run import TOML
from workers.records import CommitRecord, FenceRecord, JoinRecord, Record, TermRecord

# Alone: the next death comes as soon as the islands go on. On a busy machine the command may still be connecting then,
# and Ray ends a process that was registering with what has just died; and a Ray that is started meanwhile may take
# ports of the dead head, which then comes back late.
pytestmark = [pytest.mark.ray, pytest.mark.alone, pytest.mark.slow, pytest.mark.timeout(300)]

WAIT_S = 90.0
POLL_S = 0.1


class World:
    """A head without places for islands, two nodes with one each, and a run that follows the cluster."""

    def __init__(self, folder: Path, pack: Path) -> None:
        self.folder, self.state_dir, self.run_dir = folder, folder / "state", folder / "run"
        self.environment = {**os.environ, "ATOLL_STATE_DIR": str(self.state_dir)}
        (folder / "small.toml").write_text(TOML.replace("islands = 1", 'islands = "auto"'))
        self.settings = ["run.address=auto", f"data.path={pack}", "train.tokens=50_000_000", "train.pace_s=0.1"]

    def atoll(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "orchestrator.cli.main", *arguments],
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            env={**self.environment, "PYTHONPATH": str(ROOT)},
            cwd=self.folder,
        )

    def up(self, *arguments: str) -> str:
        done = self.atoll("up", "--host", "127.0.0.1", "--workers", "0", "--background", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[-1]

    def head(self) -> ClusterState:
        [head] = [state for state in known_clusters(self.state_dir) if state.role == "head"]
        return head

    def kill_head(self, *, supervisor: bool) -> None:
        """SIGKILL to every process of the head: Ray's whole group, and whoever would start it again."""
        head = self.head()
        assert head.ray is not None
        if supervisor:
            head.supervisor.kill()
        os.killpg(head.ray.pid, signal.SIGKILL)
        until(lambda: head.ray is None or not head.ray.is_alive, "Ray of the head to be dead")

    def train(self, *arguments: str) -> Command:
        settings = [word for value in self.settings for word in ("--set", value)]
        return Command("train", "small.toml", "--run-dir", str(self.run_dir), *settings, *arguments, folder=self.folder)

    def records(self) -> list[Record]:
        there = self.run_dir.is_dir() and segment_paths(self.run_dir)
        return [row.record for row in read_run(self.run_dir).rows] if there else []

    def commits(self) -> list[CommitRecord]:
        return commits_of(self.records())

    def lives(self) -> int:
        return sum(isinstance(record, TermRecord) for record in self.records())

    def goes_on(self, lives: int, what: str) -> None:
        """Wait for a controller's life after `lives`, and for commits of both islands in it."""
        until(lambda: self.lives() > lives, f"a controller after {what}")
        before = len(self.commits())
        until(
            lambda: any(len({e.member for e in c.roster}) == 2 for c in self.commits()[before:]),
            f"a commit of both islands after {what}",
        )


def commits_of(records: list[Record]) -> list[CommitRecord]:
    return [record for record in records if isinstance(record, CommitRecord)]


def until(condition: Callable[[], object], what: str) -> None:
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() < began_s + WAIT_S, f"waited {WAIT_S:g} s for {what}"
        time.sleep(POLL_S)
    print(f"{time.monotonic() - began_s:5.1f} s for {what}")


@pytest.fixture
def world(tmp_path: Path, pack_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    world = World(tmp_path, pack_dir)
    monkeypatch.setenv("ATOLL_STATE_DIR", str(world.state_dir))
    place = world.up()
    try:
        joins = [
            subprocess.Popen(
                [sys.executable, "-m", "orchestrator.cli.main", "join", place, "--background", "--devices", "cpu"],
                env={**world.environment, "PYTHONPATH": str(ROOT)},
                cwd=tmp_path,
            )
            for _ in range(2)
        ]
        assert [join.wait(timeout=WAIT_S) for join in joins] == [0, 0]
        yield world
        done = world.atoll("leave", "--all", "--now")
        assert done.returncode == 0, done.stderr
        assert not world.state_dir.exists()
    finally:
        for state in known_clusters(world.state_dir):
            state.supervisor.kill()
        for state in dead_heads(world.state_dir):
            shutil.rmtree(state.folder)


def test_a_run_outlives_its_head_and_the_journal_on_it(world: World) -> None:
    run = world.train()
    try:
        run.until(lambda: len(world.commits()) >= 3, "commits")
        sealed = world.commits()

        world.kill_head(supervisor=False)  # its supervisor starts Ray again
        world.goes_on(1, "the death of Ray on the head")
        run.until(lambda: "the controller is there again" in run.said, "the command to find its run again")

        token = world.head().token()
        world.kill_head(supervisor=True)
        until(lambda: dead_heads(world.state_dir), "a head that is dead")
        assert world.up("--json")
        assert world.head().token() == token, "the machines that joined know this one"
        world.goes_on(2, "the death of the whole head")
        # The command may be connected by way of another node by now, and lose nothing from sight: it says nothing then.

        before = world.records()
        world.kill_head(supervisor=True)
        shutil.rmtree(world.run_dir)
        world.up()
        run.until(lambda: "holds no journal any more" in run.said, "the loss to be told")
        assert world.records() == []
        done = world.atoll("up", "--recover-from-members", "no-such-run")
        assert done.returncode == 2
        assert "no controller" in done.stderr
        done = world.atoll("up", "--recover-from-members", world.run_dir.name)
        assert done.returncode == 0, done.stderr
        assert "was rebuilt from its members" in done.stderr
        world.goes_on(sum(isinstance(record, TermRecord) for record in before), "the loss of the journal")

        run.interrupt()
        assert run.end() == 3, run.said
    finally:
        run.kill()
    records = world.records()
    # What was written and nobody had heard of is in nobody's copy: at most the last one.
    told = commits_of(before)[:-1]
    assert len(told) > len(sealed)
    assert commits_of(records)[: len(told)] == told, "no committed step was rolled back"
    # Nobody was fenced for a head that was away; after the loss of a journal everybody begins anew, with its work kept.
    reasons = {record.why for record in records if isinstance(record, FenceRecord)}
    assert reasons == {"the journal was rebuilt from the members' copies"}
    assert not [record for record in before if isinstance(record, FenceRecord)]
    joins = sorted((record.member, record.incarnation) for record in records if isinstance(record, JoinRecord))
    assert joins == [("island-0", 1), ("island-0", 2), ("island-1", 1), ("island-1", 2)]
    summary = load_summary(world.run_dir)
    assert (summary.exit_reason, summary.tokens_lost) == ("stopped", 0)
    done = world.atoll("ledger", str(world.run_dir))
    assert done.returncode == 0, done.stdout + done.stderr
