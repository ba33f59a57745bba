"""`atoll plan`: the presets priced for a model on given links, the one to start from, and plots over the bandwidth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from orchestrator.config import list_presets, load_config
from orchestrator.errors import UserError
from orchestrator.pipeline.planner import PipelineRow, pipeline_cost
from orchestrator.planner import COSTS, GOOD_UTILISATION, Case, Cost, choose, cost_of, steps_for
from orchestrator.quantities import show_bytes, show_count, show_rate, show_seconds
from strategies.errors import SettingError
from strategies.fragments import TensorSpec

if TYPE_CHECKING:
    from orchestrator.config import RunConfig

# Toys: priced like the others, never proposed for anything else.
FOR_A_REASON = frozenset({"robust"})  # chosen for what it bears, not for what it costs
EXAMPLES = frozenset({"debug", "demo"})
COLUMNS = ("preset", "strategy", "H", "bytes a round", "exchange", "round", "utilisation", "needs", "memory")
PIPELINE_COLUMNS = (
    "pipeline",
    "strategy",
    "peers + trainers",
    "parameters",
    "bytes a step: peer",
    "trainer",
    "step",
    "utilisation",
    "memory",
)
POINTS = 61
SPAN_BIT_PER_S = (1e6, 1e11)


class PlanRow(BaseModel):
    """One preset of a plan."""

    preset: str = Field(description="Name of the preset, or of the configuration that was given.")
    strategy: str = Field(description="strategy.name")
    codec: str = Field(description="codec.name")
    inner_steps: int = Field(description="Local steps of a round.")
    exchanges_per_round: int = Field(description="Exchanges of a round: one for each fragment.")
    bytes_per_round: int = Field(description="Payload bytes that one island sends in a round (and receives).")
    largest_exchange_bytes: int = Field(description="Payload bytes that one island sends in its largest exchange.")
    exchange_s: float = Field(description="Seconds from the offer to the commit of the slowest exchange.")
    round_s: float = Field(description="Seconds of a round, what is waited for included.")
    utilisation: float = Field(description="Expected share of the time in which islands compute, 0 to 1.")
    needs_bit_per_s: float = Field(description="Bytes of a round over the time to compute it, bits a second.")
    memory_bytes: int = Field(description="Memory of one island without activations.")


class Plan(BaseModel):
    """What `atoll plan --json` prints."""

    params: int = Field(description="Trained values of the model.")
    islands: int = Field(description="Islands that synchronise.")
    link_bit_per_s: float = Field(description="Rate of each island's link, in both directions.")
    rtt_s: float = Field(description="Round trip between two islands, seconds.")
    step_s: float = Field(description="Seconds of one inner step.")
    rows: list[PlanRow] = Field(description="One for each preset, and one for the configuration that was given.")
    pipelines: list[PipelineRow] = Field(
        default=[], description="The same for presets with stages: for models that no single worker holds."
    )
    misfits: dict[str, str] = Field(description="Presets that do not fit the model, and why.")
    start_from: str = Field(description="The preset to start from.")
    why: str = Field(description="Why that one.")


def case_of(config: RunConfig, *, num_islands: int, link_bit_per_s: float, rtt_s: float, step_s: float) -> Case:
    """The case of a configuration's model. Raises UserError where its size is only known to a factory of the user."""
    from workers.model.shape import parameter_shapes, resolve_shape

    if config.model.factory is not None:
        raise UserError(
            f"the size of model.factory = {config.model.factory!r} is known when it is built",
            place="model.factory",
            remedy="give it: --params 1.2e9",
        )
    vocabulary, seq_len = 256, config.data.seq_len
    if config.data.path is not None:
        from workers.data.index import load_index

        index = load_index(Path(config.data.path).expanduser())
        vocabulary, seq_len = index.vocab_size, index.seq_len
    shape = resolve_shape(config.model, vocab_size=vocabulary, seq_len=seq_len)
    tensors = tuple(TensorSpec(name=name, shape=sizes) for name, sizes in parameter_shapes(shape).items())
    return Case(
        num_params=shape.num_params,
        num_islands=num_islands,
        link_bit_per_s=link_bit_per_s,
        rtt_s=rtt_s,
        step_s=step_s,
        tensors=tensors,
        shape=shape,
        step_samples=config.train.batch_size,
    )


