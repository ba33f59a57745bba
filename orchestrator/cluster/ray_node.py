"""One machine's part of a Ray cluster: its environment, its arguments, and the process group that is started with them.

Ray 2.60 takes its token from `RAY_AUTH_TOKEN`, then from the file that `RAY_AUTH_TOKEN_PATH` names, then from the home
directory. Only the file is used here, and the mode is always explicit: an environment can be read by every process of
the same user, and is inherited further than one thinks.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from faults.lab.processes import ProcessId, identify
from orchestrator.errors import ClusterUnreachable, UserError
from orchestrator.launch import LOOPBACK_ONLY, OBJECT_STORE_BYTES, RAY_ENVIRONMENT, python_path
from orchestrator.processes import WORKER_RESOURCE

START_TIMEOUT_S = 150.0
STOP_TIMEOUT_S = 15.0
POLL_S = 0.05
TAIL_BYTES = 8000
LAST_LINES = 8
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# Ray's sockets lie 62 characters below its folder, and a socket's path has at most 107.
MAX_FOLDER_LENGTH = 40
# For clusters of one machine only, see launch.
LOCAL_ONLY = {
    "RAY_AUTH_MODE",
    "RAY_raylet_report_resources_period_milliseconds",
    "RAY_object_manager_timer_freq_ms",
}
# They would override what is set here, or send a node to another cluster.
DROPPED = ("RAY_AUTH_TOKEN", "RAY_ADDRESS", "RAY_REDIS_ADDRESS", LOOPBACK_ONLY)
# A slow link is no dead node: Ray's verdict kills processes, ours is given by the run's own heartbeats in seconds.
# Without it Ray's defaults hold, which take about a minute.
WAN_PROFILE = {
    "RAY_health_check_period_ms": "5000",
    "RAY_health_check_timeout_ms": "20000",
    "RAY_health_check_failure_threshold": "12",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
    "RAY_gcs_grpc_min_reconnect_backoff_ms": "2000",
    "RAY_object_manager_pull_timeout_ms": "600000",
    "RAY_grpc_client_keepalive_time_ms": "30000",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Devices:
    """What of a machine's accelerators Ray may give away: None lets Ray look, an empty tuple is none at all."""

    gpus: tuple[int, ...] | None

    @property
    def environment(self) -> dict[str, str]:
        """What restricts the processes of a node to them."""
        return {} if not self.gpus else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, self.gpus))}

    @property
    def arguments(self) -> list[str]:
        """What says it to Ray."""
        return [] if self.gpus is None else [f"--num-gpus={len(self.gpus)}"]


def parse_devices(text: str) -> Devices:
    """Read `auto`, `cpu`, or `cuda:0,cuda:1`.

    Raises:
        UserError: it has another form.
    """
    if text == "auto":
        return Devices(gpus=None)
    if text == "cpu":
        return Devices(gpus=())
    indices = [part.removeprefix("cuda:") for part in text.split(",")]
    if not all(index.isascii() and index.isdigit() for index in indices) or len(set(indices)) < len(indices):
        raise UserError(f"--devices is {text!r}", remedy="auto, cpu, or a list like cuda:0,cuda:1")
    return Devices(gpus=tuple(map(int, indices)))


def check_devices(devices: Devices, dev: Path = Path("/dev")) -> None:
    """See whether the GPUs that are named are there, as far as the system tells.

    Raises:
        UserError: one is not.
    """
    if (dev / "dxg").exists():  # all GPUs of a Windows host, without a file for each
        return
    here = sorted(path.name.removeprefix("nvidia") for path in dev.glob("nvidia[0-9]*"))
    missing = [index for index in devices.gpus or () if str(index) not in here]
    if missing:
        found = ", ".join(f"cuda:{index}" for index in here) or "none"
        raise UserError(
            f"this machine has no GPU cuda:{missing[0]}",
            place="--devices",
            remedy=f"auto, cpu, or of those here: {found}",
        )


def default_workers(devices: Devices) -> int:
    """One island for each GPU, one where there is none."""
    return max(1, count_gpus() if devices.gpus is None else len(devices.gpus))


