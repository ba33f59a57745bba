"""The report in a real browser: no console message, nothing fetched, no empty plot, usable by mouse and keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.metrics import MetricsWriter, StepRow
from orchestrator.report import build_report
from tests.browser.chromium import NAMES, Chromium, Page, find_chromium
from tests.unit.report.synthetic_run import SyntheticRun

BINARY = find_chromium()
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BINARY is None, reason=f"no browser: none of {', '.join(NAMES)} is installed"),
]

# Every drawn path of every chart: how long it is, and whether any of it lies inside the drawing.
PLOTS = """
[...document.querySelectorAll("figure.chart")].map((figure) => {
  const svg = figure.querySelector(".plot svg"), view = svg.viewBox.baseVal;
  const paths = [...svg.querySelectorAll("path.curve, path.bar, path.phase")];
  const boxes = paths.map((path) => path.getBBox());
  return {
    id: figure.id,
    lengths: paths.map((path) => path.getTotalLength()),
    inside: boxes.every((b) => b.x < view.width && b.y < view.height && b.x + b.width > 0 && b.y + b.height > 0),
    height: svg.getBoundingClientRect().height,
    broken: svg.innerHTML.includes("NaN") || svg.innerHTML.includes("undefined"),
    labels: svg.querySelectorAll("text").length,
  };
})
"""
# Contrast (WCAG 2) of every text with the first opaque background behind it; below 4.5 is reported.
POOR_CONTRAST = """
(() => {
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
      .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor;
      if (colour.startsWith("rgb(")) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const poor = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || element.closest("script, style, [hidden], details:not([open])")) continue;
    const style = getComputedStyle(element), drawn = element instanceof SVGElement;
    const [a, b] = [light(drawn ? style.fill : style.color), light(ground(element))].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < 4.5) poor.push(`${element.tagName}.${element.getAttribute("class")}: ${contrast.toFixed(2)}`);
  }
  return [...new Set(poor)];
})()
"""
SETTLED = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 0))))"
TOOLTIP = "(() => { const tip = document.getElementById('tip'); return tip.hidden ? null : tip.innerText; })()"


@dataclass(frozen=True, kw_only=True)
class Reports:
    single: Path
    unfinished: Path
    dense: Path
    crowd: Path
    one_step: Path
    hostile: Path
    nothing: Path
    compared: Path


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    root = tmp_path_factory.mktemp("runs")
    demo = SyntheticRun().write(root / "demo")
    ddp = SyntheticRun(
        name="ddp",
        strategy="ddp",
        codec="fp32",
        inner_steps=1,
        rounds=400,
        kill_round=None,
        bytes_per_value=4.0,
        seed=1,
    ).write(root / "ddp")
    hostile = SyntheticRun(name="</script><script>console.log(1)</script>", rounds=4, kill_round=2).write(root / "h")
    metrics = hostile / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("island-1", "</script><img src=http://x.invalid onerror=fail()>"))
    (root / "one").mkdir()
    with MetricsWriter(root / "one" / "metrics.jsonl") as writer:
        writer.append(
            StepRow(t_s=1, member="a", incarnation=1, step=1, progress=0, loss=5.0, tokens_per_s=10, step_ms=1)
        )
    (root / "new").mkdir()
    (root / "new" / "config.toml").write_text("")
    return Reports(
        single=build_report(demo),
        unfinished=build_report(SyntheticRun().write(root / "half", summary=False, share=0.4)),
        dense=build_report(ddp),
        crowd=build_report(SyntheticRun(islands=20, rounds=8, inner_steps=20, kill_round=4).write(root / "crowd")),
        one_step=build_report(root / "one"),
        hostile=build_report(hostile),
        nothing=build_report(root / "new"),
        compared=build_report(demo, ddp),
    )


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    assert BINARY is not None
    with Chromium.launch(BINARY, tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def page(browser: Chromium, reports: Reports) -> Iterator[Page]:
    """The report of the demo; whatever a test does with it, nothing may be complained about."""
    opened = browser.open(reports.single.as_uri())
    yield opened
    assert opened.problems == []


def centre(page: Page, selector: str, *, x_share: float = 0.5, y_share: float = 0.5) -> tuple[float, float]:
    """A point of an element, which is brought into view first."""
    page.evaluate(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
    page.evaluate(SETTLED)  # the scroll event hides tooltips, and comes with the next frame
    left, top, width, height = page.evaluate(
        f"(() => {{ const b = document.querySelector({selector!r}).getBoundingClientRect();"
        " return [b.left, b.top, b.width, b.height]; })()"
    )
    return left + width * x_share, top + height * y_share


@pytest.mark.parametrize(
    ("name", "num_charts"),
    [
        ("single", 7),
        ("unfinished", 7),
        ("dense", 7),
        ("crowd", 7),
        ("one_step", 3),
        ("hostile", 7),
        ("nothing", 0),
        ("compared", 4),
    ],
)
def test_no_complaint_nothing_fetched_no_empty_plot(
    name: str, num_charts: int, browser: Chromium, reports: Reports
) -> None:
    path: Path = getattr(reports, name)
    page = browser.open(path.as_uri())
    plots: list[dict[str, Any]] = page.evaluate(PLOTS)
    assert len(plots) == num_charts
    for plot in plots:
        assert plot["lengths"] and min(plot["lengths"]) > 0, plot
        assert plot["inside"] and plot["height"] > 80 and plot["labels"] >= 4 and not plot["broken"], plot
    assert page.evaluate("document.querySelectorAll('.plot svg').length") == num_charts
    assert page.evaluate("document.images.length") == 0
    assert page.problems == []
    assert page.requests == [path.as_uri()]


def test_the_browser_would_notice_what_the_page_must_not_do(browser: Chromium, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text("<!doctype html><img src='missing.png'><script>console.error('x'); undefined_name();</script>")
    page = browser.open(bad.as_uri())
    assert any("console.error" in problem for problem in page.problems)
    assert any("undefined_name" in problem for problem in page.problems)
    assert len(page.requests) == 2


def test_the_policy_stops_a_script_that_is_not_ours(browser: Chromium, reports: Reports, tmp_path: Path) -> None:
    changed = tmp_path / "changed.html"
    changed.write_text(reports.single.read_text().replace("</main>", "<script>window.ran = 1</script></main>"))
    page = browser.open(changed.as_uri())
    assert page.evaluate("window.ran === undefined")
    assert any("Content Security Policy" in problem for problem in page.problems)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read_in_light_and_dark(scheme: str, page: Page) -> None:
    page.colours(scheme)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(245, 247, 247)") == (scheme == "light")
    assert page.evaluate(POOR_CONTRAST) == []


@pytest.mark.parametrize("width", [360, 768, 1280, 2200])
def test_nothing_sticks_out_of_the_page(width: int, page: Page) -> None:
    page.resize(width, 900)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_mouse_reads_a_line_chart(page: Page) -> None:
    page.hover(*centre(page, "#loss-time .plot svg", x_share=0.5))
    told = page.evaluate(TOOLTIP)
    for said in ("island-0", "island-1", "island-2", "anchor (validation)"):
        assert said in told
    page.hover(2, 2)
    assert page.evaluate(TOOLTIP) is None


def test_the_mouse_reads_bars_and_the_timeline(page: Page) -> None:
    page.hover(*centre(page, "#exchange-bytes .plot svg", x_share=0.2))
    assert "MB" in page.evaluate(TOOLTIP) and "3 of 3 islands" in page.evaluate(TOOLTIP)
    page.hover(*centre(page, "#timeline .plot svg", x_share=0.65, y_share=0.5))
    assert "island-1, incarnation 2" in page.evaluate(TOOLTIP) and "starting" in page.evaluate(TOOLTIP)


def test_the_keyboard_reads_every_chart(page: Page) -> None:
    for chart in page.evaluate("[...document.querySelectorAll('figure.chart')].map((figure) => figure.id)"):
        page.evaluate(f"document.querySelector('#{chart} .plot svg').focus()")
        page.evaluate(SETTLED)
        page.press("Home")
        first = page.evaluate(TOOLTIP)
        page.press("ArrowRight")
        second = page.evaluate(TOOLTIP)
        assert first and second and first != second, chart
        page.press("Escape")
        assert page.evaluate(TOOLTIP) is None, chart


def test_the_keyboard_changes_rows_of_the_timeline(page: Page) -> None:
    page.evaluate("document.querySelector('#timeline .plot svg').focus()")
    page.evaluate(SETTLED)
    page.press("End")
    assert page.evaluate(TOOLTIP).startswith("island-0")
    page.press("ArrowDown")
    assert page.evaluate(TOOLTIP).startswith("island-1")


def test_the_legend_hides_a_curve_by_keyboard_and_mouse(page: Page) -> None:
    hidden = "getComputedStyle(document.querySelector('#loss-progress g[data-series=\"1\"]')).display === 'none'"
    button = "#loss-progress button[data-series='1']"
    page.click(*centre(page, button))
    assert page.evaluate(hidden)
    assert page.evaluate(f'document.querySelector("{button}").ariaPressed') == "false"
    page.hover(*centre(page, "#loss-progress .plot svg"))
    assert "island-1" not in page.evaluate(TOOLTIP)
    page.evaluate(f'document.querySelector("{button}").focus()')
    page.press("Enter")
    assert not page.evaluate(hidden)


def test_tab_reaches_legends_charts_and_folded_parts(page: Page) -> None:
    reached = set()
    for _ in range(40):
        page.press("Tab")
        reached.add(page.evaluate("document.activeElement.tagName.toLowerCase()"))
    assert {"button", "svg", "summary"} <= reached


def test_the_page_can_be_read_without_scripts(browser: Chromium, reports: Reports) -> None:
    page = browser.open("about:blank")
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    page.loaded = False
    page.call("Page.navigate", url=reports.single.as_uri())
    page.wait_until_loaded()
    page.call("Emulation.setScriptExecutionDisabled", value=False)
    assert all(min(plot["lengths"]) > 0 for plot in page.evaluate(PLOTS))
