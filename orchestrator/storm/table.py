"""The figures of a storm as a table for the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from orchestrator.storm.figures import StormFigures, Times


def show(figures: StormFigures, console: Console) -> None:
    """Print them; the table fits into 80 columns."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("fault", "noticed", "detection", "next commit", "back", "contributed"):
        table.add_column(name, no_wrap=True, justify="left" if name == "fault" else "right")
    for kind, row in figures.kinds.items():
        table.add_row(
            kind,
            f"{row.detected} of {row.injected}",
            *(_times(times) for times in (row.detection, row.next_commit, row.back, row.contributed)),
        )
    console.print(table)
    console.print("seconds after the injection: median / 95th percentile", highlight=False)
    facts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name, value in lines(figures):
        facts.add_row(name, value)
    console.print(facts, highlight=False)


def lines(figures: StormFigures) -> list[tuple[str, str]]:
    """The figures that are not of one kind of fault."""
    ledger = "adds up" if not figures.ledger_findings else f"{figures.ledger_findings} contradictions"
    verdicts = (f"{kind}: {', '.join(sorted(row.detected_as))}" for kind, row in figures.kinds.items())
    return [
        ("noticed as", "; ".join(verdicts)),
        ("islands", f"{figures.islands}, {figures.seconds:.0f} s, {figures.rate_per_hour:g} faults an hour"),
        ("throughput", f"{figures.throughput:.3f} of the fault-free run, for the seconds that islands were alive"),
        ("tokens", f"{figures.tokens_per_s:,.0f} a second, fault-free {figures.fault_free_tokens_per_s:,.0f}"),
        (
            "participation",
            f"{100 * figures.participation:.1f} % of the living and connected, mean of {figures.commits} commits; "
            f"below 90 % in {100 * figures.participation_low:.1f} % of them",
        ),
        ("tokens lost", f"{figures.tokens_lost:,}, issued again {figures.tokens_reissued:,}"),
        ("digest mismatches", str(figures.digest_mismatches)),
        ("ledger", ledger),
        ("not detected", ", ".join(figures.undetected) or "none"),
    ]


def _times(times: Times) -> str:
    if times.median_s is None or times.p95_s is None:
        return "-"
    return " / ".join(f"{value:.2f}" if value < 10 else f"{value:.1f}" for value in (times.median_s, times.p95_s))
