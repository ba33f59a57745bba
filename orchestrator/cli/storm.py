"""`atoll storm`: what random faults cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from orchestrator.cli.options import json_option, set_option

FAILED = 5


@click.command()
@click.option("--minutes", default=10.0, show_default=True, type=click.FloatRange(min=0.2), help="Length of the storm.")
@click.option("--rate", default=240.0, show_default=True, type=click.FloatRange(min=1.0), help="Faults an hour.")
@click.option("--islands", default=8, show_default=True, type=click.IntRange(min=2), help="How many.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the faults.")
@click.option("--kinds", default="kill+hang+cut", show_default=True, help="What happens, with + between.")
@click.option("--standby", type=click.IntRange(min=0), help="Processes that wait to take a dead one's place.")
@click.option("--head", is_flag=True, help="On a cluster of two nodes, and kill its head once.")
@click.option("--no-controller-kill", is_flag=True, help="Let the controller live.")
@click.option(
    "--dir", "folder", type=click.Path(path_type=Path), help="Where both runs go [runs/storm-<date>-<4 hex>]."
)
@click.option("--schema", is_flag=True, help="Print the JSON schema of what --json prints, and do nothing else.")
@set_option
@json_option
def storm(
    minutes: float,
    rate: float,
    islands: int,
    seed: int,
    kinds: str,
    standby: int | None,
    head: bool,
    no_controller_kill: bool,
    folder: Path | None,
    schema: bool,
    overrides: Sequence[str],
    as_json: bool,
) -> int:
    """Measure what random faults cost: a run without them, then one with.

    Islands with a minimum step time (preset storm) are killed, hung and cut off at random; the controller is killed
    once as well. Needs no root and no GPU. Exit code 5 if a digest mismatched or the ledger does not add up.
    """
    if schema:
        import json

        from orchestrator.storm.figures import StormFigures

        click.echo(json.dumps(StormFigures.model_json_schema(), indent=2))
        return 0
    from faults.plan import parse_fault
    from orchestrator.errors import UserError
    from orchestrator.rundir import make_run_folder
    from orchestrator.storm.run import StormPlan, run_storm
    from orchestrator.waiting import waiting

    if folder is not None and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty", place="--dir", remedy="a new folder: two runs are written there")
    storm_kinds = parse_fault(f"storm,kinds={kinds}", (), place="--kinds").kinds
    given = [*overrides, *([f"run.standby={standby}"] if standby is not None else [])]
    plan = StormPlan(
        folder=(folder or make_run_folder("storm")).resolve(),
        seconds=60.0 * minutes,
        rate=rate,
        islands=islands,
        seed=seed,
        kinds=storm_kinds,
        kill_controller=not no_controller_kill,
        head=head,
        overrides=tuple(given),
    )
    with waiting("two runs", plan.calm_s + plan.seconds, timed=True):
        figures = run_storm(plan, lambda text: click.echo(text, err=True))
    if as_json:
        click.echo(figures.model_dump_json(indent=2))
    else:
        from rich.console import Console

        from orchestrator.storm.table import show

        show(figures, Console())
    click.echo(f"both runs: {plan.folder}", err=as_json)
    return FAILED if figures.digest_mismatches or figures.ledger_findings else 0
