"""Runs as jobs of a Ray cluster, and what people ask of them while they go on; with the commands that a user has."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.launch import LOOPBACK_ONLY, RAY_ENVIRONMENT
from orchestrator.ledger import recompute
from orchestrator.processes import WORKER_RESOURCE
from orchestrator.rundir import RunDir
from orchestrator.segments import read_run
from orchestrator.status import Status
from tests.ray.command import ROOT
from tests.small_run import TOML
from workers.records import CommitRecord, PauseRecord, Record, RollbackRecord, SettingRecord, TermRecord

pytestmark = [pytest.mark.ray, pytest.mark.alone, pytest.mark.slow, pytest.mark.timeout(150)]

WAIT_S = 90.0
POLL_S = 0.1
ATOLL = [sys.executable, "-m", "orchestrator.cli.main"]

# What a notebook, or somebody's own program on that Ray, does with a run that goes on.
OWN_SCRIPT = """
import json, sys
import atoll
from workers.records import SettingRecord
with atoll.attach(sys.argv[1], run=sys.argv[2]) as run:
    before = run.status()
    since = run.set({"strategy.outer_lr": 0.5, "codec.name": "int4"})
    name = run.save()
    kinds = [type(row.record).__name__ for row in run.events(follow=False)]
    print(json.dumps({"run": run.name, "rounds": before.rounds, "since": since, "saved": name, "kinds": kinds}))
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    folder: Path
    jobs: str
    gcs: str
    pack: Path

    def run(self, *command: str, code: int = 0) -> str:
        done = subprocess.run(
            [*command], capture_output=True, text=True, timeout=WAIT_S, env=environment(), cwd=self.folder
        )
        assert done.returncode == code, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + (done.stderr if code else "")

    def atoll(self, *arguments: str, code: int = 0) -> str:
        return self.run(*ATOLL, *arguments, code=code)

    def toml(self, name: str, *, islands: int, tokens: int = 10_000_000) -> Path:
        path = self.folder / f"{name}.toml"
        text = TOML.replace('name = "small"', f'name = "{name}"').replace("islands = 1", f"islands = {islands}")
        text = text.replace("tokens = 7680", f"tokens = {tokens}\npace_s = 0.02")
        note = self.folder / "note.py"
        note.write_text("import sys; open(sys.argv[1], 'a').write(sys.stdin.read())\n")
        text += f'\n[data]\npath = "{self.pack}"\n[notify]\ncommand = "{sys.executable} {note} {self.folder}/told"\n'
        path.write_text(text)
        return path


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "PYTHONDONTWRITEBYTECODE")}
    return {**kept, **RAY_ENVIRONMENT, LOOPBACK_ONLY: "0", "PYTHONPATH": str(ROOT)}


