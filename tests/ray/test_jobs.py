"""Runs as jobs of a Ray cluster, and what people ask of them while they go on; with the commands that a user has."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cluster.door_client import job_place
from orchestrator.cluster.join_string import parse
from orchestrator.ledger import recompute
from orchestrator.rundir import RunDir
from orchestrator.segments import read_run
from orchestrator.status import Status
from tests.ray.command import ROOT
from tests.small_run import TOML
from workers.records import (
    CommitRecord,
    JoinRecord,
    OperatorRecord,
    PauseRecord,
    Record,
    RollbackRecord,
    SettingRecord,
    TermRecord,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(150)]

WAIT_S = 90.0
DEAD_WITHIN_S = 3.0  # as on the page of a dashboard that needs no door
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
    place: str
    labelled: str
    gcs: str
    jobs_port: int
    state: Path
    pack: Path

    def run(self, *command: str, code: int = 0, both: bool = False) -> str:
        """What it prints; with `both`, and where it fails, with what it says beside."""
        # What a program of one's own needs to be let in: the file with the cluster's token.
        env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.state / "token")}
        env |= environment(self.folder / "state")
        done = subprocess.run([*command], capture_output=True, text=True, timeout=WAIT_S, env=env, cwd=self.folder)
        assert done.returncode == code, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + (done.stderr if code or both else "")

    def ray_job(self, *arguments: str, code: int = 0) -> str:
        ray = str(Path(sys.executable).with_name("ray"))
        address = f"http://127.0.0.2:{self.jobs_port}"
        return self.run(ray, "job", "submit", "--address", address, *arguments, code=code)

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


def environment(state: Path) -> dict[str, str]:
    dropped = ("RAY_ADDRESS", "RAY_AUTH_MODE", "PYTHONDONTWRITEBYTECODE")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    return {**kept, "ATOLL_STATE_DIR": str(state), "PYTHONPATH": str(ROOT)}


def until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {WAIT_S:g} s for {what}"
        time.sleep(POLL_S)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, pack_dir: Path) -> Iterator[Head]:
    """A cluster of `atoll up`, with its job server at a port that is known beforehand."""
    folder = tmp_path_factory.mktemp("jobs")
    env = environment(folder / "state")
    with socket.create_server(("127.0.0.2", 0)) as free:
        port = int(free.getsockname()[1])
    command = [*ATOLL, "up", "--host", "127.0.0.1", "--workers", "4", "--label", "zone=a", "--background", "--json"]
    command += ["--jobs-port", str(port)]
    up = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, env=env, cwd=folder)
    assert up.returncode == 0, up.stderr
    ready = json.loads(up.stdout)
    state = next((folder / "state").glob("head-*"))
    try:
        # A second machine, as far as Ray can tell; left to itself Ray would fill the first one before.
        join = [*ATOLL, "join", ready["join"], "--workers", "2", "--devices", "cpu", "--label", "zone=b"]
        second = subprocess.run(
            [*join, "--background", "--json"], capture_output=True, text=True, timeout=WAIT_S, env=env, cwd=folder
        )
        assert second.returncode == 0, second.stderr
        yield Head(
            labelled=str(json.loads(second.stdout)["node"]),
            folder=folder,
            place=ready["join"],
            gcs=ready["address"],
            jobs_port=port,
            state=state,
            pack=pack_dir,
        )
    finally:
        subprocess.run([*ATOLL, "leave", "--now", "--all"], timeout=WAIT_S, env=env, check=True)


def records(run_dir: Path, *kinds: type[Record]) -> list[Record]:
    try:
        rows = read_run(run_dir).rows
    except FileNotFoundError:
        return []
    return [row.record for row in rows if not kinds or isinstance(row.record, kinds)]


def commits(run_dir: Path) -> int:
    return len(records(run_dir, CommitRecord)) if run_dir.exists() and list(run_dir.glob("journal*")) else 0


def kill_job_server(port: int) -> None:
    """SIGKILL to the process that listens there."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = entry.read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if b"ray.dashboard.dashboard" in arguments and f"--port={port}".encode() in arguments:
            os.kill(int(entry.parent.name), signal.SIGKILL)
            return
    raise AssertionError(f"no job server at port {port}")


