"""A run on real Ray processes that a test can look into and act upon while it goes on."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray

from faults.inject import Injection, PairPoint, Point, arm, hurry, read_marks
from orchestrator.build import resolve
from orchestrator.config import RunConfig
from orchestrator.island_actor import ContextWrapper
from orchestrator.launch import RaySession
from orchestrator.metrics import FaultEvent, StepRow, latest_faults, read_rows
from orchestrator.run_state import RunState
from orchestrator.segments import read_run
from orchestrator.summary import Summary, load_summary
from workers.records import CommitRecord, MemberId, Record, TermRecord

T = TypeVar("T")

WAIT_S = 100.0
POLL_S = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Kill:
    """One kill that fired: whom, where, and what the controller wrote about it."""

    member: str
    point: Point | PairPoint
    victim: MemberId
    mark: dict[str, Any]
    fault: FaultEvent


class LiveRun:
    """A run that was started through the launcher, as `atoll train` does."""

    def __init__(self, config: RunConfig, pack: Path, run_dir: Path, *, pace_s: float = 0.0) -> None:
        """Nothing is started before `start`."""
        self.config, self.pack, self.run_dir, self.pace_s = resolve(config), pack, run_dir, pace_s
        self.session = RaySession(self.config)
        self.wrap: ContextWrapper = Injection(pace_s=pace_s)

    def start(self, *, resume: bool = False) -> None:
        """Start the controller, which starts the islands."""
        self.run_dir.mkdir(exist_ok=True)
        (self.run_dir / "config.toml").write_text(self.config.to_toml())
        self.session.__enter__()
        self.controller = self.session.start(self.run_dir, self.pack, [], resume=resume, wrap=self.wrap)

    def stop(self) -> None:
        """End every process of the run."""
        self.session.__exit__()

    # ------------------------------------------------------------ looking

    def status(self) -> dict[str, Any]:
        """What the controller says; waits a little if there is nothing new, and for a controller that comes back."""
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                return ray.get(self.controller.wait.remote(POLL_S), timeout=WAIT_S)
            except ray.exceptions.ActorUnavailableError:
                assert time.monotonic() < deadline, f"the controller is not back after {WAIT_S:g} s"
                time.sleep(POLL_S)

    def until(self, condition: Callable[[], T | None], what: str) -> T:
        """Wait until `condition` gives something; fails with what it waited for, or if the run ends before."""
        deadline = time.monotonic() + WAIT_S
        while True:
            found = condition()
            if found:
                return found
            status = self.status()
            assert not status["over"], (
                f"the run ended ({status['reason']}: {status['detail']}) while waiting for {what}"
            )
            assert time.monotonic() < deadline, f"waited {WAIT_S:g} s for {what}; {status}"

    def records(self) -> list[Record]:
        """The journal so far."""
        return [row.record for row in read_run(self.run_dir).rows]

    def state(self) -> RunState:
        """The journal's replay."""
        state = RunState()
        for record in self.records():
            state.apply(record)
        return state

    def commits(self) -> list[CommitRecord]:
        """The commits so far."""
        return [record for record in self.records() if isinstance(record, CommitRecord)]

    def faults(self) -> list[FaultEvent]:
        """What the controller wrote about faults so far."""
        return latest_faults(row for row in read_rows(self.run_dir / "metrics.jsonl") if isinstance(row, FaultEvent))

    def steps(self) -> list[StepRow]:
        """The step rows so far."""
        return [row for row in read_rows(self.run_dir / "metrics.jsonl") if isinstance(row, StepRow)]

    # ------------------------------------------------------------ acting

    def until_training(self) -> None:
        """Wait until every island has contributed to a commit."""
        names = {f"island-{i}" for i in range(int(self.config.run.islands))}
        if self.config.strategy.own_pace:  # a commit is a push, seldom of more than one
            self.until(lambda: {e.member for c in self.commits() for e in c.roster} == names, "a push of every island")
            return
        self.until(
            lambda: any({e.member for e in c.roster} == names for c in self.commits()),
            "a commit with all islands in it",
        )

    def kill_at(self, member: str, point: Point | PairPoint) -> Kill:
        """Kill `member` when it next comes to `point`; wait until its successor has contributed to a commit."""
        victim = self.state().current[member]
        before = sum(event.member == member for event in self.faults())
        arm(self.run_dir, member, point)
        mark = self.until(lambda: read_marks(self.run_dir).get(f"{member}-{point}"), f"{member} to die at {point}")

        def recovered() -> FaultEvent | None:
            events = [event for event in self.faults() if event.member == member][before:]
            return events[0] if events and events[0].contributed_s is not None else None

        fault = self.until(recovered, f"the successor of {victim} to contribute")
        return Kill(member=member, point=point, victim=victim, mark=mark, fault=fault)

    def kill_controller(self, *, with_island: str | None = None) -> None:
        """Kill the controller's process, an island's with it if one is named; wait until all of them go on."""
        before, commits = self.lives(), len(self.commits())
        self.until(lambda: len(self.commits()) > commits, "a commit after what happened before")
        commits = len(self.commits())
        ray.kill(self.controller, no_restart=False)
        if with_island is not None:
            member = self.state().current[with_island]
            os.kill(read_marks(self.run_dir, "start")[f"{member.name}-{member.incarnation}"]["pid"], signal.SIGKILL)
        self.until(lambda: self.lives() > before, "the next controller's life")
        self.until(lambda: len(self.commits()) > commits + 1, "commits of the next controller")
        if with_island is not None:
            successor = MemberId(name=member.name, incarnation=member.incarnation + 1)
            self.until(
                lambda: any(entry.offer.member == successor for commit in self.commits() for entry in commit.roster),
                f"{successor} to contribute",
            )

    @contextmanager
    def stopped_controller(self) -> Iterator[None]:
        """SIGSTOP to the controller's process, from before the first statement to after the last one."""
        log = (self.run_dir / "logs" / "controller.log").read_text()
        pid = int(re.findall(r"is process (\d+) on", log)[-1])
        os.kill(pid, signal.SIGSTOP)
        try:
            deadline = time.monotonic() + WAIT_S
            while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
                assert time.monotonic() < deadline, f"waited {WAIT_S:g} s for process {pid} to stand still"
                time.sleep(POLL_S)
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def lives(self) -> int:
        """Controller lives so far."""
        return sum(isinstance(record, TermRecord) for record in self.records())

    def finish(self) -> Summary:
        """Let the islands train as fast as they can, and wait for the end."""
        hurry(self.run_dir)
        deadline = time.monotonic() + WAIT_S
        while not (status := self.status())["over"]:
            assert time.monotonic() < deadline, f"the run does not end: {status}"
        return load_summary(self.run_dir)
