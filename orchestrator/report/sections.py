"""The parts of a single-run report: key figures, charts, tables."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.metrics import ExchangeRow
from orchestrator.report import format as fmt
from orchestrator.report.bars import Bar, bar_chart
from orchestrator.report.html import Markup, el
from orchestrator.report.lines import Marker, Series, line_chart
from orchestrator.report.load import RunData
from orchestrator.report.scale import Axis
from orchestrator.report.series import MemberCurve, committed_rate, cumulative_bytes, member_curves, val_curve
from orchestrator.report.timeline import fault_moment
from orchestrator.report.verdict import Headline
from orchestrator.summary import FaultRow

MAX_COLOURS = 8
_MOST_BARS = 240
_NO_STEPS = "No inner steps were recorded, so there is nothing to plot."
_NO_EXCHANGES = "No exchange has been committed, so no bytes were counted."


def key_figures(figures: Headline) -> Markup:
    """The tiles below the headline."""
    so_far = " so far" if figures.partial else ""
    first, last = figures.initial_val_loss, figures.final_val_loss
    speed = f"{fmt.count(figures.tokens_per_s)}/s" if figures.tokens_per_s is not None else fmt.UNKNOWN
    return el(
        "dl",
        _tile(
            "Validation loss", fmt.loss(last), f"from {fmt.loss(first)}, nats per token" if first else "not evaluated"
        ),
        _tile("Tokens per second", speed, f"committed, all islands together{so_far}"),
        _tile(
            "Compute utilisation",
            fmt.percent(figures.compute_utilization),
            f"of the islands' time was inside training steps{so_far}",
            share=figures.compute_utilization,
        ),
        _tile(
            "Goodput",
            fmt.percent(figures.goodput),
            f"of what the islands could have made without waits or faults{so_far}",
            share=figures.goodput,
        ),
        _tile("Bytes sent", fmt.num_bytes(figures.bytes_sent), _bytes_note(figures)),
        _tile("Faults", str(len(figures.faults)) if figures.faults else "none", _faults_note(figures.faults)),
        class_="tiles",
    )


def _tile(name: str, value: str, note: str, *, share: float | None = None) -> Markup:
    meter = None
    if share is not None:
        meter = el(
            "svg",
            el("rect", width=100, height=4, rx=2, class_="meter-ground"),
            el("rect", width=f"{100 * min(1.0, max(0.0, share)):.1f}", height=4, rx=2, class_="meter-fill"),
            viewBox="0 0 100 4",
            preserveAspectRatio="none",
            class_="meter",
            aria_hidden="true",
        )
    return el(
        "div", el("dt", name), el("dd", value, class_="value"), meter, el("dd", note, class_="note"), class_="tile"
    )


def _bytes_note(figures: Headline) -> str:
    if figures.bytes_ratio is None:
        return "payload of all islands"
    other = fmt.num_bytes(figures.data_parallel_bytes)
    if 0.9 < figures.bytes_ratio < 1.1:
        return f"as much as data parallel, {other}"
    if figures.bytes_ratio < 1:
        return f"data parallel would have sent less, {other}"
    return f"data parallel would have sent {fmt.ratio(figures.bytes_ratio)} as much, {other}"


def _faults_note(faults: Sequence[FaultRow]) -> str:
    if not faults:
        return "nothing was injected or noticed"
    slowest = max((row.contributed_after_s for row in faults if row.contributed_after_s is not None), default=None)
    returned = sum(row.contributed_after_s is not None for row in faults)
    if slowest is None:
        return "no member came back and contributed"
    return f"{returned} of {len(faults)} contributed again, after at most {fmt.duration(slowest)}"


def island_css(number: int, num_members: int) -> str:
    """The colour class of an island; a crowd shares one."""
    return f"s{number}" if num_members <= MAX_COLOURS else "crowd"


def fault_markers(run: RunData) -> list[Marker]:
    """Faults as lines in charts over time (the first dozen)."""
    return [
        Marker(x=moment, label=f"{fault.fault} {fault.member}" if len(run.faults) <= 3 else fault.fault)
        for fault in run.faults[:12]
        if (moment := fault_moment(fault)) is not None
    ]


def loss_charts(run: RunData) -> list[Markup]:
    """Validation loss of the anchor and training loss of every island, over progress and over time."""
    smoothed = member_curves(run, "loss", smoothed=True)
    raw = member_curves(run, "loss", smoothed=False) if len(run.members) <= MAX_COLOURS else []
    return [_loss_chart(run, smoothed, raw, over=over) for over in ("progress", "time")]


def _loss_chart(run: RunData, smoothed: Sequence[MemberCurve], raw: Sequence[MemberCurve], *, over: str) -> Markup:
    over_time = over == "time"
    count = len(run.members)
    pale = {curve.member: curve.over_time if over_time else curve.over_progress for curve in raw}
    series = [
        Series(
            label=curve.member,
            css=island_css(run.members.index(curve.member), count),
            segments=curve.over_time if over_time else curve.over_progress,
            faint=pale.get(curve.member, []),
            keyed=count <= MAX_COLOURS,
        )
        for curve in smoothed
    ]
    val = val_curve(run, "t_s" if over_time else "progress")
    if val:
        series.append(Series(label="anchor (validation)", css="anchor", segments=[val], dots=True, hold=True))
    values = [value for one in series for _, value in one.points]
    steep = bool(values) and min(values) > 0 and max(values) > 100 * min(values)
    axis = (
        Axis(title="time since start", unit="time", low=0.0, high=run.end_s or None)
        if over_time
        else Axis(title="progress (committed tokens)", unit="progress", low=0.0, high=1.0)
    )
    return line_chart(
        chart_id=f"loss-{over}",
        title=f"Loss over {over}",
        note="Nats per token. Islands: training loss, smoothed (pale: every step). Anchor: validation loss.",
        x=axis,
        y=Axis(title="loss", unit="loss", log=steep),
        series=series,
        markers=fault_markers(run) if over_time else (),
        height=350,
        empty="Neither a training step nor an evaluation was recorded, so there is no loss to plot.",
    )


def throughput_chart(run: RunData) -> Markup:
    """Tokens per second: every island inside its steps, and committed by all."""
    count = len(run.members)
    series = [
        Series(
            label=curve.member,
            css=island_css(run.members.index(curve.member), count),
            segments=curve.over_time,
            keyed=count <= MAX_COLOURS,
        )
        for curve in member_curves(run, "tokens_per_s", smoothed=True)
    ]
    rate = committed_rate(run)
    if rate:
        series.append(Series(label="committed, all islands", css="anchor", segments=[rate], hold=True))
    return line_chart(
        chart_id="throughput",
        title="Throughput",
        note="Tokens per second: each island inside its steps, and committed by all together.",
        x=Axis(title="time since start", unit="time", low=0.0, high=run.end_s or None),
        y=Axis(title="tokens/s", unit="rate", from_zero=True),
        series=series,
        markers=fault_markers(run),
        empty=_NO_STEPS,
    )


def traffic_chart(run: RunData, figures: Headline) -> Markup:
    """Bytes sent so far over committed tokens, beside what data parallel would have sent."""
    sent = cumulative_bytes(run)
    series = [Series(label="this run", css="s0", segments=[sent] if sent else [])]
    total = figures.data_parallel_bytes
    if total and sent and figures.tokens_committed:
        per_token = total / figures.tokens_committed
        series.append(
            Series(label="data parallel (fp32 ring)", css="other", segments=[[(x, x * per_token) for x, _ in sent]])
        )
    ratio = f" At the end {fmt.ratio(figures.bytes_ratio)} apart." if figures.bytes_ratio else ""
    return line_chart(
        chart_id="traffic",
        title="Bytes sent, in total",
        note=f"Payload of all islands, logarithmic.{ratio}",
        x=Axis(title="committed tokens", unit="count", low=0.0),
        y=Axis(title="bytes", unit="bytes", log=True),
        series=series,
        empty=_NO_EXCHANGES,
    )


def exchange_charts(run: RunData) -> list[Markup]:
    """Bytes and seconds of every exchange."""
    groups = _grouped(run.exchanges)
    note = (
        "In order of commit."
        if len(groups) == len(run.exchanges)
        else "In order of commit; each bar is the highest of its group."
    )
    fewer = len(run.members)
    charts = []
    for chart_id, title, what, axis in (
        ("exchange-bytes", "Bytes per exchange", "bytes", Axis(title="payload", unit="bytes", from_zero=True)),
        (
            "exchange-seconds",
            "Seconds per exchange",
            "seconds",
            Axis(title="first offer to commit", unit="seconds", from_zero=True),
        ),
    ):
        bars = []
        for first, group in groups:
            row = max(group, key=lambda one: float(getattr(one, what)))
            flagged = any(one.attempts > 1 or len(one.roster) < fewer for one in group)
            last = first + len(group) - 1
            label = str(first) if last == first else f"{first}\u2013{last}"
            bars.append(
                Bar(
                    tick=str(first),
                    label=label,
                    value=float(getattr(row, what)),
                    detail=_detail(row, fewer),
                    flagged=flagged,
                )
            )
        charts.append(
            bar_chart(
                chart_id=chart_id,
                title=title,
                note=note,
                y=axis,
                bars=bars,
                x_title="exchange",
                flag="an island missing, or more than one attempt",
                empty="No exchange has been committed." if what == "seconds" else _NO_EXCHANGES,
            )
        )
    return charts


def _grouped(rows: Sequence[ExchangeRow]) -> list[tuple[int, Sequence[ExchangeRow]]]:
    size = max(1, -(-len(rows) // _MOST_BARS))
    return [(start + 1, rows[start : start + size]) for start in range(0, len(rows), size)]


def _detail(row: ExchangeRow, num_members: int) -> str:
    tries = "" if row.attempts == 1 else f", {row.attempts} attempts"
    return f"version {row.version} at {fmt.clock(row.t_s)}, {len(row.roster)} of {num_members} islands{tries}"
