"""The documents: one self-contained HTML file that may load nothing and run nothing but what is in it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources

from orchestrator.report import format as fmt
from orchestrator.report import sections, tables
from orchestrator.report.html import Child, Markup, el, join
from orchestrator.report.load import RunData
from orchestrator.report.timeline import phase_table, timeline_chart
from orchestrator.report.verdict import Headline, committed, fault_story, headline, learning, outcome


def document(title: str, *body: Child) -> str:
    """A whole page with the style sheet and the script inside; its policy allows exactly these two by hash."""
    style, script = _asset("report.css"), _asset("report.js")
    policy = (
        f"default-src 'none'; style-src {_source_hash(style)}; script-src {_source_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    page = el(
        "html",
        el(
            "head",
            el("meta", charset="utf-8"),
            el("meta", http_equiv="Content-Security-Policy", content=policy),
            el("meta", name="viewport", content="width=device-width, initial-scale=1"),
            el("meta", name="color-scheme", content="light dark"),
            el("meta", name="generator", content="atoll report"),
            el("title", title),
            el("style", Markup(style)),
        ),
        el(
            "body",
            *body,
            el("div", id="tip", role="status", aria_live="polite", hidden=True),
            el("script", Markup(script)),
        ),
        lang="en",
    )
    return f"<!doctype html>\n{page}\n"


def single_run_page(run: RunData) -> str:
    """The report of one run."""
    figures = headline(run)
    more: list[Child] = []
    exchanges = tables.exchange_table(run)
    if exchanges:
        more.append(fold(f"Exchanges ({len(run.exchanges)})", exchanges))
    if run.config_text:
        more.append(fold("Configuration", el("pre", run.config_text, tabindex="0")))
    charts = _charts(run, figures) if run.members or run.evals or run.exchanges else []
    body = el(
        "main",
        _header(run, figures),
        notes(run.notes),
        *charts,
        section("Details", *more) if more else None,
        _footer(),
    )
    return document(f"{run.name} \u00b7 Atoll run report", body)


def _charts(run: RunData, figures: Headline) -> list[Markup]:
    return [
        section("Loss", grid(*sections.loss_charts(run))),
        section("Stages", tables.stage_table(run))
        if run.stages
        else section("Time", timeline_chart(run), phase_table(run)),
        section("Faults", tables.fault_table(run, figures)),
        section(
            "Speed and traffic",
            grid(
                sections.throughput_chart(run),
                sections.traffic_chart(run, figures),
                *sections.exchange_charts(run),
            ),
        ),
    ]


def section(title: str, *children: Child) -> Markup:
    """A titled part of the page."""
    return el("section", el("h2", title), *children)


def grid(*children: Child) -> Markup:
    """Cards side by side where there is room."""
    return el("div", *children, class_="grid")


def fold(title: str, *children: Child) -> Markup:
    """A part that is closed at first."""
    return el("details", el("summary", title), *children, class_="card")


def notes(sentences: Sequence[str]) -> Markup | None:
    """What is missing, said openly; None where nothing is."""
    if not sentences:
        return None
    return el(
        "aside",
        el("h2", "What this report cannot show"),
        el("ul", *(el("li", sentence) for sentence in sentences)),
        class_="notes",
    )


def describe(run: RunData, params: int | None) -> str:
    """The run in one line: strategy, codec, islands, model."""
    parts = []
    name, steps = run.setting("strategy", "name"), run.setting("strategy", "inner_steps")
    if name:
        parts.append(f"{name}, H = {steps}" if name != "ddp" and steps else str(name))
    if run.setting("codec", "name"):
        parts.append(str(run.setting("codec", "name")))
    if run.stages:
        peers = sum(len(stage["serving"]) for stage in run.stages)
        parts.append(f"{fmt.plural(len(run.stages), 'stage')} with {fmt.plural(peers, 'peer')}")
    elif run.members:
        parts.append(fmt.plural(len(run.members), "island"))
    if params:
        parts.append(f"{fmt.count(params)} parameters")
    data = run.setting("data", "corpus") or run.setting("data", "path")
    if data:
        parts.append(f"trained on {data}")
    return " \u00b7 ".join(parts)


def _header(run: RunData, figures: Headline) -> Markup:
    tone, word = outcome(run)
    learning_tone, learned = learning(run, figures)
    said: list[Child] = [committed(run, figures), fault_story(run, figures)]
    why = run.summary.error if run.summary else None
    return el(
        "header",
        el("p", "Atoll run report", class_="eyebrow"),
        el("h1", run.name, el("span", word, class_=f"pill {tone}")),
        el("p", describe(run, run.summary.params if run.summary else None), class_="meta"),
        el("p", f"The run failed: {why}", class_="verdict bad") if why else None,
        el("p", learned, class_=f"verdict {learning_tone}"),
        el("p", join(said, " "), class_="lede"),
        sections.key_figures(figures),
    )


def _footer() -> Markup:
    return el(
        "footer",
        el(
            "p",
            "Made by atoll report from config.toml, summary.json and metrics.jsonl of the run directory. "
            "Times are on the controller's clock. Data parallel: fp32 gradients of every step in a ring all-reduce.",
        ),
    )


def _asset(name: str) -> str:
    return resources.files("orchestrator.report").joinpath(name).read_text(encoding="utf-8")


def _source_hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
