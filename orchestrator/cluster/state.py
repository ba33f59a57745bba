"""What this machine knows of the clusters that it is part of: a folder for each `atoll up` and `atoll join`.

A folder belongs to the supervisor that made it and is removed by it; one whose supervisor is dead is removed by
whoever looks next, except a head's: it holds the tables with which the cluster goes on (`dead_heads`). Alive is a
process with the same id *and* the same start time.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from faults.lab.processes import ProcessId
from orchestrator.cluster.join_string import format_address, parse_address
from orchestrator.cluster.tokens import HANDED_OVER, read_token_file, write_token
from orchestrator.errors import UserError

RECORD = "state.json"
TABLES = "gcs"
AUTO = "auto"
# Ray replaces 127.0.0.1 by an outside address of the machine, this one it leaves alone.
RAY_LOOPBACK = "127.0.0.2"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterState:
    """One supervisor on this machine.

    Attributes:
        role: "head" (`atoll up`) or "node" (`atoll join`).
        door: `HOST:PORT` of the cluster's door.
        gcs_address: `HOST:PORT` of Ray, empty while it starts for the first time.
        node_id: Ray's, empty while it starts.
        machine: the host name: a home directory may be shared by several.
        ray: the `ray start` that the supervisor runs, None between two of them.
        ray_folder: where Ray has its sockets and logs, outside of `folder` because their paths have to be short.
    """

    folder: Path
    role: str
    door: str
    supervisor: ProcessId
    ray_folder: Path
    node_ip: str
    wan: bool
    gcs_address: str = ""
    node_id: str = ""
    ray: ProcessId | None = None
    machine: str = ""

    @property
    def name(self) -> str:
        """What its folder is called."""
        return self.folder.name

    @property
    def token_file(self) -> Path:
        """Holds the cluster's token."""
        return self.folder / "token"

    @property
    def control_socket(self) -> Path:
        """Where the supervisor listens."""
        return self.folder / "control.sock"

    def token(self) -> str:
        """The cluster's token."""
        return read_token_file(self.token_file)


