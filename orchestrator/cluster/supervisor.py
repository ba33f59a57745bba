"""What `atoll up` and `atoll join` run: it owns this machine's `ray start`, and for the head the door.

Starts Ray again when it ends unasked, with a pause that doubles up to half a minute. Ends with `atoll leave`, SIGTERM,
SIGINT or SIGHUP, always the same way: let the islands of this machine leave, stop Ray, remove every trace. A second
signal, or `--now`, does not wait for the islands.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from faults.lab.processes import myself
from orchestrator.cluster import state as states
from orchestrator.cluster.control import Control
from orchestrator.cluster.door import Door, dial
from orchestrator.cluster.job_server import LOG as JOB_SERVER_LOG
from orchestrator.cluster.job_server import JobServer, JobServerArguments
from orchestrator.cluster.join_string import JoinString, parse_address
from orchestrator.cluster.operator import Operator
from orchestrator.cluster.ray_node import (
    Devices,
    NodeArguments,
    RayNode,
    cluster_environment,
    make_ray_folder,
    process_environment,
)
from orchestrator.cluster.state import ClusterState
from orchestrator.cluster.versions import my_versions
from orchestrator.errors import ClusterUnreachable, UserError
from orchestrator.waiting import waiting

POLL_S = 0.2
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
# Ray that ran that long before it ended is started again after the first pause.
STEADY_S = 60.0
DRAIN_S, DRAIN_NOW_S = 300.0, 15.0
# A drain that cannot connect gives up after Ray's own time-outs.
DRAIN_GRACE_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a supervisor is to run.

    Attributes:
        place: the door; of a head, where it is to listen (port 0: any).
        gcs_address: of the cluster to join, None for the head.
        gcs_port: of the head, 0 for any.
        former: a head that ended without leaving, whose tables are taken over.
        jobs_port: of Ray's job server, started with the head; None: started when somebody asks, at any port.
    """

    place: JoinString
    node_ip: str
    workers: int
    devices: Devices
    labels: Mapping[str, str]
    wan: bool
    gcs_address: str | None = None
    gcs_port: int = 0
    former: ClusterState | None = None
    jobs_port: int | None = None

    @property
    def role(self) -> str:
        """As in `ClusterState`."""
        return "head" if self.gcs_address is None else "node"


