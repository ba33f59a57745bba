"""Finding a run that goes on: the run directory says on which Ray its controller lives."""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import ClusterUnreachable, UserError
from orchestrator.processes import NAMESPACE, controller_name

if TYPE_CHECKING:
    from ray.actor import ActorHandle

WHERE = "ray.json"


def note_address(run_dir: Path) -> None:
    """Write down where this process is connected to, for commands that look for the run."""
    import ray

    context = ray.get_runtime_context()
    where = {"gcs_address": str(context.gcs_address), "node_ip": ray.util.get_node_ip_address()}  # type: ignore[no-untyped-call]
    (run_dir / WHERE).write_text(json.dumps(where) + "\n", encoding="utf-8")


def attach(run_dir: Path, address: str | None = None) -> ActorHandle[Any]:
    """Connect this process to a run's Ray, and return its controller. The caller ends with `ray.shutdown`.

    Args:
        address: of the cluster; default: what the run directory says.

    Raises:
        UserError: the directory does not say. ClusterUnreachable: no Ray answers there, or it has no such run.
    """
    told: dict[str, str] = {}
    with suppress(FileNotFoundError, ValueError):
        told = json.loads((run_dir / WHERE).read_text(encoding="utf-8"))
    address = address or told.get("gcs_address")
    if address is None:
        raise UserError(
            f"{run_dir} does not say where its run is: it has no {WHERE}",
            place=str(run_dir),
            remedy="--address of the cluster, or the directory of a run that goes on",
        )
    from orchestrator.launch import LOOPBACK_ONLY, enter_cluster, set_ray_environment

    set_ray_environment(address)
    known = enter_cluster(address, asked="--address")
    if known is None and told:
        os.environ[LOOPBACK_ONLY] = "0"
    import ray

    node_ip = known.node_ip if known is not None else told.get("node_ip")
    options: dict[str, Any] = {"_node_ip_address": node_ip} if node_ip else {}
    options |= {"address": known.gcs_address if known is not None else address, "namespace": NAMESPACE}
    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=False, configure_logging=False, **options)
        return ray.get_actor(controller_name(run_dir.name), namespace=NAMESPACE)
    except ConnectionError as error:
        raise ClusterUnreachable(
            f"no Ray answers at {address}: {error}",
            place=str(run_dir),
            remedy="--address of the cluster, if it has moved; atoll doctor looks at what is in the way",
        ) from error
    except ValueError as error:
        ray.shutdown()
        raise ClusterUnreachable(
            f"the Ray at {address} has no run {run_dir.name!r}: it is over, or runs elsewhere",
            place=str(run_dir),
            remedy=f"atoll status {run_dir} shows how it ended, atoll runs --at ADDRESS what goes on there",
        ) from error