def until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {WAIT_S:g} s for {what}"
        time.sleep(POLL_S)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, pack_dir: Path) -> Iterator[Head]:
    """A Ray as `ray start --head` gives it, with its job server; it ends with this process."""
    folder = tmp_path_factory.mktemp("jobs")
    short = Path(os.path.realpath(subprocess.check_output(["mktemp", "-d", "/tmp/atj-XXXXXX"], text=True).strip()))
    port = free_port()
    command = [
        sys.executable, "-m", "orchestrator.cluster.ray_process", str(os.getpid()), "start", "--head", "--block",
        "--port=0", "--node-ip-address=127.0.0.2", "--include-dashboard=true", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={port}", f"--temp-dir={short}/r", f"--resources={json.dumps({WORKER_RESOURCE: 4})}",
        "--object-store-memory=100000000", "--disable-usage-stats", "--include-log-monitor=false",
        f"--ray-client-server-port={free_port()}", "--labels=zone=b",
    ]  # fmt: skip
    with (folder / "ray.log").open("w") as log:
        ray = subprocess.Popen(command, stdout=log, stderr=log, env=environment(), start_new_session=True)
    said = short / "r" / "ray_current_cluster"
    try:
        until(lambda: ray.poll() is not None or (said.exists() and bool(said.read_text().strip())), "Ray")
        assert ray.poll() is None, (folder / "ray.log").read_text()[-3000:]
        yield Head(folder=folder, jobs=f"http://127.0.0.1:{port}", gcs=said.read_text().strip(), pack=pack_dir)
    finally:
        ray.send_signal(signal.SIGTERM)
        try:
            ray.wait(timeout=20)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(ray.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        ray.wait(timeout=20)
        subprocess.run(["rm", "-rf", str(short)], check=True)


def takes_jobs(head: Head) -> bool:
    """Whether a trivial job is accepted: the job server answers before its agent is there."""
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "job", "submit", "--no-wait", "--address", head.jobs, "--", "true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, env=environment())
    assert done.returncode == 0 or "No available agent" in done.stderr + done.stdout, done.stderr
    return done.returncode == 0


def records(run_dir: Path, *kinds: type[Record]) -> list[Record]:
    try:
        rows = read_run(run_dir).rows
    except FileNotFoundError:
        return []
    return [row.record for row in rows if not kinds or isinstance(row.record, kinds)]


def commits(run_dir: Path) -> int:
    return len(records(run_dir, CommitRecord)) if run_dir.exists() and list(run_dir.glob("journal*")) else 0


@pytest.fixture(scope="module")
def job_run(head: Head) -> Path:
    """A run that plain `ray job submit` started, and whose driver was killed."""
    run_dir = head.folder / "by-ray"
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "job", "submit", "--no-wait", "--address", head.jobs, "--"]
    train = [*ATOLL, "train", str(head.toml("by-ray", islands=2)), "--run-dir", str(run_dir)]
    train += ["--set", "run.labels.zone=b"]
    until(lambda: takes_jobs(head), "an agent that takes jobs")
    head.run(*command, *train)
    until(lambda: commits(run_dir) > 2, "commits of the job's run")
    holder = RunDir(run_dir).holder()
    assert holder is not None
    os.kill(holder.pid, signal.SIGKILL)
    until(lambda: RunDir(run_dir).holder() is None, "the driver's death")
    return run_dir


def test_the_run_of_a_job_goes_on_when_its_driver_is_killed(head: Head, job_run: Path) -> None:
    before = commits(job_run)
    until(lambda: commits(job_run) > before + 2, "commits after the driver's death")
    assert len(records(job_run, TermRecord)) == 1, "the controller did not notice anything"
    assert RunDir(job_run).state() == "running"
    status = Status.model_validate_json(head.atoll("status", head.gcs, "--run", "by-ray", "--json"))
    assert status.state == "running" and all(member.live for member in status.members.values())
    assert list((job_run / "logs").glob(".probe*")) == []


def test_settings_pauses_and_the_way_back(head: Head, job_run: Path) -> None:
    script = head.folder / "own.py"
    script.write_text(OWN_SCRIPT)
    said = json.loads(head.run(sys.executable, str(script), head.gcs, "by-ray"))
    assert said["run"] == "by-ray" and said["saved"] and "CommitRecord" in said["kinds"]
    assert [(r.key, r.value, r.since) for r in records(job_run, SettingRecord)] == [
        ("strategy.outer_lr", 0.5, (said["since"],)),
        ("codec.name", "int4", (said["since"],)),
    ]
    until(lambda: commits(job_run) > said["since"] + 1, "commits with the new settings")
    saved = int(said["saved"][1:])
    until(lambda: any((job_run / "snapshots").glob("v*/manifest.json")), "the snapshot")
    version = min(int(path.parent.name[1:]) for path in (job_run / "snapshots").glob("v*/manifest.json"))
    assert version >= saved
    refused = head.atoll("set", "train.lr=1", "--at", head.gcs, code=2)
    assert "cannot change while a run goes on" in refused

    assert json.loads(head.atoll("pause", str(job_run), "--json"))["paused"]
    until(lambda: {m.doing for m in Status.model_validate_json(
        head.atoll("status", str(job_run), "--json")).members.values()} <= {"sync", "wait"}, "rest")  # fmt: skip
    still = commits(job_run)
    back = json.loads(head.atoll("rollback", "--to", str(version), "--at", str(job_run), "--json"))
    assert back["versions"] == [version] and back["samples_taken_back"] > 0
    assert commits(job_run) <= still + 1
    head.atoll("resume", str(job_run))
    [rollback] = records(job_run, RollbackRecord)
    assert rollback.versions == (version,)
    assert [r.paused for r in records(job_run, PauseRecord)] == [True, False]
    until(lambda: commits(job_run) > still + 2, "commits after the rollback")
    found = recompute(read_run(job_run).rows)
    assert found.ok, found.findings


