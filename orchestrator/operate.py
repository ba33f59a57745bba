"""Answers to what people ask about the runs of a cluster, given by a process that is connected to its Ray.

One request is `{"do": ..., "run": NAME or null, "args": {...}}`, an answer `{"ok": ...}` or `{"error": {...}}`: plain
JSON. `python -m orchestrator.operate` answers one line after the other: the door's supervisor has it as a child,
because a supervisor that imported Ray could die of Ray.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from orchestrator.dashboard.feed import FeedPart, part_to_json
from orchestrator.errors import ClusterUnreachable, UserError
from orchestrator.job_ends import FailedJob, look_for_failure
from orchestrator.processes import CONTROLLER_PREFIX, NAMESPACE
from orchestrator.room import look

CALL_S = 30.0
# What may be asked of a controller: name of the request -> its method.
METHODS = {
    "status": "full_status",
    "standing": "status",
    "pause": "pause",
    "resume": "resume",
    "save": "save",
    "stop": "stop",
    "set": "set",
    "rollback": "rollback",
    "unban": "unban",
    "leave": "leave",
    "logs": "logs",
    "stack": "stack",
    "rows": "rows",
    "feed": "feed",
    "act": "act",
}


def controllers() -> list[str]:
    """Runs that have a controller on the cluster that this process is connected to, by name."""
    import ray

    actors = ray.util.list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE]
    return sorted(name.removeprefix(CONTROLLER_PREFIX) for name in names if name.startswith(CONTROLLER_PREFIX))


def choose(
    known: list[str], wanted: str | None, find_failure: Callable[[], FailedJob | None] = look_for_failure
) -> str:
    """The run that is meant: by its name, or the only one.

    Raises:
        UserError: there is none of that name, none at all, or several. Who misses a run that was submitted is told why
            its job has failed (`find_failure`).
    """
    names = ", ".join(known)
    if wanted in known:
        return str(wanted)
    if wanted is None and len(known) == 1:
        return known[0]
    if wanted is None and known:
        raise UserError(f"several runs go on there: {names}", remedy="--run NAME with one of them")
    which = f"no run {wanted!r} goes on there" if wanted is not None else "no run goes on there"
    remedy = f"--run with one of these: {names}" if known else "atoll submit, or atoll train with run.address"
    place = "--run" if wanted is not None else None
    failure = find_failure()
    if failure is None:
        raise UserError(which, place=place, remedy=remedy)
    raise UserError(f"{which}; {failure.sentence()}", place=place, remedy=failure.remedy or remedy)


def answer(request: Mapping[str, Any]) -> Any:
    """What was asked for.

    Raises:
        UserError: the request is none, or the controller refuses it; what went wrong there is raised here.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

    what, wanted, args = request.get("do"), request.get("run"), request.get("args", {})
    if what == "runs":
        return [_standing(name) for name in controllers()]
    if what == "failed_job":
        failure = look_for_failure()
        return None if failure is None else asdict(failure)
    if what == "room" and isinstance(args, dict):
        return asdict(look({str(key): str(value) for key, value in dict(args.get("labels", {})).items()}))
    if what not in METHODS or not isinstance(args, dict):
        raise UserError(
            f"{str(what)[:40]!r} cannot be asked for", remedy=", ".join(["runs", "room", "failed_job", *METHODS])
        )
    name = choose(controllers(), wanted)
    try:
        controller = ray.get_actor(f"{CONTROLLER_PREFIX}{name}", namespace=NAMESPACE)
        method = getattr(controller, METHODS[what], None)
        if method is None:
            raise UserError(
                f"{name} is a pipeline (pipeline.stages), which cannot be asked to {what}",
                remedy="atoll stop, and atoll status or atoll ledger with its directory",
            )
        reply = ray.get(method.remote(**args), timeout=CALL_S)
        return part_to_json(reply) if isinstance(reply, FeedPart) else reply
    except RayTaskError as error:
        if isinstance(error.cause, ValueError):
            cause = error.cause
            raise UserError(
                str(getattr(cause, "message", cause)),
                place=getattr(cause, "place", None),
                remedy=getattr(cause, "remedy", None) or "atoll logs shows what went on there",
            ) from error
        raise
    except UserError:
        raise
    except (ValueError, RayActorError, GetTimeoutError) as error:
        raise ClusterUnreachable(
            f"the controller of {name} does not answer: {error}", remedy="its log is logs/controller.log"
        ) from error


def _standing(name: str) -> dict[str, Any]:
    status = answer({"do": "standing", "run": name})
    return {
        "run": name,
        "run_dir": status.get("run_dir"),
        "state": status["reason"] if status["over"] else "paused" if status.get("paused") else "running",
        "progress": status.get("progress"),
        "members": sorted(status.get("members", ())),
    }


def answer_line(line: str) -> dict[str, Any]:
    """The answer to one line of JSON, as JSON values."""
    try:
        request = json.loads(line)
        if not isinstance(request, dict):
            raise UserError("a request is one line with a JSON object", remedy='{"do": "runs"}')
        return {"ok": answer(request)}
    except ValueError as error:
        told = {key: getattr(error, key, None) for key in ("message", "place", "remedy")}
        return {"error": {**told, "message": told["message"] or str(error), "code": getattr(error, "exit_code", 2)}}


def main() -> int:
    """Connect, then answer until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", required=True)
    parser.add_argument("--node-ip")
    options = parser.parse_args()
    import ray

    ray.init(
        address=options.address,
        namespace=NAMESPACE,
        logging_level=logging.ERROR,
        log_to_driver=False,
        configure_logging=False,
        **({"_node_ip_address": options.node_ip} if options.node_ip else {}),
    )
    for line in sys.stdin:
        print(json.dumps(answer_line(line)), flush=True)
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
