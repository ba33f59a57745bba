from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from faults.lab.processes import ProcessId, identify, myself
from orchestrator.cluster import state as states
from orchestrator.cluster.state import ClusterState, create, find_cluster, known_clusters, load, same_address, save
from orchestrator.errors import UserError

TOKEN = "cd" * 32


def make(tmp_path: Path, name: str = "head-1", *, role: str = "head", gcs: str = "127.0.0.2:1") -> ClusterState:
    ray_folder = Path(tempfile.mkdtemp(prefix="ray-", dir=tmp_path))
    wanted = ClusterState(
        folder=tmp_path / "state" / name,
        role=role,
        door="127.0.0.1:4321",
        supervisor=myself(),
        ray_folder=ray_folder,
        node_ip="127.0.0.2",
        wan=False,
        gcs_address=gcs,
    )
    return create(wanted, TOKEN)


def dead() -> ProcessId:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        identity = identify(process.pid)
        assert identity is not None
    return identity


def test_what_is_created_is_private_and_read_again(tmp_path: Path) -> None:
    state = make(tmp_path)
    assert load(state.folder) == state
    assert state.token() == TOKEN
    assert stat.S_IMODE(state.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(state.folder.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(state.token_file.stat().st_mode) == 0o600
    save(replace(state, node_id="n", ray=myself()))
    assert load(state.folder) == replace(state, node_id="n", ray=myself())
    assert TOKEN not in (state.folder / "state.json").read_text()


def test_nodes_of_one_cluster_are_numbered(tmp_path: Path) -> None:
    made = [make(tmp_path, "join-h-4321", role="node") for _ in range(3)]
    assert [state.name for state in made] == ["join-h-4321-0", "join-h-4321-1", "join-h-4321-2"]
    states.remove(made[1])
    assert make(tmp_path, "join-h-4321", role="node").name == "join-h-4321-1"


def test_what_dead_supervisors_left_is_removed(tmp_path: Path) -> None:
    living, left = make(tmp_path), make(tmp_path, "head-2")
    save(replace(left, supervisor=dead()))
    (tmp_path / "state" / "head-3").mkdir()
    (tmp_path / "state" / "head-3" / "state.json").write_text("{")
    assert known_clusters(tmp_path / "state") == [living]
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["head-1"]
    assert not left.ray_folder.exists()
    assert living.ray_folder.exists()


def test_what_is_no_cluster_is_nobodys_to_remove(tmp_path: Path) -> None:
    make(tmp_path)
    # Islands whose machine does not see the run directory keep logs and local states beside the clusters' folders.
    (tmp_path / "state" / "runs" / "demo" / "logs").mkdir(parents=True)
    (tmp_path / "state" / "thesis").mkdir()
    known_clusters(tmp_path / "state")
    assert (tmp_path / "state" / "runs" / "demo" / "logs").is_dir() and (tmp_path / "state" / "thesis").is_dir()


def dead_head(tmp_path: Path, name: str, *, door: str = "127.0.0.1:4321", gcs: str = "127.0.0.2:1") -> ClusterState:
    state = replace(make(tmp_path, name, gcs=gcs), door=door, supervisor=dead())
    save(state)
    (state.folder / states.TABLES).mkdir()
    return state


def test_a_dead_head_can_be_taken_up_and_is_in_no_cluster(tmp_path: Path) -> None:
    root = tmp_path / "state"
    left = dead_head(tmp_path, "head-1")
    assert known_clusters(root) == []
    assert find_cluster(root=root) is None
    assert states.dead_heads(root) == [left]
    assert not left.ray_folder.exists()
    take = partial(states.take_up, fresh=False, root=root)
    assert take(host=None, port=0, door_port=0) == left
    assert take(host="localhost", port=1, door_port=4321) == left
    assert take(host="10.0.0.1", port=0, door_port=0) is None
    assert take(host=None, port=2, door_port=0) is None
    assert take(host=None, port=0, door_port=2) is None


def test_of_several_dead_heads_one_is_to_be_named(tmp_path: Path) -> None:
    root = tmp_path / "state"
    dead_head(tmp_path, "head-1")
    other = dead_head(tmp_path, "head-2", door="127.0.0.1:4322", gcs="127.0.0.2:2")
    with pytest.raises(UserError, match="2 clusters on this machine ended without leaving") as caught:
        states.take_up(fresh=False, host=None, port=0, door_port=0, root=root)
    assert "--door-port 4321, --door-port 4322" in str(caught.value)
    assert states.take_up(fresh=False, host=None, port=0, door_port=4322, root=root) == other
    assert states.take_up(fresh=True, host=None, port=0, door_port=0, root=root) is None
    assert states.dead_heads(root) == []


def test_a_living_head_is_not_taken_up(tmp_path: Path) -> None:
    state = make(tmp_path)
    (state.folder / states.TABLES).mkdir()
    assert states.dead_heads(tmp_path / "state") == []


def test_a_process_id_that_was_given_again_is_another_process(tmp_path: Path) -> None:
    state = make(tmp_path)
    save(replace(state, supervisor=replace(myself(), started=myself().started - 1)))
    assert known_clusters(tmp_path / "state") == []


def test_the_ray_of_a_dead_supervisor_is_ended_and_nobody_else(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as ours:
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
            ray, stranger = identify(ours.pid), identify(other.pid)
            assert ray is not None and stranger is not None
            gone = dead()
            save(replace(make(tmp_path, "head-1"), supervisor=gone, ray=ray))
            save(replace(make(tmp_path, "head-2"), supervisor=gone, ray=replace(stranger, started=1)))
            assert known_clusters(tmp_path / "state") == []
            assert ours.wait(timeout=10) == -9
            assert other.poll() is None


def test_folders_of_other_machines_are_left_alone(tmp_path: Path) -> None:
    state = make(tmp_path)
    save(replace(state, machine="another-machine", supervisor=dead()))
    assert known_clusters(tmp_path / "state") == []
    assert state.folder.exists()


def test_clusters_are_found_by_either_address_and_heads_come_first(tmp_path: Path) -> None:
    root = tmp_path / "state"
    assert find_cluster("auto", root) is None
    node = make(tmp_path, "join-h", role="node")
    assert find_cluster("auto", root) == node
    head = make(tmp_path)
    for address in ("auto", None, "127.0.0.2:1", "127.0.0.1:1", "localhost:4321"):
        assert find_cluster(address, root) == head
    assert find_cluster("10.0.0.1:1", root) is None
    make(tmp_path, "head-9", gcs="127.0.0.2:9")
    assert find_cluster("127.0.0.1:1", root) == head
    with pytest.raises(UserError, match=r"in several clusters.*head-1.*head-9"):
        find_cluster("auto", root)


def test_a_cluster_that_still_starts_is_known_and_not_found(tmp_path: Path) -> None:
    state = make(tmp_path, gcs="")
    assert known_clusters(tmp_path / "state") == [state]
    assert find_cluster("auto", tmp_path / "state") is None


def test_the_last_one_takes_the_root_along(tmp_path: Path) -> None:
    states.remove(make(tmp_path))
    assert not (tmp_path / "state").exists()


def test_where_the_root_is() -> None:
    assert states.state_root({"ATOLL_STATE_DIR": "/x", "XDG_STATE_HOME": "/y"}) == Path("/x")
    assert states.state_root({"XDG_STATE_HOME": "/y"}) == Path("/y/atoll")
    assert states.state_root({"HOME": "/h"}) == Path("/h/.local/state/atoll")
    assert os.path.isabs(states.state_root())


def test_loopback_is_one_address_however_it_is_written() -> None:
    assert same_address("localhost:1", "127.0.0.2:1")
    assert same_address("[::1]:1", "127.0.0.1:1")
    assert not same_address("127.0.0.1:1", "127.0.0.1:2")
    assert not same_address("nonsense", "127.0.0.1:2")
