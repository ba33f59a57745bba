"""What `make bench-quality` runs: rows, settings, the sweep of learning rates (pure; no torch, no clock).

A job is a `Job`: settings of a run configuration. Two jobs with equal settings are the same job, whatever row wanted
them; that is all that resuming needs.

The sweep is a coordinate search on a seed of its own, written as a function from what is known to what to run next:

    1. inner learning rate on a grid, with the first outer pair, at a third of the steps
    2. outer pairs with the best inner learning rate, at full length (their order depends on the length)
    3. the neighbours of the inner learning rate with the best pair, at full length
    Rows of later strategies have a small sweep: a few outer pairs at full length, with the inner rate of another row.
    A best inner learning rate at the edge of what was tried is not a best one: the grid grows there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Value = str | int | float | bool
Settings = Mapping[str, Value]
OuterPair = tuple[float, float]

NUM_ISLANDS, BATCH_SIZE, SEQ_LEN = 4, 8, 64
STEPS, SHORT_STEPS = 3000, 1000
SEEDS, SWEEP_SEED = (1, 2, 3), 100

COMMON: dict[str, Value] = {
    "data.corpus": "stdlib",
    "data.seq_len": SEQ_LEN,
    "model.layers": 2,
    "model.dim": 64,
    "model.heads": 4,
    "train.batch_size": BATCH_SIZE,
    "train.threads": 1,
    "train.device": "cpu",
    "exchange.quorum": 1.0,  # every round has everybody's contribution
    "exchange.chunk_values": 32768,  # one part for each island: the model has 0.12 M values
    "eval.windows": 1024,
    "eval.batch_size": 32,
    "eval.every": 0.1,
    "run.snapshot_every_s": 1e9,
}

# Grid points lie a factor of about 1.6 apart, and so do the ones that the search adds at an edge.
LR_GRID = (2e-3, 3e-3, 5e-3, 8e-3)
LR_FACTOR = 1.6
OUTER_PAIRS: tuple[OuterPair, ...] = ((0.9, 0.5), (0.9, 0.7), (0.7, 0.7), (0.7, 0.9))


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Learning rates of a row; `outer` is None where the outer step has none."""

    lr: float
    outer: OuterPair | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table.

    rates_of   the row whose swept learning rates it takes: its own name, or that of the row it is compared with
    goal       one of the rows that a goal speaks of: they come first
    tries      outer pairs of a small sweep, at full length, with the inner learning rate of the row `lr_of`
    """

    name: str
    label: str
    settings: Settings = field(default_factory=dict)
    islands: int = NUM_ISLANDS
    tuned_outer: bool = False
    rates_of: str = ""
    goal: bool = False
    tries: tuple[OuterPair, ...] = ()
    lr_of: str = "diloco-30"

    @property
    def unequal(self) -> bool:
        """Whether its islands have different speeds; `SLOWEST` says how different."""
        return UNEQUAL.items() <= self.settings.items()

    @property
    def tuned_as(self) -> str:
        """Name of the row that is swept for this one's learning rates."""
        return self.rates_of or self.name


def _diloco(inner_steps: int, codec: str = "fp32", **more: Value) -> dict[str, Value]:
    return {"strategy.name": "diloco", "strategy.inner_steps": inner_steps, "codec.name": codec, **more}