class Supervisor:
    """One `atoll up` or `atoll join`; `run` returns when the machine has left.

    Args:
        on_ready: called once, when Ray runs, with the state and the join string.
    """

    def __init__(self, plan: Plan, on_ready: Callable[[ClusterState, JoinString], None]) -> None:
        self.plan, self.on_ready = plan, on_ready
        self.leaving = self.at_once = self.has_run = False
        self.gcs_address = ""
        self.control: Control | None = None

    def run(self) -> int:
        """Start everything, watch it, and end it; the exit code.

        Raises:
            UserError: the door's address cannot be had.
            ClusterUnreachable: Ray does not start.
        """
        with ExitStack() as stack:
            self._listen_to_signals()
            self.place = self._open_door(stack)
            self._make_folder(stack)
            self.node = RayNode(self._arguments(), self._environment(), self.state.folder / "ray.log")
            self.jobs = JobServer(self._drain_environment(), self.state.folder / JOB_SERVER_LOG)
            stack.callback(self.jobs.close)
            self.control = Control(self.state.folder, self._answer)
            self.control.start()
            stack.callback(self.control.close)
            stack.callback(self._stop_ray)
            if self._start_ray():
                self.has_run = True
                self._start_jobs()
                self.on_ready(self.state, self.place)
                self._watch()
                self._drain()
                self.say("stopping Ray")
        return 0

    def say(self, text: str) -> None:
        """Tell the terminal, or the log, and whoever waits for the end."""
        print(f"atoll: {text}", file=sys.stderr, flush=True)
        if self.control is not None:
            self.control.tell(text)

    # ------------------------------------------------------------ start

    def _listen_to_signals(self) -> None:
        def leave(*_: object) -> None:
            self.at_once = self.leaving
            self.leaving = True

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, leave)

    def _open_door(self, stack: ExitStack) -> JoinString:
        place = self.plan.place
        if self.plan.role == "node":
            return place
        self.operator = Operator(self._operator_command)
        stack.callback(self.operator.close)
        door = Door(
            token=place.token,
            info=self._info,
            host=place.host,
            port=place.port,
            operate=self.operator.answer,
            jobs=self._job_server,
        )
        try:
            door.start()
        except OSError as error:
            raise UserError(
                f"the door cannot listen: {error.strerror}", place=place.door, remedy="another --host or --door-port"
            ) from error
        stack.callback(door.close)
        return replace(place, port=door.port)

    def _job_server(self) -> dict[str, object]:
        """Where jobs are taken, with what a job needs to find Atoll there; starts what takes them."""
        if not self.state.gcs_address or not self.node.is_running:
            raise ClusterUnreachable("Ray does not run there yet", remedy="try again in a few seconds")
        arguments = JobServerArguments(
            host=self.state.node_ip,
            port=self.plan.jobs_port or 0,
            gcs_address=self.state.gcs_address,
            ray_folder=self.state.ray_folder / "r",
            token=self.place.token,
        )
        return {"address": self.jobs.address(arguments), "python": sys.executable, "folder": os.getcwd()}

    def _operator_command(self) -> tuple[list[str], dict[str, str]] | None:
        """What answers about the runs of this cluster, and its environment; None while Ray does not run."""
        if not self.state.gcs_address:
            return None
        arguments = ["--address", self.state.gcs_address, "--node-ip", self.state.node_ip]
        return [sys.executable, "-m", "orchestrator.operate", *arguments], self._drain_environment()

    def _info(self) -> dict[str, object]:
        return {"versions": asdict(my_versions()), "gcs_address": self.gcs_address, "wan": self.plan.wan}

    def _make_folder(self, stack: ExitStack) -> None:
        host = self.place.host.replace(":", "_")
        name = f"head-{self.place.port}" if self.plan.role == "head" else f"join-{host}-{self.place.port}"
        wanted = ClusterState(
            folder=states.state_root() / name,
            role=self.plan.role,
            door=self.place.door,
            supervisor=myself(),
            ray_folder=make_ray_folder(),
            node_ip=self.plan.node_ip,
            wan=self.plan.wan,
            gcs_address=self.plan.former.gcs_address if self.plan.former is not None else "",
        )
        self.state = states.create(wanted, self.place.token)
        if self.plan.former is not None:
            (self.plan.former.folder / states.TABLES).rename(self.state.folder / states.TABLES)
            states.remove(self.plan.former)
        stack.callback(self._remove_folder)

    def _remove_folder(self) -> None:
        if self.plan.former is None or self.has_run:
            states.remove(self.state)
        else:
            self.say("the tables of the cluster stay: atoll up goes on with them, atoll up --fresh forgets them")

    def _arguments(self) -> NodeArguments:
        return NodeArguments(
            node_ip=self.plan.node_ip,
            ray_folder=self.state.ray_folder / "r",
            workers=self.plan.workers,
            devices=self.plan.devices,
            labels=self.plan.labels,
            gcs_address=self.plan.gcs_address,
            port=self.plan.gcs_port,
        )

    def _environment(self) -> dict[str, str]:
        own = {**self._cluster_environment(head=self.plan.role == "head"), **self.plan.devices.environment}
        return process_environment(os.environ, own)

    def _cluster_environment(self, *, head: bool) -> dict[str, str]:
        storage: Path | None = None
        if head:
            storage = self.state.folder / states.TABLES
            storage.mkdir(mode=0o700, exist_ok=True)
        return cluster_environment(self.state.token_file, wan=self.plan.wan, gcs_storage=storage)

    def _start_ray(self) -> bool:
        """Start Ray and wait for it; False if it is to end meanwhile."""
        with waiting("starting Ray"):
            self.node.start()
            self._save(ray=self.node.process_id, node_id="")
            address = self.node.wait_ready(lambda: self.leaving)
        if address is None:
            return False
        self.gcs_address = address
        self._save(ray=self.node.process_id, node_id=self.node.node_id, gcs_address=address)
        # Those who joined know this port: started again, Ray takes the same.
        if self.plan.role == "head":
            self.node.arguments = replace(self.node.arguments, port=parse_address(address)[1])
        return True

    def _start_jobs(self) -> None:
        if self.plan.jobs_port is not None and self.plan.role == "head":
            self.say(f"Ray's job server: {self._job_server()['address']}")

    def _save(self, **changes: Any) -> None:
        self.state = replace(self.state, **changes)
        states.save(self.state)

    # ------------------------------------------------------------ watch

    def _watch(self) -> None:
        started_s, pause_s, tries = time.monotonic(), FIRST_PAUSE_S, 0
        while not self.leaving:
            if self.node.is_running:
                time.sleep(POLL_S)
                continue
            if tries == 0 or time.monotonic() - started_s > STEADY_S:
                pause_s, tries = FIRST_PAUSE_S, 0
            tries += 1
            self.say(f"Ray ended ({self.node.how_it_ended}), see {self.node.log_file}; try {tries} in {pause_s:g} s")
            self._wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            started_s = time.monotonic()
            self._start_again()

    def _start_again(self) -> None:
        self._stop_ray()
        if self.leaving:
            return
        if self.plan.gcs_address is not None:
            result = dial(*parse_address(self.plan.gcs_address))
            if not result["reached"]:
                return self.say(f"the cluster at {self.plan.gcs_address} does not answer: {result['why']}")
        try:
            if self._start_ray():
                self.say(f"Ray runs again, node {self.state.node_id[:8]}")
                self._start_jobs()
        except ClusterUnreachable as error:
            self._stop_ray()
            self.say(str(error))

    def _wait(self, seconds: float) -> None:
        deadline_s = time.monotonic() + seconds
        while not self.leaving and time.monotonic() < deadline_s:
            time.sleep(POLL_S)

    # ------------------------------------------------------------ leave

    def _answer(self, request: Mapping[str, Any]) -> Mapping[str, object] | None:
        match request.get("do"):
            case "leave":
                self.at_once = self.at_once or bool(request.get("now"))
                self.leaving = True
                return None
            case "status":
                values = asdict(self.state) | {"ray_runs": self.node.is_running, "leaving": self.leaving}
                return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
        return {"error": 'what to do is "leave" or "status"'}

    def _drain(self) -> None:
        """Let the islands of this machine leave their runs."""
        if not self.node.is_running or not self.state.node_id:
            return
        at_once = self.at_once
        self.say(
            "leaving" if at_once else "leaving: waiting for the islands of this machine (again, or --now: at once)"
        )
        code = self._run_drain(at_once)
        if code is None:  # somebody lost patience
            code = self._run_drain(True)
        if code:
            self.say("not all islands of this machine have said good-bye; their runs will notice")

    def _run_drain(self, at_once: bool) -> int | None:
        seconds = DRAIN_NOW_S if at_once else DRAIN_S
        arguments = ["--address", self.state.gcs_address, "--node-ip", self.state.node_ip, "--node", self.state.node_id]
        command = [sys.executable, "-m", "orchestrator.cluster.drain", *arguments, "--timeout", str(seconds)]
        with (self.state.folder / "drain.log").open("ab") as log:
            process = subprocess.Popen(
                [*command, *["--now"] * at_once],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._drain_environment(),
                start_new_session=True,
            )
        try:
            return self._follow_drain(process, at_once, time.monotonic() + seconds + DRAIN_GRACE_S)
        finally:
            process.kill()
            process.communicate()

    def _follow_drain(self, process: subprocess.Popen[bytes], at_once: bool, deadline_s: float) -> int | None:
        """The exit code of a drain, 1 if it cannot go on, None if it is to be done at once instead."""
        for line in _lines(process):
            if line:
                self._report(json.loads(line))
            if not self.node.is_running or time.monotonic() > deadline_s:
                return 1
            if self.at_once and not at_once:
                return None
        try:
            return process.wait(timeout=DRAIN_GRACE_S)
        except subprocess.TimeoutExpired:
            return 1

    def _drain_environment(self) -> dict[str, str]:
        return process_environment(os.environ, self._cluster_environment(head=False))

    def _report(self, values: Mapping[str, Any]) -> None:
        for text in values.get("ends", ()):
            self.say(text)
        if values.get("done"):
            self.say("no island of this machine is left")
        elif values["leaving"]:
            self.say(f"still to leave: {', '.join(values['leaving'])}")

    def _stop_ray(self) -> None:
        self.jobs.stop()
        self.node.stop()
        self._save(ray=None, node_id="")


def _lines(process: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """The lines of a process until it closes its output, and an empty one every now and then."""
    assert process.stdout is not None
    rest = b""
    while True:
        if not select.select([process.stdout], [], [], POLL_S)[0]:
            yield b""
            continue
        data = os.read(process.stdout.fileno(), 65536)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        yield from lines
