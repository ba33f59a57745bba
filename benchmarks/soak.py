"""No false verdict: a run whose islands do nothing wrong, on a machine that has no time for them.

    make soak                     # 30 minutes; ARGS="--minutes 2" for a look

Every core has another process that computes without a pause. The run has the settings of a LAN. At the end the journal
must not blame anybody: no suspicion, no hang, no death, no fence. Exit code 0, or 5 with the verdicts that were wrong.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from orchestrator.config import load_config
from orchestrator.waiting import waiting
from workers.records import FaultRecord, FenceRecord, Record

BLAME = ("suspect", "hung", "died", "crash", "lost", "refused", "given_up")
ISLANDS = 3
PACE_S = 0.15
VERIFICATION_FAILED = 5


def burn() -> None:
    """Compute until somebody ends it."""
    number = 1
    while True:
        number = number * 6364136223846793005 % 18446744073709551557


class Burners:
    """Processes that keep cores busy."""

    def __init__(self, num: int) -> None:
        """Nothing burns before it is entered."""
        context = multiprocessing.get_context("spawn")
        self.processes = [context.Process(target=burn, daemon=True) for _ in range(num)]

    def __enter__(self) -> Self:
        """Begin."""
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """End."""
        for process in self.processes:
            process.kill()
            process.join()


def false_verdicts(records: Iterable[Record]) -> list[str]:
    """Whom a journal blames for what; for a run in which nobody did anything wrong."""
    out = []
    for record in records:
        if isinstance(record, FaultRecord) and record.fault in BLAME and not record.injected:
            out.append(f"{record.t_s:.1f} s: {record.member} {record.fault}: {record.detail}")
        elif isinstance(record, FenceRecord):
            out.append(f"{record.member}.{record.incarnation} fenced: {record.why}")
    return out


def soak(minutes: float, run_dir: Path) -> dict[str, object]:
    """Train beside burning processes for so long; what the journal says."""
    import ray

    from orchestrator.build import pack_path, resolve
    from orchestrator.launch import RaySession
    from orchestrator.segments import read_run

    overrides = ["train.tokens=1_000_000_000", f"train.pace_s={PACE_S}", f"run.islands={ISLANDS}"]
    config = resolve(load_config("debug", overrides=overrides).config)
    run_dir.mkdir(parents=True)
    (run_dir / "config.toml").write_text(config.to_toml())
    with RaySession(config) as session, Burners(os.cpu_count() or 1):
        controller = session.start(run_dir, pack_path(config), [], resume=False)
        began = time.monotonic()
        while time.monotonic() - began < 60 * minutes:
            status = ray.get(controller.wait.remote(1.0), timeout=60)
            assert not status["over"], f"the run ended: {status}"
        controller.stop.remote(False)
        ended = time.monotonic() + 60
        while not ray.get(controller.wait.remote(1.0), timeout=60)["over"]:
            assert time.monotonic() < ended, "the run does not stop"
    records = [row.record for row in read_run(run_dir).rows]
    verdicts = [v for v in false_verdicts(records) if "stopped at once" not in v]
    slow = [f"{r.member}: {r.detail}" for r in records if isinstance(r, FaultRecord) and r.fault == "slow"]
    return {"minutes": minutes, "rounds": status["rounds"], "false_verdicts": verdicts, "slow": slow}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long (default 30)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="atoll-soak-") as folder:
        with waiting("one run", 60 * arguments.minutes, timed=True):
            result = soak(arguments.minutes, Path(folder) / "soak")
    print(json.dumps(result, indent=2))
    return VERIFICATION_FAILED if result["false_verdicts"] else 0


if __name__ == "__main__":
    sys.exit(main())
