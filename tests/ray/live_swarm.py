"""A pipeline on real processes, as its tests start it, watch it and strike it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import ray

from orchestrator.build import resolve
from orchestrator.config import RunConfig, parse_config
from orchestrator.launch import RaySession
from orchestrator.segments import read_run
from workers.records import FenceRecord, Record

T = TypeVar("T")

WAIT_S = 90.0
MOST_STEPS = 100_000
TOML = """
[run]
name = "swarm"
snapshot_every_s = 1000.0
[train]
tokens = 1_000_000_000
batch_size = 4
lr = 3e-3
device = "cpu"
[model]
layers = 4
dim = 32
heads = 2
[strategy]
name = "ddp"
inner_steps = 1
[codec]
name = "fp32"
[eval]
windows = 8
[pipeline]
stages = 3
peers = 2
trainers = 2
microbatches = 6
microbatch_size = 2
in_flight = 4
boundary = "fp32"
rebalance_s = 0.0
trainer_timeout_s = 5.0
"""


def config_of(pack_dir: Path, *overrides: str) -> RunConfig:
    return resolve(parse_config(TOML, overrides=[f"data.path={pack_dir}", *overrides]).config)


class LiveSwarm:
    """A pipeline that was started through the launcher."""

    def __init__(self, pack_dir: Path, run_dir: Path, *overrides: str) -> None:
        self.config, self.run_dir, self.pack = config_of(pack_dir, *overrides), run_dir, pack_dir
        self.session = RaySession(self.config)

    def start(self, *, resume: bool = False) -> None:
        self.run_dir.mkdir(exist_ok=True)
        (self.run_dir / "config.toml").write_text(self.config.to_toml())
        self.session.__enter__()
        self.controller = self.session.start(self.run_dir, self.pack, [], resume=resume)

    def stop(self) -> None:
        self.session.__exit__()

    def status(self) -> dict[str, Any]:
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                found: dict[str, Any] = ray.get(self.controller.wait.remote(0.05), timeout=WAIT_S)
                return found
            except ray.exceptions.RayActorError:
                assert time.monotonic() < deadline, "the controller is not back"
                time.sleep(0.05)

    def until(self, condition: Callable[[dict[str, Any]], T | None], what: str) -> T:
        deadline = time.monotonic() + WAIT_S
        while True:
            status = self.status()
            if found := condition(status):
                return found
            assert not status["over"], f"the run ended ({status['reason']}: {status['detail']}) waiting for {what}"
            assert time.monotonic() < deadline, f"waited {WAIT_S:g} s for {what}; {status}"

    def steps_more(self, num: int) -> None:
        before = self.status()["version"]
        self.until(lambda status: status["version"] >= before + num, f"{num} steps after {before}")

    def serving(self, stage: int) -> list[str]:
        return [name.partition(".")[0] for name in self.status()["stages"][stage]["peers"]]

    def until_complete(self) -> None:
        """Every stage is served by somebody, has a buddy, and all processes are there."""

        def complete(status: dict[str, Any]) -> bool:
            stages = status["stages"]
            num = sum(len(stage["peers"]) for stage in stages)
            return num == self.config.pipeline.num_peers and all(
                stage["buddies"] and stage["peers"] for stage in stages
            )

        self.until(complete, "all peers to serve and every stage to have a buddy")

    def kill(self, *names: str) -> float:
        """Kill processes at once; seconds until the next step is committed."""
        status = self.status()
        began = time.monotonic()
        for name in names:
            os.kill(status["pids"][name], signal.SIGKILL)
        fences = [r for r in self.records() if isinstance(r, FenceRecord)]
        self.until(
            lambda _: len([r for r in self.records() if isinstance(r, FenceRecord)]) >= len(fences) + len(names),
            f"the deaths of {names} to be on the record",
        )
        version = self.status()["version"]
        self.until(lambda now: now["version"] > version, f"a step after the deaths of {names}")
        return time.monotonic() - began

    def freeze(self, name: str) -> float:
        """Stop a process with SIGSTOP; seconds until a step after it was given up. It must be gone then."""
        pid: int = self.status()["pids"][name]
        began = time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        self.until(
            lambda _: any("it hangs" in r.why for r in self.records() if isinstance(r, FenceRecord)),
            f"{name} to be given up",
        )
        version = self.status()["version"]
        self.until(lambda now: now["version"] > version, f"a step after {name} was given up")
        took_s = time.monotonic() - began
        self.until(lambda _: not Path(f"/proc/{pid}").exists(), f"process {pid}, which hung, to be gone")
        return took_s

    def cause(self, fault: str) -> None:
        """Cause a fault now."""
        caused = ray.get(self.controller.chaos.remote([fault]), timeout=WAIT_S)
        assert caused == {"done": [fault], "error": None}

    def rest(self, seconds: float) -> None:
        """Let the run go on for a while."""
        ray.get(self.controller.wait.remote(seconds), timeout=WAIT_S)

    def steps(self) -> list[dict[str, Any]]:
        """What is said of each step, in order."""
        return [json.loads(line) for line in (self.run_dir / "pipeline.jsonl").read_text().splitlines()]

    def leave(self, *names: str) -> None:
        """Ask processes to go, until they have gone and their successors serve; steps are made meanwhile."""
        pids = {name: self.status()["pids"][name] for name in names}
        asks = self.controller.leave.remote
        self.until(lambda _: not ray.get(asks(list(names)), timeout=WAIT_S)["leaving"], f"{names} to leave")
        for name, pid in pids.items():
            self.until(lambda _, pid=pid: not Path(f"/proc/{pid}").exists(), f"{name}, process {pid}, to be gone")  # type: ignore[misc]
        self.steps_more(2)

    def records(self) -> list[Record]:
        return [row.record for row in read_run(self.run_dir).rows]