FEEDBACK: dict[str, Value] = {"codec.error_feedback": True, "codec.feedback_decay": 0.95}
STREAMING: dict[str, Value] = {
    "strategy.num_fragments": 2,
    "strategy.overlap_steps": 5,
    "strategy.merge_alpha": 0.5,
}
AVERAGE: dict[str, Value] = {"strategy.outer": "average"}
# Members that wait for nobody, or for a quorum: with equal ones there would be nobody to leave behind.
# In virtual time: 5 and 10 turns of 0.01 s, a little less lest a rounding makes it 6 and 11.
UNEQUAL: dict[str, Value] = {
    "train.pace_s": 0.0499,
    "train.per_island.island-3.pace_s": 0.0999,
    "exchange.quorum": 0.5,  # the default, which async-dn wants
}
SLOWEST = 2.0
"""Time of a step of the slowest island of an unequal fleet over that of the others."""
ROWS: tuple[Row, ...] = (
    Row(
        name="ddp",
        label="data parallel",
        settings={"strategy.name": "ddp", "strategy.inner_steps": 1, "codec.name": "fp32"},
        goal=True,
    ),
    Row(name="diloco-30", label="DiLoCo, H = 30, fp32", settings=_diloco(30), tuned_outer=True, goal=True),
    Row(
        name="diloco-30-int8",
        label="DiLoCo, H = 30, int8",
        settings=_diloco(30, "int8"),
        tuned_outer=True,
        rates_of="diloco-30",
        goal=True,
    ),
    Row(
        name="diloco-30-int8-warm",
        label="DiLoCo, H = 30, int8, 10 % synchronous first",
        settings=_diloco(30, "int8", **{"strategy.warmup_sync": 0.1}),
        tuned_outer=True,
        rates_of="diloco-30",
        goal=True,
    ),
    Row(name="alone", label="one island alone", settings=_diloco(100) | AVERAGE, islands=1),
    Row(name="average-30", label="plain averaging, H = 30, fp32", settings=_diloco(30) | AVERAGE),
    Row(name="diloco-10", label="DiLoCo, H = 10, fp32", settings=_diloco(10), tuned_outer=True),
    Row(name="diloco-100", label="DiLoCo, H = 100, fp32", settings=_diloco(100), tuned_outer=True),
    Row(
        name="streaming-30-e3m0",
        label="Streaming DiLoCo, H = 30, 2 fragments, tau = 5, alpha = 0.5, E3M0 with error feedback",
        settings=_diloco(30, "e3m0", **FEEDBACK, **STREAMING) | {"strategy.name": "streaming"},
        tries=((0.9, 0.7), (0.7, 0.7), (0.7, 0.9), (0.9, 0.8), (0.9, 0.9)),
    ),
    Row(
        name="eager-30",
        label="eager updates, H = 30, fp32",
        settings=_diloco(30) | {"strategy.name": "eager"},
        tries=((0.7, 0.5), (0.5, 0.7), (0.4, 0.9), (0.4, 0.5)),
    ),
    Row(
        name="delayed-30",
        label="delay of one round, H = 30, fp32",
        settings=_diloco(30) | {"strategy.name": "delayed"},
        tries=((0.7, 0.5), (0.5, 0.7), (0.4, 0.9), (0.3, 0.5), (0.5, 0.0)),
    ),
    Row(
        name="muloco-30-int4",
        label="MuLoCo, H = 30, int4 with error feedback",
        settings=_diloco(30, "int4", **FEEDBACK) | {"strategy.name": "muloco", "train.optimizer": "muon"},
        tries=((0.9, 0.5), (0.9, 0.7), (0.8, 0.9)),
    ),
    Row(
        name="sparseloco-30",
        label="SparseLoCo, H = 30, top 64 of 4,096 at 2 bits",
        settings=_diloco(30, "topk", **FEEDBACK) | {"strategy.name": "sparseloco", "strategy.outer": "sgd"},
        tries=((1.0, 0.0), (0.8, 0.0), (0.6, 0.0)),
    ),
    Row(
        name="async-30-int8",
        label="asynchronous pushes (async-dn), H = 30, N = 4, int8, one island half as fast",
        settings=_diloco(30, "int8", **UNEQUAL) | {"strategy.name": "async-dn", "strategy.momentum_every": 4},
        tries=((0.4, 0.9), (0.7, 0.7), (0.7, 0.5)),
    ),
    Row(
        name="decoupled-30-e3m0",
        label="Decoupled DiLoCo, as streaming, quorum, radial averages, one island half as fast",
        settings=_diloco(30, "e3m0", **FEEDBACK, **STREAMING, **UNEQUAL)
        | {"strategy.name": "decoupled", "strategy.aggregate": "radial"},
        tries=((0.9, 0.7), (0.7, 0.7), (0.7, 0.9)),
    ),
)
BASELINE = "ddp"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One training run: a row with learning rates, a seed and a length."""

    row: Row
    rates: Rates
    seed: int
    steps: int

    @property
    def settings(self) -> dict[str, Value]:
        """Everything that the run configuration says otherwise than the preset `diloco`."""
        tokens = self.steps * self.row.islands * BATCH_SIZE * SEQ_LEN
        out = {**COMMON, "run.islands": self.row.islands, "train.tokens": tokens, "train.seed": self.seed}
        out |= {"train.lr": self.rates.lr, **self.row.settings}
        if self.rates.outer is not None:
            out |= {"strategy.outer_lr": self.rates.outer[0], "strategy.outer_momentum": self.rates.outer[1]}
        return out

    @property
    def steps_of_all(self) -> int:
        """Inner steps of all islands together: what the run costs."""
        return self.steps * self.row.islands

    def __str__(self) -> str:
        outer = "" if self.rates.outer is None else f" outer {self.rates.outer[0]:g}/{self.rates.outer[1]:g}"
        return f"{self.row.name} lr {self.rates.lr:g}{outer} seed {self.seed} steps {self.steps}"


class Losses:
    """Final losses of finished jobs, found by settings."""

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        """`records`: rows of the results file, those of this corpus only."""
        self._final = {_key(record["settings"]): final_loss(record) for record in records}

    def get(self, job: Job) -> float | None:
        """Final validation loss, infinite for a run that diverged; None: not run yet."""
        return self._final.get(_key(job.settings))

    def best(self, jobs: Iterable[Job]) -> Job:
        """The job with the lowest loss; all of them are finished."""
        return min(jobs, key=self._known)

    def _known(self, job: Job) -> float:
        loss = self.get(job)
        assert loss is not None, f"not finished: {job}"
        return loss


def final_loss(record: Mapping[str, Any]) -> float:
    """Final validation loss of a finished run; infinite where it diverged or did not come to its end."""
    final = record["final"]
    return math.inf if final is None else float(final)


def _key(settings: Settings) -> tuple[tuple[str, Value], ...]:
    return tuple(sorted(settings.items()))


# The sweep -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepState:
    """Where the search of one row is: jobs to run next, or the rates it chose."""

    todo: tuple[Job, ...] = ()
    chosen: Rates | None = None


def sweep(row: Row, losses: Losses, *, steps: int = STEPS, short_steps: int = SHORT_STEPS) -> SweepState:
    """Return what the search wants next for `row`, or its result; a small sweep waits for that of `lr_of`."""
    if row.tries:
        base = sweep(next(r for r in ROWS if r.name == row.lr_of), losses, steps=steps, short_steps=short_steps).chosen
        return _few(row, base, losses, steps) if base is not None else SweepState()
    first = OUTER_PAIRS[0] if row.tuned_outer else None
    short = [Job(row=row, rates=Rates(lr=lr, outer=first), seed=SWEEP_SEED, steps=short_steps) for lr in LR_GRID]
    state = _line_search(short, losses)
    if state.chosen is None or not row.tuned_outer:
        return state
    full = [Job(row=row, rates=replace(state.chosen, outer=pair), seed=SWEEP_SEED, steps=steps) for pair in OUTER_PAIRS]
    if missing := _missing(full, losses):
        return SweepState(todo=missing)
    best = losses.best(full)
    around = [replace(best, rates=replace(best.rates, lr=lr)) for lr in _neighbours(best.rates.lr)]
    return _line_search([best, *around], losses)


def _few(row: Row, base: Rates, losses: Losses, steps: int) -> SweepState:
    """The best of a row's few outer pairs."""
    jobs = [Job(row=row, rates=replace(base, outer=pair), seed=SWEEP_SEED, steps=steps) for pair in row.tries]
    if missing := _missing(jobs, losses):
        return SweepState(todo=missing)
    return SweepState(chosen=losses.best(jobs).rates)


