"""What leaves the controller: every metric of the catalogue from a real run, over a real port, into real trackers."""

from __future__ import annotations

import json
import logging
import queue
import socket
import sqlite3
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.config import make_config
from orchestrator.errors import UserError
from orchestrator.local import LocalRun
from orchestrator.metrics import EvalRow, StepRow
from orchestrator.settings import MetricsConfig
from orchestrator.telemetry import trackers
from orchestrator.telemetry.catalogue import ALL, BY_NAME, COMMON, ISLANDS, PIPELINES, Sample, sample
from orchestrator.telemetry.exposition import CONTENT_TYPE, render
from orchestrator.telemetry.server import MetricsServer, may_ask
from orchestrator.telemetry.telemetry import Telemetry, target_file
from tests.ray.prometheus import DASHBOARD, metrics_of
from tests.small_run import make_pack, small_config

ROOT = Path(__file__).resolve().parents[3]
STEP = StepRow(t_s=1.0, member="island-0", incarnation=1, step=4, progress=0.1, loss=2.5, tokens_per_s=9.0, step_ms=2.0)


def watched_run(tmp_path: Path, *values: str) -> tuple[LocalRun, Telemetry]:
    config = small_config(make_pack(tmp_path), "run.islands=2", "train.tokens=2560", *values)
    run = LocalRun(config, tmp_path / "run")
    run.start()
    telemetry = Telemetry(run.config, tmp_path / "run")
    telemetry.start(run.host)
    return run, telemetry


