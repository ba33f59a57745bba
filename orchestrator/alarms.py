"""What somebody wants to be woken for: journal rows and measurements in, events out. Pure; the clock is an argument."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from faults.recovery import GIVEN_UP, KINDS
from orchestrator.settings import ExchangeConfig
from strategies.config import Section
from workers.records import EvaluationRecord, FaultRecord, Record, StopRecord

Kind = Literal["member_dead", "below_quorum", "diverged", "loss_nan", "loss_spike", "finished"]
DEAD = (*KINDS, GIVEN_UP)
DIVERGED = ("diverged", "corrupt_anchor", "digest_mismatch")
SMOOTHING = 0.05
WARM_ROWS = 10
MEMBER_AGAIN_S = 300.0


class NotifyConfig(Section):
    """`[notify]`: a command that is run when something happens, with the event as JSON on its standard input."""

    command: str | None = Field(None, min_length=1, description="Program and arguments; no shell is between.")
    timeout_s: float = Field(10.0, gt=0, le=600, description="How long the command may take.")
    below_quorum_s: float = Field(
        30.0, gt=0, description="Seconds with fewer live members than exchange.min_members, or half of the islands."
    )
    loss_spike: float = Field(2.0, gt=1, description="A training loss of so many times its running mean is a spike.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Alarm:
    """One event. `t_s`: run time in seconds; `member` is empty where it concerns the run."""

    kind: Kind
    t_s: float
    detail: str
    member: str = ""


class Alarms:
    """Notices each thing once, and again only after it was over."""

    def __init__(self, config: NotifyConfig, *, num_islands: int) -> None:
        """`num_islands`: members that the run is to have; 0: as many as there are places."""
        self.config, self.num_islands = config, num_islands
        self._below_s: float | None = None
        self._told_below = False
        self._mean: dict[str, tuple[float, int]] = {}
        self._bad: dict[tuple[str, str], float] = {}
        self._finished = False

    def on_record(self, record: Record, t_s: float) -> list[Alarm]:
        """A row of the journal was decided."""
        match record:
            case FaultRecord(fault=fault, member=member, detail=detail, injected=False) if fault in DEAD:
                return [Alarm(kind="member_dead", t_s=t_s, member=member, detail=f"{fault}: {detail}")]
            case FaultRecord(fault=fault, member=member, detail=detail, injected=False) if fault in DIVERGED:
                return self._once("diverged", member, t_s, f"{fault}: {detail}")
            case FaultRecord(fault="non_finite", member=member, detail=detail):
                return self._once("loss_nan", member, t_s, detail)
            case EvaluationRecord(val_loss=None, samples=samples) if samples:
                return []  # an own loop that evaluates nothing; what is not finite comes as a measurement
            case StopRecord(reason=reason, detail=detail) if not self._finished:
                self._finished = True
                return [Alarm(kind="finished", t_s=t_s, detail=f"{reason}: {detail}" if detail else reason)]
        return []

    def on_metric(self, row: Mapping[str, Any], t_s: float) -> list[Alarm]:
        """A measurement arrived: the loss of steps, or of an evaluation."""
        member = str(row.get("member", ""))
        if row.get("kind") == "eval":
            loss = row.get("val_loss")
            bad = isinstance(loss, float) and not math.isfinite(loss)
            return self._once("loss_nan", member, t_s, f"the validation loss is {loss}") if bad else []
        if row.get("kind") != "step" or not isinstance(row.get("loss"), float):
            return []
        loss = row["loss"]
        if not math.isfinite(loss):
            return self._once("loss_nan", member, t_s, f"the training loss is {loss}")
        mean, num = self._mean.get(member, (loss, 0))
        warm = num >= WARM_ROWS
        self._mean[member] = (mean + (SMOOTHING if warm else 1 / (num + 1)) * (loss - mean), num + 1)
        if warm and loss > self.config.loss_spike * mean:
            detail = f"the training loss is {loss:.4g}, its running mean {mean:.4g}"
            return self._once("loss_spike", member, t_s, detail)
        return []

    def num_needed(self, exchange: ExchangeConfig) -> int:
        """Live members without which the run is below its quorum; `exchange`: as it is set now."""
        return exchange.min_members or max(int(exchange.quorum * self.num_islands), 1)

    def on_time(self, num_live: int, t_s: float, *, started: bool, exchange: ExchangeConfig) -> list[Alarm]:
        """So many members live now, and so many are needed for a commit as `exchange` says now."""
        needed = self.num_needed(exchange)
        lacks = f"{num_live} members live, {needed} are needed" if num_live < needed else ""
        return self.on_lack(lacks, t_s, started=started)

    def on_lack(self, lacks: str, t_s: float, *, started: bool) -> list[Alarm]:
        """`lacks`: what is missing for a commit; empty: nothing."""
        if not started or self._finished or not lacks:
            self._below_s, self._told_below = None, False
            return []
        self._below_s = t_s if self._below_s is None else self._below_s
        if self._told_below or t_s - self._below_s < self.config.below_quorum_s:
            return []
        self._told_below = True
        return [Alarm(kind="below_quorum", t_s=t_s, detail=f"{lacks}, for {t_s - self._below_s:.0f} s")]

    def _once(self, kind: Kind, member: str, t_s: float, detail: str) -> list[Alarm]:
        """The same of the same member is told again only after a while."""
        last = self._bad.get((kind, member))
        if last is not None and t_s - last < MEMBER_AGAIN_S:
            return []
        self._bad[kind, member] = t_s
        return [Alarm(kind=kind, t_s=t_s, member=member, detail=detail)]
