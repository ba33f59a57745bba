"""A cluster of one head and two nodes, all on this machine, with the commands that a user has."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

from orchestrator.answers import ClusterJoined, Left
from orchestrator.cluster.door import Door
from orchestrator.cluster.join_string import JoinString, parse
from orchestrator.cluster.ray_node import cluster_environment, process_environment
from orchestrator.cluster.run_tokens import run_token
from orchestrator.cluster.state import ClusterState, known_clusters
from orchestrator.cluster.tokens import new_token
from orchestrator.cluster.versions import my_versions
from orchestrator.rundir import RunDir
from orchestrator.segments import read_run
from orchestrator.summary import load_summary
from tests.leaks import our_processes
from tests.ray.command import ROOT, Command
from tests.small_run import TOML
from workers.records import LEFT, CommitRecord, FenceRecord, JoinRecord
from workers.store import BlobStore
from workers.transport.base import TransportError
from workers.transport.flight import FlightTransport

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(100)]

WAIT_S = 60.0
ATOLL = [sys.executable, "-m", "orchestrator.cli.main"]

# Drivers are processes of their own: in this one Ray may be there already, without the cluster's token.
DRIVER = """
import json, sys, ray
address, node_ip, script = sys.argv[1:]
ray.init(address=address, _node_ip_address=node_ip, namespace="atoll", log_to_driver=False, logging_level=40)
exec(script)
"""
WHERE_ISLANDS_ARE = """
news = ray.get(ray.get_actor("controller/run").standby_news.remote("nobody", 0, False), timeout=30)
print(json.dumps([address for _, address, _ in news.peers]))
"""
ON_EVERY_NODE = """
@ray.remote(num_cpus=0, resources={"atoll_worker": 1})
class Island:
    def where(self):
        import orchestrator
        return ray.get_runtime_context().get_node_id()
islands = [Island.remote() for _ in range(4)]
labels = {node["NodeID"]: node["Labels"].get("zone") for node in ray.nodes()}
print(json.dumps([sorted(ray.get([island.where.remote() for island in islands])), labels]))
"""
# What the controller of a run answers. Its island leaves within three polls, but not with its machine unless at once.
CONTROLLER = """
@ray.remote(num_cpus=0)
class Controller:
    def __init__(self):
        self.calls = []
    def leave(self, members, node, at_once):
        self.calls.append([members, node, at_once])
        unknown = [name for name in members if name != "island-0"]
        waits = node is not None and not at_once or self.calls.count(self.calls[-1]) < 3
        return {"leaving": ["island-0"] * (waits and not unknown), "unknown": unknown}
    def heard(self):
        return self.calls
