"""A short storm as a user makes one, and single faults that are asked for while a run goes on."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from faults.plan import STORM_KINDS
from orchestrator.ledger import ledger_command
from orchestrator.segments import read_run
from orchestrator.storm.figures import StormFigures
from orchestrator.storm.run import fired_kinds
from tests.ray.command import ROOT
from workers.records import FaultRecord, TermRecord

pytestmark = [pytest.mark.ray, pytest.mark.paired, pytest.mark.timeout(360)]

WAIT_S = 150.0
ISLANDS = 3
ASKED = "delay:island-0,for=2s,by=0.02s"
MINUTES = 1.0
KILL_NOTICED_WITHIN_S = 0.5
# Chosen so that each kind comes within the first half minute.
SEED, RATE = 19, 720


@dataclass(frozen=True, kw_only=True, slots=True)
class Story:
    """What the command printed, and where its runs are."""

    figures: StormFigures
    folder: Path
    asked: subprocess.CompletedProcess[str]
    refused: subprocess.CompletedProcess[str]

    @property
    def faults(self) -> list[FaultRecord]:
        """Every fault in the journal of the stormy run."""
        records = [row.record for row in read_run(self.folder / "storm").rows]
        return [record for record in records if isinstance(record, FaultRecord)]


@pytest.fixture(scope="module")
def story(pack_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("storm")
    command = [sys.executable, "-m", "orchestrator.cli.main", "storm", "--json", "--dir", str(folder / "runs")]
    command += ["--minutes", str(MINUTES), "--islands", str(ISLANDS), "--rate", str(RATE), "--seed", str(SEED)]
    command += ["--set", f"data.path={pack_dir}"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as storm:
        try:
            until_it_storms(folder / "runs" / "storm", storm)
            asked, refused = (chaos(text, folder / "runs" / "storm") for text in (ASKED, "hang:nobody"))
            out, err = storm.communicate(timeout=150)
        finally:
            storm.terminate()
    assert storm.returncode == 0, err
    assert "storm of 60 s, 720 faults an hour (kill, hang, cut)" in err
    figures = StormFigures.model_validate(json.loads(out))
    return Story(figures=figures, folder=folder / "runs", asked=asked, refused=refused)


def until_it_storms(run_dir: Path, storm: subprocess.Popen[str]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not (run_dir / "journal.jsonl").exists() or not fired_kinds(run_dir):
        assert storm.poll() is None and time.monotonic() < deadline_s, f"no storm in {run_dir}"
        time.sleep(0.2)


def chaos(fault: str, run_dir: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orchestrator.cli.main", "chaos", fault, "--run", str(run_dir)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S)


def test_faults_of_each_kind_fired(story: Story) -> None:
    fired = {record.fault for record in story.faults if record.injected}
    assert fired == {"storm", "controller_kill", "delay", *STORM_KINDS}
    assert story.figures.kinds.keys() == {"controller_kill", "delay", *STORM_KINDS}


def test_a_fault_is_caused_in_a_run_that_goes_on_and_one_that_names_nobody_is_not(story: Story) -> None:
    assert story.asked.returncode == 0, story.asked.stderr
    assert story.asked.stdout == f"injected {ASKED}\n"
    assert ASKED in [record.detail for record in story.faults if record.injected]
    assert story.refused.returncode == 2
    assert "there is no member 'nobody'; this run has island-0, island-1, island-2" in story.refused.stderr
    assert story.refused.stderr.count("error:") == 1


def test_each_kind_was_detected(story: Story) -> None:
    for kind in ("kill", "hang", "cut", "controller_kill"):
        row = story.figures.kinds[kind]
        assert row.detected == row.injected, f"{kind}: {row}"
        assert row.detection.max_s is not None
    kills_s = story.figures.kinds["kill"].detection.max_s
    assert kills_s is not None and kills_s <= KILL_NOTICED_WITHIN_S
    assert story.figures.kinds["kill"].detected_as == {"died": story.figures.kinds["kill"].injected}


def test_the_killed_controller_came_back_and_the_storm_went_on(story: Story) -> None:
    records = [row.record for row in read_run(story.folder / "storm").rows]
    assert sum(isinstance(record, TermRecord) for record in records) == 2
    killed = next(i for i, record in enumerate(records) if getattr(record, "fault", "") == "controller_kill")
    later = [record for record in records[killed + 1 :] if isinstance(record, FaultRecord) and record.injected]
    assert later, "the next controller injected nothing"
    details = [record.detail for record in story.faults if record.injected]
    assert len(set(details)) == len(details), "a fault was injected twice"
    numbers = [int(text.split("number ")[1].split()[0]) for text in details if "(number " in text]
    assert numbers == list(range(1, len(numbers) + 1)), "a fault of the storm was left out"


def test_everybody_is_back_and_the_run_went_on_meanwhile(story: Story) -> None:
    kills = story.figures.kinds["kill"]
    assert kills.contributed.num >= kills.injected - 1  # the last one may be under way when the run ends
    assert 0.3 < story.figures.throughput <= 1.5, "a noisy machine moves it, a broken run ends far below"
    assert story.figures.participation > 0.7
    assert story.figures.commits >= 8


def test_nothing_is_counted_twice_and_no_bit_differs(story: Story) -> None:
    assert (story.figures.digest_mismatches, story.figures.ledger_findings) == (0, 0)
    for name in ("calm", "storm"):
        assert ledger_command(story.folder / name, False) == 0
