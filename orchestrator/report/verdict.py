"""What a run came to, in words and in a handful of figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator import summary as formulas
from orchestrator.metrics import FaultEvent
from orchestrator.report import format as fmt
from orchestrator.report.load import RunData
from orchestrator.report.series import Point, num_bad_losses, val_curve
from orchestrator.report.timeline import fault_moment

Tone = Literal["good", "warn", "bad", "plain"]
# A fall of the validation loss below this share is noise of 64 windows, not learning.
_LEARNING_SHARE = 0.005
_RISE_SHARE = 0.02
_FAULT_WORDS = {
    "kill": "was killed",
    "hang": "hung",
    "cut": "was cut off",
    "slow": "was slowed down",
    "crash": "crashed",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Headline:
    """The figures of the header; None where a run does not tell. `partial`: computed from metrics, not the summary."""

    seconds: float
    tokens_committed: int
    initial_val_loss: float | None
    final_val_loss: float | None
    tokens_per_s: float | None
    compute_utilization: float | None
    goodput: float | None
    bytes_sent: int
    data_parallel_bytes: int | None
    faults: tuple[formulas.FaultRow, ...]
    partial: bool

    @property
    def bytes_ratio(self) -> float | None:
        """How many times as much data parallel would have sent."""
        if not self.data_parallel_bytes or not self.bytes_sent:
            return None
        return self.data_parallel_bytes / self.bytes_sent


def headline(run: RunData) -> Headline:
    """The figures of `run`, from its summary or else from its metrics so far."""
    curve = val_curve(run, "t_s")
    if run.summary:
        told = run.summary
        return Headline(
            seconds=told.seconds,
            tokens_committed=told.tokens_committed,
            initial_val_loss=told.initial_val_loss,
            final_val_loss=told.final_val_loss,
            tokens_per_s=told.tokens_per_s,
            compute_utilization=told.compute_utilization,
            goodput=told.goodput,
            bytes_sent=told.bytes_sent,
            data_parallel_bytes=_data_parallel_bytes(run, told.params),
            faults=told.faults,
            partial=False,
        )
    member_s = formulas.seconds_there(formulas.first_joins(run.spans), run.spans, end_s=run.end_s)
    speed = formulas.fault_free_speed(run.speed_points(), run.faults)
    enough = bool(member_s) and run.tokens_committed > 0
    return Headline(
        seconds=run.end_s,
        tokens_committed=run.tokens_committed,
        initial_val_loss=curve[0][1] if curve else None,
        final_val_loss=curve[-1][1] if len(curve) > 1 else None,
        tokens_per_s=formulas.tokens_per_s(run.tokens_committed, max(member_s.values())) if enough else None,
        compute_utilization=formulas.compute_utilization(run.compute_seconds(), member_s) if member_s else None,
        goodput=formulas.goodput(run.tokens_committed, speed, member_s) if enough and speed else None,
        bytes_sent=run.bytes_sent,
        data_parallel_bytes=None,
        faults=formulas.fault_rows(run.faults),
        partial=True,
    )


def _data_parallel_bytes(run: RunData, params: int) -> int | None:
    num_steps = run.num_member_steps()
    if len(run.members) < 2 or not num_steps or not params:
        return None
    return formulas.data_parallel_bytes(params=params, num_member_steps=num_steps, num_members=len(run.members))


def outcome(run: RunData) -> tuple[Tone, str]:
    """How the run ended, in one word."""
    if run.summary is None:
        return ("plain", "Unfinished")
    tones: dict[str, tuple[Tone, str]] = {
        "done": ("good", "Done"),
        "failed": ("bad", "Failed"),
        "stopped": ("warn", "Stopped"),
    }
    return tones[run.summary.exit_reason]


def learning(run: RunData, figures: Headline) -> tuple[Tone, str]:
    """Whether the model learned, with the reason."""
    curve = val_curve(run, "progress")
    first, last = figures.initial_val_loss, figures.final_val_loss
    if run.evals and run.evals[-1].val_loss is None:
        return ("bad", "The run diverged: the last validation loss is not a finite number.")
    if first is None or last is None:
        if not curve:
            return ("plain", "No evaluation was recorded, so it is not known whether the model learned.")
        return ("plain", f"There is only one evaluation so far, a validation loss of {fmt.loss(curve[0][1])}.")
    change = f"from {fmt.loss(first)} to {fmt.loss(last)} nats per token ({_change(first, last)})"
    if last > first * (1 - _LEARNING_SHARE):
        return ("bad", f"It did not learn: the validation loss went {change}.")
    best = min(curve, key=_value, default=(0.0, last))
    if last > best[1] * (1 + _RISE_SHARE):
        at = fmt.percent(best[0])
        return (
            "warn",
            f"It learned, then lost some: {change}, with the lowest, {fmt.loss(best[1])}, at {at} of the run.",
        )
    verb = "It is learning" if run.summary is None else "It learned"
    return ("good", f"{verb}: the validation loss fell {change}.")


def _value(point: Point) -> float:
    return point[1]


def _change(first: float, last: float) -> str:
    percent = fmt.percent(last / first - 1) if first else fmt.UNKNOWN
    return percent if percent.startswith((fmt.MINUS, fmt.UNKNOWN)) else f"+{percent}"


def committed(run: RunData, figures: Headline) -> str:
    """How much was trained, how long it took, and what was lost."""
    if not figures.seconds:
        return "Nothing has been recorded yet."
    target = run.tokens_target
    of = f" of {fmt.count(target)}" if target and figures.tokens_committed < target else ""
    said = f"{fmt.count(figures.tokens_committed)}{of} tokens were committed in {fmt.duration(figures.seconds)}"
    if run.summary and run.summary.tokens_lost:
        lost, again = run.summary.tokens_lost, run.summary.tokens_reissued
        said += f"; {fmt.count(lost)} were trained in vain" + (f" and {fmt.count(again)} issued again" if again else "")
    bad = num_bad_losses(run)
    if bad:
        steps = ", ".join(f"{name}: {number}" for name, number in bad.items())
        said += f". Steps whose loss was not finite: {steps}"
    return said + "."


def fault_story(run: RunData, figures: Headline) -> str:
    """The faults in one or two sentences."""
    if not figures.faults:
        if not figures.seconds:
            return ""
        return "No fault so far." if figures.partial else "No fault happened."
    if len(figures.faults) > 1:
        kinds = ", ".join(f"{row.member} {_FAULT_WORDS.get(row.kind, row.kind)}" for row in figures.faults[:4])
        more = len(figures.faults) - 4
        return f"{len(figures.faults)} faults: {kinds}" + (f" and {more} more." if more > 0 else ".")
    row = figures.faults[0]
    event = _event_of(run, row)
    at = f" at {fmt.clock(fault_moment(event))}" if event else ""
    said = f"{row.member} {_FAULT_WORDS.get(row.kind, 'had a fault: ' + row.kind)}{at}"
    if row.next_commit_after_s is not None:
        said += f"; the others committed again {fmt.duration(row.next_commit_after_s)} later"
    if row.contributed_after_s is not None:
        said += f", and its next incarnation contributed after {fmt.duration(row.contributed_after_s)}"
    elif row.back_after_s is not None:
        said += f", and its next incarnation trained after {fmt.duration(row.back_after_s)}"
    else:
        said += "; it did not come back"
    return said + "."


def _event_of(run: RunData, row: formulas.FaultRow) -> FaultEvent | None:
    same = [event for event in run.faults if (event.fault, event.member) == (row.kind, row.member)]
    return same[0] if len(same) == 1 else None
