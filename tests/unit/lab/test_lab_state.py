"""What is remembered of labs, who is still alive, and what is refused before anything is made."""

from __future__ import annotations

import errno
import ipaddress
import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from faults.lab import namespaces, tap
from faults.lab.cluster import LabCluster
from faults.lab.errors import LabError
from faults.lab.lab import Lab
from faults.lab.processes import ProcessId, end_all, identify, myself, processes_in
from faults.lab.state import LabRecord, LabStates, overlapping, remove_folder
from faults.lab.switch import BURST, TURN_S, Pace
from faults.lab.topology import Topology
from orchestrator.cli.main import main
from tests.lab import would_run

PAIR = Topology.model_validate({"regions": {"p": {"nodes": ["a", "b"]}}})
GONE = ProcessId(pid=os.getpid(), started=1)


def record(name: str = "one", **values: Any) -> LabRecord:
    plain = LabRecord(
        name=name, namespaces={}, network="10.201.0.0/24", topology={}, owner=myself(), switch=None, scratch=""
    )
    return replace(plain, **values)


def test_a_process_is_its_id_and_its_start() -> None:
    assert myself().is_alive
    assert not GONE.is_alive, "the same id with another start is another process"
    GONE.kill()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = identify(child.pid)
    assert process is not None and process.is_alive
    end_all(lambda: [process] if process.is_alive else [], what="the child", timeout_s=10)
    assert child.wait() == -signal.SIGKILL
    child.communicate()
    assert identify(child.pid) is None
    process.kill()


def test_processes_that_do_not_end_are_named() -> None:
    with pytest.raises(LabError, match=f"a stone did not end within 0 s of SIGKILL: processes {GONE.pid}"):
        end_all(lambda: [GONE], what="a stone", timeout_s=0)


def test_a_folder_is_removed_with_what_comes_while_it_is_emptied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"
    kept.touch()
    busy = tmp_path / "busy"
    (busy / "0").mkdir(parents=True)
    late, remove = iter(("first", "second")), shutil.rmtree

    def remove_and_be_disturbed(path: str, ignore_errors: bool) -> None:
        remove(path, ignore_errors=ignore_errors)
        if (name := next(late, None)) is not None:
            (busy / name).mkdir(parents=True)

    monkeypatch.setattr("faults.lab.state.shutil.rmtree", remove_and_be_disturbed)
    monkeypatch.setattr("faults.lab.state.REMOVE_PAUSE_S", 0.0)
    remove_folder(str(busy))
    assert not busy.exists() and next(late, None) is None
    monkeypatch.chdir(tmp_path)
    remove_folder("")
    assert kept.exists()
    monkeypatch.setattr("faults.lab.state.shutil.rmtree", lambda path, ignore_errors: None)
    with pytest.raises(LabError, match="kept cannot be removed"):
        remove_folder(str(kept))


def test_our_own_network_is_never_searched(tmp_path: Path) -> None:
    ordinary = tmp_path / "name-without-mount"
    ordinary.touch()
    assert processes_in([Path("/proc/self/ns/net"), ordinary, tmp_path / "missing"]) == []


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    states = LabStates(tmp_path / "labs")
    with states.lock():
        states.write(record(switch=GONE))
    assert states.read("one") == record(switch=GONE)
    assert states.read("two") is None


def test_stale_labs_are_those_that_nobody_holds() -> None:
    assert not record().is_stale
    assert record(owner=GONE).is_stale
    assert not record(owner=None, switch=myself()).is_stale
    assert record(owner=None, switch=GONE).is_stale
    assert record(owner=None, switch=None).is_stale


def test_a_sweep_removes_stale_labs_only(tmp_path: Path) -> None:
    states = LabStates(tmp_path / "labs")
    with states.lock():
        states.write(record("alive"))
        states.write(record("dead", owner=GONE, namespaces={"a": "atoll-no-such-namespace"}))
        states.path("half-made").mkdir()
    with states.lock():
        assert states.sweep() == ["dead", "half-made"]
    assert states.names() == ["alive"]


def test_down_removes_what_a_dead_lab_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its nodes' processes and files too, whether it is named or not."""
    states, scratch = LabStates(tmp_path / "labs"), tmp_path / "scratch"
    monkeypatch.setattr("faults.lab.state.LabStates", lambda: states)
    for arguments in ([], ["dead"]):
        scratch.mkdir()
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as switch:
            with states.lock():
                states.write(record("dead", owner=GONE, switch=identify(switch.pid), scratch=str(scratch)))
            assert main(["lab", "down", *arguments]) == 0
            assert switch.wait() == -signal.SIGKILL
        assert capsys.readouterr().out == "lab dead removed\n"
        assert not states.root.exists() and not scratch.exists()


def test_an_empty_root_is_not_left_behind(tmp_path: Path) -> None:
    states = LabStates(tmp_path / "labs")
    with states.lock():
        assert states.names() == []
    assert not states.root.exists()


def test_the_lab_that_is_meant(tmp_path: Path) -> None:
    states = LabStates(tmp_path / "labs")
    with pytest.raises(LabError, match="there is no lab"):
        states.only(None)
    with states.lock():
        states.write(record("one"))
    assert states.only(None).name == "one"
    with pytest.raises(LabError, match=r"there is no lab 'two'.*one of one"):
        states.only("two")
    with states.lock():
        states.write(record("two"))
    with pytest.raises(LabError, match="several labs: one, two"):
        states.only(None)
    assert states.only("two").name == "two"


