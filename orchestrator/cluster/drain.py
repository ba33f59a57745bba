"""Ask the controllers of a cluster to let islands go, and wait until they went: `python -m orchestrator.cluster.drain`.

A process of its own, because a supervisor that imported Ray could die of Ray. Its environment is that of the cluster.
What it says is one line of JSON for each change, `{"leaving": [...]}`, and at the end `{"done": true, ...}`; before,
`{"leaving": [], "ends": [...]}` where something on the machine hands nothing over: one sentence for each.

A controller's `leave(members, node, at_once)` is idempotent and returns `{"leaving": [...], "unknown": [...]}`: the
islands that still have to go, and the names that its run does not have.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from orchestrator.processes import CONTROLLER_PREFIX, NAMESPACE

POLL_S = 0.5
CALL_S = 10.0
DONE, LATE = 0, 1

# A controller's `leave`: name of the controller -> its answer, None if it is gone.
Leave = Callable[[str], Mapping[str, Sequence[str]] | None]


def drain(
    controllers: Iterable[str],
    leave: Leave,
    say: Callable[[dict[str, object]], None],
    *,
    timeout_s: float,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> int:
    """Poll all controllers until nothing leaves any more; returns the exit code."""
    waiting, unknown = list(controllers), dict[str, list[str]]()
    num, deadline_s, said = len(waiting), clock() + timeout_s, None
    while True:
        answers = {name: leave(name) for name in waiting}
        unknown |= {name: list(answer["unknown"]) for name, answer in answers.items() if answer is not None}
        leaving = sorted(member for answer in answers.values() if answer is not None for member in answer["leaving"])
        waiting = [name for name, answer in answers.items() if answer is not None and answer["leaving"]]
        if not waiting or clock() > deadline_s:
            break
        if leaving != said:
            say({"leaving": leaving})
            said = leaving
        pause(POLL_S)
    # A name is unknown if no run has it.
    nowhere = set.intersection(*map(set, unknown.values())) if unknown else set()
    say({"done": not waiting, "controllers": num, "leaving": leaving, "unknown": sorted(nowhere)})
    return LATE if waiting else DONE


def what_ends(actors: Iterable[Mapping[str, Any]], node: str) -> list[str]:
    """Of the actors that Ray knows, what ends with a machine without handing over, in sentences.

    Args:
        actors: Name, State and node (Address.NodeID) of each.
        node: of the machine.
    """
    here = [a["Name"] for a in actors if a["State"] == "ALIVE" and a["Address"]["NodeID"] == node and a["Name"]]
    said = []
    for name in sorted(name for name in here if name.startswith(CONTROLLER_PREFIX)):
        run = name.removeprefix(CONTROLLER_PREFIX)
        said.append(
            f"the controller of {run} is on this machine and ends with it: "
            f"atoll stop --run {run} before lets atoll train --resume go on exactly there"
        )
    return said


def main() -> int:
    """Connect, drain, disconnect."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", required=True)
    parser.add_argument("--node-ip")
    parser.add_argument("--node")
    parser.add_argument("--member", action="append", default=[])
    parser.add_argument("--now", action="store_true")
    parser.add_argument("--timeout", type=float, default=300.0)
    options = parser.parse_args()

    import ray
    from ray.exceptions import GetTimeoutError, RayActorError

    ray.init(
        address=options.address,
        namespace=NAMESPACE,
        logging_level=logging.ERROR,
        log_to_driver=False,
        configure_logging=False,
        **({"_node_ip_address": options.node_ip} if options.node_ip else {}),
    )

    def leave(name: str) -> Mapping[str, Sequence[str]] | None:
        try:
            controller = ray.get_actor(name, namespace=NAMESPACE)
            answer: Any = ray.get(controller.leave.remote(options.member, options.node, options.now), timeout=CALL_S)
        except (ValueError, RayActorError):
            return None  # its run is over
        except GetTimeoutError:
            return {"leaving": [f"(no answer from {name})"], "unknown": []}
        return {"leaving": answer["leaving"], "unknown": answer["unknown"]}

    try:
        actors = ray.util.list_named_actors(all_namespaces=True)
        names = [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE]
        controllers = [name for name in names if name.startswith(CONTROLLER_PREFIX)]
        if options.node is not None and (ends := what_ends(_all_actors(), options.node)):
            _say({"leaving": [], "ends": ends})
        return drain(controllers, leave, _say, timeout_s=options.timeout)
    finally:
        ray.shutdown()


def _all_actors() -> list[Mapping[str, Any]]:
    """What `what_ends` is given, from the Ray that this process is connected to."""
    from ray._private.state import actors

    return list(actors().values())


def _say(values: dict[str, object]) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    sys.exit(main())
