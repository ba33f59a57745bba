"""`atoll pause`, `resume`, `stop`, `save`, `set`, `rollback`, `unban`, `logs`, `stack`: a run that goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from orchestrator.cli.cluster import hide_token, token_file_option
from orchestrator.cli.options import Command, json_option
from orchestrator.errors import ClusterUnreachable, UserError
from orchestrator.waiting import waiting

STOP_S = 600.0
POLL_S = 0.5

target_argument: Callable[[Command], Command] = click.argument(
    "target", required=False, metavar="[RUN_DIR|ADDRESS|JOIN_STRING]"
)
at_option: Callable[[Command], Command] = click.option(
    "--at", "target", metavar="RUN_DIR|ADDRESS|JOIN_STRING", help="Which run, or where it goes on [runs/latest]."
)
run_option: Callable[[Command], Command] = click.option(
    "--run", "run", metavar="NAME", help="Which one, where several go on."
)


def _ask(target: str | None, token_file: Path | None, run: str | None, what: str, **args: Any) -> Any:
    from orchestrator.client import connect

    hide_token(target or "")
    with waiting("asking the run"), connect(target, token_file) as runs:
        return runs.ask(what, run, **args)


def _show(kind: str, answer: Any, as_json: bool, text: str) -> int:
    """Print an answer as JSON, which its model in `orchestrator.answers` has to accept, or as text."""
    if as_json:
        from orchestrator import answers

        click.echo(getattr(answers, kind).model_validate(answer).model_dump_json())
    else:
        click.echo(text)
    if not as_json and isinstance(answer, dict) and answer.get("journalled") is False:
        click.echo("warning: the journal's disk is full; it holds as soon as there is space", err=True)
    return 0


@click.command()
@target_argument
@token_file_option
@run_option
@json_option
def pause(target: str | None, token_file: Path | None, run: str | None, as_json: bool) -> int:
    """Let a run rest: no island takes further samples until atoll resume.

    Processes stay, with all they hold; the exchange under way is finished. TARGET is a run directory, an address of
    Ray, or the join string of a cluster; without it the newest run here, or this machine's cluster.
    """
    answer = _ask(target, token_file, run, "pause")
    return _show("Asked", answer, as_json, f"{answer['run']} is paused; atoll resume lets it go on")


@click.command()
@target_argument
@token_file_option
@run_option
@json_option
def resume(target: str | None, token_file: Path | None, run: str | None, as_json: bool) -> int:
    """Let a paused run go on. (A run that was stopped goes on with atoll train --resume.)"""
    answer = _ask(target, token_file, run, "resume")
    return _show("Asked", answer, as_json, f"{answer['run']} goes on")


@click.command()
@target_argument
@token_file_option
@run_option
@click.option("--now", is_flag=True, help="At once: steps that were not offered are lost.")
@click.option("--no-wait", is_flag=True, help="Return when it was asked.")
@json_option
def stop(target: str | None, token_file: Path | None, run: str | None, now: bool, no_wait: bool, as_json: bool) -> int:
    """Stop a run so that atoll train --resume goes on exactly there."""
    from orchestrator.client import connect

    hide_token(target or "")
    with waiting("stopping"), connect(target, token_file) as runs:
        standing = runs.ask("standing", run)
        name = standing.get("run") or run
        runs.ask("stop", run, save=not now)
        deadline_s, silent = time.monotonic() + STOP_S, 0
        while not no_wait and not standing["over"] and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
            try:
                standing, silent = runs.ask("standing", name), 0
            except ClusterUnreachable:  # once: it may be ending at this moment
                silent += 1
                if silent > 1:
                    raise
            except UserError:  # who started it has ended its processes, as after every run
                standing = {"over": True, "reason": None}
    ended = f"is {standing['reason']}" if standing["reason"] else "has ended"
    text = f"{name} {ended}" if standing["over"] else f"{name} was asked to stop"
    return _show("Stopped", {"run": name, "over": standing["over"], "reason": standing["reason"]}, as_json, text)


@click.command()
@target_argument
@token_file_option
@run_option
@json_option
def save(target: str | None, token_file: Path | None, run: str | None, as_json: bool) -> int:
    """Write a snapshot of the common state now."""
    answer = _ask(target, token_file, run, "save")
    return _show("SaveAsked", answer, as_json, f"{answer['run']} saves {answer['snapshot']}")


@click.command(name="set")
@click.argument("values", nargs=-1, required=True, metavar="KEY=VALUE...")
@at_option
@token_file_option
@run_option
@json_option
def set_(values: Sequence[str], target: str | None, token_file: Path | None, run: str | None, as_json: bool) -> int:
    """Change settings of a run that goes on: journalled, and for all islands from the same version on.

    These can change: strategy.inner_steps, strategy.outer_lr, codec.name, and, for the exchange that is open already,
    exchange.quorum, exchange.min_members and exchange.grace_s. KEY= unsets one. Of a pipeline: strategy.inner_steps of
    diloco, pipeline.rebalance_s and pipeline.hysteresis.
    """
    from orchestrator.config import parse_value

    wanted = {}
    for text in values:
        key, separator, value = text.partition("=")
        if not separator:
            raise click.UsageError(f"{text!r} is not of the form section.key=value")
        wanted[key.strip()] = parse_value(value) if value.strip() else None
    answer = _ask(target, token_file, run, "set", values=wanted)
    told = ", ".join(f"{key} = {value}" for key, value in answer["set"].items())
    return _show("SettingsSet", answer, as_json, f"{answer['run']}: {told} from version {min(answer['since'])} on")


@click.command()
@at_option
@click.option("--to", "version", type=click.IntRange(min=0), required=True, help="Version to go back to.")
@token_file_option
@run_option
@json_option
def rollback(target: str | None, version: int, token_file: Path | None, run: str | None, as_json: bool) -> int:
    """Let a run go on from an older version, of which there is a snapshot.

    Journalled; the samples that were committed since are trained on again.
    """
    answer = _ask(target, token_file, run, "rollback", version=version)
    again = f"{answer['samples_taken_back']} samples are trained on again"
    text = f"{answer['run']} goes on from version {version}; {again}"
    return _show("RolledBackTo", answer, as_json, text)


@click.command()
@click.argument("member")
@at_option
@token_file_option
@run_option
@json_option
def unban(member: str, target: str | None, token_file: Path | None, run: str | None, as_json: bool) -> int:
    """Let a banned MEMBER contribute again: with a small weight, until it was not refused for a while."""
    answer = _ask(target, token_file, run, "unban", member=member)
    return _show("Unbanned", answer, as_json, f"{answer['run']}: {member} is on {answer['standing']}")


@click.command()
@click.argument("member", required=False)
@at_option
@token_file_option
@run_option
@click.option("--follow", "-f", is_flag=True, help="Stay, and show what is added.")
@json_option
def logs(
    member: str | None, target: str | None, token_file: Path | None, run: str | None, follow: bool, as_json: bool
) -> int:
    """Show the end of a log: of MEMBER (island-1, or island-1.2 for one incarnation), or the controller's.

    Also of members that are gone, and of runs that are over.
    """
    hide_token(target or "")
    with _log_reader(target, token_file, run) as read:
        with waiting("reading the log"):
            last = read(member)
        if as_json:
            return _show("LogTail", last, as_json, "")
        click.echo(last["text"], nl=False)
        while follow:
            time.sleep(POLL_S)
            now = read(member)
            new = now["size_bytes"] - last["size_bytes"] if now["name"] == last["name"] else len(now["text"])
            if new > 0:
                click.echo(now["text"].encode()[-new:].decode(errors="replace"), nl=False)
            last = now
    return 0


def _log_reader(target: str | None, token_file: Path | None, run: str | None) -> Any:
    """What reads a log: from the directory where it is here, else over the cluster."""
    from contextlib import contextmanager

    @contextmanager
    def reader() -> Any:
        from orchestrator.client import connect, directory_of
        from orchestrator.log_files import tail_of

        directory = directory_of(target) if token_file is None else None
        if directory is not None:
            yield lambda member: tail_of(directory.path, member)
            return
        with connect(target, token_file) as runs:
            yield lambda member: runs.ask("logs", run, member=member)

    return reader()


@click.command()
@click.argument("member")
@at_option
@token_file_option
@run_option
@json_option
def stack(member: str, target: str | None, token_file: Path | None, run: str | None, as_json: bool) -> int:
    """Show what every thread of an island does at this moment (py-spy), and keep it in the run's logs."""
    answer = _ask(target, token_file, run, "stack", member=member)
    return _show("StackDump", answer, as_json, f"{answer['text']}\nkept in {answer['file']}")