def _line_search(jobs: list[Job], losses: Losses) -> SweepState:
    """Best inner learning rate among `jobs`; one more beyond the edge as long as the best lies there."""
    while True:
        if missing := _missing(jobs, losses):
            return SweepState(todo=missing)
        best = losses.best(jobs)
        rates = sorted(job.rates.lr for job in jobs)
        if best.rates.lr == rates[-1]:
            beyond = round_rate(rates[-1] * LR_FACTOR)
        elif best.rates.lr == rates[0]:
            beyond = round_rate(rates[0] / LR_FACTOR)
        else:
            return SweepState(chosen=best.rates)
        jobs = [*jobs, replace(best, rates=replace(best.rates, lr=beyond))]


def _neighbours(lr: float) -> tuple[float, float]:
    """The next lower and higher inner learning rate: of the grid, or a step beyond it."""
    lower = max((rate for rate in LR_GRID if rate < lr), default=round_rate(lr / LR_FACTOR))
    higher = min((rate for rate in LR_GRID if rate > lr), default=round_rate(lr * LR_FACTOR))
    return lower, higher


def round_rate(lr: float) -> float:
    """Two significant digits: a learning rate that can be written down."""
    return float(f"{lr:.1e}")


def _missing(jobs: Iterable[Job], losses: Losses) -> tuple[Job, ...]:
    return tuple(job for job in jobs if losses.get(job) is None)


# Everything --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Length:
    """How long the runs are; a smoke test takes shorter ones."""

    steps: int = STEPS
    short_steps: int = SHORT_STEPS
    seeds: tuple[int, ...] = SEEDS


def chosen_rates(losses: Losses, length: Length, rows: Iterable[Row] = ROWS) -> dict[str, Rates]:
    """Rates of every row whose search is over."""
    found: dict[str, Rates] = {}
    for row in rows:
        if row.tuned_as == row.name:
            state = sweep(row, losses, steps=length.steps, short_steps=length.short_steps)
            if state.chosen is not None:
                found[row.name] = state.chosen
    return found


def next_jobs(losses: Losses, length: Length, rows: tuple[Row, ...] = ROWS) -> list[Job]:
    """All jobs that can be run now and are not done, the most wanted first.

    The rows of the goals come before the others; of each kind the sweep comes before the table, which needs it, and the
    table goes seed by seed, so that a run cut short has whole pairs.
    """
    rates = chosen_rates(losses, length, rows)
    todo: list[Job] = []
    for group in ([row for row in rows if row.goal], [row for row in rows if not row.goal]):
        for row in group:
            if row.tuned_as == row.name and row.name not in rates:
                todo += sweep(row, losses, steps=length.steps, short_steps=length.short_steps).todo
        table = [job for seed in length.seeds for job in table_jobs(rates, seed, length, group)]
        todo += _missing(table, losses)
    return todo


def table_jobs(rates: Mapping[str, Rates], seed: int, length: Length, rows: Iterable[Row] = ROWS) -> list[Job]:
    """The table's jobs of one seed, those whose rates are known."""
    known = [row for row in rows if row.tuned_as in rates]
    return [Job(row=row, rates=rates[row.tuned_as], seed=seed, steps=length.steps) for row in known]
