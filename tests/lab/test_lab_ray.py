"""A real Ray cluster across two hosts of a lab. Its ports are fixed, in networks that nobody else is in."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.lab.lab import Lab
from orchestrator.topology import load_topology
from tests.lab.support import python, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]

RAY = [
    sys.executable,
    "-m",
    "ray.scripts.scripts",
    "start",
    "--block",
    "--num-cpus=1",
    "--object-store-memory=80000000",
]
PORT = 6379
ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
TASK = """
import json, socket, sys, time
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
host, there = sys.argv[1:]
ray.init(address=f"{host}:6379", _node_ip_address=host, log_to_driver=False)

@ray.remote(num_cpus=1)
def where():
    return socket.gethostname()

deadline_s = time.monotonic() + 60
while not (nodes := {n["NodeManagerAddress"]: n["NodeID"] for n in ray.nodes() if n["Alive"]}).get(there):
    assert time.monotonic() < deadline_s, "the other node did not join"
    time.sleep(0.1)
strategy = NodeAffinitySchedulingStrategy(nodes[there], soft=False)
task = where.options(scheduling_strategy=strategy)
name = ray.get(task.remote(), timeout=60)
begin_s = time.monotonic()
ray.get(task.remote(), timeout=60)
print(json.dumps({"name": name, "seconds": time.monotonic() - begin_s, "here": socket.gethostname()}))
"""


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Short, as Ray puts sockets there, and their paths are limited."""
    path = Path(tempfile.mkdtemp(prefix="ray-"))
    yield path
    shutil.rmtree(path)


def start(lab: Lab, node: str, arguments: list[str], log: Path) -> subprocess.Popen[str]:
    """Start Ray on a node; what it says goes into a file."""
    environment = {**ENVIRONMENT, "PYTHONUNBUFFERED": "1"}
    with open(log, "w", encoding="utf-8") as output:
        return lab.popen(node, [*RAY, *arguments], env=environment, stdout=output, stderr=subprocess.STDOUT)


def wait_until_started(process: subprocess.Popen[str], log: Path) -> None:
    def has_started_or_ended() -> bool:
        return "Ray runtime started" in log.read_text(encoding="utf-8") or process.poll() is not None

    wait_for(has_started_or_ended, what=f"Ray to write {log.name}", timeout_s=100)
    assert process.poll() is None, log.read_text(encoding="utf-8")


@pytest.mark.timeout(240)
def test_a_task_runs_on_the_other_host(lab_root: Path, tmp_path: Path, ray_folder: Path) -> None:
    with Lab(load_topology("slow-pair"), root=lab_root) as lab:
        a, b = lab.address("a"), lab.address("b")
        head = ["--head", f"--node-ip-address={a}", f"--port={PORT}", "--include-dashboard=false"]
        on_a = start(lab, "a", [*head, f"--temp-dir={ray_folder}"], tmp_path / "a.log")
        on_b = start(lab, "b", [f"--node-ip-address={b}", f"--address={a}:{PORT}"], tmp_path / "b.log")
        wait_until_started(on_a, tmp_path / "a.log")
        wait_until_started(on_b, tmp_path / "b.log")
        command = python(TASK, a, b)
        done = lab.run("a", command, env=ENVIRONMENT, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout.splitlines()[-1])
        assert (said["here"], said["name"]) == ("a", "b")
        assert said["seconds"] > 0.05, "a call takes a round trip at least"
        assert lab.status().link("a>b").num_bytes > 10_000
