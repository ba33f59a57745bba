"""How labs begin and end: host names, clean-up after any death, the command line, and what is refused."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from faults.lab.errors import LabError
from faults.lab.lab import Lab
from faults.lab.playing import Playing
from faults.lab.processes import ProcessId, identify
from faults.lab.schedule import LinkChange
from faults.lab.state import LabRecord, LabStates
from faults.lab.tap import NETNS_DIR
from faults.lab.topology import Topology
from orchestrator.cli.main import main
from tests.lab.support import pair, python, wait_for

ROOT = Path(__file__).resolve().parents[2]
SLEEP = python("import time; print('up', flush=True); time.sleep(600)")
# A daemon: it leaves its parent, its session and its group, and so everything but its network.
DAEMON = python(
    "import os; os.fork() and os._exit(0); os.setsid(); os.fork() and os._exit(0); import time; time.sleep(600)"
)
# Stays in its lab until it is killed; says when everything is up.
HOLD = """
import subprocess, sys, time
from pathlib import Path
from faults.lab.lab import Lab
from tests.lab.support import pair
from tests.lab.test_lab_life import DAEMON, SLEEP
with Lab(pair(delay_ms=5), root=Path(sys.argv[1])) as lab:
    lab.popen("a", SLEEP, stdout=subprocess.DEVNULL)
    lab.run("b", DAEMON)
    print(lab.name, flush=True)
    time.sleep(600)
