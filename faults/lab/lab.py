"""Several hosts on this machine, each in a network namespace of its own, joined by emulated links.

    with Lab(topology) as lab:
        server = lab.popen("us-1", ["python", "server.py", "--host", lab.address("us-1")])
        lab.run("eu-1", ["python", "client.py", "us-1"], check=True, timeout=60)
        lab.cut("eu")

Needs root. At the end of the `with`, also by SIGTERM, everything that runs on a node is killed and everything that was
made is removed; after a SIGKILL of this process the next lab, or `atoll lab down`, does it. `faults.lab.cluster` makes
a Ray cluster of the nodes.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

from faults.lab import enter, namespaces
from faults.lab.control import LabStatus, SwitchControl
from faults.lab.errors import LabError
from faults.lab.processes import ProcessId, end_all, identify, myself, processes_in
from faults.lab.schedule import LinkChange, check_changes, due
from faults.lab.state import END_TIMEOUT_S, STATE_ROOT, LabRecord, LabStates, overlapping
from faults.lab.switch import PLAN
from faults.lab.tap import NETNS_DIR
from faults.lab.targets import NAME, parse_target, routes_of
from faults.lab.topology import LabPlan, Topology, link_changes, plan_lab

PREFIX = "atoll-"
# The folder of what the nodes write: short, as Ray's sockets lie below it and their paths are limited.
SCRATCH = "/tmp/alab-"
HOSTS = "hosts"
SWITCH_LOG = "switch.log"
READY_TIMEOUT_S = 60.0
# On every node: the directory of its lab.
LAB_VARIABLE = "ATOLL_LAB"
FREE_NETWORKS = ipaddress.IPv4Network("10.201.0.0/16")
ROOT = Path(__file__).resolve().parents[2]


class Lab:
    """A lab; see the module. `start` makes it, `stop` removes it, a `with` does both.

    Args:
        topology: its nodes and links.
        name: what it is called; unset = a random name.
        seed: of loss and jitter.
        root: where its state is kept.
    """

    def __init__(self, topology: Topology, *, name: str | None = None, seed: int = 0, root: Path = STATE_ROOT) -> None:
        self.topology = topology
        self.name = name or secrets.token_hex(3)
        self.seed = seed
        self._states = LabStates(root)
        self._control = SwitchControl(self._states.path(self.name), self.name)
        self._record: LabRecord | None = None
        self._plan: LabPlan | None = None
        self._switch: subprocess.Popen[str] | None = None
        self._started: list[subprocess.Popen[Any]] = []
        self._signal_before: Any = None
        if not re.fullmatch(NAME, self.name):
            raise LabError(f"{self.name!r} is no name for a lab", remedy="--name with small letters, digits and dashes")

    @classmethod
    def attach(cls, name: str | None = None, *, root: Path = STATE_ROOT) -> Self:
        """A lab that runs already: that of this name, or the only one.

        Raises:
            LabError: there is none, or there are several.
        """
        record = LabStates(root).only(name)
        lab = cls(Topology.model_validate(record.topology), name=record.name, root=root)
        lab._record, lab._plan = record, plan_lab(lab.topology, record.network)
        return lab

    @classmethod
    def around(cls) -> Self:
        """The lab that this process runs in, on one of its nodes; elsewhere the only lab of the machine.

        Raises:
            LabError: there is none, or there are several.
        """
        own = os.environ.get(LAB_VARIABLE)
        return cls.attach() if own is None else cls.attach(Path(own).name, root=Path(own).parent)

    def __enter__(self) -> Self:
        # The block is what SIGTERM ends: as with Ctrl-C, nothing is left behind.
        on_main = threading.current_thread() is threading.main_thread()
        if on_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._signal_before = signal.signal(signal.SIGTERM, _leave)
        try:
            self.start()
        except BaseException:
            self._restore_signal()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:
            self._restore_signal()

    def _restore_signal(self) -> None:
        if self._signal_before is not None:
            signal.signal(signal.SIGTERM, self._signal_before)
            self._signal_before = None

    def start(self) -> None:
        """Make the nodes and their links, after removing what dead labs left behind.

        Raises:
            LabError: no root, no TAP, a network or name in use, no such congestion control; nothing is left behind.
        """
        assert self._record is None, "start() was called twice"
        if reason := namespaces.why_no_lab():
            raise LabError(f"no lab here: {reason}", remedy="root on Linux with /dev/net/tun and iproute2")
        with self._states.lock():
            self._states.sweep()
            self._claim()
        try:
            self._make()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kill everything that runs on the nodes and remove the lab. May be called again.

        Raises:
            LabError: a process does not end.
        """
        if self._record is None:
            return
        for process in self._started:
            # One that has not entered its node yet would not be found there.
            process.kill()
        with self._states.lock():
            self._states.remove(self.name, self._record)
        self._record = None
        for process in self._started:
            process.wait(timeout=END_TIMEOUT_S)
        if self._switch is not None:
            self._switch.communicate(timeout=END_TIMEOUT_S)

    @property
    def nodes(self) -> list[str]:
        """The names of the nodes, in the order of the topology."""
        return self.topology.node_names()

    def address(self, node: str) -> str:
        """The IPv4 address of a node."""
        return next(plan.address for plan in self._planned().nodes if plan.name == self._known(node))

    def namespace(self, node: str) -> str:
        """The name of a node's network namespace, for `ip -n`."""
        return self._running().namespaces[self._known(node)]

    @property
    def folder(self) -> Path:
        """Where its state is kept; gone with the lab."""
        return self._states.path(self._running().name)

    def environment(self, node: str) -> dict[str, str]:
        """What a command on a node has in its environment beside the caller's: its own place for state and files.

        Both are removed with the lab. Their paths are short, as Ray's sockets lie below them.
        """
        own = Path(self._running().scratch) / str(self.nodes.index(self._known(node)))
        own.mkdir(mode=0o700, exist_ok=True)
        return {"ATOLL_STATE_DIR": str(own / "state"), "TMPDIR": str(own), LAB_VARIABLE: str(self.folder)}

    def command(self, node: str, argv: Sequence[str]) -> list[str]:
        """What to execute on this machine so that `argv` runs on a node."""
        namespace = NETNS_DIR / self.namespace(node)
        hosts = self._states.path(self.name) / HOSTS
        # Isolated and without site-packages: the launcher needs neither, and is there 100 ms sooner.
        return [sys.executable, "-IS", enter.__file__, str(namespace), node, str(hosts), *map(str, argv)]

    def popen(self, node: str, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a command on a node; options as for `subprocess.Popen`. The process id is that of the command."""
        options.setdefault("env", os.environ | self.environment(node))
        process = subprocess.Popen(self.command(node, argv), **options)
        self._started = [one for one in self._started if one.poll() is None] + [process]
        return process

    def run(self, node: str, argv: Sequence[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        """Run a command on a node to its end; options as for `subprocess.run`."""
        options.setdefault("env", os.environ | self.environment(node))
        return subprocess.run(self.command(node, argv), **options)

    def processes(self, node: str) -> list[ProcessId]:
        """Everything that runs on a node, daemons too."""
        return processes_in([NETNS_DIR / self.namespace(node)])

    def kill(self, node: str) -> None:
        """Kill everything that runs on a node with SIGKILL; the node itself stays, as a machine that came back."""
        end_all(lambda: self.processes(node), what=f"what runs on {node}", timeout_s=END_TIMEOUT_S)

    def cut(self, target: str) -> None:
        """Let nothing pass, silently: to and from a node or region, between a pair (us:eu), or one way (us>eu)."""
        self._wires().cut(routes_of(parse_target(target, self.topology.members), self.topology.members))

    def heal(self, target: str | None = None) -> None:
        """Let pass what `cut` of the same target closes, whichever cut closed it; None = everything."""
        members = self.topology.members
        self._wires().heal(None if target is None else routes_of(parse_target(target, members), members))

    def set(self, target: str, **values: float | None) -> None:
        """Change the lines of a node or of all nodes of a region, or a link (us:eu, us>eu); None = the default.

        Raises:
            LabError: an unknown place, no such link, an unknown key, or a value out of range.
        """
        self._wires().set(link_changes(self.topology, target, values))

    def apply(self, change: LinkChange) -> None:
        """Do one change of a schedule now."""
        match change.action:
            case "cut":
                self.cut(change.target)
            case "heal":
                self.heal(change.target)
            case "set":
                self.set(change.target, **change.values)

    def play(self, changes: Sequence[LinkChange], *, over: threading.Event | None = None) -> list[LinkChange]:
        """Do all changes of a schedule at their times, counted from now; returns after the last one, or when `over` is.

        Returns:
            Those whose time did not come.

        Raises:
            LabError: one of them names nobody; then none is done.
        """
        check_changes(changes, self.topology)
        over = over or threading.Event()
        begin_s, done_until_s = time.monotonic(), -1.0
        for change in sorted(changes, key=lambda one: one.at_s):
            if over.wait(max(0.0, begin_s + change.at_s - time.monotonic())):
                return [one for one in changes if one.at_s > done_until_s]
            now_s = max(change.at_s, time.monotonic() - begin_s)
            for one in due(changes, after_s=done_until_s, until_s=now_s):
                self.apply(one)
            done_until_s = max(done_until_s, now_s)
        return []

    def status(self) -> LabStatus:
        """What every link is like and has carried, what is cut, and how well the emulation kept its times."""
        record = self._running()
        # The switch first: without it there are no interfaces whose counts could be read.
        now = self._control.status()
        overruns = {node: namespaces.dropped_by_kernel(name) for node, name in record.namespaces.items()}
        return replace(now, overruns=overruns)

    def detach(self) -> None:
        """Leave the lab running after this process; `Lab.attach` finds it, `atoll lab down` removes it."""
        record = replace(self._running(), owner=None)
        self._states.write(record)
        self._control.detach()
        self._record = None

    def _wires(self) -> SwitchControl:
        """What asks the switch of a lab that runs."""
        self._running()
        return self._control

    def _running(self) -> LabRecord:
        if self._record is None:
            raise LabError(f"lab {self.name!r} is not running", remedy="lab.start(), or a with statement")
        return self._record

    def _planned(self) -> LabPlan:
        self._running()
        assert self._plan is not None
        return self._plan

    def _known(self, node: str) -> str:
        if node not in self.nodes:
            raise LabError(f"no node is called {node!r}", remedy=f"one of {', '.join(self.nodes)}")
        return node

    def _claim(self) -> None:
        """Take a name and a network, and write down what will be made before it is."""
        if self._states.read(self.name) is not None:
            raise LabError(f"lab {self.name!r} is running already", remedy=f"atoll lab down {self.name}, or --name")
        network = self._free_network()
        self._plan = plan_lab(self.topology, network)
        namespaces.check_congestion({node.congestion for node in self._plan.nodes if node.congestion})
        tag = secrets.token_hex(3)
        record = LabRecord(
            name=self.name,
            namespaces={node.name: f"{PREFIX}{tag}-{node.name}" for node in self._plan.nodes},
            network=network,
            topology=self.topology.model_dump(mode="json", exclude_unset=True),
            owner=myself(),
            switch=None,
            scratch=f"{SCRATCH}{tag}",
        )
        self._states.write(record)
        self._record = record

    def _free_network(self) -> str:
        used, records = namespaces.networks_in_use(), self._states.records()
        if self.topology.network is not None:
            user = overlapping(ipaddress.IPv4Network(self.topology.network), used, records)
            if user is not None:
                raise LabError(
                    f"network = {self.topology.network!r} is in use by {user}",
                    place="network",
                    remedy="another network, or none: then a free one is taken",
                )
            return self.topology.network
        free = (net for net in FREE_NETWORKS.subnets(new_prefix=24) if overlapping(net, used, records) is None)
        network = next(free, None)
        if network is None:
            raise LabError(f"no part of {FREE_NETWORKS} is free", remedy="network = ... in the topology")
        return str(network)

    def _make(self) -> None:
        record, plan = self._running(), self._planned()
        names = [record.namespaces[node.name] for node in plan.nodes]
        state_dir = self._states.path(self.name)
        Path(record.scratch).mkdir(mode=0o700)
        (state_dir / HOSTS).write_text(_hosts(plan), encoding="utf-8")
        (state_dir / PLAN).write_text(json.dumps(_switch_plan(plan, record, self.seed)), encoding="utf-8")
        namespaces.create(names)
        self._start_switch(state_dir)
        namespaces.configure(plan, names)
        if self.topology.rto_max_ms is not None:
            namespaces.limit_waits(names, self.topology.rto_max_ms)

    def _start_switch(self, state_dir: Path) -> None:
        command = [sys.executable, "-m", "faults.lab.switch", str(state_dir)]
        with open(state_dir / SWITCH_LOG, "w", encoding="utf-8") as log:
            switch = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self._switch = switch
        self._record = replace(self._running(), switch=identify(switch.pid))
        self._states.write(self._record)
        assert switch.stdout is not None
        ready, _, _ = select.select([switch.stdout], [], [], READY_TIMEOUT_S)
        answer = switch.stdout.readline().strip() if ready else f"nothing within {READY_TIMEOUT_S:g} s"
        if answer != "ready":
            details = (state_dir / SWITCH_LOG).read_text(encoding="utf-8").strip().splitlines()
            raise LabError(f"the switch did not start: {answer or (details or ['it ended'])[-1]}")
        switch.stdout.close()
        switch.stdout = None


def _leave(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def _hosts(plan: LabPlan) -> str:
    nodes = "".join(f"{node.address} {node.name}\n" for node in plan.nodes)
    return f"127.0.0.1 localhost\n::1 localhost\n{nodes}"


def _switch_plan(plan: LabPlan, record: LabRecord, seed: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "nodes": [
            {"name": node.name, "namespace": record.namespaces[node.name], "mac": node.mac} for node in plan.nodes
        ],
        "links": {name: asdict(shape) for name, shape in plan.links.items()},
        "routes": [(route.source, route.target, route.links) for route in plan.routes],
    }
