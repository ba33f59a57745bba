"""A run that `atoll train` makes on the cluster of a lab, and what its files say while it goes on."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Self, TypeVar

from faults.lab.cluster import LabCluster
from orchestrator.config import RunConfig
from orchestrator.segments import read_run
from orchestrator.summary import Summary, load_summary
from workers.records import CommitRecord, FenceRecord, JoinRecord, MemberId, Record

T = TypeVar("T")
WAIT_S = 120.0
POLL_S = 0.1
END_S = 60.0


class LabRun:
    """`atoll train` on the first node of a lab; ends with its block."""

    def __init__(self, cluster: LabCluster, folder: Path, config: RunConfig) -> None:
        """Nothing is started before it is entered."""
        self.cluster, self.folder, self.config = cluster, folder, config
        self.run_dir = folder / "run"
        self.output = folder / "train.txt"
        self.process: subprocess.Popen[Any] | None = None

    def __enter__(self) -> Self:
        """Start."""
        (self.folder / "run.toml").write_text(self.config.to_toml())
        arguments = ["train", "run.toml", "--run-dir", str(self.run_dir), "--set", "run.address=auto"]
        with self.output.open("w") as out:
            self.process = self.cluster.atoll(
                self.cluster.head, arguments, cwd=self.folder, stdout=out, stderr=subprocess.STDOUT
            )
        return self

    def __exit__(self, *_: object) -> None:
        """End it, however far it is; what it started ends with its lab."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(timeout=END_S)

    # ------------------------------------------------------------ looking

    def until(self, condition: Callable[[], T | None], what: str) -> T:
        """Wait until `condition` gives something; fails with what it waited for, or if the run ends before."""
        assert self.process is not None
        deadline_s = time.monotonic() + WAIT_S
        while not (found := condition()):
            assert self.process.poll() is None, f"the run ended before {what}:\n{self._said()}"
            assert time.monotonic() < deadline_s, f"waited {WAIT_S:g} s for {what}:\n{self._said()}"
            time.sleep(POLL_S)
        return found

    def records(self) -> list[Record]:
        """The journal so far."""
        if not (self.run_dir / "journal.jsonl").exists():
            return []
        return [row.record for row in read_run(self.run_dir).rows]

    def commits(self) -> list[CommitRecord]:
        """The commits so far."""
        return [record for record in self.records() if isinstance(record, CommitRecord)]

    def commits_with(self, names: Collection[str], *, after: int = 0) -> list[CommitRecord]:
        """Those commits, `after` the first so many, that have all of these islands in their rosters."""
        return [c for c in self.commits()[after:] if set(names) <= {entry.member for entry in c.roster}]

    def last_commit_of(self, names: Collection[str], *, after: int = 0) -> CommitRecord | None:
        """The first of `commits_with`."""
        return next(iter(self.commits_with(names, after=after)), None)

    def current(self, name: str) -> MemberId:
        """The newest incarnation of an island."""
        joins = [r for r in self.records() if isinstance(r, JoinRecord) and r.member == name]
        return MemberId(name=name, incarnation=joins[-1].incarnation)

    def fenced(self, member: MemberId) -> bool:
        """Whether an incarnation is fenced."""
        return any(
            isinstance(r, FenceRecord) and (r.member, r.incarnation) == (member.name, member.incarnation)
            for r in self.records()
        )

    def logged(self) -> dict[str, tuple[int, str]]:
        """Island -> process id and host name of its newest process, by the islands' own logs."""
        found: dict[str, tuple[int, str]] = {}
        for path in sorted((self.run_dir / "logs").glob("island-*.log"), key=lambda path: path.stat().st_mtime):
            for name, pid, host in re.findall(r"(island-\d+) is process (\d+) on (\S+)", path.read_text()):
                found[name] = (int(pid), host)
        return found

    def pids(self) -> dict[str, int]:
        """Island -> process id; all of them are alive."""
        pids = {name: pid for name, (pid, _) in self.logged().items()}
        inside = {one.pid for node in self.cluster.lab.nodes for one in self.cluster.lab.processes(node)}
        assert set(pids.values()) <= inside, f"of {pids} some have ended"
        return pids

    def island_on(self, node: str) -> str:
        """The island that runs on a node of the lab."""
        [name] = [name for name, (_, host) in self.logged().items() if host == node]
        return name

    # ------------------------------------------------------------ the end

    def finish(self, *, within_s: float = WAIT_S) -> Summary:
        """Wait for the end."""
        assert self.process is not None
        try:
            code = self.process.wait(timeout=within_s)
        except subprocess.TimeoutExpired:
            code = None
        assert code == 0, f"exit code {code}:\n{self._said()}"
        return load_summary(self.run_dir)

    def _said(self) -> str:
        log = self.run_dir / "logs" / "controller.log"
        controller = log.read_text()[-6000:] if log.exists() else "(no log of the controller)"
        return f"{self.output.read_text()[-3000:]}\n{controller}"
