"""The report as a file: complete, self-contained, safe, and open about what is missing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from orchestrator.cli.report import report
from orchestrator.metrics import MetricsWriter, StepRow
from orchestrator.report import ReportError, build_report
from orchestrator.report.load import load_run
from orchestrator.report.series import first_reach, smooth, timeline, value_at
from orchestrator.report.timeline import LEFT, RIGHT, WIDTH, timeline_chart
from orchestrator.report.verdict import headline, learning
from tests.unit.report.synthetic_run import TOKENS_PER_STEP, SyntheticRun

VOID = {"meta", "br", "hr", "path", "line", "rect", "circle"}
CHARTS = {"loss-progress", "loss-time", "timeline", "throughput", "traffic", "exchange-bytes", "exchange-seconds"}


class Outline(HTMLParser):
    """Checks that tags nest, and collects ids, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data

    @property
    def charts(self) -> set[str]:
        return {value for tag, name, value in self.attributes if (tag, name) == ("figure", "id")}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SyntheticRun().write(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = SyntheticRun(
        name="ddp",
        strategy="ddp",
        codec="fp32",
        inner_steps=1,
        rounds=400,
        kill_round=None,
        bytes_per_value=4.0,
        seed=1,
    )
    return run.write(tmp_path_factory.mktemp("runs") / "ddp")


def read(path: Path) -> Outline:
    return Outline(path.read_text(encoding="utf-8"))


def test_a_report_has_every_chart_and_table(demo: Path) -> None:
    path = build_report(demo)
    assert path == demo / "report.html"
    page = read(path)
    assert page.charts == CHARTS
    assert len(page.ids) == len(set(page.ids))
    for said in (
        "It learned",
        "island-1 was killed at",
        "Compute utilisation",
        "Goodput",
        "data parallel would have sent",
    ):
        assert said in page.text
    assert "What this report cannot show" not in page.text


def test_a_report_loads_nothing_and_runs_only_what_is_in_it(demo: Path) -> None:
    text = build_report(demo).read_text()
    page = Outline(text)
    policy = next(value for tag, name, value in page.attributes if tag == "meta" and "default-src" in value)
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for tag in ("style", "script"):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.S)
        assert content is not None
        digest = base64.b64encode(hashlib.sha256(content[1].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    names = {name for _, name, _ in page.attributes}
    assert not names & {"src", "href", "style", "srcset", "action"}
    assert not {name for name in names if name.startswith("on")}
    assert "http://" not in text and "https://" not in text and "@import" not in text


def test_figures_of_the_header_are_those_of_the_summary(demo: Path) -> None:
    run = load_run(demo)
    assert run.summary is not None
    figures = headline(run)
    assert figures.goodput == run.summary.goodput
    # 24 rounds of 40 steps, three islands; island-1 was away for some of them and lost 16 steps.
    committed_steps = run.tokens_committed // TOKENS_PER_STEP
    assert run.num_member_steps() == committed_steps + 16
    assert figures.data_parallel_bytes == round(4 * 380_000 * 2 * 2 / 3 * run.num_member_steps())


def test_the_same_figures_are_derived_without_a_summary(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes((demo / "metrics.jsonl").read_bytes())
    told, derived = headline(load_run(demo)), headline(load_run(tmp_path))
    for name in ("tokens_committed", "tokens_per_s", "compute_utilization", "goodput", "bytes_sent", "faults"):
        assert getattr(derived, name) == pytest.approx(getattr(told, name)), name
    assert derived.partial and not told.partial


def test_a_partial_run_says_so(tmp_path: Path) -> None:
    run_dir = SyntheticRun().write(tmp_path / "run", summary=False, share=0.4)
    with open(run_dir / "metrics.jsonl", "ab") as out:
        out.write(b'{"kind":"step","t_s":')
    page = read(build_report(run_dir))
    assert page.charts == CHARTS
    for said in ("Unfinished", "There is no summary", "cut off", "so far", "It is learning"):
        assert said in page.text


@pytest.mark.parametrize("name", ["config.toml", "summary.json", "metrics.jsonl"])
def test_each_file_may_be_missing(name: str, demo: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for kept in {"config.toml", "summary.json", "metrics.jsonl"} - {name}:
        (run_dir / kept).write_bytes((demo / kept).read_bytes())
    page = read(build_report(run_dir))
    assert "What this report cannot show" in page.text
    assert page.charts == (set() if name == "metrics.jsonl" else CHARTS)
    assert ("Configuration" in page.text) == (name != "config.toml")


@pytest.mark.parametrize("name", ["config.toml", "summary.json", "metrics.jsonl"])
def test_each_file_may_be_damaged(name: str, demo: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for kept in ("config.toml", "summary.json", "metrics.jsonl"):
        (run_dir / kept).write_bytes((demo / kept).read_bytes())
    (run_dir / name).write_bytes(b"\xff\x00 = {{{\n")
    page = read(build_report(run_dir))
    assert "could not be read" in page.text


def test_a_run_that_recorded_nothing_has_no_empty_plot(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[run]\nname = 'new'\n")
    (tmp_path / "metrics.jsonl").write_text("")
    page = read(build_report(tmp_path))
    assert page.charts == set()
    assert "Nothing has been recorded yet." in page.text


def test_one_step_is_enough_for_a_chart_and_the_rest_says_why_not(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        writer.append(
            StepRow(t_s=1, member="a", incarnation=1, step=1, progress=0, loss=5.0, tokens_per_s=10, step_ms=1)
        )
    page = read(build_report(tmp_path))
    assert page.charts == {"loss-progress", "loss-time", "throughput"}
    for said in ("no timeline", "no bytes were counted", "No evaluation was recorded"):
        assert said in page.text


def test_no_run_is_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="not a run directory") as error:
        build_report(tmp_path)
    assert "atoll runs" in str(error.value)


def test_names_cannot_become_markup(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    run_dir = SyntheticRun(name=evil.replace('"', ""), rounds=4, kill_round=2).write(tmp_path / "run")
    metrics = run_dir / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("island-1", json.dumps(evil)[1:-1]))
    text = build_report(run_dir).read_text()
    assert evil not in text
    assert text.count("<script") == len(Outline(text).charts) + 1


@pytest.mark.parametrize(
    ("losses", "tone", "said"),
    [
        ([5.5, 2.0, 1.6], "good", "It learned"),
        ([5.5, 1.6, 1.9], "warn", "then lost some"),
        ([5.5, 5.6, 5.5], "bad", "did not learn"),
        ([5.5, 2.0, None], "bad", "diverged"),
        ([5.5], "plain", "only one evaluation"),
        ([], "plain", "No evaluation"),
    ],
)
def test_the_verdict_follows_the_validation_loss(
    losses: list[float | None], tone: str, said: str, demo: Path, tmp_path: Path
) -> None:
    summary = json.loads((demo / "summary.json").read_text())
    summary["initial_val_loss"] = losses[0] if losses else None
    summary["final_val_loss"] = losses[-1] if len(losses) > 1 else None
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    rows = [
        {
            "kind": "eval",
            "t_s": i,
            "member": "a",
            "version": i,
            "progress": i / 2,
            "val_loss": loss,
            "tokens_committed": i,
        }
        for i, loss in enumerate(losses)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = load_run(tmp_path)
    found = learning(run, headline(run))
    assert found[0] == tone and said in found[1]


def test_steps_are_counted_whether_or_not_an_incarnation_starts_again(tmp_path: Path) -> None:
    def at(member: str, incarnation: int, number: int) -> StepRow:
        return StepRow(
            t_s=1, member=member, incarnation=incarnation, step=number, progress=0, loss=1, tokens_per_s=1, step_ms=1
        )

    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        # a starts at one again (10 + 5), b goes on counting (10 + 5), rows are thinned.
        for row in (at("a", 1, 3), at("a", 1, 10), at("a", 2, 1), at("a", 2, 5)):
            writer.append(row)
        for row in (at("b", 1, 1), at("b", 1, 10), at("b", 2, 12), at("b", 2, 15)):
            writer.append(row)
    assert load_run(tmp_path).num_member_steps() == 15 + 15


def test_members_are_in_natural_order(tmp_path: Path) -> None:
    assert load_run(SyntheticRun(islands=11, rounds=2).write(tmp_path / "run")).members[1:3] == ("island-1", "island-2")


def test_two_runs_are_compared(demo: Path, baseline: Path) -> None:
    path = build_report(demo, baseline)
    assert path == demo / "report-vs-ddp.html"
    page = read(path)
    assert page.charts == {"loss-tokens", "loss-time", "traffic", "throughput"}
    for said in ("A / B", "bytes sent", "time to a loss of", "strategy.inner_steps", "fewer bytes", "goodput"):
        assert said in page.text


def test_a_run_can_be_compared_with_an_unfinished_one(demo: Path, tmp_path: Path) -> None:
    other = SyntheticRun().write(tmp_path / "half", summary=False, share=0.3)
    page = read(build_report(demo, other))
    assert "B: There is no summary" in page.text
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.toml").write_text("")
    page = read(build_report(tmp_path / "new", other))
    assert "cannot be compared" in page.text


def test_a_crowd_of_islands_stays_small(tmp_path: Path) -> None:
    path = build_report(SyntheticRun(islands=40, rounds=8, inner_steps=20).write(tmp_path / "run"))
    assert path.stat().st_size < 700_000
    assert "40 islands" in read(path).text


def test_a_long_timeline_is_drawn_by_slots_that_keep_every_second(tmp_path: Path) -> None:
    run = load_run(SyntheticRun(inner_steps=1, rounds=500, kill_round=250).write(tmp_path / "run"))
    for row in timeline(run, num_slots=800):
        assert row.spans == [] and len(row.slots) == 800
        width_s = run.end_s / 800
        for phase, seconds in enumerate(row.seconds.values()):
            assert sum(shares[phase] for _, _, shares in row.slots) * width_s == pytest.approx(seconds, abs=1e-6)
        assert max(sum(shares) for _, _, shares in row.slots) < 1 + 1e-6


def test_the_timeline_is_as_wide_as_the_time_it_shows(demo: Path) -> None:
    run = load_run(demo)
    drawing = timeline_chart(run)
    for number, row in enumerate(timeline(run, num_slots=800)):
        for phase, seconds in row.seconds.items():
            paths = re.findall(rf'd="([^"]*)" class="phase {phase}"', drawing.split('class="row-name')[number + 1])
            assert len(paths) == (seconds > 0)
            widths = [float(width) for path in paths for width in re.findall(r"h(\d[\d.]*)", path)]
            pixels = seconds / run.end_s * (WIDTH - LEFT - RIGHT)
            # A span narrower than a pixel is drawn one pixel wide.
            assert pixels * 0.99 - 0.1 <= sum(widths) <= pixels * 1.01 + len(widths)


def test_smoothing_keeps_the_mean_of_a_line_and_its_start() -> None:
    assert smooth([5.0, 5.0, 5.0], 3) == [5.0, 5.0, 5.0]
    assert smooth([4.0, 3.0, 2.0, 1.0, 0.0], 3) == [4.0, 3.0, 2.0, 1.0, 0.5]
    assert smooth([], 3) == []


def test_curves_are_read_between_their_points() -> None:
    curve = [(0.0, 5.0), (10.0, 3.0), (20.0, 2.0)]
    assert value_at(curve, 5.0) == 4.0
    assert (value_at(curve, 20.0), value_at(curve, 21.0), value_at([], 1.0)) == (2.0, None, None)
    assert (first_reach(curve, 2.5), first_reach(curve, 9.0), first_reach(curve, 1.0)) == (15.0, 0.0, None)


def test_the_command_prints_where_the_report_is(demo: Path, baseline: Path) -> None:
    result = CliRunner().invoke(report, [str(demo)])
    assert (result.exit_code, result.output.strip()) == (0, str(demo / "report.html"))
    result = CliRunner().invoke(report, [str(demo), str(baseline)])
    assert result.output.strip() == str(demo / "report-vs-ddp.html")