def fetch(url: str, host: str | None = None) -> tuple[int, str, str]:
    request = urllib.request.Request(url, headers={"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode(), answer.headers["Content-Type"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), ""


def test_every_metric_is_served_with_what_the_run_knows(tmp_path: Path) -> None:
    run, telemetry = watched_run(tmp_path, "metrics.port=0")
    run.run(until=lambda: run.host.coordinator.progress() > 0.3)
    run.kill("island-1")
    finished = run.run(max_turns=4000)
    assert finished is not None and finished.reason == "done"
    telemetry.published_s = float("-inf")
    telemetry.tick(run.host)
    assert telemetry.server is not None
    (entry,) = json.loads(target_file(tmp_path / "run").read_text())
    status, text, kind = fetch(f"http://{entry['targets'][0]}/metrics")
    assert status == 200 and kind == CONTENT_TYPE
    families = {family.name: family for family in text_string_to_metric_families(text)}
    served = {one.name for family in families.values() for one in family.samples}
    assert served == {metric.name for metric in (*COMMON, *ISLANDS)}
    values = {(one.name, *one.labels.values()): one.value for f in families.values() for one in f.samples}
    coordinator, name = run.host.coordinator, tmp_path.joinpath("run").name
    assert values["atoll_tokens_committed_total", name] == coordinator.state.samples_committed() * run.host.plan.seq_len
    assert values["atoll_progress_ratio", name] == 1.0
    assert values["atoll_version", name, "0"] == coordinator.state.heads[0].version.n
    assert values["atoll_faults_total", name, "kill"] == 1
    assert values["atoll_validation_loss", name] == pytest.approx(coordinator.state.evaluations[-1].val_loss)
    workers = {one.labels["worker"] for one in families["atoll_island_up"].samples}
    assert workers == {"island-0.1", "island-1.2"}, "the dead incarnation has no sample"
    telemetry.stop()
    run.close()
    assert not target_file(tmp_path / "run").exists()


def test_names_and_labels_keep_the_conventions() -> None:
    assert len(BY_NAME) == len(ALL)
    for metric in ALL:
        assert metric.name.startswith("atoll_") and metric.labels[0] == "run"
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert ("island" in metric.labels) == metric.name.startswith("atoll_island_") == ("worker" in metric.labels)


def test_the_reference_has_every_metric_with_its_labels_and_meaning() -> None:
    text = (ROOT / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `atoll_")]
    wanted = [f"| `{m.name}` | {m.kind} | {', '.join(f'`{name}`' for name in m.labels)} | {m.help} |" for m in ALL]
    assert rows == wanted


def test_grafana_has_a_row_for_each_kind_of_run_and_a_place_for_every_panel() -> None:
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    shown: dict[str, set[str]] = {}
    taken: set[tuple[int, int]] = set()
    row = ""
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
        row = panel["title"] if panel["type"] == "row" else row
        names = shown.setdefault(row, set())
        names |= {name for target in panel.get("targets", ()) for name in metrics_of(target["expr"])}
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    common, islands, pipelines = ({metric.name for metric in kind} for kind in (COMMON, ISLANDS, PIPELINES))
    assert shown["Runs"] <= common | {"atoll_suspect_members"}
    assert shown["Islands"] <= islands | {"atoll_version"}
    assert shown["Pipelines"] == pipelines, "all of them: nothing else shows a pipeline over weeks"


def test_text_of_what_is_unusual() -> None:
    text = render([sample("validation_loss", float("nan"), 'a"b\\c\nd'), sample("run_seconds", 0.5, "x")])
    (loss,) = next(f for f in text_string_to_metric_families(text) if f.name == "atoll_validation_loss").samples
    assert loss.labels == {"run": 'a"b\\c\nd'} and loss.value != loss.value
    with pytest.raises(AssertionError, match="has the labels"):
        sample("run_seconds", 1.0, "a", "b")


def test_a_run_in_a_script_has_its_metrics_too(tmp_path: Path) -> None:
    import torch

    import atoll

    model = torch.nn.Sequential(torch.nn.Embedding(256, 8), torch.nn.Linear(8, 256))
    optimizer = torch.optim.AdamW(model.parameters())
    config = {"data.path": make_pack(tmp_path), "train.tokens": 2560, "metrics.port": 0, "strategy.inner_steps": 4}
    text = ""
    with atoll.Island(model, optimizer, config, run_dir=tmp_path / "run") as island:
        for batch in island.batches():
            loss = torch.nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            island.step(loss)
            if "atoll_run_seconds" not in text:
                (entry,) = json.loads(target_file(tmp_path / "run").read_text())
                text = fetch(f"http://{entry['targets'][0]}/metrics")[1]
    assert 'atoll_run_seconds{run="run"}' in text
    assert not target_file(tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"metrics.ray = true, but this run is in one process"):
        atoll.Island(model, optimizer, {**config, "metrics.ray": True}, run_dir=tmp_path / "other").__enter__()


@contextmanager
def serving(samples: list[Sample]) -> Iterator[str]:
    server = MetricsServer(host="127.0.0.1", port=0)
    server.start()
    server.publish(samples)
    try:
        yield server.target
    finally:
        server.stop()


def test_other_names_paths_and_methods_are_refused() -> None:
    with serving([sample("run_seconds", 1.0, "x")]) as target:
        assert fetch(f"http://{target}/metrics")[1].endswith('atoll_run_seconds{run="x"} 1\n')
        assert fetch(f"http://{target}/metrics", host="localhost:1")[0] == 200
        assert fetch(f"http://{target}/metrics", host="attacker.example")[0] == 403
        assert fetch(f"http://{target}/")[0] == 404 and fetch(f"http://{target}/../config.toml")[0] == 404
        with pytest.raises(urllib.error.HTTPError, match="405") as refused:
            urllib.request.urlopen(f"http://{target}/metrics", data=b"x", timeout=10)
        refused.value.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://{target}/metrics", timeout=10)
    assert may_ask("node-3:9000", "10.0.0.3") and may_ask("[::1]:9000", "::1") and not may_ask("node-3", "::1")


def test_a_port_that_is_taken_is_told_and_the_run_goes_on(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        run, telemetry = watched_run(tmp_path, f"metrics.port={port}")
        assert telemetry.told.startswith(f"no metrics: cannot listen at 127.0.0.1:{port} (metrics.port): ")
        assert run.run(max_turns=4000) is not None
        telemetry.tick(run.host)
        telemetry.stop()
        run.close()


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, telemetry = watched_run(tmp_path, "metrics.tensorboard=true")
    assert run.run(max_turns=4000) is not None
    telemetry.stop()
    run.close()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"island-0/loss", "island-1/lr", "run/val_loss", "fragment-0/bytes"} <= tags
    losses = [event.value for event in events.Scalars("run/val_loss")]
    found = [evaluation.val_loss for evaluation in run.host.coordinator.state.evaluations]
    assert losses == pytest.approx(found)
    steps = [event.step for event in events.Scalars("island-0/loss")]
    assert steps == sorted(steps) and steps[-1] > 0


@pytest.mark.filterwarnings("ignore")  # of trackio's own imports
def test_trackio_reads_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run, telemetry = watched_run(tmp_path, "metrics.tracker=trackio", "metrics.project=reefs")
    assert run.run(max_turns=4000) is not None
    telemetry.stop()
    run.close()
    assert not telemetry.trackers[0].failed
    (file,) = (tmp_path / "trackio").glob("reefs*.db")
    with closing(sqlite3.connect(file)) as database:
        rows = [json.loads(row[0]) for row in database.execute("select metrics from metrics where run_name = 'run'")]
    losses = [row["run/val_loss"] for row in rows if "run/val_loss" in row]
    assert losses == pytest.approx([e.val_loss for e in run.host.coordinator.state.evaluations])
    assert any("island-1/tokens_per_s" in row for row in rows) and max(row["tokens"] for row in rows) > 0


class Stubborn:
    """A tracker that breaks at its second row, or never takes the first."""

    def __init__(self, hold: threading.Event | None = None) -> None:
        self.hold, self.rows = hold, 0

    def write(self, values: dict[str, float], step: int) -> None:
        self.rows += 1
        if self.hold is not None:
            self.hold.wait(10)
        elif self.rows == 2:
            raise RuntimeError("the server is on fire")

    def close(self) -> None:
        assert self.rows


def started(monkeypatch: pytest.MonkeyPatch, tracker: Stubborn) -> trackers.TrackerThread:
    monkeypatch.setattr(trackers, "open_tracker", lambda *_: tracker)
    thread = trackers.TrackerThread("trackio", MetricsConfig(), Path("run"), {})
    thread.start()
    return thread


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_tracker_that_breaks_does_not_stop_the_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, logger="atoll.controller"):
        thread = started(monkeypatch, Stubborn())
        thread.note(dict(trackers.points(STEP)), 1)
        thread.note(dict(trackers.points(STEP)), 2)
        thread.stop()
    assert thread.failed and "trackio ends; the run goes on without it" in caplog.text
    thread.note(dict(trackers.points(STEP)), 3)  # nobody reads it any more, and nobody waits


def test_a_tracker_that_is_slow_loses_rows_and_counts_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers, "MAX_WAITING", 3)
    release = threading.Event()
    thread = started(monkeypatch, Stubborn(release))
    for _ in range(20):
        thread.note(dict(trackers.points(STEP)), 1)
    assert thread.dropped >= 16
    release.set()
    with caplog.at_level(logging.WARNING, logger="atoll.controller"):
        thread.stop()
    assert f"{thread.dropped} rows are not in it" in caplog.text
    assert isinstance(thread._queue, queue.Queue)


def test_curves_of_rows() -> None:
    assert dict(trackers.points(STEP)) == {"island-0/loss": 2.5, "island-0/tokens_per_s": 9.0, "island-0/step_ms": 2.0}
    row = EvalRow(t_s=1.0, member="island-0", version=1, progress=0.1, val_loss=None, tokens_committed=1)
    assert dict(trackers.points(row)) == {}


@pytest.mark.parametrize(
    ("settings", "package"),
    [({"tensorboard": True}, "tensorboardX"), ({"tracker": "wandb"}, "wandb"), ({"tracker": "trackio"}, "trackio")],
)
def test_a_package_that_is_missing_is_found_before_the_run(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], package: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"needs the package {package}.*pip install 'atoll\["):
        trackers.check_installed(MetricsConfig.model_validate(settings))


def test_nothing_is_started_unless_it_is_asked_for(tmp_path: Path) -> None:
    telemetry = Telemetry(make_config({"data.corpus": "stdlib"}), tmp_path)
    assert telemetry.trackers == [] and telemetry.server is None and telemetry.config.port is None
    assert telemetry.config.host == "127.0.0.1"
    trackers.check_installed(telemetry.config)
