"""The status of a lab as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from faults.lab.control import LabStatus, LinkStatus

COLUMNS = ("link", "Mbit/s", "delay ms", "jitter ms", "loss", "MB", "packets", "full", "lost", "cut")


def format_status(name: str, now: LabStatus) -> str:
    """Every direction of every link in a row, then what is cut and how punctual the emulation is."""
    lines = [f"lab {name}", *align([COLUMNS, *map(_row, now.links)])]
    if now.cut:
        lines.append("cut: " + ", ".join(f"{source}>{target}" for source, target in now.cut))
    lines.append(
        f"{now.num_late} of {now.num_frames} delayed frames came over 1 ms late (worst {now.worst_late_ms:g} ms); "
        f"the switch used {now.cpu_s:.1f} s of CPU, scheduling {now.scheduling}"
    )
    overruns = {node: num for node, num in now.overruns.items() if num}
    if overruns:
        dropped = ", ".join(f"{num} from {node}" for node, num in overruns.items())
        lines.append(f"warning: the switch was too slow for {dropped} frames, which are lost: nobody asked for that")
    return "\n".join(lines)


def _row(link: LinkStatus) -> tuple[str, ...]:
    return (
        link.name,
        "-" if link.rate_mbit is None else f"{link.rate_mbit:g}",
        f"{link.delay_ms:g}",
        f"{link.jitter_ms:g}",
        f"{link.loss:g}",
        f"{link.num_bytes / 1e6:.1f}",
        str(link.num_packets),
        str(link.dropped_queue),
        str(link.dropped_loss),
        str(link.dropped_cut),
    )


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of equal columns: the first to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
