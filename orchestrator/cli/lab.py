"""`atoll lab`: several hosts on this machine, joined by emulated links."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.cli.lazy import HelpfulGroup
from orchestrator.cli.options import json_option
from orchestrator.waiting import waiting

if TYPE_CHECKING:
    from faults.lab.lab import Lab
    from faults.lab.schedule import LinkChange

NONE = "none"
BAD_INPUT = 2

lab_option = click.option("--lab", "name", metavar="NAME", help="Which lab, where there are several.")


@click.group(cls=HelpfulGroup)
def lab() -> None:
    """Several hosts on this machine, joined by emulated links, with a Ray cluster across them (needs root).

    TARGET is a node or a region (eu), both directions between two of them (us:eu), or one of them ('us>eu', in quotes).
    """


@lab.command()
@click.argument("topology")
@click.option("--name", metavar="NAME", help="What to call the lab [the name of the topology].")
@click.option("--seed", default=0, show_default=True, type=int, help="Of loss and jitter.")
@click.option(
    "--workers", default=1, show_default=True, type=click.IntRange(min=0), help="Islands that each host may hold."
)
@click.option("--lan", is_flag=True, help="Ray as in one building: it gives a silent machine up after a minute.")
@click.option("--links-only", is_flag=True, help="No Ray cluster, only hosts and links.")
@json_option
def up(topology: str, name: str | None, seed: int, workers: int, lan: bool, links_only: bool, as_json: bool) -> int:
    """Make the hosts and links of TOPOLOGY, start a Ray cluster across them, and leave it running.

    The first host runs atoll up, the others atoll join; each has a host name and a state directory of its own.

    TOPOLOGY is the name of one that comes with Atoll (two-regions, slow-pair, three-continents, home-uplinks, starved,
    satellite) or the path of a TOML file. What dead labs left behind is removed first.
    """
    from faults.lab.cluster import LabCluster
    from faults.lab.lab import Lab
    from orchestrator.topology import find_topology, load_topology

    made = Lab(load_topology(topology), name=name or find_topology(topology).stem.lower(), seed=seed)
    address = None
    with made:  # whatever ends this command before the last line ends the lab
        if not links_only:
            click.echo(f"starting Ray on {', '.join(made.nodes)} ...", err=True)
            cluster = LabCluster(made, workers=workers, wan=not lan)
            with waiting("starting Ray"):
                cluster.start()
            address = cluster.address
        addresses = {node: made.address(node) for node in made.nodes}
        made.detach()
    if as_json:
        from orchestrator.answers import LabUp

        click.echo(LabUp(lab=made.name, nodes=addresses, cluster=address).model_dump_json())
        return 0
    click.echo(f"lab {made.name}" + (f", Ray at {address}" if address else ""))
    for node, address in addresses.items():
        click.echo(f"  {node:<16} {address:<16} region {made.topology.region_of(node)}")
    click.echo(
        "atoll lab run RUN trains on it, " * (not links_only) + "atoll lab exec HOST COMMAND runs anything there"
    )
    click.echo(f"atoll lab down {made.name} removes all")
    return 0


@lab.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@lab_option
@click.option(
    "--schedule",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Link changes (TOML), timed from the start of the command.",
)
@click.argument("run")
@click.argument("arguments", metavar="[OPTIONS OF ATOLL TRAIN]...", nargs=-1, type=click.UNPROCESSED)
def run(name: str | None, schedule: Path | None, run: str, arguments: Sequence[str]) -> int:
    """Train RUN, a preset or a TOML file, on the cluster of a lab and return the exit code of atoll train.

    It runs on the first host, with run.address=auto. Options of this command go before RUN, those of atoll train after
    it: atoll lab run diloco --set train.tokens=100000.
    """
    from faults.lab.cluster import LabCluster
    from faults.lab.playing import Playing

    attached = _attach(name)
    cluster = LabCluster.attach(attached)
    changes = _load_schedule(schedule, attached) if schedule is not None else ()
    process = cluster.atoll(cluster.head, ["train", run, "--set", "run.address=auto", *arguments])
    # Ctrl-C reaches it too, as the terminal sends it to both; this one does not.
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())

    def warn(text: str) -> None:
        if process.poll() != BAD_INPUT:  # it says why nothing came of it
            click.echo(f"warning: {text}", err=True)

    try:
        with Playing(attached, changes, say=warn):
            return _end_of(process)
    finally:
        signal.signal(signal.SIGTERM, before)


@lab.command()
@click.argument("schedule", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@lab_option
def play(schedule: Path, name: str | None) -> int:
    """Change links as the TOML file SCHEDULE says, at its times from now on; returns after the last change.

    [[links]] tables with at_s, action (cut, heal, set), target, and for set the table values.
    """
    attached = _attach(name)
    attached.play(_load_schedule(schedule, attached))
    return 0


@lab.command(name="exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("node")
@click.argument("command", nargs=-1, required=True)
@lab_option
def exec_command(node: str, command: Sequence[str], name: str | None) -> int:
    """Run COMMAND on the host NODE and return its exit code (--lab goes before NODE)."""
    attached = _attach(name)
    return subprocess.call(attached.command(node, command), env=os.environ | attached.environment(node))


@lab.command(name="set")
@click.argument("target")
@click.argument("values", metavar="KEY=VALUE...", nargs=-1, required=True)
@lab_option
def set_command(target: str, values: Sequence[str], name: str | None) -> int:
    """Change a link while packets pass.

    Keys: rate_mbit (up_mbit and down_mbit for the line of a host), delay_ms, jitter_ms, loss, queue_ms. The value none
    sets a key back to its default (rate_mbit=none: no limit).
    """
    changes = dict(map(_key_value, values))
    if len(changes) < len(values):
        raise click.UsageError(f"a key is given twice: {' '.join(values)}")
    _attach(name).set(target, **changes)
    return 0


@lab.command()
@click.argument("target")
@lab_option
def cut(target: str, name: str | None) -> int:
    """Let nothing pass, silently, as when a cable is cut."""
    _attach(name).cut(target)
    return 0


@lab.command()
@click.argument("target", required=False)
@lab_option
def heal(target: str | None, name: str | None) -> int:
    """Let everything pass again; without TARGET, everywhere."""
    _attach(name).heal(target)
    return 0


@lab.command()
@lab_option
@json_option
def status(name: str | None, as_json: bool) -> int:
    """Show every link, with bytes and drops, what is cut, and how well the emulation keeps its own times."""
    from dataclasses import asdict

    from orchestrator.cli.lab_table import format_status

    attached = _attach(name)
    now = attached.status()
    if as_json:
        from orchestrator.answers import LabAnswer

        click.echo(LabAnswer.model_validate({"lab": attached.name, **asdict(now)}).model_dump_json())
    else:
        click.echo(format_status(attached.name, now))
    return 0


@lab.command()
@click.argument("name", required=False)
@click.option("--all", "every", is_flag=True, help="All labs.")
def down(name: str | None, every: bool) -> int:
    """End everything that runs on the hosts of a lab and remove it, and whatever dead labs left behind."""
    from faults.lab.state import LabStates

    states = LabStates()
    with states.lock():
        removed = states.sweep()
        records = states.records()
        if not every and (records or not removed or name) and name not in removed:
            records = [states.only(name)]
        with waiting("ending what runs there"):
            for record in records:
                states.remove(record.name, record)
    for gone in [*removed, *(record.name for record in records)]:
        click.echo(f"lab {gone} removed")
    return 0


def _end_of(process: subprocess.Popen[bytes]) -> int:
    """Its exit code; Ctrl-C is for it to hear, and it ends in its own time."""
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def _load_schedule(path: Path, lab: Lab) -> Sequence[LinkChange]:
    from faults.lab.schedule import check_changes
    from orchestrator.topology import load_schedule

    changes = load_schedule(path)
    check_changes(changes, lab.topology, file=str(path))
    return changes


def _attach(name: str | None) -> Lab:
    from faults.lab.lab import Lab

    return Lab.attach(name)


def _key_value(text: str) -> tuple[str, float | None]:
    key, separator, value = text.partition("=")
    try:
        if separator:
            return key, None if value == NONE else float(value)
    except ValueError:
        pass
    raise click.UsageError(f"{text!r} is not of the form KEY=NUMBER, for example rate_mbit=100")