def test_networks_overlap_with_the_host_and_with_other_labs() -> None:
    used = {ipaddress.IPv4Network("192.168.0.0/16"): "interface eth7"}
    assert overlapping(ipaddress.IPv4Network("192.168.3.0/24"), used, []) == "interface eth7"
    assert overlapping(ipaddress.IPv4Network("10.201.0.0/16"), used, [record()]) == "lab 'one'"
    assert overlapping(ipaddress.IPv4Network("10.202.0.0/24"), used, [record()]) is None


def test_few_turns_do_not_wait_and_many_are_spread() -> None:
    pace = Pace()
    assert max(pace.pause_s(100.0) for _ in range(BURST)) <= 0
    now_s, turns = 100.0, 0
    while now_s < 101.0:
        now_s += max(0.0, pace.pause_s(now_s)) + 1e-5
        turns += 1
    assert turns == pytest.approx(1 / TURN_S, rel=0.02)
    assert pace.pause_s(now_s + 1.0) <= 0, "after a rest there is no debt"


@pytest.mark.parametrize(
    ("root", "device", "refusal", "message"),
    [
        (False, True, None, "needs root"),
        (True, False, None, "there is no .*: the kernel module tun is not loaded"),
        (True, True, OSError(errno.EPERM, "Operation not permitted"), "the kernel refuses a TAP device"),
    ],
    ids=["no root", "no device", "refused"],
)
def test_what_a_lab_cannot_do_without(
    root: bool,
    device: bool,
    refusal: OSError | None,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def ioctl(*_: object) -> None:
        if refusal is not None:
            raise refusal

    monkeypatch.setattr(os, "geteuid", lambda: 0 if root else 1000)
    there = tmp_path / "tun"
    if device:
        there.touch()
    monkeypatch.setattr(tap, "DEVICE", there)
    monkeypatch.setattr(tap.fcntl, "ioctl", ioctl)
    monkeypatch.setattr(tap, "_check", lambda result: None)
    with pytest.raises(LabError, match=message):
        Lab(PAIR, root=tmp_path / "labs").start()
    assert not (tmp_path / "labs").exists()
    assert main(["lab", "up", "slow-pair"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no lab here: ") and "try:" in error


@pytest.mark.parametrize(
    ("has_tap", "num_skipped", "code"), [(True, 0, 0), (True, 2, 1), (False, 2, 0)], ids=["run", "skipped", "no TAP"]
)
def test_make_check_fails_where_there_is_tap_and_the_tests_of_the_lab_are_skipped(
    has_tap: bool,
    num_skipped: int,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Item:
        def __init__(self, number: int) -> None:
            self.number = number

        def get_closest_marker(self, name: str) -> object:
            return name if name == "skip" and self.number < num_skipped else None

    def collect(arguments: list[str], plugins: list[Any]) -> pytest.ExitCode:
        plugins[0].items = [Item(number) for number in range(3)]
        return pytest.ExitCode.OK

    if has_tap:
        (tmp_path / "tun").touch()
    monkeypatch.setattr(would_run, "DEVICE", tmp_path / "tun")
    monkeypatch.setattr(would_run, "why_no_lab", lambda: "needs root" if num_skipped else None)
    monkeypatch.setattr(pytest, "main", collect)
    assert would_run.main() == code
    said = capsys.readouterr()
    why = ": needs root" if num_skipped else ""
    assert said.out == f"{num_skipped} of 3 tests of the lab would be skipped{why}\n"
    assert said.err.startswith("error: there is TAP on this machine") == bool(code)


def test_a_host_that_does_not_start_is_named_with_its_last_words(tmp_path: Path) -> None:
    class FakeLab:
        folder = tmp_path

    cluster = LabCluster(cast("Lab", FakeLab()))
    (tmp_path / "a.err").write_text("starting\nerror: the port is taken\n", encoding="utf-8")
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"], text=True)
    with pytest.raises(LabError, match="on a: exit code 3; its last words are:\nstarting\nerror: the port is taken"):
        cluster._wait("a", process)


def test_without_iproute2_there_is_no_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces, "why_no_tap", lambda: None)
    monkeypatch.setattr(namespaces.shutil, "which", lambda *_, **__: None)
    assert namespaces.why_no_lab() == "there is no command ip: install iproute2"


def test_an_unknown_congestion_control_is_named() -> None:
    with pytest.raises(LabError, match="no congestion control 'warp'"):
        namespaces.check_congestion(["warp"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["up", "slow-pear"], "error: no topology or file is called 'slow-pear'\n  try:   slow-pair ("),
        (["set", "eu", "rate"], "error: 'rate' is not of the form KEY=NUMBER"),
        (["set", "eu", "rate_mbit=fast"], "error: 'rate_mbit=fast' is not of the form KEY=NUMBER"),
        (["cut", "eu", "--lab", "no-such-lab"], "error: there is no lab 'no-such-lab'"),
        (["upp"], "error: no command is called 'upp', did you mean 'up'?"),
        (["up", "slow-pair", "--name", "A/B"], "error: 'A/B' is no name for a lab"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_on_the_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", *arguments]) == 2
    assert capsys.readouterr().err.startswith(message)


def test_errors_survive_pickling() -> None:
    error = LabError("no", place="here", remedy="there")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "no (place: here; try: there)"
