"""`atoll train` as a user runs it: Ctrl-C, resume, and the same bits as a run in one process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from orchestrator.finish import build_summary
from orchestrator.ledger import ledger_command
from orchestrator.local import LocalRun
from orchestrator.metrics import ExchangeRow, StepRow, read_rows
from orchestrator.segments import read_run
from orchestrator.summary import Summary, load_summary
from tests.small_run import TOML, small_config
from workers.records import CommitRecord, StopRecord

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

WAIT_S = 90.0
LONG = 3 * 8192 * 16 * 3  # tokens of three rounds
STOPPED = 3


class Command:
    """An `atoll` command in a process group of its own, as in a terminal."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        self.output = cwd / "output.txt"
        with self.output.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator.cli.main", *arguments],
                cwd=cwd,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            )

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for something while the command runs."""
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert self.process.poll() is None, f"ended before {what}:\n{self.output.read_text()}"
            assert time.monotonic() < deadline, f"waited for {what}:\n{self.output.read_text()}"
            time.sleep(0.02)

    def interrupt(self) -> None:
        """Ctrl-C: every process of the terminal's foreground group gets it."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self) -> int:
        """Wait for the end and return the exit code."""
        try:
            return self.process.wait(timeout=WAIT_S)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait(timeout=WAIT_S)


@pytest.fixture(scope="module")
def address(ray_cluster: None) -> str:
    """A cluster that is there already."""
    return str(ray.get_runtime_context().gcs_address)


@pytest.fixture
def config_file(pack_dir: Path, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "small.toml"
    path.write_text(TOML + f'\n[data]\npath = "{pack_dir}"\n')
    yield path


def settings(*overrides: str) -> list[str]:
    return [argument for override in overrides for argument in ("--set", override)]


def committed(run_dir: Path) -> int:
    if not (run_dir / "journal.jsonl").exists():
        return 0
    return sum(isinstance(row.record, CommitRecord) for row in read_run(run_dir).rows)


def steps_since_commit(run_dir: Path) -> int:
    if not (run_dir / "metrics.jsonl").exists():
        return 0
    rows = list(read_rows(run_dir / "metrics.jsonl"))
    latest = max((row.t_s for row in rows if isinstance(row, ExchangeRow)), default=float("inf"))
    return sum(isinstance(row, StepRow) and row.t_s > latest for row in rows)


def in_one_process(pack_dir: Path, run_dir: Path, *overrides: str) -> Summary:
    run = LocalRun(small_config(pack_dir, *overrides), run_dir)
    run.start()
    finish = run.run(max_turns=5000)
    assert finish is not None and finish.reason == "done"
    summary = build_summary(run.host, run.config)
    run.close()
    return summary


def test_one_ctrl_c_and_resume_change_no_bit(address: str, config_file: Path, pack_dir: Path, tmp_path: Path) -> None:
    whole = in_one_process(pack_dir, tmp_path / "whole", "train.tokens=30000")
    run_dir = tmp_path / "run"
    first = Command(
        "train", str(config_file), "--run-dir", str(run_dir), *settings("train.tokens=30000"), cwd=tmp_path
    )  # on a Ray of its own
    first.until(lambda: committed(run_dir) >= 3, "three commits")
    second = Command("train", str(config_file), "--run-dir", str(run_dir), cwd=run_dir)
    assert second.end() == 2
    assert re.search(r"not empty|in use", second.output.read_text()), second.output.read_text()
    (run_dir / "output.txt").unlink()
    first.interrupt()
    assert first.end() == STOPPED, first.output.read_text()
    stopped = load_summary(run_dir)
    assert (stopped.exit_reason, stopped.tokens_lost) == ("stopped", 0)
    assert 0 < stopped.tokens_committed < 30_000

    resumed = Command("train", "--resume", str(run_dir), *settings(f"run.address={address}"), cwd=tmp_path)
    assert resumed.end() == 0, resumed.output.read_text()
    done = load_summary(run_dir)
    assert done.anchor_digest == whole.anchor_digest
    assert done.final_val_loss == whole.final_val_loss
    assert (done.tokens_lost, done.tokens_reissued) == (0, 0)
    assert ledger_command(run_dir, False) == 0
    assert "Traceback" not in resumed.output.read_text()


def test_two_ctrl_c_stop_at_once_and_resume_still_works(address: str, config_file: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    common = settings(f"run.address={address}")
    # Steps long enough that an island is in the middle of one when the user loses patience.
    slow = settings(f"train.tokens={LONG}", "train.batch_size=8192", "strategy.inner_steps=3")
    first = Command("train", str(config_file), "--run-dir", str(run_dir), *common, *slow, cwd=tmp_path)
    first.until(lambda: steps_since_commit(run_dir) >= 1, "steps after a commit")
    first.interrupt()
    first.until(lambda: "stopping" in first.output.read_text(), "the first to be heard")
    first.interrupt()
    assert first.end() == STOPPED, first.output.read_text()
    stops = [row.record.detail for row in read_run(run_dir).rows if isinstance(row.record, StopRecord)]
    assert len(stops) == 1 and "at once" in stops[0], stops
    stopped = load_summary(run_dir)
    assert stopped.exit_reason == "stopped" and stopped.tokens_lost > 0

    resumed = Command("train", "--resume", str(run_dir), *common, cwd=tmp_path)
    assert resumed.end() == 0, resumed.output.read_text()
    done = load_summary(run_dir)
    assert done.tokens_committed == LONG
    assert stopped.tokens_lost <= done.tokens_lost <= done.tokens_reissued
    assert ledger_command(run_dir, False) == 0


def test_four_islands_on_ray_equal_those_in_one_process_and_do_not_need_their_driver(
    address: str, config_file: Path, pack_dir: Path, tmp_path: Path
) -> None:
    overrides = ("run.islands=4", "train.tokens=40960", "exchange.quorum=1.0")
    reference = in_one_process(pack_dir, tmp_path / "whole", *overrides)
    run_dir = tmp_path / "run"
    driver = Command(
        "train",
        str(config_file),
        "--run-dir",
        str(run_dir),
        *settings(f"run.address={address}", *overrides),
        cwd=tmp_path,
    )
    driver.until(lambda: committed(run_dir) >= 1, "a commit")
    driver.process.kill()
    driver.end()
    command = Command("train", "--resume", str(run_dir), "--json", *settings(f"run.address={address}"), cwd=tmp_path)
    assert command.end() == 0, command.output.read_text()
    text = command.output.read_text()
    summary = json.loads(text[text.index("{") : text.rindex("}") + 1])
    assert summary["anchor_digest"] == reference.anchor_digest
    assert summary["exchanges_committed"] == reference.exchanges_committed
    assert summary["final_val_loss"] == reference.final_val_loss
