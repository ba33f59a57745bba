"""A real Prometheus beside a real run: every expression of the dashboard has data, and so has Ray's own agent."""

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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import ray

from orchestrator.telemetry.catalogue import BY_NAME
from orchestrator.telemetry.telemetry import target_file
from tests.ray.live_run import LiveRun
from tests.small_run import small_config

pytestmark = [pytest.mark.ray, pytest.mark.timeout(150)]

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "cluster_configs" / "monitoring"
WAIT_S = 60.0
POLL_S = 0.2


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {WAIT_S:g} s for {what}"
        time.sleep(POLL_S)
    return found


class Prometheus:
    """Debian's Prometheus with our configuration, looking more often than there so that the test is short."""

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

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=20)


def dashboard_expressions() -> list[str]:
    board = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return [expr.replace("$run", ".*").replace("$__rate_interval", "15s") for expr in found]


@pytest.fixture(scope="module")
def watched(pack_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveRun, Prometheus]]:
    """A run in `runs/` of a folder in which Prometheus was started; one of its islands was killed and is back."""
    folder = tmp_path_factory.mktemp("watched")
    (folder / "runs").mkdir()
    values = ("run.islands=2", "train.tokens=64000", "strategy.inner_steps=4", "metrics.port=0", "metrics.ray=true")
    values += ("metrics.tensorboard=true",)
    config = small_config(pack_dir, *values)
    with ExitStack() as stack:
        prometheus = Prometheus(folder)
        stack.callback(prometheus.stop)
        prometheus.wait_ready()
        run = LiveRun(config, pack_dir, folder / "runs" / "watched", pace_s=0.1)
        run.start()
        stack.callback(run.stop)
        run.until_training()
        run.kill_at("island-1", "offered")
        yield run, prometheus


def test_every_expression_of_the_dashboard_returns_data(watched: tuple[LiveRun, Prometheus]) -> None:
    run, prometheus = watched
    expressions = dashboard_expressions()
    assert len(expressions) >= 14
    silent = set(expressions)

    def all_answered() -> bool:
        assert not run.status()["over"], f"the run ended while these had no data: {silent}"
        for expression in list(silent):
            if prometheus.ask("query", query=expression).get("result"):
                silent.discard(expression)
        return not silent

    until(all_answered, f"data of {silent}")
    names = {name for expression in expressions for name in re.findall(r"atoll_\w+", expression)}
    assert names <= BY_NAME.keys()

    def workers() -> set[str]:
        return {entry["metric"]["worker"] for entry in prometheus.ask("query", query="atoll_island_up")["result"]}

    until(lambda: workers() == {"island-0.1", "island-1.2"}, "the successor, and no sample of the dead")
    assert prometheus.ask("label/run/values") == ["watched"], "the variable of the dashboard"
    (target,) = [one for one in prometheus.ask("targets")["activeTargets"] if one["labels"]["job"] == "atoll"]
    assert target["health"] == "up" and f"http://{target['discoveredLabels']['__address__']}" in run.status()["metrics"]


def test_ray_exports_the_same_with_its_tags(watched: tuple[LiveRun, Prometheus]) -> None:
    run, _ = watched
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def exported() -> list[str]:
        assert not run.status()["over"]
        with urllib.request.urlopen(address, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        ours = [line for line in lines if re.match(r"ray_atoll_island_(steps|sent_bytes)_total\{", line)]
        return ours if any('worker="island-1.2"' in line for line in ours) else []

    lines = until(exported, f"island-1.2 at {address}")
    assert any('run="watched"' in line and 'island="island-0"' in line for line in lines)


def test_the_run_ends_with_its_trackers_and_takes_its_address_away(watched: tuple[LiveRun, Prometheus]) -> None:
    run, _ = watched
    assert run.finish().exit_reason == "done"
    assert list((run.run_dir / "tensorboard").glob("events*"))
    assert not target_file(run.run_dir).exists()
    assert "before open()" not in (run.run_dir / "logs" / "controller.log").read_text()
