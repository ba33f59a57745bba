"""`atoll export` and `atoll sample`: use the model of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from orchestrator.cli.options import Command, json_option, latest_run_dir_argument, shown

snapshot_option: Callable[[Command], Command] = click.option(
    "--snapshot", metavar="NAME", help="An older one of the run's snapshots, such as v120 [the newest]."
)


@click.command()
@latest_run_dir_argument
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@snapshot_option
@json_option
def export(run_dir: Path | None, out: Path, snapshot: str | None, as_json: bool) -> int:
    """Write the trained model as a Hugging Face folder.

    The folder has safetensors, config.json and the tokenizer, and loads with transformers; that of a pipeline's list
    of layers says in config.json what builds it. Without RUN_DIR it is the newest run, runs/latest.
    """
    from orchestrator.rundir import open_run_dir

    directory = open_run_dir(run_dir)
    from orchestrator.artifacts import export as write_export
    from orchestrator.waiting import waiting

    with waiting("reading the snapshot"):
        write_export(directory.path, out, snapshot)
    if as_json:
        from orchestrator.answers import Exported

        files = sorted(path.name for path in out.iterdir())
        click.echo(Exported(run_dir=str(directory.path), out=str(out), files=files).model_dump_json())
    else:
        click.echo(f"exported {shown(directory.path)} to {out}")
    return 0


@click.command()
@latest_run_dir_argument
@click.option("--prompt", required=True, help="The text to go on with.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=200, show_default=True, help="Length.")
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.8, show_default=True, help="0 takes the likeliest token."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the draws.")
@snapshot_option
@json_option
def sample(
    run_dir: Path | None,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    snapshot: str | None,
    as_json: bool,
) -> int:
    """Let the trained model go on with a text.

    Without RUN_DIR it is the newest run, runs/latest.
    """
    from orchestrator.rundir import open_run_dir

    directory = open_run_dir(run_dir)
    from orchestrator.artifacts import sample as draw_sample
    from orchestrator.waiting import waiting

    with waiting("reading the snapshot, and writing"):
        text = draw_sample(directory.path, prompt, max_new_tokens, temperature, seed, snapshot)
    if as_json:
        from orchestrator.answers import Sampled

        click.echo(Sampled(prompt=prompt, text=text).model_dump_json())
    else:
        click.echo(text)
    return 0
