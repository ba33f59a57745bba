"""Tables of a single-run report: faults, and the committed exchanges."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.metrics import ExchangeRow
from orchestrator.report import format as fmt
from orchestrator.report.html import Child, Markup, el, table
from orchestrator.report.load import RunData
from orchestrator.report.timeline import fault_moment
from orchestrator.report.verdict import Headline

_MOST_ROWS = 300


def fault_table(run: RunData, figures: Headline) -> Markup:
    """What each fault led to, in seconds after it."""
    if not figures.faults:
        return el("p", "No fault was injected, and none was noticed.", class_="nothing")
    moments: dict[tuple[str, str], list[float | None]] = {}
    for event in run.faults:
        moments.setdefault((event.fault, event.member), []).append(fault_moment(event))
    rows: list[list[Child]] = []
    for row in figures.faults:
        times = moments.get((row.kind, row.member), [])
        at = fmt.clock(times.pop(0)) if times else fmt.UNKNOWN
        mark = "\u2248" + fmt.NBSP if row.estimated else ""
        after = (row.detected_after_s, row.next_commit_after_s, row.back_after_s, row.contributed_after_s)
        rows.append([row.kind, row.member, mark + at, *(_after(value, mark) for value in after)])
    head = ["fault", "member", "at", "noticed", "next commit", "back in training", "contributed again"]
    note = "Seconds after the fault. Next commit: of the others. \u2248: the moment of the fault is estimated."
    return el(
        "div",
        table(head, rows, caption="Faults and recovery", numeric=range(2, len(head))),
        el("p", note, class_="footnote"),
    )


def _after(value: float | None, mark: str) -> Child:
    return el("span", "never", class_="muted") if value is None else f"{mark}{fmt.duration(value)}"


def stage_table(run: RunData) -> Markup:
    """Who served which stage of a pipeline at its newest step, at which speed, and why."""
    rows: list[list[Child]] = []
    for stage in run.stages:
        buddies = ", ".join(stage["buddies"]) or "nobody"
        for peer in stage["serving"]:
            speed = peer["throughput"]
            memory = peer["memory_bytes"]
            rows.append(
                [
                    str(stage["stage"]),
                    f"{stage['params']:,}",
                    peer["peer"],
                    fmt.UNKNOWN if speed is None else f"{speed:.2f}",
                    fmt.UNKNOWN if memory is None else f"{memory / 1e6:,.0f}",
                    peer["why"],
                    buddies,
                ]
            )
    head = ["stage", "parameters", "peer", "forwards a second", "memory, MB", "why it serves this stage", "copy at"]
    return table(head, rows, caption="Stages at the newest step", numeric=(0, 1, 3, 4))


def exchange_table(run: RunData) -> Markup | None:
    """All exchanges, or the first, the last and every unusual one of very many."""
    rows, num_members = run.exchanges, len(run.members)
    if not rows:
        return None
    shown = list(range(len(rows)))
    if len(rows) > _MOST_ROWS:
        odd = [i for i, row in enumerate(rows) if row.attempts > 1 or len(row.roster) < num_members]
        shown = sorted({*range(50), *odd[: _MOST_ROWS - 100], *range(len(rows) - 50, len(rows))})
    cells: list[list[Child]] = [[str(i + 1), *_exchange_cells(rows[i], run.members)] for i in shown]
    head = ["#", "version", "fragment", "committed at", "seconds", "attempts", "bytes", "tokens so far", "contributors"]
    left_out = len(rows) - len(shown)
    note = f"{left_out} ordinary exchanges in the middle are left out." if left_out else None
    return el(
        "div",
        table(head, cells, caption="Committed exchanges", numeric=range(8), css="tall"),
        el("p", note, class_="footnote") if note else None,
    )


def _exchange_cells(row: ExchangeRow, members: Sequence[str]) -> list[Child]:
    absent = [member for member in members if member not in row.roster]
    if not absent:
        roster: Child = f"all {len(members)}"
    elif len(absent) <= 3:
        roster = el("span", f"{len(row.roster)} of {len(members)}, without {', '.join(absent)}", class_="flag-text")
    else:
        roster = el("span", f"{len(row.roster)} of {len(members)}", class_="flag-text")
    return [
        str(row.version),
        str(row.fragment),
        fmt.clock(row.t_s),
        fmt.duration(row.seconds),
        el("span", str(row.attempts), class_="flag-text" if row.attempts > 1 else None),
        fmt.num_bytes(row.bytes),
        fmt.count(row.tokens_committed),
        roster,
    ]
