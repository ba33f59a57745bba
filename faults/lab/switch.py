"""The process that is the wires of a lab: `python -m faults.lab.switch STATE_DIR`.

Called by `faults.lab.lab.Lab` alone. It opens one TAP device in each node's namespace, says "ready" on stdout, then
passes frames between them through a `Fabric` until it is ended. It answers on a unix socket in the state directory, one
JSON object for another (`faults.lab.control`). It ends when its stdin does, that is with its owner, until it is told to
stay ("detach").

One thread is enough: 64 KB frames pass at more than 10 Gbit/s, as nearly all of the time is spent in the kernel.
"""

from __future__ import annotations

import gc
import json
import math
import os
import select
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.lab.errors import LabError
from faults.lab.fabric import Fabric, Route, RoutePlan
from faults.lab.links import Shape
from faults.lab.segments import VNET_BYTES, on_the_wire
from faults.lab.tap import open_tap

SOCKET = "switch.sock"
PLAN = "switch.json"
MAX_FRAME_BYTES = 1 << 17
FRAMES_IN_A_ROW = 64
RETRY_S = 0.1
TURN_S = 1e-3
BURST = 8
WAKE_S = 1.2e-4
"""The kernel takes about so long to wake this process: it asks for so much less."""

MAX_MESSAGE_BYTES = 1 << 20
ADDRESS = slice(VNET_BYTES, VNET_BYTES + 6)
"""Where the hardware address of the target is in a frame."""


class Port:
    """A node's end of the switch: its TAP device, and the routes from it by the hardware address of their targets."""

    def __init__(self, node: str, fd: int, routes: dict[bytes, Route]) -> None:
        self.node = node
        self.fd = fd
        self.routes = routes
        self.num_unroutable = 0
        self.num_refused = 0
        self.is_down = False


@dataclass(slots=True)
class Pace:
    """How often the loop turns: `BURST` turns at once, then one in `TURN_S`.

    A turn is dear, as the process has to be fetched back into the caches, and a frame in it is cheap. So under load the
    loop turns less often for more frames each time; a few packets on an idle link do not wait.
    """

    next_s: float = 0.0

    def pause_s(self, now_s: float) -> float:
        """How long to wait before a turn that could begin now; the turn is counted."""
        wait_s = self.next_s - now_s
        self.next_s = max(self.next_s, now_s - BURST * TURN_S) + TURN_S
        return wait_s


