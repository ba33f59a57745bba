"""A real Ray cluster across the nodes of a lab, made with the commands that machines use: `atoll up`, `atoll join`.

    with Lab(topology) as lab:
        cluster = LabCluster(lab)
        cluster.start()
        lab.kill("eu-1")
        cluster.join("eu-1")

Each node has a host name, a state directory and a temporary directory of its own (`Lab.environment`). The processes go
on in the background; they end with the lab, or with `Lab.kill`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from faults.lab.errors import LabError
from faults.lab.lab import ROOT, Lab

RECORD = "cluster.json"
START_TIMEOUT_S = 240.0
LAST_LINES = 12
ATOLL = (sys.executable, "-m", "orchestrator.cli.main")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterRecord:
    """How more nodes join.

    Attributes:
        head: the node where `atoll up` runs.
        address: of Ray.
        door: where machines join.
        token: of the cluster.
    """

    head: str
    address: str
    door: str
    token: str
    workers: int
    wan: bool


class LabCluster:
    """The Ray cluster of a lab; see the module.

    Args:
        lab: one that runs.
        workers: islands that each node may hold.
        wan: whether Ray is told that its nodes are far apart (`atoll up --wan`).
    """

    def __init__(self, lab: Lab, *, workers: int = 1, wan: bool = True) -> None:
        self.lab, self.workers, self.wan = lab, workers, wan
        self._record: ClusterRecord | None = None

    @classmethod
    def attach(cls, lab: Lab) -> Self:
        """The cluster that runs in a lab.

        Raises:
            LabError: there is none.
        """
        try:
            values = json.loads((lab.folder / RECORD).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise LabError(f"lab {lab.name!r} has no cluster", remedy="atoll lab up without --links-only") from error
        record = ClusterRecord(**values)
        cluster = cls(lab, workers=record.workers, wan=record.wan)
        cluster._record = record
        return cluster

    @property
    def head(self) -> str:
        """The node where `atoll up` runs: the first one of the topology."""
        return self.lab.nodes[0]

    @property
    def address(self) -> str:
        """`HOST:PORT` of Ray."""
        return self._started().address

    def start(self) -> None:
        """Start the head, then let all other nodes join at once.

        Raises:
            LabError: one of them does not start; says which, and its last words.
        """
        assert self._record is None, "start() was called twice"
        up = ["up", "--host", self.lab.address(self.head), "--workers", str(self.workers), "--json", "--background"]
        said = self._wait(self.head, self._begin(self.head, [*up, *["--wan"] * self.wan]))
        token, _, door = said["join"].partition("://")[2].partition("@")
        self._record = ClusterRecord(
            head=self.head, address=said["address"], door=door, token=token, workers=self.workers, wan=self.wan
        )
        record = self.lab.folder / RECORD
        with open(os.open(record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump(asdict(self._record), file)
        self.join(*self.lab.nodes[1:])

    def join(self, *nodes: str) -> None:
        """Let nodes join, at once: those of the topology at the start, and one that was killed.

        Raises:
            LabError: one of them does not start; says which, and its last words.
        """
        record = self._started()
        command = ["join", record.door, "--workers", str(record.workers), "--background"]
        begun = [(node, self._begin(node, command, token=record.token)) for node in nodes]
        for node, process in begun:
            self._wait(node, process)

    def atoll(self, node: str, arguments: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start an `atoll` command on a node; options as for `subprocess.Popen`."""
        environment = {**self.lab.environment(node), **options.pop("env", {})}
        path = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path))
        return self.lab.popen(node, [*ATOLL, *arguments], env={**os.environ, **environment}, **options)

    def _started(self) -> ClusterRecord:
        if self._record is None:
            raise LabError(f"the cluster of lab {self.lab.name!r} is not running", remedy="cluster.start()")
        return self._record

    def _begin(self, node: str, arguments: Sequence[str], *, token: str | None = None) -> subprocess.Popen[str]:
        """What it says goes into a file: those whom it starts may keep their end of a pipe open."""
        environment = {} if token is None else {"ATOLL_TOKEN": token}
        with open(self._log(node, "out"), "w") as out, open(self._log(node, "err"), "w") as err:
            return self.atoll(
                node, arguments, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=ROOT
            )

    def _wait(self, node: str, process: subprocess.Popen[str]) -> dict[str, Any]:
        """What a command said that is ready."""
        try:
            code = process.wait(timeout=START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            code = None
            process.kill()
            process.wait()
        if code != 0:
            lines = self._log(node, "err").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            why = f"exit code {code}" if code is not None else f"not ready after {START_TIMEOUT_S:g} s"
            raise LabError(
                f"Ray did not start on {node}: {why}; its last words are:\n" + "\n".join(lines[-LAST_LINES:])
            )
        text = self._log(node, "out").read_text(encoding="utf-8").strip()
        result: dict[str, Any] = json.loads(text.splitlines()[-1]) if text else {}
        return result

    def _log(self, node: str, kind: str) -> Path:
        return self.lab.folder / f"{node}.{kind}"