@pytest.fixture(scope="module")
def job_run(head: Head) -> Path:
    """A run that plain `ray job submit` started, and whose driver was killed."""
    run_dir = head.folder / "by-ray"
    train = [*ATOLL, "train", str(head.toml("by-ray", islands=2)), "--run-dir", str(run_dir)]
    train += ["--set", "run.labels.zone=b"]
    head.ray_job("--no-wait", "--", *train)
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


def test_islands_are_on_machines_with_the_labels_that_were_asked_for(head: Head, job_run: Path) -> None:
    joins = [record for record in records(job_run, JoinRecord) if isinstance(record, JoinRecord)]
    assert {join.member for join in joins} == {"island-0", "island-1"}
    assert {join.node for join in joins} == {head.labelled}
    command = ["train", str(head.toml("nobody", islands=1)), "--set", "run.address=auto", "--set"]
    refused = head.atoll(*command, "run.labels.zone=c", code=2)
    assert "has room for 0 islands (resource atoll_worker) on machines with the label zone=c" in refused
    assert "labels there are zone=a, zone=b" in refused
    submit = ["submit", str(head.toml("nobody", islands=3)), "--address", head.place, "--set", "run.labels.zone=b"]
    refused = head.atoll(*submit, code=2)  # before there is a job
    assert "has room for 2 islands" in refused and "on machines with the label zone=b, the run has 3" in refused
    assert not (head.folder / "runs").exists() or not list((head.folder / "runs").glob("nobody*"))


def test_a_job_that_was_refused_says_why_to_who_asks_for_its_run(head: Head, job_run: Path) -> None:
    """Plain `ray job submit` knows nothing of places: the driver finds that there are none, and its log says so."""
    train = [*ATOLL, "train", str(head.toml("nowhere", islands=1)), "--set", "run.labels.zone=c"]
    refused = "has room for 0 islands (resource atoll_worker) on machines with the label zone=c, the run has 1"
    head.ray_job("--submission-id", "nowhere", "--", *train, code=1)
    known = head.run(*ATOLL, "runs", "--at", head.place, both=True)
    assert "by-ray  running" in known and "note: the newest job there, nowhere, failed at" in known
    for place in (head.place, head.gcs):
        said = head.atoll("status", place, "--run", "nowhere", code=2)
        assert "no run 'nowhere' goes on there; the newest job there, nowhere, failed at" in said
        assert "with exit code 2" in said and refused in said and "labels there are zone=a, zone=b" in said


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
    refused = head.atoll("set", "train.lr=1", "--at", head.place, code=2)
    assert "cannot change while a run goes on" in refused
    assert "island-0 is not banned" in head.atoll("unban", "island-0", "--at", head.place, code=2)
    assert "no member 'island-9'" in head.atoll("unban", "island-9", "--at", head.place, code=2)

    assert json.loads(head.atoll("pause", str(job_run), "--json"))["paused"]
    until(lambda: {m.doing for m in Status.model_validate_json(
        head.atoll("status", head.place, "--json")).members.values()} <= {"sync", "wait"}, "rest")  # fmt: skip
    still = commits(job_run)
    back = json.loads(head.atoll("rollback", "--to", str(version), "--at", head.place, "--json"))
    assert back["versions"] == [version] and back["samples_taken_back"] > 0
    assert commits(job_run) <= still + 1
    head.atoll("resume", head.place)
    [rollback] = records(job_run, RollbackRecord)
    assert rollback.versions == (version,)
    assert [r.paused for r in records(job_run, PauseRecord)] == [True, False]
    until(lambda: commits(job_run) > still + 2, "commits after the rollback")
    found = recompute(read_run(job_run).rows)
    assert found.ok, found.findings