def state_root(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder of all folders; it may not be there."""
    if own := environ.get("ATOLL_STATE_DIR"):
        return Path(own).absolute()
    base = environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path(environ.get("HOME") or Path.home()) / ".local" / "state") / "atoll"


def create(state: ClusterState, token: str) -> ClusterState:
    """Make the folder of a supervisor, complete from its first moment on; a number is added to a name that is taken."""
    root = state.folder.parent
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = root / f".new-{os.getpid()}"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(mode=0o700)
    write_token(fresh / "token", token)
    wanted, number = state.name, 0
    while True:
        state = replace(
            state,
            machine=platform.node(),
            folder=root / (f"{wanted}-{number}" if number or state.role == "node" else wanted),
        )
        _write(state, fresh)
        with suppress(OSError):  # a folder that is not empty is not replaced
            fresh.rename(state.folder)
            return state
        number += 1
        assert number < 10_000, f"{fresh} cannot be renamed to {state.folder}"


def save(state: ClusterState) -> None:
    """Write a record; a reader sees the old one or the new one."""
    _write(state, state.folder)


def _write(state: ClusterState, folder: Path) -> None:
    values = {key: value for key, value in asdict(state).items() if key != "folder"}
    new = folder / f"{RECORD}.new"
    new.write_text(json.dumps(values, default=str, indent=1), encoding="utf-8")
    new.replace(folder / RECORD)


def load(folder: Path) -> ClusterState | None:
    """The record in a folder, or None if it holds none that can be read."""
    try:
        values: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        for key in ("supervisor", "ray"):
            values[key] = ProcessId(**values[key]) if values[key] else None
        values["ray_folder"] = Path(values["ray_folder"])
        known = {field.name for field in fields(ClusterState)}
        return ClusterState(folder=folder, **{key: value for key, value in values.items() if key in known})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def remove(state: ClusterState) -> None:
    """Remove the folder of a supervisor and that of its Ray; an empty root goes too."""
    shutil.rmtree(state.ray_folder, ignore_errors=True)
    shutil.rmtree(state.folder, ignore_errors=True)
    with suppress(OSError):
        state.folder.parent.rmdir()


def known_clusters(root: Path | None = None) -> list[ClusterState]:
    """All living supervisors of this user on this machine; what dead ones left is removed."""
    root = state_root() if root is None else root
    living = []
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if folder.name.startswith(".") or folder.name == HANDED_OVER:
            continue
        state = load(folder)
        if state is not None and state.machine != platform.node():
            continue
        if state is not None and state.supervisor.is_alive:
            living.append(state)
        elif state is not None:
            if state.ray is not None:
                state.ray.kill()  # to this very process, or to nobody
            if _can_go_on(state):
                shutil.rmtree(state.ray_folder, ignore_errors=True)
            else:
                remove(state)
        elif (folder / RECORD).exists():  # a record that cannot be read; what has none is somebody else's
            shutil.rmtree(folder, ignore_errors=True)
    return living


def dead_heads(root: Path | None = None) -> list[ClusterState]:
    """Heads on this machine that ended without leaving, and can be started again with the tables that they left."""
    root = state_root() if root is None else root
    known_clusters(root)
    folders = sorted(root.iterdir()) if root.is_dir() else []
    states = [load(folder) for folder in folders if not folder.name.startswith(".")]
    return [
        state
        for state in states
        if state is not None
        and state.machine == platform.node()
        and not state.supervisor.is_alive
        and _can_go_on(state)
    ]


def take_up(
    *, fresh: bool, host: str | None, port: int, door_port: int, root: Path | None = None
) -> ClusterState | None:
    """The dead head with which a new one goes on: the one whose addresses are not others than those asked for.

    `fresh`: none; what they left is removed.

    Raises:
        UserError: several could be meant.
    """
    dead = dead_heads(root)
    if fresh:
        for state in dead:
            remove(state)
        return None
    fits = [
        state
        for state in dead
        if (host is None or ray_host(host) == ray_host(parse_address(state.door)[0]))
        and port in (0, parse_address(state.gcs_address)[1])
        and door_port in (0, parse_address(state.door)[1])
    ]
    if len(fits) > 1:
        names = ", ".join(f"--door-port {parse_address(state.door)[1]}" for state in fits)
        raise UserError(
            f"{len(fits)} clusters on this machine ended without leaving",
            remedy=f"go on with one of them ({names}), or start another one with --fresh, which forgets them",
        )
    return fits[0] if fits else None


def _can_go_on(state: ClusterState) -> bool:
    return state.role == "head" and bool(state.gcs_address) and (state.folder / TABLES).is_dir()


def find_cluster(address: str | None = AUTO, root: Path | None = None) -> ClusterState | None:
    """A cluster that this machine is part of, by the address of Ray or of its door, or the only one ("auto", None).

    Where several supervisors belong to it, the head's is taken. None if there is none.

    Raises:
        UserError: "auto", and there are several clusters.
    """
    known = [state for state in known_clusters(root) if state.gcs_address]
    if address not in (None, AUTO):
        assert address is not None
        known = [state for state in known if same_address(address, state.gcs_address, state.door)]
    if len({state.gcs_address for state in known}) > 1:
        names = ", ".join(f"{state.gcs_address} ({state.name})" for state in known)
        raise UserError(f"this machine is in several clusters: {names}", remedy="name one by its address")
    return min(known, key=lambda state: (state.role != "head", state.name), default=None)


def same_address(address: str, *others: str) -> bool:
    """Whether an address is one of the others; all ways to write loopback are the same."""
    return _normal(address) in map(_normal, others)


def _normal(address: str) -> str:
    try:
        host, port = parse_address(address)
    except UserError:
        return address
    return format_address(ray_host(host), port)


def ray_host(host: str) -> str:
    """The address to give to Ray: loopback in the one form that it does not replace."""
    return RAY_LOOPBACK if host in LOOPBACK else host
