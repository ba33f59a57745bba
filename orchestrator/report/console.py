"""The closing table of a run, for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.report import format as fmt
from orchestrator.summary import FaultRow, Summary

if TYPE_CHECKING:
    from rich.console import RenderableType

_REASONS = {"done": "[green]done[/]", "failed": "[red]failed[/]", "stopped": "[yellow]stopped, can be resumed[/]"}


def console_table(summary: Summary) -> RenderableType:
    """What a run came to, as a rich table with a row per fault."""
    from rich.markup import escape
    from rich.table import Table

    figures = Table(
        title=f"Run {escape(summary.run_id)}", title_justify="left", show_header=False, box=None, pad_edge=False
    )
    figures.add_column(style="dim", no_wrap=True)
    figures.add_column(overflow="fold")
    for name, value in _rows(summary):
        figures.add_row(name, value.replace(fmt.NBSP, " "))
    if summary.error:
        figures.add_row("error", f"[red]{escape(summary.error)}[/]")
    for fault in summary.faults:
        figures.add_row(f"{escape(fault.kind)} {escape(fault.member)}", _fault(fault).replace(fmt.NBSP, " "))
    return figures


def _rows(summary: Summary) -> list[tuple[str, str]]:
    lost = f", {fmt.count(summary.tokens_lost)} lost" if summary.tokens_lost else ""
    lost += f", {fmt.count(summary.tokens_dropped)} dropped" if summary.tokens_dropped else ""
    discarded = f", {summary.exchanges_discarded} discarded" if summary.exchanges_discarded else ""
    return [
        ("outcome", f"{_REASONS[summary.exit_reason]} after {fmt.duration(summary.seconds)}"),
        (
            "validation loss",
            f"{fmt.loss(summary.initial_val_loss)} to [bold]{fmt.loss(summary.final_val_loss)}[/] nats per token",
        ),
        (
            "tokens",
            f"{fmt.count(summary.tokens_committed)} committed{lost}, {fmt.count(summary.tokens_per_s)} per second",
        ),
        ("compute utilisation", fmt.percent(summary.compute_utilization)),
        ("goodput", fmt.percent(summary.goodput)),
        ("exchanges", f"{summary.exchanges_committed} committed{discarded}"),
        (
            "bytes sent",
            f"{fmt.num_bytes(summary.bytes_sent)}, {summary.bytes_sent_per_param_per_round:.2f} B "
            "per parameter, member and round",
        ),
    ]


def _fault(fault: FaultRow) -> str:
    about = "about " if fault.estimated else ""
    steps = (
        ("noticed", fault.detected_after_s),
        ("next commit", fault.next_commit_after_s),
        ("back", fault.back_after_s),
        ("contributed", fault.contributed_after_s),
    )
    known = [f"{name} after {about}{fmt.duration(value)}" for name, value in steps if value is not None]
    return (
        ", ".join(known) + ("" if fault.back_after_s is not None else "; did not come back") if known else "not noticed"
    )
