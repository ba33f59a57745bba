"""Makes run directories without training anything: the rows a controller would write, with an island that is killed.

`SyntheticRun(...).write(directory)`; everything is a function of the seed. Not a test module:
import it as `tests.unit.report.synthetic_run`.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.metrics import (
    EvalRow,
    ExchangeRow,
    FaultEvent,
    MetricsWriter,
    Phase,
    Row,
    SpanRow,
    StepRow,
)
from orchestrator.summary import Summary, bytes_sent_per_param_per_round, derive_figures, save_summary

SEQ_LEN, BATCH_SIZE = 128, 8
TOKENS_PER_STEP = SEQ_LEN * BATCH_SIZE
START_S, SYNC_S, EVALUATE_S, RESTART_S, DETECT_S = 2.4, 0.09, 0.55, 3.6, 0.06

CONFIG = """\
[run]
name = "{name}"
islands = {islands}

[train]
tokens = {tokens}
batch_size = 8
optimizer = "adamw"
lr = 0.001
seed = {seed}

[data]
corpus = "stdlib"
seq_len = 128

[model]
layers = 2
dim = 128

[strategy]
name = "{strategy}"
inner_steps = {inner_steps}
outer_lr = 0.9
outer_momentum = 0.5

[codec]
name = "{codec}"

