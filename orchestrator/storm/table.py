"""The figures of a storm as a table for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from orchestrator.storm.figures import StormFigures, Times


def show(figures: StormFigures, console: Console) -> None:
    """Print them."""
    table = Table("fault", "injected", "detected", "detection", "next commit", "back", "contributed")
    for kind, row in figures.kinds.items():
        found = ", ".join(f"{num} {verdict}" for verdict, num in sorted(row.detected_as.items()))
        table.add_row(
            kind,
            str(row.injected),
            f"{row.detected} ({found})" if found else str(row.detected),
            *(_times(times) for times in (row.detection, row.next_commit, row.back, row.contributed)),
        )
    console.print(table)
    console.print("times: median / 95th percentile after the injection", highlight=False)
    for name, value in lines(figures):
        console.print(f"{name:<22}{value}", highlight=False)


def lines(figures: StormFigures) -> list[tuple[str, str]]:
    """The figures that are not of one kind of fault."""
    ledger = "adds up" if not figures.ledger_findings else f"{figures.ledger_findings} contradictions"
    return [
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
    return f"{times.median_s:.2f} / {times.p95_s:.2f} s"