def measured_step_s(run_dir: Path) -> float | None:
    """Median seconds of an inner step of a run, None without a row."""
    from orchestrator.metrics import StepRow, read_rows
    from orchestrator.rundir import RunDir

    path = RunDir(run_dir).metrics
    if not path.exists():
        return None
    steps = [row.step_ms for row in read_rows(path) if isinstance(row, StepRow) and row.step_ms > 0]
    return median(steps) / 1000 if steps else None


def island_presets() -> dict[str, RunConfig]:
    """The presets whose runs have islands: what is planned for holds a whole model."""
    configs = {name: load_config(name).config for name in list_presets()}
    return {name: config for name, config in configs.items() if config.pipeline.stages is None}


def pipeline_presets() -> dict[str, RunConfig]:
    """The others: their runs have stages, and workers hold a part of the model."""
    configs = {name: load_config(name).config for name in list_presets()}
    return {name: config for name, config in configs.items() if config.pipeline.stages is not None}


def make_plan(case: Case, own: Mapping[str, RunConfig]) -> Plan:
    """Price `own` configurations and all presets in a case.

    Raises:
        UserError: a strategy has no entry in the table of costs, or none fits the model.
    """
    costs: list[Cost] = []
    misfits: dict[str, str] = {}
    pipelines: list[PipelineRow] = []
    for name, config in {**own, **island_presets(), **pipeline_presets()}.items():
        try:
            if config.pipeline.stages is not None:
                pipelines.append(pipeline_cost(name, config, case))
            else:
                costs.append(cost_of(name, config, case))
        except SettingError as error:
            misfits[name] = str(error)
    real = [cost for cost in costs if cost.preset not in EXAMPLES and cost.preset not in own]
    if not real:
        raise UserError(
            f"no preset fits this model: {'; '.join(misfits.values())}",
            remedy="a larger model, or settings of your own: atoll plan RUN.toml",
        )
    best = choose([cost for cost in real if cost.preset not in FOR_A_REASON])
    return Plan(
        params=case.num_params,
        islands=case.num_islands,
        link_bit_per_s=case.link_bit_per_s,
        rtt_s=case.rtt_s,
        step_s=case.step_s,
        rows=[_row(cost) for cost in costs],
        pipelines=pipelines,
        misfits=misfits,
        start_from=best.preset,
        why=_why(best, case),
    )


def _row(cost: Cost) -> PlanRow:
    return PlanRow(
        preset=cost.preset,
        strategy=cost.strategy,
        codec=cost.codec,
        inner_steps=cost.inner_steps,
        exchanges_per_round=cost.num_exchanges,
        bytes_per_round=cost.bytes_per_round,
        largest_exchange_bytes=cost.largest_exchange_bytes,
        exchange_s=cost.exchange_s,
        round_s=cost.round_s,
        utilisation=cost.utilisation,
        needs_bit_per_s=cost.needs_bit_per_s,
        memory_bytes=cost.memory_bytes,
    )


def _why(best: Cost, case: Case) -> str:
    share = f"{100 * best.utilisation:.0f} %"
    if best.utilisation >= GOOD_UTILISATION:
        why = f"{COSTS[best.strategy].purpose}; islands compute {share} of the time"
    else:
        steps = steps_for(best, case)
        why = f"islands compute {share} of the time, no preset reaches {100 * GOOD_UTILISATION:.0f} %"
        why += f"; strategy.inner_steps = {steps} would" if best.inner_steps > 1 else ""
    if best.window_bound:
        why += "; so few streams do not fill this link: raise exchange.connections"
    return why


def table(plan: Plan) -> list[tuple[str, ...]]:
    """Head and rows for people."""
    return [
        COLUMNS,
        *(
            (
                row.preset,
                f"{row.strategy}, {row.codec}",
                str(row.inner_steps),
                show_bytes(row.bytes_per_round),
                show_seconds(row.exchange_s),
                show_seconds(row.round_s),
                f"{100 * row.utilisation:.1f} %",
                show_rate(row.needs_bit_per_s),
                show_bytes(row.memory_bytes),
            )
            for row in plan.rows
        ),
    ]


