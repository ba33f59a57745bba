"""Making the two runs of a storm, each with the commands that a user would type, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from orchestrator.config import load_config
from orchestrator.errors import RunFailed
from orchestrator.ledger import recompute
from orchestrator.metrics import ExchangeRow, newest_rows, read_rows
from orchestrator.segments import read_run
from orchestrator.storm.figures import RunData, StormFigures, storm_figures
from orchestrator.storm.follow import follow
from orchestrator.summary import load_summary
from workers.records import FaultRecord

PRESET = "storm"
START_S = 180.0
SETTLE_S = 30.0
STOP_S = 60.0
POLL_S = 0.5
SETTLE_POLL_S = 2.0  # all rows are read each time
CALM_SHARE, CALM_S = 0.2, (8.0, 120.0)
# Shares of the storm's time after which these are killed.
CONTROLLER_AT, HEAD_AT = 1 / 3, 2 / 3

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class StormPlan:
    """What `atoll storm` is to do.

    Attributes:
        seconds: length of the storm; the fault-free run has a fifth of it, 8 to 120 s. rate: faults an hour.
        kill_controller: once, a third into it. head: run on a cluster of two nodes, and kill its head once as well.
        overrides: for both runs, as `--set` takes them.
    """

    folder: Path
    seconds: float
    rate: float
    islands: int
    seed: int
    kinds: tuple[str, ...]
    kill_controller: bool = True
    head: bool = False
    overrides: tuple[str, ...] = field(default=())

    @property
    def calm_s(self) -> float:
        """Length of the fault-free run."""
        return min(max(self.seconds * CALM_SHARE, CALM_S[0]), CALM_S[1])

    @property
    def round_s(self) -> float:
        """About how long a round takes."""
        return 2.7


class Command:
    """An `atoll` command in a process group of its own; what it says goes into a file."""

    def __init__(self, arguments: Sequence[str], output: Path, environment: Mapping[str, str]) -> None:
        """Starts it."""
        self.output = output
        with output.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator.cli.main", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **environment},
            )

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float, *, poll_s: float = POLL_S) -> None:
        """Wait for something while it runs. Raises RunFailed if it ends before, or after `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                how = "ended before" if self.process.poll() is not None else f"waited {timeout_s:g} s for"
                raise RunFailed(
                    f"{how} {what}: {self.last_words()}",
                    place=str(self.output),
                    remedy="fewer --islands where the machine is slow; the output has the whole story",
                )
            time.sleep(poll_s)

    def last_words(self) -> str:
        """Its last lines."""
        return " | ".join(self.output.read_text(errors="replace").strip().splitlines()[-3:])

    def end(self, timeout_s: float) -> int:
        """SIGTERM, which a shell's `&` does not switch off, and again if that takes too long; the exit code."""
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                self.process.send_signal(number)  # not to its group: Ray's own processes are in it
            try:
                return self.process.wait(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                continue
        return self.process.wait()


def run_storm(plan: StormPlan, say: Say) -> StormFigures:
    """Both runs, one after the other, and their figures. Raises RunFailed, UserError."""
    load_config(PRESET, overrides=plan.overrides)  # what is wrong with them is said before anything starts
    plan.folder.mkdir(parents=True, exist_ok=True)
    with _cluster(plan, say) as environment:
        say(f"fault-free run of {plan.islands} islands, {plan.calm_s:g} s ...")
        calm = _train(replace(plan, seconds=plan.calm_s), "calm", (), environment)
        say(f"storm of {plan.seconds:g} s, {plan.rate:g} faults an hour ({', '.join(plan.kinds)}) ...")
        stormy = _train(plan, "storm", fault_arguments(plan), environment)
    return storm_figures(calm, stormy, rate=plan.rate, seed=plan.seed)


def fault_arguments(plan: StormPlan) -> tuple[str, ...]:
    """The faults of the second run, as `atoll train --fault` takes them. The storm begins once rounds are made."""
    begin = 2
    out = [
        f"storm@round={begin},for={plan.seconds:g}s,rate={plan.rate:g},seed={plan.seed},kinds={'+'.join(plan.kinds)}"
    ]
    if plan.kill_controller:
        out.append(f"controller_kill@round={begin + max(int(plan.seconds * CONTROLLER_AT / plan.round_s), 1)}")
    if plan.head:
        out.append(f"head_kill@round={begin + max(int(plan.seconds * HEAD_AT / plan.round_s), 2)}")
    return tuple(out)


def _train(plan: StormPlan, name: str, faults: Sequence[str], environment: Mapping[str, str]) -> RunData:
    run_dir = plan.folder / name
    settings = [f"run.islands={plan.islands}", *plan.overrides]
    if plan.head:
        settings.append("run.address=auto")
    arguments = ["train", PRESET, "--run-dir", str(run_dir)]
    arguments += [word for value in settings for word in ("--set", value)]
    arguments += [word for fault in faults for word in ("--fault", fault)]
    command = Command(arguments, plan.folder / f"{name}.log", environment)
    try:
        command.until(lambda: _everybody(run_dir, plan.islands), "a commit with everybody in it", START_S)
        over_s = time.monotonic() + plan.seconds
        command.until(lambda: time.monotonic() >= over_s, "its time to be over", plan.seconds + START_S)
        if faults:
            _settle(command, run_dir)
        code = command.end(STOP_S)
    finally:
        if command.process.poll() is None:
            command.process.kill()
            command.process.wait()
    if code != 3:
        raise RunFailed(
            f"the run ended with exit code {code}: {command.last_words()}",
            place=str(run_dir / "logs"),
            remedy=f"the end of {command.output} and of the logs; a shorter or milder storm (--minutes, --rate)",
        )
    return read_data(run_dir, plan.islands)


def _everybody(run_dir: Path, islands: int) -> bool:
    path = run_dir / "metrics.jsonl"
    rows = newest_rows(path) if path.exists() else iter(())
    return any(isinstance(row, ExchangeRow) and len(row.roster) >= islands for row in rows)


def _settle(command: Command, run_dir: Path) -> None:
    """The last faults get some time to be followed to their end."""
    deadline_s = time.monotonic() + SETTLE_S

    def settled() -> bool:
        if time.monotonic() > deadline_s:
            return True
        followed = follow([row.record for row in read_run(run_dir).rows], read_rows(run_dir / "metrics.jsonl"))
        return all(f.contributed_s is not None for f in followed if f.member)

    command.until(settled, "the last faults to be over", 2 * SETTLE_S, poll_s=SETTLE_POLL_S)


def read_data(run_dir: Path, islands: int) -> RunData:
    """What a run that has ended wrote."""
    journal = read_run(run_dir).rows
    summary = load_summary(run_dir)
    return RunData(
        records=[row.record for row in journal],
        rows=list(read_rows(run_dir / "metrics.jsonl")),
        seq_len=summary.seq_len or 1,
        islands=islands,
        tokens_lost=summary.tokens_lost,
        tokens_reissued=summary.tokens_reissued,
        ledger_findings=recompute(journal).num_findings,
    )


@contextmanager
def _cluster(plan: StormPlan, say: Say) -> Iterator[dict[str, str]]:
    """With a head: a cluster of two nodes on loopback addresses, the islands on the second; else nothing."""
    if not plan.head:
        yield {}
        return
    environment = {"ATOLL_STATE_DIR": str(plan.folder / "state")}
    say("starting a cluster of two nodes ...")
    up = Command(["up", "--host", "127.0.0.1", "--workers", "0", "--json"], plan.folder / "up.log", environment)
    node = None
    try:
        up.until(lambda: _ready(up.output) is not None, "the head", START_S)
        ready = _ready(up.output)
        assert ready is not None
        arguments = ["join", str(ready["join"]), "--workers", str(plan.islands + 2), "--devices", "cpu"]
        node = Command(arguments, plan.folder / "join.log", environment)
        node.until(lambda: "joined" in node.output.read_text(), "the second node", START_S)
        yield environment
    finally:
        for command in filter(None, (node, up)):
            command.end(STOP_S)


def _ready(output: Path) -> dict[str, object] | None:
    for line in output.read_text(errors="replace").splitlines():
        if line.startswith("{"):
            found: dict[str, object] = json.loads(line)
            return found
    return None


def fired_kinds(run_dir: Path) -> dict[str, int]:
    """How many faults of each kind the journal of a run has as injected."""
    out: dict[str, int] = {}
    for row in read_run(run_dir).rows:
        if isinstance(row.record, FaultRecord) and row.record.injected:
            out[row.record.fault] = out.get(row.record.fault, 0) + 1
    return out
