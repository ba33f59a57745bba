"""From finished runs to the table, the figures and the plot of `make bench-quality` (pure but for the three files).

A gap is `loss / loss of data parallel - 1`, both with the same seed: the pair shares first weights and samples, so the
spread over seeds is that of the gap and not that of the loss.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality_best import best_text, hours, link_table, sent_mb
from benchmarks.quality_links import LINKS
from benchmarks.quality_plan import (
    BASELINE,
    BATCH_SIZE,
    COMMON,
    NUM_ISLANDS,
    OUTER_PAIRS,
    ROWS,
    SEQ_LEN,
    SWEEP_SEED,
    Job,
    Length,
    Losses,
    Rates,
    Row,
    chosen_rates,
    final_loss,
    table_jobs,
)
from benchmarks.quality_plot import Curve, Point, plot

Record = Mapping[str, Any]

GAP_LIMIT, WARM_LIMIT, CODEC_LIMIT = 0.05, 0.035, 0.004
STREAMING_LIMIT = 0.01
EARLY = 0.3
"""Share of the tokens at which the gap is compared with that at the end: has it fallen?"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Paired:
    """A relative difference for each seed."""

    by_seed: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.by_seed.values())

    @property
    def low(self) -> float:
        """Least of the seeds."""
        return min(self.by_seed.values())

    @property
    def high(self) -> float:
        """Largest of the seeds."""
        return max(self.by_seed.values())

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        seeds = {str(seed): value for seed, value in self.by_seed.items()}
        return {"mean": self.mean, "min": self.low, "max": self.high, "by_seed": seeds}

    def __str__(self) -> str:
        if len(self.by_seed) == 1:
            return f"{100 * self.mean:+.2f} %"
        return f"{100 * self.mean:+.2f} % ({100 * self.low:+.2f} to {100 * self.high:+.2f})"


def paired(losses: Mapping[int, float], base: Mapping[int, float]) -> Paired | None:
    """Relative difference of two rows over the seeds that both have; None without a common one."""
    common = sorted(losses.keys() & base.keys())
    return Paired(by_seed={seed: losses[seed] / base[seed] - 1.0 for seed in common}) if common else None


def gap_curve(runs: Mapping[int, Record], base: Mapping[int, Record]) -> list[tuple[float, Paired]]:
    """`(share of the tokens, gap)` at the checkpoints that both rows have, but not the one before the first step."""
    by_share: dict[float, dict[int, float]] = {}
    for seed in sorted(runs.keys() & base.keys()):
        ours, theirs = _points(runs[seed]), _points(base[seed])
        for share in sorted(ours.keys() & theirs.keys()):
            if share > 0:
                by_share.setdefault(share, {})[seed] = ours[share] / theirs[share] - 1.0
    return [(share, Paired(by_seed=gaps)) for share, gaps in sorted(by_share.items())]


