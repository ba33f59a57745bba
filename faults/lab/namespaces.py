"""The network namespaces of a lab, made and removed with `ip` (iproute2)."""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from faults.lab.errors import LabError
from faults.lab.tap import INTERFACE, NETNS_DIR, Descriptor, enter_network, why_no_tap
from faults.lab.topology import LabPlan, NodePlan

COMMAND_TIMEOUT_S = 30.0
QUEUE_FRAMES = 10_000
_AVAILABLE_CONGESTION = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")
_DEFAULT_CONGESTION = Path("/proc/sys/net/ipv4/tcp_congestion_control")
_RTO_MAX = Path("/proc/sys/net/ipv4/tcp_rto_max_ms")


def why_no_lab() -> str | None:
    """Why this process cannot make a lab, or None if it can."""
    if not NETNS_DIR.parent.is_dir():
        return "a lab needs Linux"
    return why_no_tap() or (None if _ip() else "there is no command ip: install iproute2")


def check_congestion(names: Iterable[str]) -> None:
    """Raise `LabError` for a congestion control that this kernel does not have."""
    there = _AVAILABLE_CONGESTION.read_text().split()
    for name in names:
        if name not in there:
            raise LabError(
                f"this kernel has no congestion control {name!r}",
                place="congestion",
                remedy=f"one of {', '.join(there)}, or modprobe tcp_{name}",
            )


def has_rto_max() -> bool:
    """Whether this kernel lets a namespace say how long TCP waits at most before it sends again (Linux 6.15)."""
    return _RTO_MAX.exists()


def default_congestion() -> str:
    """The congestion control of a node that asks for none."""
    return _DEFAULT_CONGESTION.read_text().strip()


def networks_in_use() -> dict[ipaddress.IPv4Network, str]:
    """The IPv4 networks that this machine has addresses in or routes to -> what uses them."""
    found: dict[ipaddress.IPv4Network, str] = {}
    for route in json.loads(_run(["-j", "-4", "route", "show"])):
        if route["dst"] != "default":
            found[ipaddress.IPv4Network(route["dst"], strict=False)] = f"interface {route.get('dev', '?')}"
    for interface in json.loads(_run(["-j", "-4", "addr", "show"])):
        for address in interface.get("addr_info", ()):
            network = ipaddress.IPv4Network(f"{address['local']}/{address['prefixlen']}", strict=False)
            found[network] = f"interface {interface.get('ifname', '?')}"
    return found


def create(names: Sequence[str]) -> None:
    """Make named network namespaces."""
    _batch([f"netns add {name}" for name in names])


def delete(names: Iterable[str]) -> None:
    """Remove those of the namespaces that are there; the names first, the rest when nobody is in them any more."""
    there = [name for name in names if (NETNS_DIR / name).exists()]
    if there:
        _batch([f"netns delete {name}" for name in there])


def configure(plan: LabPlan, names: Sequence[str]) -> None:
    """Give each node its address, its neighbours and its congestion control; its interface is there already."""
    for node, name in zip(plan.nodes, names, strict=True):
        _batch(_setup(node, plan), namespace=name)


def limit_waits(names: Sequence[str], rto_max_ms: int) -> None:
    """Have TCP in these namespaces wait no longer than this before it sends again.

    Raises:
        LabError: the kernel cannot.
    """
    if not has_rto_max():
        raise LabError("this kernel has no net.ipv4.tcp_rto_max_ms", place="rto_max_ms", remedy="Linux 6.15, or unset")
    # What a thread sees of /proc/sys/net is that of the namespace it is in; this one ends with the block.
    with ThreadPoolExecutor(max_workers=1) as thread:
        thread.submit(_limit_waits, names, rto_max_ms).result()


def _limit_waits(names: Sequence[str], rto_max_ms: int) -> None:
    for name in names:
        with Descriptor(os.open(NETNS_DIR / name, os.O_RDONLY)) as there:
            enter_network(there)
        _RTO_MAX.write_text(str(rto_max_ms))


def dropped_by_kernel(name: str) -> int:
    """Frames that the kernel dropped in front of a node's interface because the switch did not take them in time."""
    (interface,) = json.loads(_run(["-n", name, "-j", "-s", "link", "show", "dev", INTERFACE]))
    return int(interface["stats64"]["tx"]["dropped"])


def _setup(node: NodePlan, plan: LabPlan) -> list[str]:
    prefix = plan.network.partition("/")[2]
    congestion = f" congctl {node.congestion}" if node.congestion else ""
    return [
        "link set lo up",
        # No address of IPv6: nobody solicits neighbours, nothing is sent that nobody asked for.
        f"link set {INTERFACE} addrgenmode none",
        f"link set {INTERFACE} address {node.mac} txqueuelen {QUEUE_FRAMES} up",
        f"addr add {node.address}/{prefix} dev {INTERFACE}",
        # Of the route, as a namespace may not change its default to what the host has not allowed to everybody.
        f"route replace {plan.network} dev {INTERFACE} src {node.address}{congestion}",
        # Known beforehand: a cut is silence, as it is far away, and not "no route to host" after three seconds.
        *(
            f"neigh replace {other.address} lladdr {other.mac} nud permanent dev {INTERFACE}"
            for other in plan.nodes
            if other is not node
        ),
    ]


def _batch(lines: Sequence[str], *, namespace: str | None = None) -> None:
    _run([*(["-n", namespace] if namespace else []), "-batch", "-"], text="\n".join(lines) + "\n")


def _run(arguments: Sequence[str], *, text: str = "") -> str:
    ip = _ip()
    if ip is None:
        raise LabError("there is no command ip", remedy="install iproute2")
    done = subprocess.run(
        [ip, *arguments], input=text, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        raise LabError(f"ip {' '.join(arguments)} failed: {done.stderr.strip()}", place=text.strip() or None)
    return done.stdout


def _ip() -> str | None:
    return shutil.which("ip", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
