"""The timeline: what every member did, on the controller's clock, with faults and commits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.metrics import PHASES, FaultEvent
from orchestrator.report import format as fmt
from orchestrator.report.html import Child, Markup, el, table
from orchestrator.report.load import RunData
from orchestrator.report.scale import Axis, Scale
from orchestrator.report.series import TimelineRow, timeline
from orchestrator.report.svg import drawing, empty_chart, figure

WIDTH, LEFT, RIGHT, TOP, AXIS = 1240, 96, 76, 30, 34
WORDS = {
    "compute": "computing",
    "sync": "synchronising",
    "evaluate": "evaluating",
    "dead": "dead",
    "start": "starting",
    "away": "away",
    "wait": "waiting",
}
_DRAW_ORDER = ("compute", "start", "wait", "sync", "evaluate", "dead")
_MOST_COMMITS = 400


def timeline_chart(run: RunData) -> Markup:
    """The timeline of a run, or a sentence where no spans were recorded."""
    rows = timeline(run, num_slots=WIDTH - LEFT - RIGHT)
    title = "What each island did"
    if not rows or run.end_s <= 0:
        return empty_chart(title, "No spans were recorded, so there is no timeline of computing and waiting.")
    pitch = 40 if len(rows) <= 12 else 24 if len(rows) <= 40 else 14
    height = TOP + pitch * len(rows) + AXIS
    scale = Scale(low=0.0, high=run.end_s, start_px=LEFT, end_px=WIDTH - RIGHT)
    rows_svg = [_row(row, TOP + i * pitch, pitch, scale) for i, row in enumerate(rows)]
    faults = [_fault_mark(fault, rows, pitch, scale) for fault in run.faults]
    hover = el(
        "g",
        el("rect", class_="pick", x=0, y=0, width=1, height=pitch - _gap(pitch), rx=2),
        class_="hover",
        visibility="hidden",
    )
    label = f"Timeline of {fmt.plural(len(rows), 'island')} over {fmt.duration(run.end_s)}."
    svg = drawing(
        label,
        el("defs", _hatch()),
        _axis(run.end_s, scale, height),
        _commits(run, scale),
        *rows_svg,
        *faults,
        hover,
        height=height,
        width=WIDTH,
    )
    return figure(
        "timeline",
        title,
        _note(rows, run),
        svg=svg,
        legend=_legend(rows, run),
        values=_data(run, rows, pitch, scale),
        wide=True,
    )


def phase_table(run: RunData) -> Markup | None:
    """Seconds and shares of every phase per member: the timeline in figures."""
    rows = timeline(run, num_slots=1)
    if not rows:
        return None
    phases = [phase for phase in PHASES if any(row.seconds[phase] for row in rows)]
    cells: list[list[Child]] = []
    for row in rows:
        total = sum(row.seconds.values()) or 1.0
        cells.append([row.member, *(_share_cell(row.seconds[phase], total) for phase in phases), fmt.duration(total)])
    head = ["island", *(WORDS[phase] for phase in phases), "all"]
    return table(
        head,
        cells,
        caption="Where the time of each island went",
        numeric=range(1, len(head)),
        css="tall" if len(rows) > 12 else "",
    )


def _share_cell(seconds: float, total: float) -> Markup:
    if not seconds:
        return el("span", fmt.UNKNOWN, class_="muted")
    return el("span", fmt.percent(seconds / total), el("small", fmt.duration(seconds)))


def _note(rows: Sequence[TimelineRow], run: RunData) -> str:
    note = "On the controller's clock; the share on the right is computing."
    if any(row.slots for row in rows):
        return note + " A row has more spans than pixels: each column shows the shares of its phases."
    return note + (" Spans narrower than a pixel are drawn one pixel wide." if run.end_s > 20 else "")


def _row(row: TimelineRow, top: float, pitch: int, scale: Scale) -> Markup:
    gap = _gap(pitch)
    bar_top, bar_height = top + gap / 2, pitch - gap
    total = sum(row.seconds.values()) or 1.0
    middle = top + pitch / 2
    paths: dict[str, str] = dict.fromkeys(PHASES, "")
    for start_s, end_s, phase, _ in row.spans:
        width = scale(end_s) - scale(start_s)
        if PHASES[phase] != "compute":
            width = max(width, 1.0)
        paths[PHASES[phase]] += f"M{scale(start_s):.2f} {bar_top}h{width:.2f}v{bar_height}h{-width:.2f}z"
    for start_s, end_s, shares in row.slots:
        x, width, y = scale(start_s), scale(end_s) - scale(start_s) + 0.05, bar_top + bar_height
        for phase_name in _DRAW_ORDER:
            part = shares[PHASES.index(phase_name)] * bar_height
            if part > 0.05:
                y -= part
                paths[phase_name] += f"M{x:.2f} {y:.2f}h{width:.2f}v{part:.2f}h{-width:.2f}z"
    return el(
        "g",
        el("text", row.member, x=LEFT - 12, y=middle, dy="0.34em", class_="row-name end"),
        *(
            el("path", d=paths[phase], class_=f"phase {phase}", data_phase=phase)
            for phase in _DRAW_ORDER
            if paths[phase]
        ),
        el(
            "text",
            fmt.percent(row.seconds["compute"] / total),
            x=WIDTH - RIGHT + 12,
            y=middle,
            dy="0.34em",
            class_="share",
        ),
    )


def _gap(pitch: int) -> int:
    """Pixels between two rows."""
    return 8 if pitch > 20 else 4


def _axis(end_s: float, scale: Scale, height: int) -> Markup:
    axis = Axis(title="", unit="time")
    parts: list[Child] = []
    for value, label in axis.ticks(0.0, end_s, target=12):
        at = f"{scale(value):.1f}"
        parts.append(el("line", x1=at, x2=at, y1=TOP - 4, y2=height - AXIS + 2, class_="grid"))
        parts.append(el("text", label, x=at, y=height - AXIS + 19, class_="tick mid"))
    return el("g", *parts)


def _commits(run: RunData, scale: Scale) -> Markup | None:
    """A rug of commits above the rows; no rug where it would be a solid bar."""
    if not run.exchanges or len(run.exchanges) > _MOST_COMMITS:
        return None
    ticks = "".join(f"M{scale(row.t_s):.1f} {TOP - 16}v9" for row in run.exchanges)
    return el(
        "g",
        el("text", "commits", x=LEFT - 12, y=TOP - 11, dy="0.34em", class_="tick end"),
        el("path", d=ticks, class_="commit"),
    )


def _fault_mark(fault: FaultEvent, rows: Sequence[TimelineRow], pitch: int, scale: Scale) -> Markup | None:
    moment_s = fault_moment(fault)
    index = next((i for i, row in enumerate(rows) if row.member == fault.member), None)
    if moment_s is None or index is None:
        return None
    x, y = scale(moment_s), TOP + index * pitch + pitch / 2
    parts: list[Child] = [
        el("circle", cx=f"{x:.1f}", cy=y, r=min(7.5, pitch / 2), class_="fault-disc"),
        el("path", d=f"M{x - 3:.1f} {y - 3}l6 6m0 -6l-6 6", class_="fault-cross"),
    ]
    if fault.contributed_s is not None:
        x = scale(fault.contributed_s)
        parts.append(el("path", d=f"M{x:.1f} {y - 6.5}l6.5 6.5l-6.5 6.5l-6.5 -6.5z", class_="back-mark"))
    return el("g", *parts, class_="fault")


def fault_moment(fault: FaultEvent) -> float | None:
    """When a fault happened, or else when it was noticed."""
    return fault.injected_s if fault.injected_s is not None else fault.detected_s


def _legend(rows: Sequence[TimelineRow], run: RunData) -> list[Child]:
    present = [phase for phase in PHASES if any(row.seconds[phase] for row in rows)]
    keys: list[Child] = [
        el("span", el("span", class_="swatch box"), WORDS[phase], class_=f"key phase {phase}") for phase in present
    ]
    if run.faults:
        keys.append(el("span", _icon("fault-disc", "fault-cross"), "fault", class_="key"))
    if any(fault.contributed_s is not None for fault in run.faults):
        keys.append(el("span", _icon("back-mark"), "contributes again", class_="key"))
    return keys


def _icon(*css: str) -> Markup:
    drawings = {
        "fault-disc": el("circle", cx=8, cy=8, r=7.5, class_="fault-disc"),
        "fault-cross": el("path", d="M5 5l6 6m0 -6l-6 6", class_="fault-cross"),
        "back-mark": el("path", d="M8 1.5l6.5 6.5l-6.5 6.5l-6.5 -6.5z", class_="back-mark"),
    }
    return el("svg", *(drawings[name] for name in css), viewBox="0 0 16 16", class_="icon", aria_hidden="true")


def _hatch() -> Markup:
    return el(
        "pattern",
        el("rect", width=6, height=6, class_="hatch-ground"),
        el("path", d="M-1 1l2 -2M0 6l6 -6M5 7l2 -2", class_="hatch-line"),
        id="hatch",
        width=6,
        height=6,
        patternUnits="userSpaceOnUse",
    )


def _data(run: RunData, rows: Sequence[TimelineRow], pitch: int, scale: Scale) -> dict[str, Any]:
    def moment(value: float) -> float:
        return round(value, 3)

    return {
        "kind": "timeline",
        "end_s": moment(run.end_s),
        "start": scale.start_px,
        "end": scale.end_px,
        "top": TOP,
        "pitch": pitch,
        "gap": _gap(pitch),
        "phases": list(PHASES),
        "words": [WORDS[phase] for phase in PHASES],
        "rows": [
            {
                "name": row.member,
                "spans": [[moment(a), moment(b), phase, incarnation] for a, b, phase, incarnation in row.spans],
                "slots": [[moment(a), moment(b), [round(share, 3) for share in shares]] for a, b, shares in row.slots],
            }
            for row in rows
        ],
        "faults": [
            [fault.member, fault.fault, moment(at)] for fault in run.faults if (at := fault_moment(fault)) is not None
        ],
    }