def _points(record: Record) -> dict[float, float]:
    return {round(share, 4): loss for share, loss in record["curve"] if loss is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """One thing that is asked of the figures; `measured` None: its runs are not done."""

    what: str
    limit: str
    measured: str | None
    met: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One row of the table with what was measured of it."""

    row: Row
    rates: Rates
    runs: Mapping[int, Record]
    gap: Paired | None
    curve: list[tuple[float, Paired]]

    @property
    def losses(self) -> dict[int, float]:
        """Final loss of each seed."""
        return {seed: final_loss(record) for seed, record in self.runs.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The report as text, and whether the goals are met."""

    text: str
    goals: tuple[Goal, ...]


def lines_of(records: Sequence[Record], length: Length, rows: tuple[Row, ...] = ROWS) -> list[Line]:
    """The table's lines: rows of which at least one seed is done."""
    by_settings = {_frozen(record["settings"]): record for record in records}
    rates = chosen_rates(Losses(records), length, rows)
    runs: dict[str, dict[int, Record]] = {row.name: {} for row in rows}
    for seed in length.seeds:
        for job in table_jobs(rates, seed, length, rows):
            record = by_settings.get(_frozen(job.settings))
            if record is not None:
                runs[job.row.name][seed] = record
    base = runs[BASELINE]
    base_losses = {seed: final_loss(record) for seed, record in base.items()}
    return [
        Line(
            row=row,
            rates=rates[row.tuned_as],
            runs=runs[row.name],
            gap=paired({seed: final_loss(record) for seed, record in runs[row.name].items()}, base_losses),
            curve=gap_curve(runs[row.name], base),
        )
        for row in rows
        if runs[row.name]
    ]


def _frozen(settings: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(settings.items()))


def goals_of(lines: Sequence[Line], length: Length) -> tuple[Goal, ...]:
    """The goals; one is met only with all seeds."""
    by_name = {line.row.name: line for line in lines}
    int8, warm, fp32 = (by_name.get(name) for name in ("diloco-30-int8", "diloco-30-int8-warm", "diloco-30"))
    codec = paired(int8.losses, fp32.losses) if int8 and fp32 else None
    streaming = by_name.get("streaming-30-e3m0")
    four_bits = paired(streaming.losses, fp32.losses) if streaming and fp32 else None
    return (
        _goal("DiLoCo H = 30 int8 over data parallel", int8.gap if int8 else None, GAP_LIMIT, length),
        _goal("the same with 10 % synchronous warm-up", warm.gap if warm else None, WARM_LIMIT, length),
        _goal("int8 over fp32 at H = 30", codec, CODEC_LIMIT, length),
        _falling(int8, length),
        _goal("streaming, 4 bits with error feedback, over fp32 at H = 30", four_bits, STREAMING_LIMIT, length),
    )


def _goal(what: str, found: Paired | None, limit: float, length: Length) -> Goal:
    whole = found is not None and set(found.by_seed) == set(length.seeds)
    met = whole and found is not None and found.mean <= limit
    measured = None if found is None else str(found)
    return Goal(what=what, limit=f"at most {100 * limit:g} %", measured=measured, met=met)


def _falling(line: Line | None, length: Length) -> Goal:
    what = f"the gap of DiLoCo H = 30 int8 falls from {100 * EARLY:.0f} % of the tokens to the end"
    ends = {share: gap for share, gap in line.curve if share in (EARLY, 1.0)} if line else {}
    if len(ends) < 2:
        return Goal(what=what, limit="lower", measured=None, met=False)
    early, late = ends[EARLY], ends[1.0]
    met = late.mean < early.mean and set(late.by_seed) == set(length.seeds)
    measured = f"{100 * early.mean:+.2f} % to {100 * late.mean:+.2f} %"
    return Goal(what=what, limit="lower", measured=measured, met=met)


# Text --------------------------------------------------------------------------------------------------------------


def markdown(
    records: Sequence[Record], lines: Sequence[Line], goals: Sequence[Goal], length: Length, ray: Record | None = None
) -> str:
    """The report to read; `ray`: what `benchmarks.quality_ray` found, if it has run."""
    parts = ["# Loss against data parallel training", "", _intro(records, length), ""]
    parts += ["## Goals", "", *_goal_table(goals), "", "## Rows", "", *_row_table(lines), "", _footnotes(), ""]
    parts += ["## Predicted time on slow links", "", *link_table(lines), "", best_text(lines), ""]
    parts += [_ray_text(ray), ""]
    parts += ["## Gap over tokens", "", "![Gap to data parallel over tokens](quality.svg)", "", *_curve_table(lines)]
    parts += ["", "## Learning rates", "", _sweep_text(length), "", *_sweep_table(records, length), ""]
    return "\n".join(parts)


def _intro(records: Sequence[Record], length: Length) -> str:
    params = next((record["params"] for record in records), 0)
    tokens = length.steps * NUM_ISLANDS * BATCH_SIZE * SEQ_LEN
    model = f"{COMMON['model.layers']} layers of width {COMMON['model.dim']} ({params:,} parameters)"
    return (
        f"{NUM_ISLANDS} islands, {model}, "
        f"{SEQ_LEN} bytes x {BATCH_SIZE} a step, {length.steps:,} steps of each island ({tokens:,} tokens in all), "
        f"corpus `stdlib`, {len(length.seeds)} seeds. Loss: nats per byte of the final anchor over "
        f"{COMMON['eval.windows']:,} fixed validation windows. A gap compares runs with the same seed, which have the "
        "same first weights and the same samples; mean over the seeds, in brackets the least and the largest. "
        "Written by `python -m benchmarks.quality`; every run is in `quality_runs.jsonl`.\n\n" + _machines(records)
    )


def _machines(records: Sequence[Record]) -> str:
    environments = [record["environment"] for record in records]
    if not environments:
        return "Nothing is finished yet."
    machines = sorted({f"{e['processor']}, {e['cores']} cores" for e in environments})
    commits = sorted({e["commit"] for e in environments})
    dates = sorted({e["date"][:10] for e in environments})
    cpu_min = sum(record["cpu_s"] for record in records) / 60
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return (
        f"Machine: {'; '.join(machines)}; {when}; commit {', '.join(commits)} (+: with changes); torch "
        f"{', '.join(sorted({e['torch'] for e in environments}))}; {len(records)} runs, {cpu_min:.0f} minutes of CPU."
    )


def _goal_table(goals: Sequence[Goal]) -> list[str]:
    rows = [f"| {g.what} | {g.limit} | {g.measured or 'not run'} | {'yes' if g.met else 'no'} |" for g in goals]
    return ["| Goal | Limit | Measured | Met |", "|---|---|---|---|", *rows]


def _row_table(lines: Sequence[Line]) -> list[str]:
    out = [
        "| Row | Inner lr | Outer lr / momentum | Loss (mean) | Over data parallel | Seeds | MB sent by an island |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        outer = "" if line.rates.outer is None else f"{line.rates.outer[0]:g} / {line.rates.outer[1]:g}"
        gap = "" if line.row.name == BASELINE or line.gap is None else str(line.gap)
        sent = sent_mb(line)
        loss = statistics.fmean(line.losses.values())
        out.append(
            f"| {line.row.label} | {line.rates.lr:g} | {outer} | {loss:.4f} | {gap} | {len(line.runs)} | {sent:.1f} |"
        )
    return out


def _footnotes() -> str:
    return (
        "One island alone makes as many steps as each island of the others, with the same batch: a quarter of their "
        "tokens in the same time. It is what an island would reach without the others, not a run with equal tokens. "
        "All other rows train on the same samples; how they are dealt to the islands depends on the length of a round, "
        "and on their speeds where one island is half as fast."
    )


def _ray_text(ray: Record | None) -> str:
    if ray is None:
        return "No row was repeated on Ray yet: `python -m benchmarks.quality_ray`."
    first, second = ray["in_process"]["anchor_digest"], ray["ray"]["anchor_digest"]
    ends = f"with the same bits (anchor `{first}`)" if ray["equal"] else f"with OTHER bits: `{second}`, not `{first}`"
    return (
        f"`{ray['row']}`, seed {ray['seed']}, was repeated on Ray, {NUM_ISLANDS} processes over sockets, and ended "
        f"{ends}; commit {ray['environment']['commit']}, `quality_ray.json`."
    )


def _curve_table(lines: Sequence[Line]) -> list[str]:
    shown = [line for line in lines if line.row.name != BASELINE and line.curve]
    shares = sorted({share for line in shown for share, _ in line.curve})
    out = ["| Share of the tokens | " + " | ".join(line.row.label for line in shown) + " |"]
    out.append("|---" * (len(shown) + 1) + "|")
    for share in shares:
        cells = [f"{100 * dict(line.curve)[share].mean:+.2f} %" if share in dict(line.curve) else "" for line in shown]
        out.append(f"| {100 * share:.0f} % | " + " | ".join(cells) + " |")
    return out


def _sweep_text(length: Length) -> str:
    pairs = ", ".join(f"{lr:g} / {momentum:g}" for lr, momentum in OUTER_PAIRS)
    return (
        f"Swept on seed {SWEEP_SEED}, which the table does not use: the inner rate with outer {OUTER_PAIRS[0][0]:g} / "
        f"{OUTER_PAIRS[0][1]:g} in runs of {length.short_steps:,} steps; the outer pairs {pairs} with the best inner "
        f"rate in runs of {length.steps:,} steps; the inner rate's neighbours with the best pair. Where the best lay "
        "at an edge, one more was tried beyond it. The int8 rows have the rates of fp32 at H = 30. Streaming and the "
        "rows after it have the inner rate of fp32 at H = 30 and the best of a few outer pairs of their own. Not "
        "tuned, and the same for all rows: AdamW betas 0.9 / 0.95, weight decay 0.1, clipping at 1, 5 % warm-up, "
        "cosine to a tenth."
    )


def _sweep_table(records: Sequence[Record], length: Length) -> list[str]:
    rates = chosen_rates(Losses(records), length)
    out = ["| Row | Steps | Inner lr | Outer lr / momentum | Loss |", "|---|---|---|---|---|"]
    order = {row.name: place for place, row in enumerate(ROWS)}
    swept = [record for record in records if record["seed"] == SWEEP_SEED and record["row"] in order]
    for record in sorted(swept, key=lambda r: (order[r["row"]], r["steps"], final_loss(r))):
        settings = record["settings"]
        outer = _outer_of(settings)
        mine = rates.get(record["row"])
        chosen = mine is not None and record["settings"] == _chosen_settings(record, mine)
        cell = f"**{final_loss(record):.4f}**" if chosen else f"{final_loss(record):.4f}"
        out.append(f"| {record['row']} | {record['steps']:,} | {settings['train.lr']:g} | {outer} | {cell} |")
    return out


def _chosen_settings(record: Record, rates: Rates) -> Mapping[str, Any]:
    row = next(row for row in ROWS if row.name == record["row"])
    return Job(row=row, rates=rates, seed=SWEEP_SEED, steps=record["steps"]).settings


def _outer_of(settings: Mapping[str, Any]) -> str:
    if "strategy.outer_lr" not in settings:
        return ""
    return f"{settings['strategy.outer_lr']:g} / {settings['strategy.outer_momentum']:g}"


# Files -------------------------------------------------------------------------------------------------------------


def figures(lines: Sequence[Line], goals: Sequence[Goal], length: Length) -> dict[str, Any]:
    """The figures as JSON."""
    return {
        "setup": {**COMMON, "islands": NUM_ISLANDS, "steps": length.steps, "seeds": list(length.seeds)},
        "goals": [{"what": g.what, "limit": g.limit, "measured": g.measured, "met": g.met} for g in goals],
        "rows": [_line_figures(line) for line in lines],
    }


def _line_figures(line: Line) -> dict[str, Any]:
    return {
        "row": line.row.name,
        "label": line.row.label,
        "lr": line.rates.lr,
        "outer": line.rates.outer,
        "loss_by_seed": {str(seed): loss for seed, loss in line.losses.items()},
        "gap": line.gap.as_dict() if line.gap else None,
        "gap_over_tokens": [{"share": share, **gap.as_dict()} for share, gap in line.curve],
        "bytes_sent": {str(seed): record["bytes_sent"] for seed, record in line.runs.items()},
        "predicted_hours": {link.name: round(hours(line, link), 3) for link in LINKS},
        "exchanges": {str(seed): record["exchanges"] for seed, record in line.runs.items()},
        "anchor_digest": {str(seed): record["anchor_digest"] for seed, record in line.runs.items()},
    }


def write_report(records: Sequence[Record], length: Length, out: Path) -> Report:
    """Write `quality.md`, `quality.json` and `quality.svg` into `out` from what is finished."""
    out.mkdir(parents=True, exist_ok=True)
    lines = lines_of(records, length)
    goals = goals_of(lines, length)
    repeated = out / "quality_ray.json"
    ray = json.loads(repeated.read_text()) if repeated.exists() else None
    text = markdown(records, lines, goals, length, ray)
    (out / "quality.md").write_text(text)
    (out / "quality.json").write_text(json.dumps(figures(lines, goals, length), indent=2) + "\n")
    (out / "quality.svg").write_text(plot([_curve(line) for line in lines if line.row.name != BASELINE]))
    return Report(text=text, goals=goals)


def _curve(line: Line) -> Curve:
    points = tuple(
        Point(share=share, mean=gap.mean, low=gap.low, high=gap.high)
        for share, gap in line.curve
        if math.isfinite(gap.mean)
    )
    return Curve(label=line.row.label, points=points)
