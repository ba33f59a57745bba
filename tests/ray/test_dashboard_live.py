"""The dashboard on a real run: read from the controller, looked at in a real browser, and acted through.

One run goes through a kill and a drain that are asked for by clicks; the tests look at what the page showed.
"""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.dashboard.actor import start_in_cluster
from orchestrator.dashboard.ray_source import RaySource, pick_run, runs_here
from orchestrator.dashboard.serve import on_thread
from orchestrator.dashboard.server import Dashboard
from orchestrator.ledger import ledger_command
from orchestrator.summary import Summary
from tests.browser.chromium import NAMES, Chromium, Page, find_chromium
from tests.ray.live_run import LiveRun
from tests.small_run import small_config
from workers.records import LEFT, FaultRecord, FenceRecord, OperatorRecord, Record

BINARY = find_chromium()
pytestmark = [
    pytest.mark.ray,
    pytest.mark.browser,
    pytest.mark.timeout(200),
    pytest.mark.skipif(BINARY is None, reason=f"no browser: none of {', '.join(NAMES)} is installed"),
]
DEAD_WITHIN_S = 3.0
WAIT_S = 60.0
# Notes when each state of each member is first shown after the click that asks for the kill.
NOTE = """
window.seen = [];
new MutationObserver(() => {
  for (const row of document.querySelectorAll("#members tbody tr"))
    window.seen.push([performance.now(), row.dataset.member, row.dataset.doing]);
}).observe(document.querySelector("#members tbody"), {subtree: true, childList: true, attributes: true});
const ask = window.fetch;
window.fetch = (...given) => { if (given[0] === "/api/act") window.asked = performance.now(); return ask(...given); };
"""


DISABLED = """
Object.fromEntries([...document.querySelectorAll("#acts button")].map((one) => [one.textContent, one.disabled]))
"""


@dataclass(frozen=True, kw_only=True)
class Shown:
    dead_after_s: float
    loss_before: float
    loss_after: float
    toasts: list[str]
    able: list[str]
    disabled: dict[str, bool]
    problems: list[str]
    figures: dict[str, Any]
    records: list[Record]
    summary: Summary
    run_dir: Path
    ended_state: str
    links: list[str]
    status_of_actor: int


def wait_for(page: Page, condition: str, what: str, keep_going: Callable[[], object]) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (found := page.evaluate(condition)):
        assert time.monotonic() < deadline, f"waited {WAIT_S:g} s for {what}: {page.problems}"
        keep_going()
    return found


