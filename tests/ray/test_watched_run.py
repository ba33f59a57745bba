"""One real run, looked at in every way: a browser on its dashboard, which also acts on it, and a real Prometheus.

The dashboard is read from the controller; a kill and a drain are asked for by clicks. Every expression of the Grafana
dashboard has data in Prometheus, and Ray's own agent exports the same.
"""

from __future__ import annotations

import json
import re
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

from orchestrator.dashboard.actor import start_in_cluster
from orchestrator.dashboard.controller_source import pick_run
from orchestrator.dashboard.ray_source import RaySource, runs_here
from orchestrator.dashboard.serve import on_thread
from orchestrator.dashboard.server import Dashboard
from orchestrator.dashboard.sources import FileSource
from orchestrator.ledger import ledger_command
from orchestrator.summary import Summary, load_summary
from orchestrator.telemetry.telemetry import target_file
from tests.browser.chromium import NAMES, Chromium, Page, find_chromium
from tests.ray.live_run import LiveRun
from tests.ray.prometheus import WAIT_S, Prometheus, expressions, until
from tests.small_run import small_config
from workers.records import LEFT, FaultRecord, FenceRecord, OperatorRecord, Record

BINARY = find_chromium()
needs_browser = pytest.mark.skipif(BINARY is None, reason=f"no browser: none of {', '.join(NAMES)} is installed")
pytestmark = [pytest.mark.ray, pytest.mark.browser, pytest.mark.timeout(200)]

DEAD_WITHIN_S = 3.0
# Notes when each state of each member is first shown after the click that asks for the kill, on the clock of the
# machine, as several pages look at it.
NOTE = """
window.seen = [];
window.now = () => performance.timeOrigin + performance.now();
new MutationObserver(() => {
  for (const row of document.querySelectorAll("#members tbody tr"))
    window.seen.push([window.now(), row.dataset.member, row.dataset.doing]);
}).observe(document.querySelector("#members tbody"), {subtree: true, childList: true, attributes: true});
const ask = window.fetch;
window.fetch = (...given) => { if (given[0] === "/api/act") window.asked = window.now(); return ask(...given); };
"""
ROW = "#members tr[data-member='{}']"
DEAD = "window.seen.find(([, name, doing]) => name === 'island-1' && doing === 'dead')"
# The last moment at which the curve of island-0 has a point.
LAST_T = """
(async () => {
  const end = (await (await fetch('/api/run')).json()).end_s;
  const s = await (await fetch(`/api/series?from=0&to=${end}&bins=400`)).json();
  return s.x[s.loss['island-0'].findLastIndex((v) => v !== null)];
})()
"""


DISABLED = """
Object.fromEntries([...document.querySelectorAll("#acts button")].map((one) => [one.textContent, one.disabled]))
"""


def wait_for(page: Page, condition: str, what: str, keep_going: Callable[[], object]) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (found := page.evaluate(condition)):
        assert time.monotonic() < deadline, f"waited {WAIT_S:g} s for {what}: {page.problems}"
        keep_going()
    return found


