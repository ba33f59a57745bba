"""The command `atoll`: the list of commands, and the one place where errors become messages and exit codes.

Exit codes: 0 done, 1 the run failed, 2 bad input, 3 stopped by the user and resumable, 4 cluster not reachable,
5 verification failed. (130: a command other than a run was interrupted; 141: the reader of the output went away.)
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence

import click

from orchestrator.cli.lazy import LazyCommand, LazyGroup
from orchestrator.version import VERSION

BAD_INPUT = 2
INTERRUPTED = 130
READER_GONE = 141
# What to do about an error of the system that names a file.
OF_THE_SYSTEM = {
    errno.EACCES: "a path that this user may read and write",
    errno.EPERM: "a path that this user may read and write",
    errno.ENOENT: "a path that exists",
    errno.ENOSPC: "free some space there, or another disk",
    errno.EROFS: "another disk: this one is read-only",
}

COMMANDS = {
    "demo": LazyCommand(
        target="orchestrator.cli.train:demo", help="Train three islands, kill one of them, and show what happened."
    ),
    "train": LazyCommand(target="orchestrator.cli.train:train", help="Train a model."),
    "plan": LazyCommand(target="orchestrator.cli.plan:plan", help="Say what each preset costs on given links."),
    "status": LazyCommand(target="orchestrator.cli.inspect:status", help="Show where a run is."),
    "pause": LazyCommand(target="orchestrator.cli.operate:pause", help="Let a run rest."),
    "resume": LazyCommand(target="orchestrator.cli.operate:resume", help="Let a paused run go on."),
    "stop": LazyCommand(target="orchestrator.cli.operate:stop", help="Stop a run so that it can be resumed."),
    "save": LazyCommand(target="orchestrator.cli.operate:save", help="Write a snapshot of a run now."),
    "set": LazyCommand(target="orchestrator.cli.operate:set_", help="Change settings of a run that goes on."),
    "rollback": LazyCommand(target="orchestrator.cli.operate:rollback", help="Let a run go on from an older version."),
    "unban": LazyCommand(target="orchestrator.cli.operate:unban", help="Let a banned member contribute again."),
    "logs": LazyCommand(target="orchestrator.cli.operate:logs", help="Show the log of a member or of the controller."),
    "stack": LazyCommand(target="orchestrator.cli.operate:stack", help="Show what an island does at this moment."),
    "submit": LazyCommand(target="orchestrator.cli.submit:submit", help="Start a run as a job of a Ray cluster."),
    "bundle": LazyCommand(target="orchestrator.cli.inspect:bundle", help="Put what a run wrote into one archive."),
    "dashboard": LazyCommand(target="orchestrator.cli.dashboard:dashboard", help="Show a run in the browser."),
    "report": LazyCommand(target="orchestrator.cli.report:report", help="Write the report of a run, or compare two."),
    "ledger": LazyCommand(
        target="orchestrator.cli.inspect:ledger", help="Recompute from the journal that every sample was counted once."
    ),
    "export": LazyCommand(
        target="orchestrator.cli.artifacts:export", help="Write the trained model as a Hugging Face folder."
    ),
    "sample": LazyCommand(target="orchestrator.cli.artifacts:sample", help="Let the trained model go on with a text."),
    "runs": LazyCommand(target="orchestrator.cli.inspect:runs", help="List the runs."),
    "data": LazyCommand(target="orchestrator.cli.data:data", help="Pack text into token shards."),
    "simulate": LazyCommand(
        target="orchestrator.cli.simulate:simulate", help="Look for histories that break the protocol, in virtual time."
    ),
    "up": LazyCommand(target="orchestrator.cli.cluster:up", help="Start a cluster that other machines can join."),
    "join": LazyCommand(target="orchestrator.cli.cluster:join", help="Let this machine be part of a cluster."),
    "leave": LazyCommand(target="orchestrator.cli.cluster:leave", help="Take this machine out of its cluster."),
    "doctor": LazyCommand(
        target="orchestrator.cli.cluster:doctor", help="Check whether this machine can be part of a cluster."
    ),
    "chaos": LazyCommand(target="orchestrator.cli.chaos:chaos", help="Make something go wrong in a run that goes on."),
    "storm": LazyCommand(
        target="orchestrator.cli.storm:storm", help="Measure what random faults cost: a run without them, and one with."
    ),
    "why": LazyCommand(target="orchestrator.cli.why:why", help="Tell from the journal why something was decided."),
    "lab": LazyCommand(
        target="orchestrator.cli.lab:lab", help="Several hosts on this machine, joined by emulated links."
    ),
    "config": LazyCommand(target="orchestrator.cli.config:config", help="Show and check configurations."),
}


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        click.echo(f"atoll {VERSION}")
        ctx.exit()


@click.group(cls=LazyGroup, lazy=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="The version."
)
@click.option("--traceback", "show_traceback", is_flag=True, help="Show where in the code an error was raised.")
@click.pass_context
def cli(ctx: click.Context, show_traceback: bool) -> None:
    """Train one language model on several machines that synchronise rarely."""
    ctx.find_root().meta["atoll.traceback"] = show_traceback


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; mistakes of the user end in one message on stderr."""
    # Before anything imports Ray: it sends no statistics of use.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = cli.main(args=arguments, prog_name="atoll", standalone_mode=False)
        sys.stdout.flush()
    except click.Abort:
        return INTERRUPTED
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return BAD_INPUT
    except click.ClickException as error:
        return _fail(error.format_message(), code=BAD_INPUT, remedy=_usage_hint(error))
    except BrokenPipeError:
        # Nobody reads on (`atoll config show demo | head`); keep the interpreter from complaining at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    except ValueError as error:
        if type(error) is ValueError:
            raise  # checks of what the user gave have types of their own: this is a mistake of Atoll's, shown whole
        return _report(error, show_traceback="--traceback" in arguments)
    except OSError as error:
        if error.filename is None:
            raise
        message, remedy = f"{error.strerror}: {error.filename}", OF_THE_SYSTEM.get(error.errno or 0, "another path")
        return _fail(message, code=BAD_INPUT, remedy=remedy, show_traceback="--traceback" in arguments)
    return code if isinstance(code, int) else 0


def _report(error: ValueError, *, show_traceback: bool) -> int:
    """A mistake of the user: `UserError`, or a ValueError of a lower layer, which may have place and remedy too."""
    message, remedy = str(getattr(error, "message", None) or error), getattr(error, "remedy", None)
    if remedy and message.endswith(remedy):  # errors of the journal say it in their text as well
        message = message.removesuffix(remedy).rstrip("; ")
    return _fail(
        message,
        code=int(getattr(error, "exit_code", BAD_INPUT)),
        place=getattr(error, "place", None),
        remedy=remedy,
        show_traceback=show_traceback,
    )


def _fail(
    message: str, *, code: int, place: str | None = None, remedy: str | None = None, show_traceback: bool = False
) -> int:
    if show_traceback:
        traceback.print_exc()
    click.echo(f"error: {message}", err=True)
    if place:
        click.echo(f"  place: {place}", err=True)
    if remedy:
        click.echo(f"  try:   {remedy}", err=True)
    return code


def _usage_hint(error: click.ClickException) -> str | None:
    context = getattr(error, "ctx", None)
    return f"{context.command_path} --help" if isinstance(context, click.Context) else None


if __name__ == "__main__":
    sys.exit(main())
