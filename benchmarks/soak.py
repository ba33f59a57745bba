"""No false verdict: a run whose islands do nothing wrong, on a machine that has no time for them.

    make soak                     # 30 minutes; ARGS="--minutes 2" for a look, ARGS=--again to begin anew

Every core has another process that computes without a pause. The run has the settings of a LAN. Its journal must not
blame anybody: no suspicion, no hang, no death, no fence. It is looked at each minute, and what it says is kept in
`runs/soak/progress.jsonl`: a soak that was interrupted goes on with another run for the minutes that are left, and one
that found a verdict has ended with it. Exit code 0, or 5 with the verdicts that were wrong.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.common import keep
from orchestrator.config import load_config
from orchestrator.simulation.batch import append_line, code_digest
from orchestrator.waiting import waiting
from workers.records import FaultRecord, FenceRecord, Record

BLAME = ("suspect", "hung", "died", "crash", "lost", "refused", "given_up")
ISLANDS = 3
PACE_S = 0.15
MINUTES = 30.0
TELL_EVERY_S = 60.0
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What one run came to so far; a soak that was interrupted has several of them."""

    run: str
    minutes: float
    rounds: int
    false_verdicts: tuple[str, ...]
    slow: tuple[str, ...]


class Progress:
    """The parts of a soak in a file, a line a minute; those of other code do not count."""

    def __init__(self, folder: Path) -> None:
        """`folder`: where runs and the file are."""
        self.folder, self.file, self.code = folder, folder / "progress.jsonl", code_digest()

    def read(self) -> list[Part]:
        """The last line of each part; a line that was cut off by a kill is left out."""
        parts: dict[str, Part] = {}
        for line in self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else ():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if row.pop("code") == self.code:
                row["false_verdicts"], row["slow"] = tuple(row["false_verdicts"]), tuple(row["slow"])
                parts[row["run"]] = Part(**row)
        return list(parts.values())

    def add(self, part: Part) -> None:
        """How far a part is now."""
        self.folder.mkdir(parents=True, exist_ok=True)
        append_line(self.file, json.dumps({"code": self.code, **asdict(part)}))

    def next_run(self) -> Path:
        """A directory for the next part."""
        numbers = (number for number in range(1, 10_000) if not (self.folder / f"part-{number}").exists())
        return self.folder / f"part-{next(numbers)}"


def look(run_dir: Path, minutes: float, rounds: int) -> Part:
    """What the journal of a run blames anybody for, up to now."""
    from orchestrator.segments import read_run

    records = [row.record for row in read_run(run_dir).rows]
    return Part(
        run=run_dir.name,
        minutes=minutes,
        rounds=rounds,
        false_verdicts=tuple(v for v in false_verdicts(records) if "stopped at once" not in v),
        slow=tuple(f"{r.member}: {r.detail}" for r in records if isinstance(r, FaultRecord) and r.fault == "slow"),
    )


def soak(minutes: float, run_dir: Path, said: Callable[[Part], None] = lambda part: None) -> Part:
    """Train beside burning processes for so long, or until the first false verdict; `said` hears of it each minute."""
    import ray

    from orchestrator.build import pack_path, resolve
    from orchestrator.launch import RaySession

    overrides = ["train.tokens=1_000_000_000", f"train.pace_s={PACE_S}", f"run.islands={ISLANDS}"]
    config = resolve(load_config("debug", overrides=overrides).config)
    run_dir.mkdir(parents=True)
    (run_dir / "config.toml").write_text(config.to_toml())
    with RaySession(config) as session, Burners(os.cpu_count() or 1):
        controller = session.start(run_dir, pack_path(config), [], resume=False)
        began = told = time.monotonic()
        blamed = False
        while time.monotonic() - began < 60 * minutes and not blamed:
            status = ray.get(controller.wait.remote(1.0), timeout=60)
            assert not status["over"], f"the run ended: {status}"
            if time.monotonic() - told >= TELL_EVERY_S:
                told = time.monotonic()
                part = look(run_dir, (told - began) / 60, status["rounds"])
                blamed = bool(part.false_verdicts)
                said(part)
        lasted_s = time.monotonic() - began
        controller.stop.remote(False)
        ended = time.monotonic() + 60
        while not ray.get(controller.wait.remote(1.0), timeout=60)["over"]:
            assert time.monotonic() < ended, "the run does not stop"
    done = look(run_dir, lasted_s / 60, status["rounds"])
    said(done)
    return done


def show(name: str, result: dict[str, object]) -> None:
    """Of a look that is shorter than a soak nothing is kept."""
    print(json.dumps({name: result}, indent=2))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="how long (default 30)")
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"), help="where its runs are (default runs/soak)")
    parser.add_argument("--again", action="store_true", help="forget what was kept of an earlier soak")
    arguments = parser.parse_args()
    progress = Progress(arguments.folder.resolve())
    if arguments.again:
        progress.file.unlink(missing_ok=True)
    parts = progress.read()
    left = arguments.minutes - sum(part.minutes for part in parts)
    if left > 0.01 and not any(part.false_verdicts for part in parts):
        with waiting("the soak", 60 * left, timed=True):
            soak(left, progress.next_run(), progress.add)
        parts = progress.read()
    verdicts = [f"{part.run}: {verdict}" for part in parts for verdict in part.false_verdicts]
    result = {
        "minutes": sum(part.minutes for part in parts),
        "longest_without_interruption": max(part.minutes for part in parts),
        "rounds": sum(part.rounds for part in parts),
        "false_verdicts": verdicts,
        "slow": [f"{part.run}: {slow}" for part in parts for slow in part.slow],
    }
    told = keep if arguments.minutes >= MINUTES else show
    told("soak", {"islands": ISLANDS, "burners": os.cpu_count(), **result})
    return VERIFICATION_FAILED if verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