"""


def namespaces_of(record: LabRecord | None) -> list[Path]:
    assert record is not None
    return record.namespace_paths


@contextmanager
def holder(root: Path) -> Iterator[tuple[subprocess.Popen[str], LabRecord, list[ProcessId]]]:
    """Another process with a lab, and everything that runs in it; killed at the end at the latest."""
    owner = subprocess.Popen([sys.executable, "-c", HOLD, str(root)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    # Closed, and not read to its end: what the owner starts holds the other end of the pipe.
    with owner.stdout:
        name = owner.stdout.readline().strip()
    try:
        lab = Lab.attach(name, root=root)
        # The daemon is there once its last fork is.
        inside = wait_for(
            lambda: found if len(found := lab.processes("a") + lab.processes("b")) == 2 else None, what="the daemon"
        )
        record = LabStates(root).read(name)
        assert record is not None
        yield owner, record, inside
    finally:
        owner.kill()
        owner.wait(timeout=20)


def test_every_node_has_its_own_name_and_knows_the_others(lab_root: Path) -> None:
    code = "import socket; print(socket.gethostname(), socket.gethostbyname('a'), socket.gethostbyname('b'))"
    with Lab(pair(), root=lab_root) as lab:
        said = {
            node: lab.run(node, python(code), capture_output=True, text=True, check=True, timeout=20).stdout.split()
            for node in lab.nodes
        }
        assert said == {node: [node, lab.address("a"), lab.address("b")] for node in ("a", "b")}
        assert lab.run("a", ["no-such-command"], capture_output=True, timeout=20).returncode == 127
        with pytest.raises(LabError, match="no node is called 'c'"):
            lab.run("c", ["true"])
    assert " a\n" not in Path("/etc/hosts").read_text(), "the machine's own names are untouched"


def test_everything_ends_with_the_lab(lab_root: Path) -> None:
    with Lab(pair(), root=lab_root) as lab:
        sleeper = lab.popen("a", SLEEP, stdout=subprocess.DEVNULL)
        lab.run("b", DAEMON, timeout=20)
        daemons = wait_for(lambda: lab.processes("b"), what="the daemon")
        record = LabStates(lab_root).read(lab.name)
        assert record is not None and record.switch is not None
        processes = [*lab.processes("a"), *daemons, record.switch]
        assert len(processes) >= 3
    assert sleeper.returncode == -signal.SIGKILL
    assert [process for process in processes if process.is_alive] == []
    assert [path for path in namespaces_of(record) if path.exists()] == []
    for ask in (lambda: lab.run("a", ["true"]), lambda: lab.cut("a"), lab.heal, lab.status):
        with pytest.raises(LabError, match="is not running"):
            ask()
    lab.stop()


def test_everything_ends_when_the_block_fails(lab_root: Path) -> None:
    with pytest.raises(ZeroDivisionError), Lab(pair(), root=lab_root) as lab:
        lab.popen("a", SLEEP, stdout=subprocess.DEVNULL)
        raise ZeroDivisionError


def test_a_node_can_be_killed_and_comes_back(lab_root: Path) -> None:
    with Lab(pair(), root=lab_root) as lab:
        on_a, on_b = (lab.popen(node, SLEEP, stdout=subprocess.PIPE, text=True) for node in ("a", "b"))
        for process in (on_a, on_b):
            with process.stdout:
                assert process.stdout.readline() == "up\n"
        lab.kill("a")
        assert lab.processes("a") == []
        assert on_a.wait(timeout=20) == -signal.SIGKILL
        assert on_b.poll() is None
        lab.run("a", ["true"], check=True, timeout=20)


def test_nothing_stays_behind_after_sigkill_of_the_lab(lab_root: Path) -> None:
    """Its wires end at once, the rest with the next lab, which is not disturbed by what it finds."""
    with holder(lab_root) as (owner, record, inside), Lab(pair(), root=lab_root) as other:
        assert Path(record.scratch).is_dir()
        assert sorted(LabStates(lab_root).names()) == sorted([record.name, other.name]), "a living lab is left alone"
        owner.kill()
        owner.wait(timeout=20)
        switch = record.switch
        assert switch is not None
        wait_for(lambda: not switch.is_alive, what="the switch to end")
        with Lab(pair(), root=lab_root):
            assert record.name not in LabStates(lab_root).names()
            assert not Path(record.scratch).exists()
            assert [process for process in inside if process.is_alive] == []
            assert [path for path in namespaces_of(record) if path.exists()] == []
            assert other.processes("a") == []
            other.run("a", ["true"], check=True, timeout=20)


def test_sigterm_ends_a_lab_and_leaves_nothing(lab_root: Path) -> None:
    with holder(lab_root) as (owner, record, inside):
        scratch = Path(record.scratch)
        assert scratch.is_dir()
        owner.terminate()
        assert owner.wait(timeout=20) == 128 + signal.SIGTERM
        assert [process for process in inside if process.is_alive] == []
        assert [path for path in namespaces_of(record) if path.exists()] == []
        assert LabStates(lab_root).names() == [] and not scratch.exists()


def test_each_node_has_a_place_for_files_that_goes_with_the_lab(lab_root: Path) -> None:
    code = "import os, tempfile; print(os.environ['ATOLL_STATE_DIR'], tempfile.mkdtemp(), os.environ['ATOLL_LAB'])"
    with Lab(pair(), root=lab_root) as lab:
        said = [
            lab.run(node, python(code), capture_output=True, text=True, check=True, timeout=20).stdout.split()
            for node in lab.nodes
        ]
        assert len({state for state, _, _ in said}) == 2 and all(Path(made).is_dir() for _, made, _ in said)
        [around] = {around for _, _, around in said}
        assert around == str(lab.folder)
    assert not any(Path(made).exists() for _, made, _ in said)


def test_a_process_on_a_node_changes_the_links_of_its_lab(lab_root: Path) -> None:
    """As a controller does that carries out a fault plan; another lab on the machine is not meant."""
    code = """
