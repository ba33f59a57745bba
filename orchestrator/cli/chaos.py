"""`atoll chaos`: make something go wrong in a run that goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from orchestrator.cli.options import json_option

ANSWER_S = 30.0


@click.command()
@click.argument("faults", metavar="KIND:TARGET...", nargs=-1, required=True)
@click.option("--run", "run_dir", type=click.Path(path_type=Path), metavar="DIR", help="Which run [the newest].")
@click.option("--address", metavar="ADDRESS", help="Of the cluster where it runs [as its directory says].")
@json_option
def chaos(faults: Sequence[str], run_dir: Path | None, address: str | None, as_json: bool) -> int:
    """Make something go wrong in a run that goes on, at once.

    kill:island-1, oom:, stop:, hang:, slow:, cut: (also island-0+island-1), heal:, delay:, corrupt:, nan:, disk_full,
    clock_jump:, controller_kill, head_kill, storm; wrong updates, gross: sign_flip:, scale:, noise:, send_nan:,
    lying_owner:, and stealthy: little_is_enough:, inner_product:, copy_cat:, label_flip:; with options:
    hang:island-1,for=6s slow:island-0,factor=4. All are checked before the first is caused, and each is in the journal.
    """
    from orchestrator.errors import ClusterUnreachable, UserError
    from orchestrator.rundir import open_run_dir

    directory = open_run_dir(run_dir)
    from orchestrator.attach import attach
    from orchestrator.client import does_not_go_on
    from orchestrator.waiting import waiting

    if address is None and directory.state() in ("done", "failed", "stopped"):
        raise does_not_go_on(directory)
    with waiting("reaching the run"):
        controller = attach(directory.path.resolve(), address)
    import ray

    try:
        with waiting("causing it"):
            asked: Any = controller.chaos.remote(list(faults))
            answer: dict[str, Any] = ray.get(asked, timeout=ANSWER_S)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
        if any(fault.startswith("controller_kill") for fault in faults):
            answer = {"done": list(faults), "error": None}  # it could not say it any more
        else:
            raise ClusterUnreachable(
                f"the controller does not answer: {error}",
                place=str(directory.path),
                remedy=f"atoll status {directory.path}; if it goes on, the same once more",
            ) from error
    finally:
        ray.shutdown()
    if answer["error"]:
        raise UserError(
            answer["error"],
            place=str(directory.path),
            remedy=answer.get("try") or "atoll status names the members; atoll chaos --help the faults",
        )
    if as_json:
        from orchestrator.answers import Injected

        click.echo(Injected(injected=answer["done"]).model_dump_json())
    else:
        for text in answer["done"]:
            click.echo(f"injected {text}")
    return 0