class Switch:
    """The loop over all ports, the control socket and the clock."""

    def __init__(self, fabric: Fabric, ports: list[Port], listener: socket.socket) -> None:
        self.fabric = fabric
        self.ports = {port.fd: port for port in ports}
        port_of = {port.node: port for port in ports}
        for route in fabric.routes.values():
            route.exit_fd = port_of[route.target].fd
        self.listener = listener
        self.connections: dict[int, socket.socket] = {}
        self.is_owned = True
        self.scheduling = "normal"
        self.pace = Pace()
        self._hurries = False
        self._retry_s = math.inf
        self._buffer = bytearray(MAX_FRAME_BYTES)
        self._view = memoryview(self._buffer)
        self._fds: list[int] = []
        self._watch()

    def run(self) -> None:
        """Pass frames on until the owner is gone."""
        clock, fabric, ports, pace = time.monotonic, self.fabric, self.ports, self.pace
        while True:
            if not self._hurries and (pause_s := pace.pause_s(clock())) > 0:
                time.sleep(pause_s)
            self._hurries = False
            ready, _, _ = select.select(self._fds, [], [], self._patience_s(clock()))
            self._deliver(clock())
            for fd in ready:
                port = ports.get(fd)
                if port is not None:
                    self._forward(port, clock, fabric)
                elif not self._serve(fd):
                    return
            if clock() >= self._retry_s:
                self._retry()

    def _patience_s(self, now_s: float) -> float | None:
        """How long there is nothing to do unless something comes; None = for ever."""
        until_s = min(self.fabric.next_s, self._retry_s)
        return None if until_s == math.inf else max(0.0, until_s - now_s - WAKE_S)

    def _forward(self, port: Port, clock: Callable[[], float], fabric: Fabric) -> None:
        """Take what a node sends: not too much in a row, and not beyond the time when something else is due."""
        buffer, view, read_into, fd = self._buffer, self._view, os.readv, port.fd
        for _ in range(FRAMES_IN_A_ROW):
            try:
                length = read_into(fd, (buffer,))
            except BlockingIOError:
                return
            except OSError:
                # Its interface is down or gone. Asking again at once would turn the loop into a spin.
                port.is_down = True
                self._retry_s = clock() + RETRY_S
                self._watch()
                return
            route = port.routes.get(bytes(view[ADDRESS]))
            if route is None:
                port.num_unroutable += 1
                continue
            num_packets, num_bytes = on_the_wire(buffer, length)
            if route.is_plain:
                self._hurries = True
                route.count(num_bytes, num_packets)
                try:
                    os.write(route.exit_fd, view[:length])
                except OSError:
                    self._refused(route)
                if fabric.next_s > clock():
                    continue
            else:
                now_s = clock()
                frame = bytes(view[:length])
                fabric.send(route, frame, num_bytes=num_bytes, num_packets=num_packets, now_s=now_s)
                if fabric.next_s > now_s:
                    continue
            self._deliver(clock())

    def _deliver(self, now_s: float) -> None:
        write = os.write
        for route, frame in self.fabric.due(now_s):
            try:
                write(route.exit_fd, frame)
            except OSError:
                self._refused(route)

    def _refused(self, route: Route) -> None:
        """A node's interface is down: a packet to a host that is off goes nowhere."""
        self.ports[route.exit_fd].num_refused += 1

    def _retry(self) -> None:
        """Look again at interfaces that were down."""
        self._retry_s = math.inf
        for port in self.ports.values():
            port.is_down = False
        self._watch()

    def _watch(self) -> None:
        """Rebuild the list of what to wait for."""
        self._fds = [fd for fd, port in self.ports.items() if not port.is_down]
        self._fds += [self.listener.fileno(), *self.connections]
        if self.is_owned:
            self._fds.append(sys.stdin.fileno())

    def _serve(self, fd: int) -> bool:
        """Answer one request; False when the owner is gone."""
        if fd == self.listener.fileno():
            connection, _ = self.listener.accept()
            connection.setblocking(False)
            self.connections[connection.fileno()] = connection
        elif fd in self.connections:
            self._answer(fd)
        else:
            return os.read(fd, 1) != b""
        self._watch()
        return True

    def _answer(self, fd: int) -> None:
        connection = self.connections[fd]
        with suppress(OSError):
            if request := connection.recv(MAX_MESSAGE_BYTES):
                connection.send(json.dumps(self._handle(request)).encode())
                return
        del self.connections[fd]
        connection.close()

    def _handle(self, request: bytes) -> dict[str, Any]:
        try:
            message = json.loads(request)
            match message["do"]:
                case "set":
                    self.fabric.configure(message["links"])
                case "cut":
                    self.fabric.cut(_ways(message["blocks"]))
                case "heal":
                    self.fabric.heal(_ways(message["blocks"]) if "blocks" in message else list(self.fabric.routes))
                case "detach":
                    self.is_owned = False
                case "status":
                    return self._status()
                case other:
                    return {"error": f"unknown request {other!r}"}
        except (ValueError, KeyError, TypeError) as error:
            return {"error": f"{type(error).__name__}: {error}"}
        return {}

    def _status(self) -> dict[str, Any]:
        fabric, late = self.fabric, self.fabric.punctuality
        return {
            "links": {
                name: {
                    **{field: getattr(link.shape, field) for field in Shape.__dataclass_fields__},
                    **{field: getattr(link.counters, field) for field in link.counters.__dataclass_fields__},
                }
                for name, link in fabric.links.items()
            },
            "cut": [way for way, route in fabric.routes.items() if route.is_cut],
            "num_on_the_way": fabric.num_on_the_way,
            "num_frames": late.num_frames,
            "num_late": late.num_late,
            "worst_late_ms": round(late.worst_s * 1e3, 3),
            "num_unroutable": sum(port.num_unroutable for port in self.ports.values()),
            "num_refused": sum(port.num_refused for port in self.ports.values()),
            "scheduling": self.scheduling,
            "cpu_s": time.process_time(),
        }


def _ways(blocks: list[dict[str, list[str]]]) -> list[tuple[str, str]]:
    return [(source, target) for block in blocks for source in block["sources"] for target in block["targets"]]


def build(state_dir: Path) -> Switch:
    """Open the TAP devices and the control socket that a plan asks for.

    Raises:
        LabError: the kernel refuses a device.
    """
    plan = json.loads((state_dir / PLAN).read_text(encoding="utf-8"))
    shapes = {name: Shape(**values) for name, values in plan["links"].items()}
    routes = [RoutePlan(source=s, target=t, links=tuple(links)) for s, t, links in plan["routes"]]
    fabric = Fabric(shapes, routes, seed=plan["seed"])
    addresses = {node["name"]: bytes.fromhex(node["mac"].replace(":", "")) for node in plan["nodes"]}
    ports = []
    for node in plan["nodes"]:
        name = node["name"]
        from_here = {addresses[route.target]: route for route in fabric.routes.values() if route.source == name}
        ports.append(Port(name, open_tap(node["namespace"]), from_here))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(state_dir / SOCKET))
    listener.listen()
    return Switch(fabric, ports, listener)


def hurry() -> str:
    """Ask for the CPU before everybody else, as a wire waits for nobody; say what was granted."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(os.sched_get_priority_min(os.SCHED_RR)))
    except OSError:
        return "normal"
    return "realtime"


def main() -> int:
    """Run the switch of one lab."""
    try:
        switch = build(Path(sys.argv[1]))
    except (LabError, OSError) as error:
        print(f"error: {error}", flush=True)
        return 2
    switch.scheduling = hurry()
    # Nothing here makes cycles, and a collection in between would delay packets.
    gc.disable()
    print("ready", flush=True)
    switch.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