def count_gpus() -> int:
    """NVIDIA GPUs that this process may use, without asking a driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() not in ("", "-1")])
    return sum(1 for path in Path("/dev").glob("nvidia[0-9]*") if path.name.removeprefix("nvidia").isdigit())


def cluster_environment(token_file: Path, *, wan: bool, gcs_storage: Path | None = None) -> dict[str, str]:
    """What every process of a cluster has in its environment, drivers included.

    Args:
        gcs_storage: for the head alone: where its tables survive its death.
    """
    common = {key: value for key, value in RAY_ENVIRONMENT.items() if key not in LOCAL_ONLY}
    storage = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(gcs_storage)} if gcs_storage else {}
    return {
        **common,
        **(WAN_PROFILE if wan else {}),
        **storage,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        # Whoever stops a node has let its islands leave before.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }


def process_environment(inherited: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """The whole environment of a Ray process of ours: modules are found as here, nothing of another cluster is left."""
    kept = {key: value for key, value in inherited.items() if key not in DROPPED and key != "ATOLL_TOKEN"}
    paths = [*python_path(), *filter(None, inherited.get("PYTHONPATH", "").split(os.pathsep))]
    return {**kept, **own, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeArguments:
    """What `ray start` is told.

    Attributes:
        gcs_address: of the head, None for the head itself.
        port: of the head's GCS, 0 for any.
    """

    node_ip: str
    ray_folder: Path
    workers: int
    devices: Devices
    labels: Mapping[str, str]
    gcs_address: str | None
    port: int = 0

    def command_line(self, client_port: int) -> list[str]:
        """The arguments of `ray`. `client_port` must be free: Ray's client server cannot be turned off."""
        head = [
            "--head",
            f"--port={self.port}",
            "--include-dashboard=false",
            f"--ray-client-server-port={client_port}",
        ]
        return [
            "start",
            *(head if self.gcs_address is None else [f"--address={self.gcs_address}"]),
            "--block",
            f"--node-ip-address={self.node_ip}",
            f"--temp-dir={self.ray_folder}",
            f"--resources={json.dumps({WORKER_RESOURCE: self.workers})}",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            "--dashboard-agent-listen-port=0",
            "--include-log-monitor=false",
            "--disable-usage-stats",
            *([f"--labels={','.join(f'{key}={value}' for key, value in self.labels.items())}"] if self.labels else []),
            *self.devices.arguments,
        ]


def make_ray_folder() -> Path:
    """A private folder with a short path; Ray makes what lies in it writable for everybody."""
    base = Path(tempfile.gettempdir())
    if len(str(base)) > MAX_FOLDER_LENGTH - len("/atoll-12345678/r"):
        base = Path("/tmp")
    return Path(tempfile.mkdtemp(prefix="atoll-", dir=base))


class RayNode:
    """`ray start` as a process group of its own; may be started again after it ended."""

    def __init__(self, arguments: NodeArguments, environment: Mapping[str, str], log_file: Path) -> None:
        self.arguments, self.environment, self.log_file = arguments, environment, log_file
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def _folder(self) -> Path:
        return self.arguments.ray_folder

    @property
    def process_id(self) -> ProcessId | None:
        """Its identity while it runs."""
        return None if self.process is None or self.process.poll() is not None else identify(self.process.pid)

    def start(self) -> None:
        """Start it; `wait_ready` says whether it came up."""
        (self._folder / "ray_current_cluster").unlink(missing_ok=True)
        command = [sys.executable, "-m", "orchestrator.cluster.ray_process", str(os.getpid())]
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *self.arguments.command_line(_free_port(self.arguments.node_ip))],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(self.environment),
                start_new_session=True,
            )

    def wait_ready(self, give_up: Callable[[], bool], timeout_s: float = START_TIMEOUT_S) -> str | None:
        """The address of the GCS once the node is registered there; None if `give_up` says so.

        Raises:
            ClusterUnreachable: it ended, or did not come up within `timeout_s`.
        """
        deadline_s = time.monotonic() + timeout_s
        while not give_up():
            # Ray writes it last.
            with suppress(FileNotFoundError):
                if address := (self._folder / "ray_current_cluster").read_text().strip():
                    return address
            if not self.is_running or time.monotonic() > deadline_s:
                what = "did not come up" if self.is_running else "ended while it started"
                raise ClusterUnreachable(
                    f"Ray {what}, its last words are:\n{self.last_words(LAST_LINES)}",
                    remedy="a free --port if one is taken; atoll doctor looks at the rest",
                )
            time.sleep(POLL_S)
        return None

    @property
    def is_running(self) -> bool:
        """Whether `ray start` runs."""
        return self.process is not None and self.process.poll() is None

    @property
    def node_id(self) -> str:
        """Ray's name of the node that was started last, as the names of its port files tell it."""
        files = sorted(self._folder.glob("session_2*/runtime_env_agent_port_*"), key=lambda path: path.stat().st_mtime)
        return files[-1].name.rpartition("_")[2] if files else ""

    @property
    def how_it_ended(self) -> str:
        """In a few words, for a process that ended."""
        code = None if self.process is None else self.process.poll()
        return f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"

    def last_words(self, num_lines: int) -> str:
        """The last lines that Ray wrote."""
        with suppress(OSError), self.log_file.open("rb") as file:
            file.seek(max(0, self.log_file.stat().st_size - TAIL_BYTES))
            lines = COLOUR.sub("", file.read().decode(errors="replace")).strip().splitlines()
            return "\n".join(f"    {line[:300]}" for line in lines[-num_lines:])
        return ""

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """End this process group and nothing else: SIGTERM, then SIGKILL to what is left after `timeout_s`."""
        if self.process is None:
            return
        if self.is_running:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=timeout_s)
        # Its id stays taken as long as anything is left in the group.
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None


def _free_port(host: str) -> int:
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
        return int(server.getsockname()[1])
