"""Faults of a whole process, each done to a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from faults.process import JumpClock

ROOT = Path(__file__).parents[3]
WAIT_S = 20.0


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S
    )


def test_want_of_memory_ends_a_process_by_sigkill_after_it_grew() -> None:
    script = (
        "import faults.process as p, mmap, resource\n"
        "def end():\n"
        "    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "    print(grown, open('/proc/self/oom_score_adj').read().strip(), flush=True); kill()\n"
        "kill, p.die = p.die, end\n"
        "p.run_out_of_memory(64 << 20)\n"
    )
    done = run(script)
    assert done.returncode == -signal.SIGKILL
    grown_mb, score = map(int, done.stdout.split())
    assert grown_mb >= 64
    assert score == 1000


def test_a_full_disk_stops_the_journal_and_nothing_else(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from faults.process import FullDisk\n"
        "from orchestrator.journal import JournalFull, open_segment\n"
        "from workers.records import StopRecord\n"
        "journal, disk = open_segment(Path(sys.argv[1]), controller='c'), FullDisk()\n"
        "disk.fill(); disk.fill()\n"
        "for _ in range(2):\n"
        "    try:\n"
        "        journal.append([StopRecord(reason='done')]); print('written')\n"
        "    except JournalFull: print('full')\n"
        "disk.free()\n"
        "journal.append([StopRecord(reason='done')]); print(len(journal.rows)); journal.close(merge=False)\n"
    )
    done = run(script, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["full", "full", "2"]
    assert (tmp_path / "journal.jsonl").read_text().count("\n") == 2


def test_a_pause_stops_a_process_and_lets_it_go_on() -> None:
    script = (
        "import sys, time\n"
        "from faults.process import pause\n"
        "began = last = time.monotonic(); longest = 0.0\n"
        "print('here', flush=True); pause(1.0)\n"
        "while time.monotonic() - began < 20 and longest < 0.8:\n"
        "    now = time.monotonic(); longest = max(longest, now - last); last = now\n"
        "print(f'{longest:.2f}', flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        stopped, deadline_s = False, time.monotonic() + WAIT_S
        while process.poll() is None and time.monotonic() < deadline_s:
            stopped = stopped or _state(process.pid) == "T"
            time.sleep(0.01)
        assert process.stdout is not None
        said = process.stdout.read().split()
    assert stopped, "it was never stopped"
    assert said[0] == "here"
    assert float(said[1]) == pytest.approx(1.0, abs=0.5)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def test_a_clock_that_jumps() -> None:
    clock = JumpClock(lambda: 5.0)
    clock.jump(3600.0)
    clock.jump(-10.0)
    assert clock() == 3595.0
