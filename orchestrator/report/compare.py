"""The two-run report: A beside B."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from orchestrator.report import format as fmt
from orchestrator.report.html import Child, Markup, el, table
from orchestrator.report.lines import Series, line_chart
from orchestrator.report.load import RunData
from orchestrator.report.page import describe, document, fold, grid, notes, section
from orchestrator.report.scale import Axis, Unit
from orchestrator.report.series import Point, committed_rate, cumulative_bytes, first_reach, val_curve, value_at
from orchestrator.report.verdict import Headline, headline, outcome

Measure = tuple[str, float | None, float | None, Callable[[float | None], str]]
# Settings that say where a run was kept, not what it was.
_IDENTITY = frozenset({"run.name", "run.address"})


def compare_page(a: RunData, b: RunData) -> str:
    """The report of two runs."""
    figures_a, figures_b = headline(a), headline(b)
    body = el(
        "main",
        _header(a, b),
        notes([f"{name}: {note}" for name, run in (("A", a), ("B", b)) for note in run.notes]),
        section("Figures", _figures_table(a, b, figures_a, figures_b)),
        section(
            "Loss",
            grid(
                _chart(
                    a,
                    b,
                    "loss-tokens",
                    "Validation loss over tokens",
                    "count",
                    lambda r: val_curve(r, "tokens_committed"),
                ),
                _chart(a, b, "loss-time", "Validation loss over time", "time", lambda r: val_curve(r, "t_s")),
            ),
        ),
        section("Speed and traffic", grid(_traffic_chart(a, b), _rate_chart(a, b))),
        section("Settings that differ", _settings_table(a, b)),
        section("Details", *(_config_fold(name, run) for name, run in (("A", a), ("B", b)))),
        el(
            "footer",
            el("p", "Made by atoll report. Losses at equal tokens are interpolated between evaluations."),
        ),
    )
    return document(f"{a.name} and {b.name} \u00b7 Atoll", body)


def _header(a: RunData, b: RunData) -> Markup:
    cards = []
    for css, letter, run in (("run-a", "A", a), ("run-b", "B", b)):
        tone, word = outcome(run)
        cards.append(
            el(
                "div",
                el("p", el("span", class_="swatch"), letter, class_=f"letter {css}"),
                el("h2", run.name, el("span", word, class_=f"pill {tone}")),
                el("p", describe(run, run.summary.params if run.summary else None), class_="meta"),
                class_="card run",
            )
        )
    return el(
        "header",
        el("p", "Atoll comparison of two runs", class_="eyebrow"),
        el("h1", "A and B, side by side"),
        el("p", _sentence(a, b), class_="lede"),
        el("div", *cards, class_="grid"),
    )


def _sentence(a: RunData, b: RunData) -> str:
    loss_a, loss_b, tokens = losses_at_equal_tokens(a, b)
    if loss_a is None or loss_b is None:
        return "The runs have no evaluation at a common number of tokens, so their losses cannot be compared."
    change = 100 * (loss_a / loss_b - 1)
    if abs(change) < 0.05:
        said = "A and B have the same validation loss"
    else:
        said = f"A's validation loss is {abs(change):.1f}{fmt.NBSP}% {'higher' if change > 0 else 'lower'} than B's"
    said += f" after {fmt.count(tokens)} tokens ({fmt.loss(loss_a)} and {fmt.loss(loss_b)})"
    if a.bytes_sent and b.bytes_sent:
        more, less = max(a.bytes_sent, b.bytes_sent), min(a.bytes_sent, b.bytes_sent)
        said += f"; {'A' if a.bytes_sent < b.bytes_sent else 'B'} sent {fmt.ratio(more / less)} fewer bytes"
    return said + "."


def losses_at_equal_tokens(a: RunData, b: RunData) -> tuple[float | None, float | None, float]:
    """Validation losses of both at the largest number of committed tokens that both were evaluated at or beyond."""
    curve_a, curve_b = val_curve(a, "tokens_committed"), val_curve(b, "tokens_committed")
    if not curve_a or not curve_b:
        return None, None, 0.0
    tokens = min(curve_a[-1][0], curve_b[-1][0])
    return value_at(curve_a, tokens), value_at(curve_b, tokens), tokens


def _measures(a: RunData, b: RunData, of_a: Headline, of_b: Headline) -> Iterator[Measure]:
    loss_a, loss_b, tokens = losses_at_equal_tokens(a, b)
    yield f"validation loss at {fmt.count(tokens)} tokens", loss_a, loss_b, fmt.loss
    yield "final validation loss", of_a.final_val_loss, of_b.final_val_loss, fmt.loss
    yield "tokens committed", of_a.tokens_committed, of_b.tokens_committed, fmt.count
    yield "seconds", of_a.seconds, of_b.seconds, fmt.duration
    if of_a.final_val_loss is not None and of_b.final_val_loss is not None:
        goal = max(of_a.final_val_loss, of_b.final_val_loss)
        reach = (first_reach(val_curve(a, "t_s"), goal), first_reach(val_curve(b, "t_s"), goal))
        yield f"time to a loss of {fmt.loss(goal)}", *reach, fmt.duration
    yield "tokens per second", of_a.tokens_per_s, of_b.tokens_per_s, fmt.count
    yield "compute utilisation", of_a.compute_utilization, of_b.compute_utilization, fmt.percent
    yield "goodput", of_a.goodput, of_b.goodput, fmt.percent
    yield "bytes sent", of_a.bytes_sent, of_b.bytes_sent, fmt.num_bytes
    if of_a.tokens_committed and of_b.tokens_committed:
        per_token = (of_a.bytes_sent / of_a.tokens_committed, of_b.bytes_sent / of_b.tokens_committed)
        yield "bytes sent per committed token", *per_token, fmt.num_bytes
    sums = (a.summary, b.summary)
    if sums[0] and sums[1]:
        one, two = sums[0], sums[1]
        each = (one.bytes_sent_per_param_per_round, two.bytes_sent_per_param_per_round)
        yield "bytes per parameter and round", *each, lambda value: fmt.UNKNOWN if value is None else f"{value:.3f}"
        yield "exchanges committed", one.exchanges_committed, two.exchanges_committed, fmt.count
        yield "exchanges discarded", one.exchanges_discarded, two.exchanges_discarded, fmt.count
        yield "tokens lost", one.tokens_lost, two.tokens_lost, fmt.count
        yield "parameters", one.params, two.params, fmt.count
        yield "peak memory of an island", one.peak_memory_bytes, two.peak_memory_bytes, fmt.num_bytes
    yield "faults", len(of_a.faults), len(of_b.faults), fmt.count


def _figures_table(a: RunData, b: RunData, of_a: Headline, of_b: Headline) -> Markup:
    rows: list[list[Child]] = []
    for name, value_a, value_b, say in _measures(a, b, of_a, of_b):
        ratio = value_a / value_b if value_a is not None and value_b else None
        rows.append([name, say(value_a), say(value_b), fmt.ratio(ratio)])
    return table(["", "A", "B", "A / B"], rows, caption="Figures of both runs and their ratios", numeric=(1, 2, 3))


def _pair(a: RunData, b: RunData, points: Callable[[RunData], list[Point]], *, dots: bool, hold: bool) -> list[Series]:
    return [
        Series(label=f"{letter}: {run.name}", css=css, segments=[curve], dots=dots, hold=hold)
        for letter, css, run in (("A", "run-a", a), ("B", "run-b", b))
        if (curve := points(run))
    ]


def _chart(
    a: RunData, b: RunData, chart_id: str, title: str, unit: Unit, points: Callable[[RunData], list[Point]]
) -> Markup:
    x_title = "committed tokens" if unit == "count" else "time since start"
    return line_chart(
        chart_id=chart_id,
        title=title,
        note="Nats per token, of the anchor.",
        x=Axis(title=x_title, unit=unit, low=0.0),
        y=Axis(title="loss", unit="loss"),
        series=_pair(a, b, points, dots=True, hold=True),
        empty="Neither run recorded an evaluation, so there is no validation loss to plot.",
    )


def _traffic_chart(a: RunData, b: RunData) -> Markup:
    return line_chart(
        chart_id="traffic",
        title="Bytes sent, in total",
        note="Payload of all islands, logarithmic.",
        x=Axis(title="committed tokens", unit="count", low=0.0),
        y=Axis(title="bytes", unit="bytes", log=True),
        series=_pair(a, b, cumulative_bytes, dots=False, hold=True),
        empty="Neither run has committed an exchange, so no bytes were counted.",
    )


def _rate_chart(a: RunData, b: RunData) -> Markup:
    return line_chart(
        chart_id="throughput",
        title="Committed tokens per second",
        note="All islands together, averaged over a twelfth of the run.",
        x=Axis(title="time since start", unit="time", low=0.0),
        y=Axis(title="tokens/s", unit="rate", from_zero=True),
        series=_pair(a, b, committed_rate, dots=False, hold=True),
        empty="Neither run has committed an exchange, so no tokens were counted.",
    )


def _settings_table(a: RunData, b: RunData) -> Markup:
    of_a, of_b = _flat(a.config), _flat(b.config)
    keys = [key for key in {**of_a, **of_b} if of_a.get(key) != of_b.get(key) and key not in _IDENTITY]
    if not keys:
        why = (
            "The settings are the same." if of_a and of_b else "A configuration is missing, so they cannot be compared."
        )
        return el("p", why, class_="nothing")
    rows: list[list[Child]] = [
        [el("code", key), str(of_a.get(key, fmt.UNKNOWN)), str(of_b.get(key, fmt.UNKNOWN))] for key in keys
    ]
    return table(["setting", "A", "B"], rows, caption="Settings that differ")


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _config_fold(letter: str, run: RunData) -> Markup | None:
    if not run.config_text:
        return None
    return fold(f"Configuration of {letter}", el("pre", run.config_text, tabindex="0"))