[eval]
every = 0.1
"""


@dataclass(kw_only=True)
class SyntheticRun:
    """A made-up run; `kill_round = None` for one without a fault. `floor` is the loss it would end at."""

    name: str = "demo-synthetic"
    islands: int = 3
    rounds: int = 24
    inner_steps: int = 40
    kill_round: int | None = 15
    strategy: str = "diloco"
    codec: str = "int8"
    bytes_per_value: float = 1.0
    step_s: float = 0.039
    params: int = 380_000
    floor: float = 1.55
    seed: int = 0
    rows: list[Row] = field(default_factory=list)

    @property
    def tokens_target(self) -> int:
        """Tokens of the whole run."""
        return self.islands * self.rounds * self.inner_steps * TOKENS_PER_STEP

    def write(self, run_dir: Path, *, summary: bool = True, share: float = 1.0) -> Path:
        """Write config.toml, metrics.jsonl and (unless told not to) summary.json; `share` < 1 stops part-way."""
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.toml").write_text(
            CONFIG.format(
                name=self.name,
                islands=self.islands,
                tokens=self.tokens_target,
                seed=self.seed,
                strategy=self.strategy,
                inner_steps=self.inner_steps,
                codec=self.codec,
            )
        )
        self.rows = sorted(self._simulate(max(1, round(self.rounds * share))), key=_when)
        with MetricsWriter(run_dir / "metrics.jsonl") as writer:
            for row in self.rows:
                writer.append(row)
        if summary:
            save_summary(self.summary(), run_dir)
        return run_dir

    def summary(self) -> Summary:
        """The summary that fits the rows."""
        exchanges = [row for row in self.rows if isinstance(row, ExchangeRow)]
        evals = [row for row in self.rows if isinstance(row, EvalRow)]
        end_s = max(row.end_s for row in self.rows if isinstance(row, SpanRow))
        tokens = exchanges[-1].tokens_committed
        figures = derive_figures(self.rows, tokens_committed=tokens, end_s=end_s)
        bytes_sent = sum(row.bytes for row in exchanges)
        lost = 17 * TOKENS_PER_STEP if figures.faults else 0
        return Summary(
            run_id=self.name,
            exit_reason="done",
            seconds=end_s,
            params=self.params,
            initial_val_loss=evals[0].val_loss,
            final_val_loss=evals[-1].val_loss,
            tokens_committed=tokens,
            tokens_lost=lost,
            tokens_reissued=lost,
            exchanges_committed=len(exchanges),
            bytes_sent=bytes_sent,
            control_bytes_sent=len(exchanges) * 2200,
            bytes_sent_per_param_per_round=bytes_sent_per_param_per_round(
                bytes_sent, params=self.params, num_contributions=sum(len(row.roster) for row in exchanges)
            ),
            tokens_per_s=figures.tokens_per_s,
            compute_utilization=figures.compute_utilization,
            goodput=figures.goodput,
            codec_backend="torch",
            peak_memory_bytes=312_000_000,
            anchor_digest="5f" * 16,
            faults=figures.faults,
        )

    def _loss(self, progress: float) -> float:
        return self.floor + (5.55 - self.floor) * (0.35 * math.exp(-60 * progress) + 0.65 * math.exp(-4.5 * progress))

    def _simulate(self, rounds: int) -> list[Row]:
        rng = random.Random(self.seed)
        members = [f"island-{i}" for i in range(self.islands)]
        speed = {member: self.step_s * rng.uniform(0.98, 1.06) for member in members}
        incarnation = dict.fromkeys(members, 1)
        steps = dict.fromkeys(members, 0)
        away_until: dict[str, float] = {}
        rows: list[Row] = [self._span(member, 1, "start", 0.0, START_S) for member in members]
        fault: dict[str, float] = {}
        now, tokens, next_eval = START_S, 0, 0.0

        for number in range(1, rounds + 1):
            victim = members[1] if number == self.kill_round and self.islands > 1 else None
            here = [member for member in members if away_until.get(member, 0.0) <= now]
            evaluator = ""
            if tokens / self.tokens_target >= next_eval:
                evaluator = here[number % len(here)]
                rows += self._evaluation(evaluator, number - 1, now, tokens)
                next_eval += 0.1
            for member in here:
                if member in away_until:
                    del away_until[member]
                    rows.append(self._span(member, 2, "start", fault["back_s"] - RESTART_S + 0.4, now))
                    fault["back_s"] = now + speed[member]
            ends: dict[str, float] = {}
            for member in here:
                begin = now + (EVALUATE_S if member == evaluator else 0.0)
                count = self.inner_steps if member != victim else self.inner_steps * 2 // 5
                for _ in range(count):
                    begin, row = self._step(rng, member, incarnation[member], steps, begin, speed[member], tokens)
                    rows.append(row)
                first = now + (EVALUATE_S if member == evaluator else 0.0)
                rows.append(self._span(member, incarnation[member], "compute", first, begin))
                ends[member] = begin
            if victim is not None:
                killed_s = ends.pop(victim)
                back_s = killed_s + DETECT_S + RESTART_S
                fault = {"injected_s": killed_s, "detected_s": killed_s + DETECT_S, "back_s": back_s}
                rows.append(self._span(victim, 1, "dead", killed_s, back_s - RESTART_S + 0.4))
                away_until[victim] = back_s
                incarnation[victim], steps[victim] = 2, 0
            roster = tuple(sorted(ends))
            opened_s = min(ends.values())
            now = max(ends.values()) + SYNC_S * self.bytes_per_value * rng.uniform(0.8, 1.4)
            rows += [self._span(member, incarnation[member], "sync", end, now) for member, end in ends.items()]
            tokens += len(roster) * self.inner_steps * TOKENS_PER_STEP
            rows.append(
                ExchangeRow(
                    t_s=now,
                    fragment=0,
                    version=number,
                    attempts=2 if victim else 1,
                    roster=roster,
                    seconds=now - opened_s,
                    bytes=round(self._exchange_bytes(len(roster))),
                    opened_s=opened_s,
                    tokens_committed=tokens,
                )
            )
            if fault and "next_commit_s" not in fault:
                fault["next_commit_s"] = now
            elif fault and members[1] in roster:
                fault.setdefault("contributed_s", now)
        rows += self._evaluation(members[0], rounds, now, tokens)
        if fault:
            told: dict[str, Any] = {
                key: value for key, value in fault.items() if key != "back_s" or members[1] not in away_until
            }
            rows.append(FaultEvent(t_s=fault["detected_s"], fault="kill", member=members[1], **told))
        return rows

    def _exchange_bytes(self, num_members: int) -> float:
        share = (num_members - 1) / num_members if num_members > 1 else 0.0
        return 2 * share * num_members * self.params * self.bytes_per_value

    def _step(
        self,
        rng: random.Random,
        member: str,
        incarnation: int,
        steps: dict[str, int],
        t_s: float,
        step_s: float,
        tokens: int,
    ) -> tuple[float, StepRow]:
        seconds = step_s * rng.lognormvariate(0.0, 0.05)
        steps[member] += 1
        progress = min(1.0, tokens / self.tokens_target + steps[member] % self.inner_steps * 1e-6)
        seen = progress + (steps[member] - 1) % self.inner_steps * self.islands * TOKENS_PER_STEP / self.tokens_target
        row = StepRow(
            t_s=t_s + seconds,
            member=member,
            incarnation=incarnation,
            step=steps[member],
            progress=min(1.0, seen),
            loss=self._loss(min(1.0, seen)) * rng.lognormvariate(0.0, 0.05) - 0.02,
            lr=1e-3,
            grad_norm=0.8,
            tokens_per_s=TOKENS_PER_STEP / seconds,
            step_ms=1000 * seconds,
            compute_s=seconds,
            mem_peak_bytes=312_000_000,
        )
        return row.t_s, row

    def _evaluation(self, member: str, version: int, t_s: float, tokens: int) -> list[Row]:
        progress = tokens / self.tokens_target
        return [
            self._span(member, 1, "evaluate", t_s, t_s + EVALUATE_S),
            EvalRow(
                t_s=t_s + EVALUATE_S,
                member=member,
                version=version,
                progress=progress,
                val_loss=self._loss(progress),
                tokens_committed=tokens,
            ),
        ]

    @staticmethod
    def _span(member: str, incarnation: int, phase: Phase, start_s: float, end_s: float) -> SpanRow:
        return SpanRow(member=member, incarnation=incarnation, phase=phase, start_s=start_s, end_s=end_s)


def _when(row: Row) -> float:
    return row.end_s if isinstance(row, SpanRow) else row.t_s