def ask_actor(link: str) -> int:
    address, _, token = link.partition("#token=")
    request = urllib.request.Request(f"{address}api/run", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
        assert b"island-0" in answer.read()
        return int(answer.status)


def click(page: Page, selector: str) -> None:
    page.evaluate(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
    left, top, width, height = page.evaluate(
        f"(() => {{ const b = document.querySelector({selector!r}).getBoundingClientRect();"
        " return [b.left, b.top, b.width, b.height]; })()"
    )
    page.click(left + width / 2, top + height / 2)


@pytest.fixture(scope="module")
def shown(ray_cluster: None, pack_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    assert BINARY is not None
    folder = tmp_path_factory.mktemp("watched")
    config = small_config(
        pack_dir, "run.islands=3", "train.tokens=40_000", "strategy.inner_steps=4", "exchange.suspect_s=30"
    )
    run = LiveRun(config, pack_dir, folder / "run", pace_s=0.1)
    run.start()
    try:
        run_id = pick_run(runs_here(), None)
        source = RaySource(run_id, chaos=True)
        with on_thread(Dashboard(source)) as link, Chromium.launch(BINARY, folder / "profile") as browser:
            page = browser.open(link)
            run.until_training()
            row = "#members tr[data-member='{}']"
            wait_for(page, "document.querySelectorAll('#members tbody tr').length === 3", "three members", run.status)
            wait_for(page, "document.documentElement.dataset.drawn > 1", "curves", run.status)
            last_t = "(async () => { const end = (await (await fetch('/api/run')).json()).end_s;"
            last_t += " const s = await (await fetch(`/api/series?from=0&to=${end}&bins=400`)).json();"
            last_t += " return s.x[s.loss['island-0'].findLastIndex((v) => v !== null)]; })()"
            loss_before = wait_for(page, last_t, "a loss in the curve", run.status)
            page.evaluate(NOTE)
            able = page.evaluate("fetch('/api/run').then((a) => a.json()).then((run) => run.able)")
            click(page, f"{row.format('island-1')} button[data-act=kill]")
            click(page, "#ask button[value=yes]")
            dead = "window.seen.find(([, name, doing]) => name === 'island-1' && doing === 'dead')"
            at_ms = wait_for(page, dead, "island-1 shown as dead", run.status)[0]
            asked_ms = page.evaluate("window.asked")
            toasts = [page.evaluate("document.getElementById('toast').textContent")]
            again = f"document.querySelector(\"{row.format('island-1')} .pick\").textContent === 'island-1.2'"
            wait_for(page, again, "island-1.2", run.status)
            later = f"{last_t}.then((t) => t > {loss_before} && t)"
            loss_after = wait_for(page, later, "the curve to go on", run.status)
            click(page, f"{row.format('island-2')} button[data-act=drain]")
            click(page, "#ask button[value=yes]")
            left = "window.seen.find(([, name, doing]) => name === 'island-2' && doing === 'left')"
            wait_for(page, left, "island-2 shown as gone", run.status)
            toasts.append(page.evaluate("document.getElementById('toast').textContent"))
            disabled = page.evaluate(DISABLED)
            figures = page.evaluate("fetch('/api/run').then((answer) => answer.json())")
            links = [start_in_cluster(run_id, host="127.0.0.1", port=0, chaos=False) for _ in range(2)]
            status_of_actor = ask_actor(links[0])
            summary = run.finish()
            ended = wait_for(
                page, "document.getElementById('state').textContent === 'done' && 'done'", "the end", lambda: None
            )
            yield Shown(
                dead_after_s=(at_ms - asked_ms) / 1e3,
                loss_before=loss_before,
                loss_after=loss_after,
                toasts=toasts,
                able=able,
                disabled=disabled,
                problems=page.problems,
                figures=figures,
                records=run.records(),
                summary=summary,
                run_dir=run.run_dir,
                ended_state=ended,
                links=links,
                status_of_actor=status_of_actor,
            )
    finally:
        run.stop()


def test_a_killed_island_shows_as_dead_within_three_seconds_and_the_curve_goes_on(shown: Shown) -> None:
    killed = [r for r in shown.records if isinstance(r, FaultRecord) and r.injected]
    assert [(r.fault, r.member) for r in killed] == [("kill", "island-1")]
    fences = [r for r in shown.records if isinstance(r, FenceRecord) and r.member == "island-1"]
    assert fences and fences[0].incarnation == 1
    assert 0 < shown.dead_after_s < DEAD_WITHIN_S
    assert shown.loss_after > shown.loss_before
    assert shown.problems == []


def test_actions_are_journalled_with_what_came_of_them(shown: Shown) -> None:
    asked = [r for r in shown.records if isinstance(r, OperatorRecord)]
    assert [(r.action, r.member, r.outcome) for r in asked] == [
        ("kill", "island-1", "done"),
        ("drain", "island-2", "asked"),
    ]
    assert all(r.by.startswith("dashboard, 127.0.0.1") for r in asked)
    assert any(isinstance(r, FenceRecord) and r.member == "island-2" and r.why == LEFT for r in shown.records)
    assert shown.toasts == ["kill island-1: done", "drain island-2: asked"]


def test_buttons_are_there_for_what_the_controller_can_do(shown: Shown) -> None:
    assert {"drain", "kill", "stop", "pause", "resume", "save"} <= set(shown.able)
    assert shown.disabled == {name: name not in shown.able for name in ("pause", "resume", "save", "stop")}


def test_the_page_shows_what_the_run_came_to(shown: Shown) -> None:
    assert shown.summary.exit_reason == shown.ended_state == "done"
    assert ledger_command(shown.run_dir, False) == 0
    assert shown.figures["ledger"]["committed"] <= shown.summary.tokens_committed
    kinds = {(event["kind"], event["member"]) for event in shown.figures["events"]}
    assert {("kill", "island-1"), ("operator", "island-1"), ("operator", "island-2")} <= kinds


def test_an_actor_of_the_cluster_serves_the_same_page(shown: Shown) -> None:
    assert shown.status_of_actor == 200
    assert shown.links[0] == shown.links[1]