def test_two_runs_share_a_cluster_and_one_is_stopped(head: Head, job_run: Path) -> None:
    other = head.folder / "other"
    toml = head.toml("other", islands=1, tokens=20_000)
    job = json.loads(head.atoll("submit", str(toml), "--address", head.jobs, "--run-dir", str(other), "--json"))
    assert job["run_dir"] == str(other)
    until(lambda: commits(other) > 0, "commits of the second run")
    known = json.loads(head.atoll("runs", "--at", head.gcs, "--json"))
    assert {(run["run"], len(run["members"])) for run in known} == {("by-ray", 2), ("other", 1)}
    assert "several runs go on there" in head.atoll("pause", head.gcs, code=2)
    stack = json.loads(head.atoll("stack", "island-0", "--at", str(job_run), "--json"))
    assert "Thread" in stack["text"] and Path(stack["file"]).read_text().startswith(stack["text"][:20])
    stopped = json.loads(head.atoll("stop", str(job_run), "--json"))
    assert stopped == {"run": "by-ray", "over": True, "reason": "stopped"}
    assert RunDir(job_run).state() == "stopped"
    until(lambda: RunDir(other).state() != "running", "the end of the second run")
    assert RunDir(other).state() == "done", (other / "logs" / "controller.log").read_text()[-2000:]
    log = json.loads(head.atoll("logs", "island-1", "--at", str(job_run), "--json"))
    assert log["name"].startswith("island-1.") and "is process" in log["text"]
    told = [json.loads(line) for line in (head.folder / "told").read_text().splitlines()]
    assert {(event["kind"], event["run"]) for event in told} >= {("finished", "by-ray"), ("finished", "other")}


# A program that uses that Ray for something of its own, and trains on it.
START_SCRIPT = """
import sys
import ray
import atoll
from workers.records import CommitRecord, StopRecord

ray.init(address=sys.argv[1], _node_ip_address="127.0.0.2", log_to_driver=False)
config = atoll.load_config(sys.argv[2], {"run.address": sys.argv[1]})
with atoll.start(config, run_dir=sys.argv[3]) as run:
    seen = []
    for row in run.events():
        seen.append(row.record)
        if sum(isinstance(record, CommitRecord) for record in seen) == 2:
            run.stop()
    summary = run.wait()
assert isinstance(seen[-1], StopRecord), seen[-1]
assert ray.is_initialized(), "its own connection stays"
print(summary.exit_reason, summary.exchanges_committed)
"""


def test_a_program_of_ones_own_starts_a_run_watches_it_and_stops_it(head: Head) -> None:
    script, run_dir = head.folder / "start.py", head.folder / "by-script"
    script.write_text(START_SCRIPT)
    said = head.run(sys.executable, str(script), head.gcs, str(head.toml("by-script", islands=1)), str(run_dir))
    reason, num = said.split()[-2:]
    assert reason == "stopped" and int(num) >= 2
    assert not (run_dir / "cluster.json").exists()
