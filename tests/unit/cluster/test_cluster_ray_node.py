from __future__ import annotations

import json
import os
import select
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from faults.lab.processes import identify
from orchestrator.cluster import ray_node
from orchestrator.cluster.ray_node import (
    MAX_FOLDER_LENGTH,
    WAN_PROFILE,
    Devices,
    NodeArguments,
    RayNode,
    cluster_environment,
    count_gpus,
    default_workers,
    make_ray_folder,
    parse_devices,
    process_environment,
)
from orchestrator.errors import ClusterUnreachable, UserError

pytestmark = pytest.mark.timeout(30)

TOKEN_FILE = Path("/state/head-1/token")


def arguments(folder: Path = Path("/r"), **changes: object) -> NodeArguments:
    values: dict[str, object] = {
        "node_ip": "127.0.0.2",
        "ray_folder": folder,
        "workers": 3,
        "devices": Devices(gpus=()),
        "labels": {"zone": "b", "rack": "7"},
        "gcs_address": None,
        "port": 0,
    }
    return NodeArguments(**{**values, **changes})  # type: ignore[arg-type]


# ---------------------------------------------------------------- environment


def test_a_cluster_asks_for_its_token_and_takes_it_from_the_file() -> None:
    environment = cluster_environment(TOKEN_FILE, wan=False)
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN_PATH"] == str(TOKEN_FILE)
    assert not any("gcs_storage" in key for key in environment)
    assert not WAN_PROFILE.keys() & environment.keys()


def test_the_head_alone_keeps_its_tables() -> None:
    environment = cluster_environment(TOKEN_FILE, wan=True, gcs_storage=Path("/state/gcs"))
    assert environment["RAY_gcs_storage"] == "rocksdb"
    assert environment["RAY_gcs_storage_path"] == "/state/gcs"
    assert environment.items() >= WAN_PROFILE.items()


def test_nothing_of_another_cluster_gets_into_a_process() -> None:
    inherited = {
        "RAY_AUTH_MODE": "disabled",
        "RAY_AUTH_TOKEN": "stronger than any file",
        "RAY_ADDRESS": "elsewhere:1",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "ATOLL_TOKEN": "secret",
        "PYTHONPATH": "/mine",
        "HOME": "/home/me",
    }
    own = cluster_environment(TOKEN_FILE, wan=False)
    environment = process_environment(inherited, own)
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["HOME"] == "/home/me"
    assert (
        not {"RAY_AUTH_TOKEN", "RAY_ADDRESS", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "ATOLL_TOKEN"} & environment.keys()
    )
    paths = environment["PYTHONPATH"].split(os.pathsep)
    assert "/mine" in paths
    assert str(Path(ray_node.__file__).parents[2]) in paths


# ---------------------------------------------------------------- arguments


def test_arguments_of_a_head() -> None:
    line = arguments(port=6379).command_line(23456)
    assert line[:2] == ["start", "--head"]
    assert {"--port=6379", "--ray-client-server-port=23456", "--include-dashboard=false", "--block"} <= set(line)
    assert {"--node-ip-address=127.0.0.2", "--temp-dir=/r", "--num-gpus=0", "--labels=zone=b,rack=7"} <= set(line)
    [resources] = [argument for argument in line if argument.startswith("--resources=")]
    assert json.loads(resources.partition("=")[2]) == {"atoll_worker": 3}


def test_arguments_of_a_node_have_nothing_that_only_a_head_may_have() -> None:
    line = arguments(gcs_address="10.0.0.1:6379", labels={}, devices=Devices(gpus=None)).command_line(1)
    assert "--address=10.0.0.1:6379" in line
    only_head = ("--head", "--port", "--include-dashboard", "--ray-client-server-port", "--labels", "--num-gpus")
    assert [argument for argument in line if argument.startswith(only_head)] == []


def test_ray_knows_all_of_these_options() -> None:
    from ray.scripts.scripts import start

    known = {name for parameter in start.params for name in parameter.opts}
    lines = [*arguments().command_line(1), *arguments(gcs_address="h:1").command_line(1)]
    assert {argument.partition("=")[0] for argument in lines if argument.startswith("--")} <= known


# ---------------------------------------------------------------- devices


@pytest.mark.parametrize(
    ("text", "devices", "environment", "line"),
    [
        ("auto", Devices(gpus=None), {}, []),
        ("cpu", Devices(gpus=()), {}, ["--num-gpus=0"]),
        ("cuda:2", Devices(gpus=(2,)), {"CUDA_VISIBLE_DEVICES": "2"}, ["--num-gpus=1"]),
        ("cuda:0,cuda:3", Devices(gpus=(0, 3)), {"CUDA_VISIBLE_DEVICES": "0,3"}, ["--num-gpus=2"]),
    ],
)
def test_devices(text: str, devices: Devices, environment: dict[str, str], line: list[str]) -> None:
    assert parse_devices(text) == devices
    assert devices.environment == environment
    assert devices.arguments == line