def test_the_dashboard_reads_and_asks_through_the_door(head: Head, job_run: Path) -> None:
    """As from a machine that is in no cluster: with the join string alone."""
    command = [*ATOLL, "dashboard", "--address", head.place, "--run", "by-ray", "--port", "0"]
    elsewhere = environment(head.folder / "elsewhere")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=elsewhere, cwd=head.folder) as server:
        try:
            assert server.stdout is not None
            address, _, token = server.stdout.readline().split(": ", 1)[1].strip().partition("#token=")
            assert head.place not in Path(f"/proc/{server.pid}/cmdline").read_text()

            def ask(path: str, body: bytes | None = None) -> dict[str, Any]:
                headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
                request = urllib.request.Request(f"{address}api/{path}", data=body, headers=headers)
                with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
                    return dict(json.loads(answer.read()))

            until(lambda: ask("run")["ledger"]["committed"] > 0, "the history of the run")
            figures = ask("run")
            assert [row["name"] for row in figures["members"]] == ["island-0", "island-1"]
            assert {"pause", "save", "drain"} <= set(figures["able"]) and "kill" not in figures["able"]
            assert any(ask(f"series?from=0&to={figures['end_s']}&bins=50")["loss"]["island-0"])
            assert ask("act", b'{"action": "save"}') == {"outcome": "asked"}
            asked = [r for r in records(job_run, OperatorRecord) if isinstance(r, OperatorRecord)]
            assert [(r.action, r.by) for r in asked] == [("save", "dashboard, 127.0.0.1")]

            def shown(member: str) -> dict[str, Any]:
                return next(row for row in ask("run")["members"] if row["name"] == member)

            [pid] = re.findall(r"is process (\d+)", (job_run / "logs" / "island-1-1.log").read_text())
            before = shown("island-1")["incarnation"]
            os.kill(int(pid), signal.SIGKILL)
            began_s = time.monotonic()
            until(lambda: shown("island-1")["doing"] == "dead", "the death to be shown")
            assert time.monotonic() - began_s < DEAD_WITHIN_S
            until(lambda: shown("island-1")["incarnation"] > before and shown("island-1")["here"], "its successor")
        finally:
            server.terminate()
            assert server.wait(timeout=WAIT_S) == 0


def test_two_runs_share_a_cluster_and_one_is_stopped(head: Head, job_run: Path) -> None:
    kill_job_server(head.jobs_port)  # it is started again for who asks
    other = head.folder / "other"
    toml = head.toml("other", islands=1)
    command = [*ATOLL, "submit", str(toml), "--address", head.place, "--run-dir", "other", "--json", "--wait"]
    env = environment(head.folder / "state")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env, cwd=head.folder
    ) as submitted:
        _share(head, job_run, other, submitted)
        assert submitted.wait(timeout=WAIT_S) == 3, "stopped, and resumable: as atoll train there"


def _share(head: Head, job_run: Path, other: Path, submitted: subprocess.Popen[str]) -> None:
    assert submitted.stdout is not None
    job = json.loads(submitted.stdout.readline())
    assert job["run_dir"] == str(other) and job["address"] == job_place(parse(head.place)).address
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{job['address']}/api/jobs/", timeout=WAIT_S)
    with refused.value as answer:
        assert answer.code == 401
    until(lambda: commits(other) > 0, "commits of the second run")
    known = json.loads(head.atoll("runs", "--at", head.place, "--json"))
    assert {(run["run"], len(run["members"])) for run in known} == {("by-ray", 2), ("other", 1)}
    assert "several runs go on there" in head.atoll("pause", head.place, code=2)
    again = ["--run-dir", str(head.folder / "a" / "by-ray"), "--set", "run.address=auto"]
    same_name = head.atoll("train", str(head.toml("same", islands=1)), *again, code=2)
    assert "a run called 'by-ray' goes on in this cluster" in same_name
    stack = json.loads(head.atoll("stack", "island-0", "--at", head.place, "--run", "by-ray", "--json"))
    assert "Thread" in stack["text"] and Path(stack["file"]).read_text().startswith(stack["text"][:20])
    stopped = json.loads(head.atoll("stop", str(job_run), "--json"))
    assert stopped == {"run": "by-ray", "over": True, "reason": "stopped"}
    assert RunDir(job_run).state() == "stopped"
    before = commits(other)
    until(lambda: commits(other) > before + 1, "commits of the second run without the first")
    assert json.loads(head.atoll("save", head.place, "--run", "other", "--json"))["run"] == "other"
    assert "island-0 is process" in head.atoll("logs", "island-0", "--at", head.place, "--run", "other")
    assert json.loads(head.atoll("stop", head.place, "--run", "other", "--json"))["over"]
    assert RunDir(other).state() == "stopped", (other / "logs" / "controller.log").read_text()[-2000:]
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