def pipeline_table(plan: Plan) -> list[tuple[str, ...]]:
    """Head and rows of the pipelines for people: each, and below it its stages."""
    found: list[tuple[str, ...]] = [PIPELINE_COLUMNS]
    for row in plan.pipelines:
        found.append(
            (
                row.preset,
                f"{row.strategy}, {row.codec}",
                f"{row.peers} + {row.trainers}",
                show_count(plan.params),
                show_bytes(row.peer_bytes_per_step),
                show_bytes(row.trainer_bytes_per_step),
                show_seconds(row.step_s),
                f"{100 * row.utilisation:.1f} %",
                show_bytes(row.memory_bytes),
            )
        )
        found += [
            (
                f"  stage {stage.stage}",
                "",
                "",
                show_count(stage.params),
                show_bytes(stage.boundary_bytes + stage.gradient_bytes // row.inner_steps),
                "",
                show_seconds(stage.compute_s),
                "",
                show_bytes(stage.memory_bytes),
            )
            for stage in row.stages
        ]
    return found


def headline(plan: Plan) -> str:
    """What was asked."""
    return (
        f"{show_count(plan.params)} parameters on {plan.islands} islands, {show_rate(plan.link_bit_per_s)} and "
        f"{show_seconds(plan.rtt_s)} round trip between them, {show_seconds(plan.step_s)} a step"
    )


def markdown(plan: Plan) -> str:
    """The table for documents; examples are left out."""
    head, *rows = table(plan)
    lines = [head, tuple("---" for _ in head), *(row for row in rows if row[0] not in EXAMPLES)]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{headline(plan)}:\n\n{text}\n\nStart from `{plan.start_from}`: {plan.why}.\n"


def curves(case: Case, own: Mapping[str, RunConfig]) -> dict[str, list[tuple[float, float]]]:
    """Preset -> (bits a second, utilisation) over the range of links; examples and misfits are left out."""
    low, high = (math.log10(end) for end in SPAN_BIT_PER_S)
    rates = [10 ** (low + (high - low) * i / (POINTS - 1)) for i in range(POINTS)]
    out: dict[str, list[tuple[float, float]]] = {}
    presets = {name: config for name, config in island_presets().items() if name not in EXAMPLES}
    islands = {name: config for name, config in own.items() if config.pipeline.stages is None}
    for name, config in {**islands, **presets}.items():
        try:
            costs = [(rate, cost_of(name, config, replace(case, link_bit_per_s=rate))) for rate in rates]
        except SettingError:
            continue
        out[name] = [(rate, cost.utilisation) for rate, cost in costs]
    return out


def round_bytes(config: RunConfig, *, num_islands: int, num_params: int | None = None) -> int | None:
    """Payload bytes that an island sends in a round; None where the model's size is not known yet, or nothing is sent.

    num_params: of a model that is not the built-in one, once it is built.
    """
    rest = {"num_islands": num_islands, "link_bit_per_s": 1e9, "rtt_s": 0.0, "step_s": 1.0}
    if config.model.factory is None and config.train.loop is None:
        case = case_of(config, **rest)  # type: ignore[arg-type]
    elif num_params:
        case = Case(num_params=num_params, **rest)  # type: ignore[arg-type]
    else:
        return None
    return cost_of(config.run.name, config, case).bytes_per_round or None


def sentence(num_bytes: int, seconds: float, *, about: bool = False) -> str:
    """`synchronising 25.8 MB every 90 s: needs 2.3 Mbit/s`; `about`: the seconds are a guess, of two digits at most."""
    if about:
        seconds = float(f"{seconds:.2g}")
    rate = 8 * num_bytes / seconds
    needs = f"about {show_rate(float(f'{rate:.2g}'))}" if about else show_rate(rate)
    every = f"about every {show_seconds(seconds)}" if about else f"every {show_seconds(seconds)}"
    return f"synchronising {show_bytes(num_bytes)} {every}: needs {needs} at each island"


def letters(names: Sequence[str]) -> dict[str, str]:
    """A letter for each curve of the terminal's plot."""
    return {name: chr(ord("a") + number % 26) for number, name in enumerate(names)}
