"""Options and arguments that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Command = Callable[..., Any]

set_option: Callable[[Command], Command] = click.option(
    "--set",
    "overrides",
    metavar="A.B=C",
    multiple=True,
    help="Set a key of the configuration; may be repeated. An empty value sets it back to its default.",
)
json_option: Callable[[Command], Command] = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
latest_run_dir_argument: Callable[[Command], Command] = click.argument(
    "run_dir", type=click.Path(path_type=Path), required=False
)


def shown(path: Path) -> Path:
    """A path as a person would type it here: relative where it lies below the current folder."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
