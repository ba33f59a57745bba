"""`atoll train` and `atoll demo`: check everything that can be checked, then start the run."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.cli.options import json_option, set_option, shown
from orchestrator.waiting import waiting

if TYPE_CHECKING:
    from orchestrator.prepare import Prepared
    from orchestrator.rundir import RunDir

CHECKING = "checking the configuration and the data"
DEMO_FAULT = "kill:island-1@round=15"
# Keys that change how a run is kept, and nothing of what it computes.
RESUME_KEYS = (
    "run.address",
    "run.start_timeout_s",
    "run.snapshot_every_s",
    "run.snapshots",
    "run.replace",
    "run.fault_plan",
    "run.max_refusals",
    "run.max_restarts",
    "run.keep_anchors",
    "run.labels",
    "notify.command",
    "notify.timeout_s",
    "notify.below_quorum_s",
    "notify.loss_spike",
    "train.loop_digest",
    "model.factory_digest",
    "train.pace_s",
    "metrics.port",
    "metrics.host",
    "metrics.ray",
    "metrics.tensorboard",
    "metrics.tracker",
    "metrics.project",
)


@click.command()
@click.argument("run", required=False)
@set_option
@click.option("--run-dir", type=click.Path(path_type=Path), help="Directory of the run [runs/<name>-<date>-<4 hex>].")
@click.option("--resume", type=click.Path(path_type=Path), metavar="DIR", help="Go on with the run in this directory.")
@click.option("--fault", "faults", metavar="SPEC", multiple=True, help="Cause a failure: kill:island-1@round=15.")
@click.option(
    "--faults", "plan", type=click.Path(path_type=Path), metavar="FILE", help="Cause the failures of this TOML file."
)
@json_option
def train(
    run: str | None,
    overrides: Sequence[str],
    run_dir: Path | None,
    resume: Path | None,
    faults: Sequence[str],
    plan: Path | None,
    as_json: bool,
) -> int:
    """Train a model.

    RUN is the name of a preset (`atoll config presets` lists them) or the path of a TOML file.
    """
    if plan is not None:
        overrides = [*overrides, f"run.fault_plan={plan.expanduser().resolve()}"]
    if resume is not None:
        if run is not None or run_dir is not None:
            raise click.UsageError("--resume goes on with its own configuration and directory: no RUN, no --run-dir")
        return _resume(resume, overrides, faults=faults, as_json=as_json)
    if run is None:
        raise click.UsageError("which run? Name a preset or a TOML file, for example: atoll train demo")
    from orchestrator.config import load_config
    from orchestrator.prepare import prepare
    from orchestrator.rundir import create_run_dir
    from orchestrator.submit import job_address

    config = load_config(run, overrides=overrides).config
    if config.run.address is None and (address := job_address()) is not None:
        config = config.with_values({"run.address": address})  # `ray job submit -- atoll train`: on that cluster
    with waiting(CHECKING):
        prepared = prepare(config, faults)
    directory = create_run_dir(config.run.name, path=run_dir)
    return _launch(prepared, directory, resume=False, as_json=as_json)


@click.command()
@set_option
@click.option("--run-dir", type=click.Path(path_type=Path), help="Directory of the run [runs/demo-<date>-<4 hex>].")
@json_option
def demo(overrides: Sequence[str], run_dir: Path | None, as_json: bool) -> int:
    """Train three islands, kill one of them, and show what happened.

    Trains the preset demo on Python's own standard library, kills one island with SIGKILL on the way, and writes
    a report that shows the loss, the failure and the recovery.
    """
    from orchestrator.config import load_config
    from orchestrator.errors import UserError
    from orchestrator.prepare import prepare
    from orchestrator.rundir import create_run_dir

    config = load_config("demo", overrides=overrides).config
    if config.run.islands == 1:
        message = "run.islands = 1 is not allowed: the demo kills island-1 and goes on with the others"
        raise UserError(message, place="--set run.islands", remedy="two or more, or `atoll train demo`")
    with waiting(CHECKING):
        prepared = prepare(config, [DEMO_FAULT])
    directory = create_run_dir(config.run.name, path=run_dir)
    return _launch(prepared, directory, resume=False, as_json=as_json, as_demo=True)


def _resume(path: Path, overrides: Sequence[str], *, faults: Sequence[str], as_json: bool) -> int:
    from orchestrator.config import load_config
    from orchestrator.errors import UserError
    from orchestrator.prepare import prepare
    from orchestrator.rundir import open_run_dir

    directory = open_run_dir(path)
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key not in RESUME_KEYS:
            message = f"{key} cannot change in the middle of a run"
            remedy = f"a new run; with --resume only {', '.join(RESUME_KEYS)}"
            raise UserError(message, place=f"--set {override}", remedy=remedy)
    config = load_config(directory.config, overrides=overrides).config
    with waiting(CHECKING):
        prepared = prepare(config, faults)
    return _launch(prepared, directory, resume=True, as_json=as_json)


def _launch(prepared: Prepared, directory: RunDir, *, resume: bool, as_json: bool, as_demo: bool = False) -> int:
    path = shown(directory.path)
    with directory.lock():
        directory.record(prepared.config.to_toml())
        if not as_json:
            click.echo(f"starting in {path}; Ray and the islands take some seconds ...")
        code = None
        try:
            if as_demo:
                from orchestrator.launch import demo as run_demo

                code = run_demo(prepared, directory.path, as_json=as_json)
            else:
                from orchestrator.launch import train as run_train

                code = run_train(prepared, directory.path, resume=resume, as_json=as_json)
        finally:
            if code is None and not resume:
                _forget(directory)
    if not as_json and not (as_demo and code == 0):
        _show_end(directory, code)
    # The last line names the directory; with --json stdout belongs to the machine that reads it.
    click.echo(f"run directory: {directory.path if as_json else path}", err=as_json)
    return code


def _forget(directory: RunDir) -> None:
    """A run that never began leaves nothing behind, and `latest` is the run before it again."""
    from orchestrator.rundir import LATEST, link_latest, list_runs

    folders = (directory.logs, directory.snapshots)
    if directory.journal.exists() or any(any(folder.iterdir()) for folder in folders if folder.is_dir()):
        return
    for file in (directory.config, directory.versions, directory.lock_file):
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # what is not empty holds something of the user's
        for folder in (*folders, directory.path):
            folder.rmdir()
    link = directory.path.parent / LATEST
    if link.is_symlink() and not link.exists():
        before = list_runs(directory.path.parent)
        link_latest(before[-1].path) if before else link.unlink()


def _show_end(directory: RunDir, code: int) -> None:
    """The closing table, and what can be done next."""
    path = shown(directory.path)
    if directory.summary.exists():
        from rich.console import Console

        from orchestrator.report.console import console_table
        from orchestrator.summary import load_summary

        summary = load_summary(directory.path)
        if summary.tokens_committed or not summary.error:  # one that failed at its start has nothing to show
            Console().print(console_table(summary))
    after = {
        0: f"report: {path}/report.html (atoll ledger, sample and export take the directory, too)",
        1: f"why: {path}/logs",
        3: f"go on: atoll train --resume {path}",
    }
    if code in after:
        click.echo(after[code])