from faults.lab.lab import Lab
from faults.lab.schedule import LinkChange
Lab.around().apply(LinkChange(at_s=0, action="cut", target="a>b"))
"""
    with Lab(pair(), root=lab_root) as other, Lab(pair(), root=lab_root) as lab:
        lab.run("b", python(code), cwd=ROOT, check=True, timeout=30)
        assert (lab.status().cut, other.status().cut) == ((("a", "b"),), ())


def test_a_lab_whose_switch_was_killed_says_so_and_goes(lab_root: Path) -> None:
    with Lab(pair(), root=lab_root) as lab:
        record = LabStates(lab_root).read(lab.name)
        assert record is not None and record.switch is not None
        record.switch.kill()
        wait_for(lambda: not record.switch.is_alive, what="the switch to end")
        for ask in (lab.heal, lab.status):
            with pytest.raises(LabError, match=r"the switch of lab .* does not answer"):
                ask()
        said: list[str] = []
        with Playing(lab, [LinkChange(at_s=0, action="cut", target="a")], say=said.append):
            wait_for(lambda: said, what="a word of it")
        assert "the schedule of link changes ended: the switch of lab" in said[0]


def test_a_schedule_beside_a_block_ends_with_it_and_names_what_did_not_come(lab_root: Path) -> None:
    said: list[str] = []
    changes = [LinkChange(at_s=at_s, action="cut", target=target) for at_s, target in ((600, "b>a"), (0, "a>b"))]
    with Lab(pair(), root=lab_root) as lab, Playing(lab, changes, say=said.append):
        wait_for(lambda: lab.status().cut, what="the first change")
        assert lab.status().cut == (("a", "b"),)
    assert said == ["link changes that did not come, as it was over before: cut b>a at 600 s"]


def test_sigkill_in_the_middle_of_making_a_lab_leaves_nothing(lab_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record is written first: with it, namespaces without a switch are found too."""
    code = """
import os, signal, sys
from pathlib import Path
from faults.lab.lab import Lab
from tests.lab.support import pair
Lab._start_switch = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
Lab(pair(), name="half", root=Path(sys.argv[1])).start()
"""
    done = subprocess.run([sys.executable, "-c", code, str(lab_root)], cwd=ROOT, timeout=30, check=False)
    assert done.returncode == -signal.SIGKILL
    record = LabStates(lab_root).read("half")
    assert all(path.exists() for path in namespaces_of(record))
    with Lab(pair(), name="half", root=lab_root):
        assert not any(path.exists() for path in namespaces_of(record)), "the new one has namespaces of its own"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"congestion": "warp"}, "no congestion control 'warp'"),
        ({"network": "10.201.0.0/16"}, r"network = '10.201.0.0/16' is in use by lab 'first'"),
    ],
)
def test_what_is_refused_leaves_nothing(values: dict[str, str], message: str, lab_root: Path) -> None:
    wanted = Topology.model_validate({"regions": {"p": {"nodes": ["x", "y"]}}, **values})
    with Lab(pair(), name="first", root=lab_root):
        before = sorted(os.listdir(NETNS_DIR))
        with pytest.raises(LabError, match=message):
            Lab(wanted, root=lab_root).start()
        with pytest.raises(LabError, match="lab 'first' is running already"):
            Lab(pair(), name="first", root=lab_root).start()
        assert LabStates(lab_root).names() == ["first"]
        assert [name for name in os.listdir(NETNS_DIR) if name.endswith(("-x", "-y"))] == []
        assert set(before) >= {path.name for path in namespaces_of(LabStates(lab_root).read("first"))}


def test_the_network_of_the_host_is_refused(lab_root: Path) -> None:
    routes = json.loads(subprocess.run(["ip", "-j", "-4", "addr"], capture_output=True, check=True).stdout)
    taken = [a["local"] for one in routes for a in one["addr_info"] if not a["local"].startswith("127.")]
    if not taken:
        pytest.skip("this machine has no address that a lab could clash with")
    network = ".".join(taken[0].split(".")[:3]) + ".0/24"
    wanted = Topology.model_validate({"network": network, "regions": {"p": {"nodes": ["x", "y"]}}})
    with pytest.raises(LabError, match="is in use by interface"):
        Lab(wanted, root=lab_root).start()


