"""Debian's Prometheus with our configuration beside a run, and what Grafana's dashboard asks it."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from orchestrator.telemetry.catalogue import BY_NAME, ISLANDS, PIPELINES

MONITORING = Path(__file__).resolve().parents[2] / "cluster_configs" / "monitoring"
DASHBOARD = MONITORING / "grafana-dashboard.json"
POLL_S = 0.2
WAIT_S = 60.0


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {WAIT_S:g} s for {what}"
        time.sleep(POLL_S)
    return found


def metrics_of(expression: str) -> set[str]:
    return set(re.findall(r"atoll_\w+", expression))


def expressions(*, pipeline: bool) -> list[str]:
    """What the dashboard asks of such a run: all expressions without a metric that only the other kind has."""
    others = {metric.name for metric in (ISLANDS if pipeline else PIPELINES)}
    board = json.loads(DASHBOARD.read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    assert {name for expression in found for name in metrics_of(expression)} <= BY_NAME.keys()
    asked = [expression for expression in found if not metrics_of(expression) & others]
    return [expression.replace("$run", ".*").replace("$__rate_interval", "15s") for expression in asked]


class Prometheus:
    """It looks more often than it would with our configuration as it is, so that the test is short."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("prometheus")
        assert program is not None, "no prometheus: apt-get install prometheus (.ci/run does it)"
        text = (MONITORING / "prometheus.yml").read_text()
        text, hurried = re.subn(r"scrape_interval: 2s", "scrape_interval: 250ms", text)
        text, found = re.subn(r"refresh_interval: 5s", "refresh_interval: 250ms", text)
        assert hurried == found == 1
        (folder / "prometheus.yml").write_text(text)
        self.log = folder / "prometheus.log"
        # It can be told any free port (0), and does not tell which one it took.
        with closing(socket.create_server(("127.0.0.1", 0))) as free:
            self.address = "{}:{}".format(*free.getsockname())
        arguments = ["--config.file=prometheus.yml", "--storage.tsdb.path=data"]
        arguments += [f"--web.listen-address={self.address}"]
        with self.log.open("w") as out:
            self.process = subprocess.Popen([program, *arguments], cwd=folder, stdout=out, stderr=subprocess.STDOUT)

    def wait_ready(self) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            return "Server is ready" in self.log.read_text()

        until(ready, "Prometheus to be ready")

    def ask(self, path: str, **query: str) -> Any:
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 503:  # it replays its log
                    return {}
                raise AssertionError(f"{query}: {error.read().decode()}") from error

    def until_answered(self, asked: list[str], is_over: Callable[[], bool]) -> None:
        """Every expression has data, while the run goes on."""
        silent = set(asked)

        def all_answered() -> bool:
            assert not is_over(), f"the run ended while these had no data: {silent}"
            for expression in list(silent):
                if self.ask("query", query=expression).get("result"):
                    silent.discard(expression)
            return not silent

        until(all_answered, f"data of {silent}")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=20)
