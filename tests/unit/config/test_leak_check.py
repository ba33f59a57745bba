from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests import leaks


def test_a_child_is_found_until_it_is_gone() -> None:
    before = leaks.our_processes()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert {one.pid for one in leaks.our_processes() - before} == {process.pid}
        process.kill()
    assert leaks.our_processes() - before == set()


def test_an_orphan_is_found_by_its_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    before = leaks.our_processes()
    shell = "sleep 60 >/dev/null 2>&1 & echo $!"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=10, check=True)
    orphan = int(done.stdout)
    monkeypatch.setattr(leaks, "LEAK_TIMEOUT_S", 0.0)
    assert {one.pid for one in leaks.wait_until_gone(before)} == {orphan}
    os.kill(orphan, signal.SIGKILL)
    monkeypatch.setattr(leaks, "LEAK_TIMEOUT_S", 10.0)
    assert leaks.wait_until_gone(before) == set()


def test_a_forked_child_is_found_by_its_parent() -> None:
    before = leaks.our_processes()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    assert {one.pid for one in leaks.our_processes() - before} == {pid}
    os.close(write)
    os.close(read)
    os.waitpid(pid, 0)
    assert leaks.our_processes() - before == set()