def test_a_switch_that_does_not_start_leaves_nothing(lab_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("faults.lab.lab.namespaces.create", lambda names: None)
    with pytest.raises(LabError, match="the switch did not start: error: no TAP device in atoll-"):
        Lab(pair(), root=lab_root).start()


def test_the_command_line(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """In the place where all labs of the machine are, under a name of its own."""
    name = f"test-{secrets.token_hex(4)}"

    def atoll(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(["lab", *arguments])
        return code, *capfd.readouterr()

    # A process of its own, as the lab is to outlive it.
    command = [
        sys.executable,
        "-m",
        "orchestrator.cli.main",
        "lab",
        "up",
        "slow-pair",
        "--links-only",
        "--name",
        name,
        "--json",
    ]
    up = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    try:
        assert up.returncode == 0, up.stderr
        assert set(json.loads(up.stdout)["nodes"]) == {"a", "b"}
        assert atoll("exec", "--lab", name, "a", "sh", "-c", "hostname; exit 3") == (3, "a\n", "")
        assert atoll("set", "a:b", "rate_mbit=10", "loss=0.5", "delay_ms=none", "--lab", name) == (0, "", "")
        assert atoll("cut", "a>b", "--lab", name) == (0, "", "")
        status = json.loads(atoll("status", "--lab", name, "--json")[1])
        link = next(link for link in status["links"] if link["name"] == "a>b")
        assert (link["rate_mbit"], link["loss"], link["delay_ms"]) == (10, 0.5, 0)
        assert status["cut"] == [["a", "b"]]
        table = atoll("status", "--lab", name)[1]
        assert "cut: a>b" in table
        assert any(line.split()[:5] == ["a>b", "10", "0", "0", "0.5"] for line in table.splitlines())
        assert atoll("heal", "--lab", name)[0] == 0
        schedule = tmp_path / "changes.toml"
        schedule.write_text('[[links]]\nat_s = 0.02\naction = "cut"\ntarget = "b>a"\n')
        assert atoll("play", str(schedule), "--lab", name) == (0, "", "")
        assert json.loads(atoll("status", "--lab", name, "--json")[1])["cut"] == [["b", "a"]]
        schedule.write_text('[[links]]\nat_s = 0\naction = "cut"\ntarget = "z"\n')
        assert "no node or region is called 'z'" in atoll("play", str(schedule), "--lab", name)[2]
        schedule.write_text('[[links]]\nat_s = 1\naction = "snip"\ntarget = "a"\n')
        code, _, error = atoll("play", str(schedule), "--lab", name)
        assert code == 2 and 'error: action = "snip" is not allowed: it takes one of cut, heal, set' in error
        assert f"{schedule}, links[0], action" in error
        assert f"error: lab '{name}' has no cluster" in atoll("run", "--lab", name, "debug")[2]
        message = "error: no node or region is called 'c' in 'a:c'\n  try:   one of pair, a, b\n"
        assert atoll("cut", "a:c", "--lab", name) == (2, "", message)
        assert atoll("up", "slow-pair", "--name", name)[2].startswith(f"error: lab '{name}' is running already")
    finally:
        down = atoll("down", name)
    assert down[0] == 0 and f"lab {name} removed" in down[1]
    again = atoll("down", name)
    assert again[0] == 2 and f"error: there is no lab '{name}'" in again[2]


def test_a_lab_that_was_left_running_is_found_and_removed(lab_root: Path) -> None:
    code = """
import sys
from pathlib import Path
from faults.lab.lab import Lab
from tests.lab.support import pair
lab = Lab(pair(), name="kept", root=Path(sys.argv[1]))
lab.start()
lab.detach()
"""
    subprocess.run([sys.executable, "-c", code, str(lab_root)], cwd=ROOT, timeout=30, check=True)
    with Lab(pair(), root=lab_root):
        kept = Lab.attach("kept", root=lab_root)
        kept.run("a", ["true"], check=True, timeout=20)
        assert kept.status().cut == ()
        record = LabStates(lab_root).read("kept")
        assert record is not None and record.switch is not None
        assert identify(record.switch.pid) == record.switch
        kept.stop()
        assert not record.switch.is_alive
