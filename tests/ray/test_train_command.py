"""`atoll train` on a Ray that is there: Ctrl-C and resume, and a driver that dies."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from orchestrator.ledger import ledger_command
from orchestrator.local import LocalRun
from orchestrator.segments import read_run
from orchestrator.summary import load_summary
from tests.ray.command import Command
from tests.small_run import TOML, small_config
from workers.records import (
    CommitRecord,
    Record,
    StopRecord,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

STOPPED = 3

ONE = ("train.batch_size=16", "strategy.inner_steps=60", f"train.tokens={24 * 60 * 16 * 16}")
SIX = ("run.islands=6", "train.tokens=61440")  # more than an island has threads for its own work


@pytest.fixture(scope="module")
def address(ray_cluster: None) -> str:
    """A cluster that is there already."""
    return str(ray.get_runtime_context().gcs_address)


@pytest.fixture
def config_file(pack_dir: Path, tmp_path: Path) -> str:
    path = tmp_path / "small.toml"
    path.write_text(TOML + f'\n[data]\npath = "{pack_dir}"\n')
    return str(path)


def settings(*overrides: str) -> list[str]:
    return [argument for override in overrides for argument in ("--set", override)]


def records_of(run_dir: Path) -> list[Record]:
    return [row.record for row in read_run(run_dir).rows] if (run_dir / "journal.jsonl").exists() else []


def digests_of(run_dir: Path) -> list[str]:
    """What the journal sealed: anchor and outer state of each version."""
    return [record.digest for record in records_of(run_dir) if isinstance(record, CommitRecord)]


def stops_of(run_dir: Path) -> list[StopRecord]:
    return [record for record in records_of(run_dir) if isinstance(record, StopRecord)]


def newest_process(run_dir: Path, member: str) -> int:
    """Its process id, from its newest log."""
    newest = max((run_dir / "logs").glob(f"{member}-*.log"), key=lambda path: path.stat().st_mtime)
    return int(re.findall(rf"{member} is process ([0-9]+)", newest.read_text())[-1])


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[None]:
    """The process hangs."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def digests_in_one_process(pack_dir: Path, run_dir: Path, num: int, *overrides: str) -> list[str]:
    run = LocalRun(small_config(pack_dir, *overrides), run_dir)
    run.start()
    run.run(until=lambda: len(digests_of(run_dir)) >= num)
    run.close()
    return digests_of(run_dir)[:num]


def test_ctrl_c_and_resume_change_no_bit_and_two_of_them_stop_at_once(
    address: str, config_file: str, pack_dir: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    resume = ("train", "--resume", str(run_dir), *settings(f"run.address={address}"))

    first = Command("train", config_file, "--run-dir", str(run_dir), *settings(*ONE), folder=tmp_path)
    first.until(lambda: len(digests_of(run_dir)) >= 2, "two commits")
    first.interrupt()
    assert first.end() == STOPPED, first.said
    stopped = load_summary(run_dir)
    assert (stopped.exit_reason, stopped.tokens_lost) == ("stopped", 0)
    assert first.said.splitlines()[-1] == f"run directory: {run_dir.name}"  # as seen from the current folder

    second, before = Command(*resume, folder=tmp_path), len(digests_of(run_dir))
    second.until(lambda: len(digests_of(run_dir)) >= before + 2, "two more commits")
    with frozen(newest_process(run_dir, "island-0")):  # it cannot save its state now
        second.interrupt()
        second.until(lambda: "stopping" in second.said, "the first Ctrl-C to be heard")
        second.interrupt()
        second.until(lambda: len(stops_of(run_dir)) == 2, "the stop at once")
    assert second.end() == STOPPED, second.said
    assert ["at once" in stop.detail for stop in stops_of(run_dir)] == [False, True]
    stopped = load_summary(run_dir)
    assert stopped.exit_reason == "stopped"
    digests = digests_of(run_dir)
    assert digests == digests_in_one_process(pack_dir, tmp_path / "whole", len(digests), *ONE)

    third = Command(*resume, folder=tmp_path)
    assert third.end() == 0, third.said
    done = load_summary(run_dir)
    assert done.exit_reason == "done"
    assert stopped.tokens_lost <= done.tokens_lost <= done.tokens_reissued
    assert digests_of(run_dir)[: len(digests)] == digests, "a committed version was lost"
    assert ledger_command(run_dir, False) == 0
    assert "Traceback" not in first.said + second.said + third.said


def test_six_islands_have_the_bits_of_one_process_and_do_not_need_their_driver(
    address: str, config_file: str, pack_dir: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    here = settings(f"run.address={address}")
    driver = Command("train", config_file, "--run-dir", str(run_dir), *here, *settings(*SIX), folder=tmp_path)
    driver.until(lambda: len(digests_of(run_dir)) >= 1, "a commit")
    driver.kill()
    watcher = Command("train", "--resume", str(run_dir), *here, folder=tmp_path)
    assert watcher.end() == 0, watcher.said
    digests = digests_of(run_dir)
    assert len(digests) == 20
    assert digests == digests_in_one_process(pack_dir, tmp_path / "whole", len(digests), *SIX)
    assert load_summary(run_dir).anchor_digest == digests[-1]
