"""The processes of runs on a Ray cluster: their names, where they can be, and how they are ended."""

from __future__ import annotations

import logging
import socket
from collections.abc import Collection, Mapping
from typing import Any

NAMESPACE = "atoll"
WORKER_RESOURCE = "atoll_worker"  # one unit for every island that a node may hold
CONTROLLER_PREFIX = "controller/"
HEAD = "node:__internal_head__"  # a resource that Ray gives to the head alone
KNOCK_S = 1.0

log = logging.getLogger("atoll.controller")


def controller_name(run_id: str) -> str:
    """Name of a run's controller in the namespace `atoll`."""
    return f"{CONTROLLER_PREFIX}{run_id}"


def island_actor_name(run_id: str, name: str, nonce: str) -> str:
    """Name of an island's process: found again after the controller was restarted."""
    return f"island/{run_id}/{name}/{nonce}"


def find_islands(run_id: str) -> list[tuple[str, str]]:
    """`(name, nonce)` of every process of a run's islands that Ray knows, in no order."""
    import ray

    prefix = f"island/{run_id}/"
    actors = ray.util.list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE]
    return [(name.split("/")[-2], name.split("/")[-1]) for name in names if name.startswith(prefix)]


def end_processes(run_id: str) -> None:
    """Kill the controller and then the islands of a run that are left; they outlive whoever started them."""
    _kill(controller_name(run_id))
    for name, nonce in find_islands(run_id):
        _kill(island_actor_name(run_id, name, nonce))


def _kill(actor_name: str) -> None:
    import ray

    try:
        ray.kill(ray.get_actor(actor_name, namespace=NAMESPACE))
    except ValueError:
        log.debug("%s is gone already", actor_name)


def this_machine() -> dict[str, float]:
    """Resources that only this machine has: the controller starts, and starts again, where the run directory is.

    Not the id of the node: a head that is started again has another one, and the same resources.
    """
    import ray

    mine = ray.get_runtime_context().get_node_id()
    [resources] = [node["Resources"] for node in ray.nodes() if node["NodeID"] == mine]  # type: ignore[no-untyped-call]
    names = [name for name in resources if name.startswith("node:")]
    return {HEAD if HEAD in names else names[0]: 0.001} if names else {}


def worker_nodes(labels: Mapping[str, str]) -> tuple[dict[str, int], dict[str, int]]:
    """Places of each node that is there and has these labels: all of them, and those that nobody uses now."""
    import ray
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()  # type: ignore[no-untyped-call]
    total: dict[str, int] = {}
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        own = node.get("Labels") or {}
        num = int(node["Resources"].get(WORKER_RESOURCE, 0))
        if node["Alive"] and num and all(own.get(key) == value for key, value in labels.items()):
            total[node["NodeID"]] = num
    return total, {node: int(free.get(node, {}).get(WORKER_RESOURCE, 0)) for node in total}


def label_of_nodes(key: str) -> dict[str, str]:
    """What each node that is there says of itself under a label; those that do not have it are left out."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return {node["NodeID"]: node["Labels"][key] for node in nodes if key in (node.get("Labels") or {})}


def draining_nodes() -> set[str]:
    """Nodes that Ray was told to drain: whoever runs the machines gives notice that it takes them away."""
    from ray._private.state import state

    return set(state.get_draining_nodes())


def answering(nodes: Collection[str]) -> set[str]:
    """Those of these nodes whose Ray listens: Ray itself takes seconds to notice that a machine has gone."""
    import ray

    told = {node["NodeID"]: node for node in ray.nodes()}  # type: ignore[no-untyped-call]
    return {node for node in nodes if node in told and _listens(told[node])}


def has_ended(node: str) -> bool:
    """Whether Ray has ended on a node: it is declared dead, or its machine answers that nobody listens there.

    No answer at all is none: the machine may have gone, or the way to it.
    """
    import ray

    told = next((one for one in ray.nodes() if one["NodeID"] == node), None)  # type: ignore[no-untyped-call]
    if told is None or not told["Alive"]:
        return True
    try:
        socket.create_connection((told["NodeManagerAddress"], told["NodeManagerPort"]), timeout=KNOCK_S).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def _listens(node: Mapping[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=KNOCK_S).close()
    except OSError:
        return False
    return True
