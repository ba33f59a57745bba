"""`atoll config show | validate | schema`."""

from __future__ import annotations

import json
from collections.abc import Sequence

import click

from orchestrator.cli.lazy import HelpfulGroup
from orchestrator.cli.options import json_option, set_option


@click.group(cls=HelpfulGroup)
def config() -> None:
    """Show and check configurations.

    RUN is the name of a preset (`atoll config presets` lists them), the path of a TOML file, or a run directory.
    """


@config.command()
@click.argument("run")
@set_option
@click.option("--origin", is_flag=True, help="Say behind each value where it came from.")
@json_option
def show(run: str, overrides: Sequence[str], origin: bool, as_json: bool) -> int:
    """Print the resolved configuration of RUN, with every default."""
    from orchestrator.config import load_config

    loaded = load_config(run, overrides=overrides)
    if as_json:
        values = loaded.config.model_dump(mode="json")
        click.echo(json.dumps({"config": values, "origins": dict(loaded.origins)} if origin else values, indent=2))
    else:
        click.echo(loaded.to_toml() if origin else loaded.config.to_toml(), nl=False)
    return 0


@config.command()
@click.argument("run")
@set_option
@json_option
def validate(run: str, overrides: Sequence[str], as_json: bool) -> int:
    """Check RUN and the folders that it names.

    Exit code 2 with one message when something is wrong.
    """
    from orchestrator.config import load_config
    from orchestrator.preflight import check_files

    loaded = load_config(run, overrides=overrides)
    check_files(loaded.config)
    if as_json:
        from orchestrator.answers import Valid

        click.echo(Valid(source=str(loaded.source), name=loaded.config.run.name).model_dump_json())
    else:
        click.echo(f"{loaded.source} is valid")
    return 0


@config.command()
def schema() -> int:
    """Print the JSON schema of a configuration, for editors."""
    from orchestrator.config import config_schema

    click.echo(json.dumps(config_schema(), indent=2))
    return 0


@config.command()
@json_option
def presets(as_json: bool) -> int:
    """List the presets, and what each is for."""
    from orchestrator.config import list_presets, purpose_of

    found = list_presets()
    if as_json:
        from orchestrator.answers import Preset, Presets

        told = {name: Preset(path=str(path), purpose=purpose_of(path)) for name, path in found.items()}
        click.echo(Presets(told).model_dump_json())
        return 0
    width = max(len(name) for name in found)
    for name, path in found.items():
        click.echo(click.wrap_text(purpose_of(path), 100, f"{name:{width}}  ", " " * (width + 2)))
    return 0
