"""`atoll plan`: what each preset costs on your links, before anything is started."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.cli.lab_table import align
from orchestrator.cli.options import json_option, set_option
from orchestrator.waiting import waiting

if TYPE_CHECKING:
    from orchestrator.config import RunConfig
    from orchestrator.planner import Case


@click.command()
@click.argument("run", required=False)
@set_option
@click.option("--params", metavar="N", help="Trained values of the model, such as 1.2e9, instead of RUN.")
@click.option("--islands", type=click.IntRange(1, 4096), help="Islands [those of RUN].")
@click.option("--link", default="100Mbit", show_default=True, metavar="RATE", help="Each island's link, both ways.")
@click.option("--rtt", default="50ms", show_default=True, metavar="TIME", help="Round trip between two islands.")
@click.option("--step", metavar="TIME", help="One inner step [measured, if RUN is the directory of a run].")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Write the plot there, as SVG.")
@json_option
def plan(
    run: str | None,
    overrides: Sequence[str],
    params: str | None,
    islands: int | None,
    link: str,
    rtt: str,
    step: str | None,
    plot: Path | None,
    as_json: bool,
) -> int:
    """Say what each preset costs: bytes, seconds, utilisation, memory.

    RUN is a preset, a TOML file or the directory of a run, whose model is planned for; --params takes its place.
    """
    from orchestrator.plan_plot import svg, terminal
    from orchestrator.planning import curves, headline, make_plan, pipeline_table, table

    if (run is None) == (params is None):
        raise click.UsageError("for which model? Give either RUN or --params")
    if overrides and run is None:
        raise click.UsageError("--set changes RUN, and there is none")
    with waiting("reckoning"):
        case, own = _case(run, overrides, params, islands, link, rtt, step)
        made = make_plan(case, own)
        lines = curves(case, own)
    if plot is not None:
        plot.write_text(svg(lines, title=headline(made), link_bit_per_s=case.link_bit_per_s), encoding="utf-8")
    if as_json:
        click.echo(made.model_dump_json(indent=2))
        return 0
    click.echo(headline(made) + "\n")
    click.echo("\n".join(align(table(made))))
    if made.pipelines:
        click.echo("\nin stages, for models that no worker holds; the time of a stage is that of a microbatch\n")
        click.echo("\n".join(align(pipeline_table(made))))
    for name, why in made.misfits.items():
        click.echo(f"{name} does not fit: {why}")
    click.echo("\nutilisation over the link of each island\n" + terminal(lines, link_bit_per_s=case.link_bit_per_s))
    click.echo(f"\nstart from {made.start_from}: {made.why}")
    return 0


def _case(
    run: str | None,
    overrides: Sequence[str],
    params: str | None,
    islands: int | None,
    link: str,
    rtt: str,
    step: str | None,
) -> tuple[Case, dict[str, RunConfig]]:
    from orchestrator.config import list_presets, load_config
    from orchestrator.errors import UserError
    from orchestrator.planner import Case
    from orchestrator.planning import case_of, measured_step_s
    from orchestrator.quantities import parse_count, parse_rate, parse_seconds

    rate, round_trip = parse_rate(link, place="--link"), parse_seconds(rtt, place="--rtt")
    step_s = parse_seconds(step, place="--step") if step is not None else None
    config = load_config(run, overrides=overrides).config if run is not None else None
    if step_s is None and run is not None and Path(run).is_dir():
        step_s = measured_step_s(Path(run))
    if step_s is None:
        remedy = "--step 0.9s; the column step_ms of a short run tells it, or give the directory of one as RUN"
        raise UserError("how long one inner step takes on your machines is not known", place="--step", remedy=remedy)
    num = islands or (config.run.islands if config is not None and config.run.islands != "auto" else None)
    if num is None and config is not None and config.pipeline.stages is not None:
        num = config.pipeline.num_peers  # as many machines with a whole model each
    if num is None:
        raise UserError("the number of islands is not known", place="--islands", remedy="--islands 4")
    if config is None:
        assert params is not None
        values = parse_count(params, place="--params")
        return Case(num_params=values, num_islands=num, link_bit_per_s=rate, rtt_s=round_trip, step_s=step_s), {}
    case = case_of(config, num_islands=num, link_bit_per_s=rate, rtt_s=round_trip, step_s=step_s)
    return case, {} if run in list_presets() and not overrides else {"this run": config}