on_head = {"node:__internal_head__": 0.001}
controller = Controller.options(name="controller/run-1", lifetime="detached", resources=on_head).remote()
@ray.remote(num_cpus=0)
class Elsewhere:
    def leave(self, members, node, at_once):
        return {"leaving": [], "unknown": list(members)}
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
there = NodeAffinitySchedulingStrategy("NODE", soft=False)
other = Elsewhere.options(name="controller/pipe-1", lifetime="detached", scheduling_strategy=there).remote()
print(json.dumps(ray.get(controller.heard.remote())))
"""
WHAT_IT_HEARD = """
controller = ray.get_actor("controller/run-1")
print(json.dumps(ray.get(controller.heard.remote())))
ray.kill(controller)
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    root: Path
    up_output: str
    place: JoinString

    def atoll(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*ATOLL, *arguments], capture_output=True, text=True, timeout=WAIT_S, env=environment(self.root), cwd=ROOT
        )

    def states(self) -> dict[str, ClusterState]:
        return {state.name: state for state in known_clusters(self.root)}

    def join(self, *arguments: str) -> ClusterState:
        before = self.states()
        done = self.atoll("join", str(self.place), "--background", "--devices", "cpu", "--json", *arguments)
        assert done.returncode == 0, done.stderr
        [name] = self.states().keys() - before.keys()
        assert ClusterJoined.model_validate_json(done.stdout).name == name
        return self.states()[name]

    def drive(self, script: str) -> object:
        head = next(state for state in self.states().values() if state.role == "head")
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, head.gcs_address, head.node_ip, script],
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            env=process_environment(os.environ, cluster_environment(head.token_file, wan=False)),
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def environment(root: Path) -> dict[str, str]:
    return {**os.environ, "ATOLL_STATE_DIR": str(root), "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    root, before = folder / "state", our_processes()
    command = [*ATOLL, "up", "--host", "127.0.0.1"]
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        head = subprocess.Popen(command, stdout=out, stderr=err, env=environment(root), start_new_session=True)
    try:
        until(lambda: "\n" in (folder / "out").read_text(), "the join string", head, folder / "err")
        output = (folder / "out").read_text()
        cluster = Cluster(root=root, up_output=output, place=parse(output.split()[-1]))
        node = cluster.join()
        cluster.join("--workers", "2", "--label", "zone=b")
        ray_folders = [state.ray_folder for state in cluster.states().values()]
        yield cluster
        os.kill(node.supervisor.pid, signal.SIGTERM)
        done = cluster.atoll("leave", "--all")
        assert done.returncode == 0, done.stderr
        assert head.wait(timeout=WAIT_S) == 0
        assert not root.exists()
        assert [path for path in ray_folders if path.exists()] == []
        assert our_processes() - before == set()
    finally:
        for state in known_clusters(root):
            os.kill(state.supervisor.pid, signal.SIGKILL)
        if head.poll() is None:
            head.kill()
            head.wait(timeout=WAIT_S)
        known_clusters(root)


def until(
    condition: Callable[[], bool], what: str, process: subprocess.Popen[bytes] | None = None, said: Path | None = None
) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        told = said.read_text() if said is not None else ""
        assert process is None or process.poll() is None, f"ended before {what}:\n{told}"
        assert time.monotonic() < deadline_s, f"waited {WAIT_S:g} s for {what}:\n{told}"
        time.sleep(0.05)


def answers(addresses: Sequence[str], token: str) -> set[str]:
    """What islands say to whoever asks them, with this token, for a blob that nobody has."""
    visitor, said = FlightTransport(BlobStore(), host="127.0.0.1", token=token, num_connections=1), set()
    visitor.start()
    try:
        for address in addresses:
            with pytest.raises(TransportError) as caught:
                visitor.fetch(address, ["none"], timeout_s=10.0, max_bytes=0)
            said.add(type(caught.value).__name__)
    finally:
        visitor.stop()
    return said


def one_error(done: subprocess.CompletedProcess[str]) -> str:
    assert done.stderr.count("error:") == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_up_prints_one_line_and_it_is_the_join_string(cluster: Cluster) -> None:
    assert re.fullmatch(r"atoll join atoll://[0-9a-f]{64}@127\.0\.0\.1:\d+\n", cluster.up_output)


def test_every_node_takes_islands_and_has_its_labels(cluster: Cluster) -> None:
    nodes = [state.node_id for state in cluster.states().values()]
    places, labels = cluster.drive(ON_EVERY_NODE)  # type: ignore[misc]
    assert sorted(places) == sorted([*nodes, next(node for node, zone in labels.items() if zone == "b")])
    assert [labels[node] for node in nodes].count("b") == 1


def test_doctor_finds_nothing_wrong(cluster: Cluster) -> None:
    done = cluster.atoll("doctor", str(cluster.place), "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    checks = json.loads(done.stdout)
    assert [check["name"] for check in checks] == [
        "door",
        "token",
        "versions",
        "Ray",
        "way back",
        "codecs",
        "clock",
        "link",
    ]
    assert all(check["ok"] for check in checks)
    assert "FAILED" not in cluster.atoll("doctor").stdout


def test_the_token_is_in_no_command_line_and_no_environment(cluster: Cluster) -> None:
    token, seen = cluster.place.token.encode(), 0
    for entry in (path for path in Path("/proc").iterdir() if path.name.isdigit()):
        for name in ("cmdline", "environ"):
            try:
                content = (entry / name).read_bytes()
            except OSError:
                continue
            seen += b"raylet" in content
            assert token not in content, f"{name} of {entry.name}"
    assert seen >= 3


def test_a_wrong_token_is_refused(cluster: Cluster) -> None:
    wrong = replace(cluster.place, token=new_token())
    done = cluster.atoll("join", str(wrong))
    assert done.returncode == 2
    assert "the token is not that of this cluster" in one_error(done)
    assert wrong.token not in done.stderr
    done = cluster.atoll("doctor", str(wrong))
    assert done.returncode == 1
    assert re.search(r"^token +FAILED", done.stdout, re.MULTILINE)


def test_other_versions_are_refused(cluster: Cluster) -> None:
    theirs = replace(my_versions(), python="3.11.99", ray="2.0.0")
    info = {"versions": asdict(theirs), "gcs_address": "127.0.0.2:1", "wan": False}
    door = Door(token=new_token(), info=lambda: info, host="127.0.0.1")
    door.start()
    try:
        done = cluster.atoll("join", f"atoll://{door.token}@{door.address}")
    finally:
        door.close()
    assert done.returncode == 2
    error = one_error(done)
    assert f"Python is {my_versions().python} here and 3.11.99 there" in error
    assert "and 2.0.0 there" in error


def test_nobody_at_the_door(cluster: Cluster) -> None:
    done = cluster.atoll("join", f"atoll://{new_token()}@127.0.0.1:1", "--background")
    assert done.returncode == 4
    assert "the cluster's door does not answer" in one_error(done)


def test_leaving_waits_for_the_islands_and_ends_only_its_own_processes(cluster: Cluster, tmp_path: Path) -> None:
    before = our_processes()
    told = cluster.join()
    assert cluster.drive(CONTROLLER.replace("NODE", told.node_id)) == []
    os.kill(told.supervisor.pid, signal.SIGTERM)
    log = told.folder / "supervisor.log"
    until(lambda: "to leave: island-0" in log.read_text(), "SIGTERM to ask its islands to leave")
    assert "the controller of pipe-1 is on this machine and ends with it" in log.read_text()
    os.kill(told.supervisor.pid, signal.SIGTERM)  # again: at once
    until(lambda: not told.folder.exists(), "its machine to have left")
    node = cluster.join()
    done = cluster.atoll("leave")
    assert done.returncode == 2
    assert node.name in one_error(done)
    command = [*ATOLL, "leave", "--cluster", node.name]
    with (tmp_path / "err").open("w") as err:
        patient = subprocess.Popen(command, stderr=err, env=environment(cluster.root))
    until(lambda: "to leave: island-0" in (tmp_path / "err").read_text(), "an island", patient, tmp_path / "err")
    done = cluster.atoll("leave", "--cluster", node.name, "--now")
    assert done.returncode == 0, done.stderr
    assert "no island of this machine is left" in done.stderr
    assert patient.wait(timeout=WAIT_S) == 0
    assert not node.folder.exists()
    assert not node.ray_folder.exists()
    controllers = {process for process in our_processes() if "Controller" in process.command}
    assert our_processes() - controllers <= before
    assert {process for process in before - our_processes() if "raylet" in process.command} == set()
    done = cluster.atoll("leave", "island-0", "--json")
    assert done.returncode == 0, done.stderr
    assert Left.model_validate_json(done.stdout).left == ["island-0"]
    assert "island-0 left" in done.stderr
    done = cluster.atoll("leave", "island-9")
    assert done.returncode == 2
    assert "no run has a member 'island-9'" in one_error(done)
    heard = cluster.drive(WHAT_IT_HEARD)
    assert isinstance(heard, list)
    by_signal = [call for call in heard if call[1] == told.node_id]
    assert [at_once for _, _, at_once in by_signal] == sorted(at_once for _, _, at_once in by_signal)
    assert {at_once for _, _, at_once in by_signal} == {False, True}, "one path for a signal and a command"
    heard = heard[len(by_signal) :]
    by_machine = [call for call in heard if call[1] is not None]
    assert by_machine[-3:] == [[[], node.node_id, True]] * 3
    assert by_machine[:-3] == [[[], node.node_id, False]] * (len(by_machine) - 3) != []
    assert heard[len(by_machine) :] == [[["island-0"], None, False]] * 3 + [[["island-9"], None, False]]


def test_a_run_finds_the_cluster_of_its_machine(cluster: Cluster, tmp_path: Path) -> None:
    script = (
        "import ray\n"  # without the token: as in a notebook
        "from orchestrator.launch import RaySession\n"
        "from tests.small_run import small_config\n"
        "from pathlib import Path\n"
        "with RaySession(small_config(Path('pack'), 'run.address=auto', 'run.islands=4')):\n"
        "    print(ray.get_runtime_context().gcs_address)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=WAIT_S, env=environment(cluster.root)
    )
    assert done.returncode == 0, done.stderr
    assert {state.gcs_address for state in cluster.states().values()} == {done.stdout.strip()}


def test_ray_is_started_again_and_does_not_outlive_its_supervisor(cluster: Cluster) -> None:
    node = cluster.join()
    assert node.ray is not None
    node.ray.kill()
    log, deadline_s = node.folder / "supervisor.log", time.monotonic() + WAIT_S
    while "Ray runs again" not in log.read_text():
        assert time.monotonic() < deadline_s, log.read_text()
        time.sleep(0.05)
    assert "Ray ended (killed by SIGKILL)" in log.read_text()
    again = cluster.states()[node.name]
    assert again.node_id not in ("", node.node_id)
    assert again.ray is not None
    again.supervisor.kill()
    while again.ray.is_alive:
        assert time.monotonic() < deadline_s, "Ray outlives its supervisor"
        time.sleep(0.05)
    assert node.name not in cluster.states()
    assert not node.folder.exists()
    assert not node.ray_folder.exists()


@pytest.mark.timeout(200)
def test_a_run_follows_the_machines_of_its_cluster(
    cluster: Cluster, pack_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATOLL_STATE_DIR", str(cluster.root))
    (tmp_path / "small.toml").write_text(TOML.replace("islands = 1", 'islands = "auto"'))
    run_dir = tmp_path / "run"
    values = [
        "run.address=auto",
        f"data.path={pack_dir}",
        "train.tokens=50_000_000",
        "train.pace_s=0.1",
        "exchange.suspect_s=30",
    ]
    settings = [word for value in values for word in ("--set", value)]

    def contributors() -> dict[str, str]:
        """Node of each island that is in a commit."""
        records = [row.record for row in read_run(run_dir).rows] if (run_dir / "journal.jsonl").exists() else []
        nodes = {(r.member, r.incarnation): r.node for r in records if isinstance(r, JoinRecord)}
        commits = [record for record in records if isinstance(record, CommitRecord)]
        return {e.member: nodes[e.member, e.incarnation] for commit in commits for e in commit.roster}

    run = Command("train", "small.toml", "--run-dir", str(run_dir), *settings, folder=tmp_path)
    try:
        run.until(lambda: len(contributors()) == 4, "an island in each of four places to contribute")
        node = cluster.join()
        run.until(lambda: node.node_id in contributors().values(), "the new machine's island to contribute")
        [name] = [member for member, place in contributors().items() if place == node.node_id]
        islands, salt = cluster.drive(WHERE_ISLANDS_ARE), json.loads(RunDir(run_dir).cluster_file.read_text())["salt"]
        assert isinstance(islands, list) and len(islands) == 5
        assert answers(islands, run_token(cluster.place.token, "run", salt)) == {"BlobMissing"}, "one of the run"
        for token in run_token(cluster.place.token, "run", "another start"), cluster.place.token:
            assert answers(islands, token) == {"Unauthorized"}
        for arguments, leaver in (("--cluster", node.name), name), (("island-0",), "island-0"):
            done = cluster.atoll("leave", *arguments)
            assert done.returncode == 0, done.stderr
            run.until(lambda who=leaver: f"{who}.1 has left" in run.said, f"{leaver} to be missed")  # type: ignore[misc]
        run.interrupt()
        assert run.end() == 3, run.said
    finally:
        run.kill()
    fences = [row.record for row in read_run(run_dir).rows if isinstance(row.record, FenceRecord)]
    assert [(fence.member, fence.why) for fence in fences] == [(name, LEFT), ("island-0", LEFT)]
    summary = load_summary(run_dir)
    assert (summary.exit_reason, summary.tokens_lost, summary.faults) == ("stopped", 0, ())
    assert summary.tokens_committed > 0
