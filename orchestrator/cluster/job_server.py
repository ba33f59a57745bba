"""Ray's job server beside a head that was started without one: it begins when somebody asks for it, or with `--jobs`.

`ray start --include-dashboard` would start it with eleven other processes, and let `atoll up` wait for them. What takes
jobs is two of their modules: `JobHead`, and `NodeHead`, which tells it where the head's agent is. Ray itself asks for
the cluster's token, as everywhere.
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from orchestrator.cluster.join_string import format_address
from orchestrator.errors import ClusterUnreachable

MODULES = "JobHead,NodeHead"
LOG = "job_server.log"
START_S, ASK_S, POLL_S, STOP_S = 45.0, 2.0, 0.05, 5.0
LOG_BYTES = 16 * 1024 * 1024
LAST_CHARACTERS = 600


@dataclass(frozen=True, kw_only=True, slots=True)
class JobServerArguments:
    """What a job server is told.

    Attributes:
        host: the address that it listens at, where others reach this machine.
        port: 0 for any free one.
        ray_folder: of the head's Ray.
    """

    host: str
    port: int
    gcs_address: str
    ray_folder: Path
    token: str

    def command_line(self, port: int) -> list[str]:
        """For `orchestrator.cluster.job_server`, which becomes Ray's own process."""
        session = (self.ray_folder / "session_latest").resolve()
        return [
            f"--host={self.host}",
            f"--port={port}",
            "--port-retries=0",
            f"--temp-dir={self.ray_folder}",
            f"--session-dir={session}",
            f"--log-dir={session / 'logs'}",
            f"--gcs-address={self.gcs_address}",
            f"--node-ip-address={self.host}",
            f"--modules-to-load={MODULES}",
            f"--logging-rotate-bytes={LOG_BYTES}",
            "--logging-rotate-backup-count=1",
        ]


class JobServer:
    """At most one process; started by whoever asks first, ended with the cluster's Ray."""

    def __init__(self, environment: Mapping[str, str], log_file: Path) -> None:
        """Nothing is started before `address`."""
        self._environment, self._log_file = environment, log_file
        # The kernel ends a child with the thread that started it (`end_with`): not one that answers a single visitor.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="jobs")
        self._process: subprocess.Popen[bytes] | None = None
        self._address = ""

    def address(self, arguments: JobServerArguments) -> str:
        """`http://HOST:PORT`, once it answers there.

        Raises:
            ClusterUnreachable: it ended, or did not answer in time.
        """
        return self._thread.submit(self._find_or_start, arguments).result()

    def stop(self) -> None:
        """End it, and what it has started; it may be started again."""
        self._thread.submit(self._end).result()

    def close(self) -> None:
        """End it for good."""
        self.stop()
        self._thread.shutdown()

    def _find_or_start(self, arguments: JobServerArguments) -> str:
        if self._process is None or self._process.poll() is not None:
            self._start(arguments)
        return self._address

    def _start(self, arguments: JobServerArguments) -> None:
        self._end()
        port = arguments.port or _free_port(arguments.host)
        command = [sys.executable, "-m", "orchestrator.cluster.job_server", str(os.getpid())]
        with self._log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *arguments.command_line(port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(self._environment),
                start_new_session=True,
            )
        deadline_s = time.monotonic() + START_S
        while not _answers(arguments.host, port, arguments.token):
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                what = "ended while it started" if self._process.poll() is not None else "did not answer in time"
                words = self._last_words()
                self._end()
                raise ClusterUnreachable(
                    f"Ray's job server {what}:\n{words}",
                    place=format_address(arguments.host, port),
                    remedy="another --jobs-port of atoll up, or atoll train with run.address = auto on the head",
                )
            time.sleep(POLL_S)
        self._address = f"http://{format_address(arguments.host, port)}"

    def _last_words(self) -> str:
        with suppress(OSError):
            return self._log_file.read_text(errors="replace")[-LAST_CHARACTERS:].strip()
        return ""

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=STOP_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(host: str, port: int, token: str) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=ASK_S)
    try:
        connection.request("GET", "/api/version", headers={"Authorization": f"Bearer {token}"})
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _free_port(host: str) -> int:
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
        return int(server.getsockname()[1])


def main() -> None:
    """Ask Ray for the cluster's id, then become its dashboard's process; ends with the supervisor."""
    from orchestrator.cluster.ray_process import end_with

    end_with(int(sys.argv[1]))
    arguments = sys.argv[2:]
    [gcs_address] = [text.partition("=")[2] for text in arguments if text.startswith("--gcs-address=")]
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    cluster_id = GcsClient(address=gcs_address).cluster_id.hex()
    command = [sys.executable, "-m", "ray.dashboard.dashboard", *arguments, f"--cluster-id-hex={cluster_id}"]
    os.execv(sys.executable, [*command, "--logging-filename="])


if __name__ == "__main__":
    main()