@pytest.mark.parametrize("text", ["", "gpu", "cuda:", "cuda:x", "cuda:0,", "cuda:0,cuda:0", "cuda:-1"])
def test_devices_have_one_form(text: str) -> None:
    with pytest.raises(UserError, match="--devices is"):
        parse_devices(text)


def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    for text in ("auto", "cpu", "cuda:0", "cuda:1,cuda:0"):
        ray_node.check_devices(parse_devices(text), tmp_path)
    with pytest.raises(UserError, match="has no GPU cuda:9") as caught:
        ray_node.check_devices(parse_devices("cuda:0,cuda:9"), tmp_path)
    assert caught.value.remedy == "auto, cpu, or of those here: cuda:0, cuda:1"
    (tmp_path / "dxg").touch()
    ray_node.check_devices(parse_devices("cuda:9"), tmp_path)


def test_one_island_for_each_gpu_and_one_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert count_gpus() == 3
    assert default_workers(parse_devices("auto")) == 3
    assert default_workers(parse_devices("cpu")) == 1
    assert default_workers(parse_devices("cuda:0,cuda:1")) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert default_workers(parse_devices("auto")) == 1


# ---------------------------------------------------------------- the process


def test_the_folder_is_private_and_its_path_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60)
    deep.mkdir()
    monkeypatch.setattr(ray_node.tempfile, "tempdir", str(deep))
    folder = make_ray_folder()
    try:
        assert len(str(folder / "r")) <= MAX_FOLDER_LENGTH
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    finally:
        folder.rmdir()


def make_node(tmp_path: Path, script: str) -> RayNode:
    """A node whose `ray start` is a script, in a process group of its own."""
    node = RayNode(arguments(tmp_path), {}, tmp_path / "ray.log")
    with node.log_file.open("wb") as log:
        node.process = subprocess.Popen(
            [sys.executable, "-c", script], stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
    return node


def test_a_node_is_ready_when_ray_wrote_its_address(tmp_path: Path) -> None:
    node = make_node(
        tmp_path, f"open({str(tmp_path / 'ray_current_cluster')!r}, 'w').write('h:1'); import signal; signal.pause()"
    )
    assert node.wait_ready(lambda: False, timeout_s=10) == "h:1"
    node.stop()
    assert not node.is_running


def test_a_node_that_ends_shows_its_last_words(tmp_path: Path) -> None:
    node = make_node(tmp_path, "import sys; sys.exit('\\x1b[31mValueError: no such port\\x1b[0m')")
    with pytest.raises(ClusterUnreachable, match="ended while it started") as caught:
        node.wait_ready(lambda: False, timeout_s=10)
    assert caught.value.message.endswith("\n    ValueError: no such port")
    assert node.how_it_ended == "exit code 1"
    node.stop()


def test_a_node_that_does_not_come_up_is_given_up(tmp_path: Path) -> None:
    node = make_node(tmp_path, "import signal; signal.pause()")
    with pytest.raises(ClusterUnreachable, match="did not come up"):
        node.wait_ready(lambda: False, timeout_s=0)
    assert node.wait_ready(lambda: True) is None
    node.stop()


def test_stop_ends_the_whole_group_and_nothing_else(tmp_path: Path) -> None:
    script = (
        "import signal, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"open({str(tmp_path / 'ray_current_cluster')!r}, 'w').write(str(child.pid))\n"
        "signal.pause()\n"
    )
    node = make_node(tmp_path, script)
    child = identify(int(node.wait_ready(lambda: False, timeout_s=10) or 0))
    assert child is not None
    child_fd = os.pidfd_open(child.pid)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        process = node.process
        node.stop(timeout_s=0.1)
        assert process is not None and process.returncode == -signal.SIGKILL
        assert other.poll() is None
    assert select.select([child_fd], [], [], 10)[0], "the child outlives its group"
    os.close(child_fd)


def test_the_node_id_is_that_of_the_last_start(tmp_path: Path) -> None:
    session = tmp_path / "session_2026-01-01"
    session.mkdir()
    node = RayNode(arguments(tmp_path), {}, tmp_path / "ray.log")
    assert node.node_id == ""
    for at, name in enumerate(["aa11", "bb22"]):
        path = session / f"runtime_env_agent_port_{name}"
        path.touch()
        os.utime(path, (at, at))
    assert node.node_id == "bb22"