def click(page: Page, selector: str) -> None:
    page.evaluate(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
    left, top, width, height = page.evaluate(
        f"(() => {{ const b = document.querySelector({selector!r}).getBoundingClientRect();"
        " return [b.left, b.top, b.width, b.height]; })()"
    )
    page.click(left + width / 2, top + height / 2)


@dataclass(frozen=True, kw_only=True)
class Watched:
    """The run, and what looks at it."""

    run: LiveRun
    prometheus: Prometheus
    page: Page | None
    others: dict[str, Page]


@dataclass(frozen=True, kw_only=True)
class Shown:
    dead_after_s: dict[str, float]
    loss_before: dict[str, float]
    loss_after: dict[str, float]
    shots: list[Path]
    toasts: list[str]
    able: list[str]
    disabled: dict[str, bool]
    figures: dict[str, Any]
    records: list[Record]


@pytest.fixture(scope="module")
def watched(pack_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A run in `runs/` of a folder in which Prometheus was started, with its page in a browser."""
    folder = tmp_path_factory.mktemp("watched")
    (folder / "runs").mkdir()
    values = ("run.islands=3", "train.tokens=96_000", "strategy.inner_steps=4", "exchange.suspect_s=30")
    values += ("metrics.port=0", "metrics.ray=true", "metrics.tensorboard=true")
    note = folder / "note.py"
    note.write_text("import sys; open(sys.argv[1], 'a').write(sys.stdin.read())\n")
    values += (f"notify.command={sys.executable} {note} {folder / 'told'}",)
    values += ("notify.below_quorum_s=0.5",)
    config = small_config(pack_dir, *values)
    with ExitStack() as stack:
        prometheus = Prometheus(folder)
        stack.callback(prometheus.stop)
        run = LiveRun(config, pack_dir, folder / "runs" / "watched", pace_s=0.1)
        run.start()
        stack.callback(run.stop)
        page, others = None, dict[str, Page]()
        if BINARY is not None:
            run_id = pick_run(runs_here(), None)
            # As `atoll dashboard --address`, the actor of `--background`, and `atoll dashboard RUN_DIR` serve it.
            live = stack.enter_context(on_thread(Dashboard(RaySource(run_id, chaos=True))))
            files = stack.enter_context(on_thread(Dashboard(FileSource(run.run_dir))))
            actor = start_in_cluster(run_id, host="127.0.0.1", port=0, chaos=False)
            assert start_in_cluster(run_id, host="127.0.0.1", port=0, chaos=False) == actor, "there is one"
            browser = stack.enter_context(Chromium.launch(BINARY, folder / "profile"))
            page, others = browser.open(live), {"files": browser.open(files), "actor": browser.open(actor)}
        prometheus.wait_ready()
        run.until_training()
        yield Watched(run=run, prometheus=prometheus, page=page, others=others)


@pytest.fixture(scope="module")
def shown(watched: Watched) -> Shown:
    """What the pages showed of a kill and a drain that were asked for on one of them."""
    run, page = watched.run, watched.page
    assert page is not None
    pages = {"controller": page, **watched.others}
    before, dead_ms, after = dict[str, float](), dict[str, float](), dict[str, float]()
    for name, one in pages.items():
        wait_for(one, "document.querySelectorAll('#members tbody tr').length === 3", f"members, {name}", run.status)
        wait_for(one, "document.documentElement.dataset.drawn > 1", f"curves, {name}", run.status)
        before[name] = wait_for(one, LAST_T, f"a loss in the curve, {name}", run.status)
        one.evaluate(NOTE)
    able = page.evaluate("fetch('/api/run').then((a) => a.json()).then((run) => run.able)")
    click(page, f"{ROW.format('island-1')} button[data-act=kill]")
    click(page, "#ask button[value=yes]")
    for name, one in pages.items():
        dead_ms[name] = wait_for(one, DEAD, f"island-1 shown as dead, {name}", run.status)[0]
    asked_ms = page.evaluate("window.asked")
    toasts = [page.evaluate("document.getElementById('toast').textContent")]
    shots = page.keep("dashboard-after-a-kill")
    again = f"document.querySelector(\"{ROW.format('island-1')} .pick\").textContent === 'island-1.2'"
    for name, one in pages.items():
        wait_for(one, again, f"island-1.2, {name}", run.status)
        later = f"{LAST_T.strip()}.then((t) => t > {before[name]} && t)"
        after[name] = wait_for(one, later, f"the curve to go on, {name}", run.status)
    shots += page.keep("dashboard-when-it-is-back")
    click(page, f"{ROW.format('island-2')} button[data-act=drain]")
    click(page, "#ask button[value=yes]")
    left = "window.seen.find(([, name, doing]) => name === 'island-2' && doing === 'left')"
    wait_for(page, left, "island-2 shown as gone", run.status)
    toasts.append(page.evaluate("document.getElementById('toast').textContent"))
    return Shown(
        dead_after_s={name: (at_ms - asked_ms) / 1e3 for name, at_ms in dead_ms.items()},
        loss_before=before,
        loss_after=after,
        shots=shots,
        toasts=toasts,
        able=able,
        disabled=page.evaluate(DISABLED),
        figures=page.evaluate("fetch('/api/run').then((answer) => answer.json())"),
        records=run.records(),
    )


@pytest.fixture(scope="module")
def there(request: pytest.FixtureRequest, watched: Watched) -> set[str]:
    """Who is there after a death: the page's, or one that is caused where there is no browser."""
    if BINARY is not None:
        request.getfixturevalue("shown")
        return {"island-0.1", "island-1.2"}
    watched.run.kill_at("island-1", "offered")
    return {"island-0.1", "island-1.2", "island-2.1"}


@pytest.fixture(scope="module")
def summary(request: pytest.FixtureRequest, watched: Watched, there: set[str]) -> Summary:
    """The run is over: stopped from its page, which takes less time than its last tokens would."""
    run, page = watched.run, watched.page
    if page is None:
        return run.finish()
    page.evaluate("[...document.querySelectorAll('#acts button')].find((one) => one.textContent === 'stop').click()")
    click(page, "#ask button[value=yes]")
    until(lambda: run.status()["over"], "the run to be over")
    return load_summary(run.run_dir)


@needs_browser
def test_a_killed_island_shows_as_dead_within_three_seconds_on_every_page_and_the_curve_goes_on(shown: Shown) -> None:
    killed = [r for r in shown.records if isinstance(r, FaultRecord) and r.injected]
    assert [(r.fault, r.member) for r in killed] == [("kill", "island-1")]
    fences = [r for r in shown.records if isinstance(r, FenceRecord) and r.member == "island-1"]
    assert fences and fences[0].incarnation == 1
    print({name: round(seconds, 2) for name, seconds in shown.dead_after_s.items()})
    assert set(shown.dead_after_s) == {"controller", "files", "actor"}
    assert all(0 < seconds < DEAD_WITHIN_S for seconds in shown.dead_after_s.values()), shown.dead_after_s
    assert all(shown.loss_after[name] > before for name, before in shown.loss_before.items())


@needs_browser
def test_what_it_looked_like_is_kept(shown: Shown) -> None:
    """In the folder of `SHOTS`, for people; a picture of one colour alone would be far smaller."""
    assert len(shown.shots) == 8
    for path in shown.shots:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000, path


@needs_browser
def test_actions_are_journalled_with_what_came_of_them(shown: Shown) -> None:
    asked = [r for r in shown.records if isinstance(r, OperatorRecord)]
    assert [(r.action, r.member, r.outcome) for r in asked] == [
        ("kill", "island-1", "done"),
        ("drain", "island-2", "asked"),
    ]
    assert all(r.by.startswith("dashboard, 127.0.0.1") for r in asked)
    assert any(isinstance(r, FenceRecord) and r.member == "island-2" and r.why == LEFT for r in shown.records)
    assert shown.toasts == ["kill island-1: done", "drain island-2: asked"]


@needs_browser
def test_buttons_are_there_for_what_the_controller_can_do(shown: Shown) -> None:
    assert {"drain", "kill", "stop", "pause", "resume", "save"} <= set(shown.able)
    assert shown.disabled == {name: name not in shown.able for name in ("pause", "resume", "save", "stop")}


@needs_browser
def test_the_page_shows_the_ledger_and_what_happened(shown: Shown) -> None:
    assert shown.figures["ledger"]["committed"] > 0
    kinds = {(event["kind"], event["member"]) for event in shown.figures["events"]}
    assert {("kill", "island-1"), ("operator", "island-1"), ("operator", "island-2")} <= kinds


def test_a_dashboard_of_the_files_asks_the_controller_too(watched: Watched, there: set[str]) -> None:
    source = FileSource(watched.run.run_dir)
    try:
        source.refresh()
        assert "save" in source.able() and "kill" not in source.able()
        assert source.act("save", "", "dashboard of the files") == "asked"
    finally:
        source.close()
    asked = [r for r in watched.run.records() if isinstance(r, OperatorRecord)]
    assert (asked[-1].action, asked[-1].by, asked[-1].outcome) == ("save", "dashboard of the files", "asked")


def test_every_expression_of_the_dashboard_returns_data(watched: Watched, there: set[str]) -> None:
    run, prometheus = watched.run, watched.prometheus
    asked = expressions(pipeline=False)
    assert len(asked) >= 14
    prometheus.until_answered(asked, lambda: bool(run.status()["over"]))

    def workers() -> set[str]:
        return {entry["metric"]["worker"] for entry in prometheus.ask("query", query="atoll_island_up")["result"]}

    until(lambda: workers() == there, "the successor, and no sample of the dead")
    assert prometheus.ask("label/run/values") == ["watched"], "the variable of the dashboard"
    (target,) = [one for one in prometheus.ask("targets")["activeTargets"] if one["labels"]["job"] == "atoll"]
    assert target["health"] == "up" and f"http://{target['discoveredLabels']['__address__']}" in run.status()["metrics"]


def test_ray_exports_the_same_with_its_tags(watched: Watched, there: set[str]) -> None:
    run = watched.run
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


def test_somebody_is_woken_for_what_happened_and_told_of_the_end(watched: Watched, summary: Summary) -> None:
    told = (watched.run.run_dir.parents[1] / "told").read_text().splitlines()
    events = [json.loads(line) for line in told]
    assert {event["run"] for event in events} == {"watched"}
    kinds = [event["kind"] for event in events]
    assert {*kinds} == {"member_dead", "below_quorum", "finished"} and kinds[-1] == "finished"
    dead = [event for event in events if event["kind"] == "member_dead"]
    assert [event["member"] for event in dead] == ["island-1"] and dead[0]["detail"].startswith("died")
    assert "2 members live, 3 are needed" in next(e["detail"] for e in events if e["kind"] == "below_quorum")


def test_the_run_ends_with_its_trackers_and_takes_its_address_away(watched: Watched, summary: Summary) -> None:
    run_dir = watched.run.run_dir
    assert summary.exit_reason == ("stopped" if BINARY is not None else "done")
    assert ledger_command(run_dir, False) == 0
    assert list((run_dir / "tensorboard").glob("events*"))
    assert not target_file(run_dir).exists()
    assert "before open()" not in (run_dir / "logs" / "controller.log").read_text()


@needs_browser
def test_the_page_shows_the_end(watched: Watched, shown: Shown, summary: Summary) -> None:
    page = watched.page
    assert page is not None
    for name, one in {"controller": page, **watched.others}.items():
        wait_for(one, "document.getElementById('state').textContent === 'stopped'", f"the end, {name}", lambda: None)
        assert one.problems == [], name
    assert shown.figures["ledger"]["committed"] <= summary.tokens_committed
