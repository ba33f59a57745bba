"""A journal that was lost with the disk of its machine, or is damaged: asking members for their copies, and for that.

`atoll up --recover-from-members RUN` runs `python -m orchestrator.lost_journal` in the environment of its cluster: a
supervisor that imported Ray could die of Ray.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.processes import NAMESPACE, controller_name
from orchestrator.segments import segment_paths
from workers.records import Term

if TYPE_CHECKING:
    from orchestrator.host import Handed

JOURNAL_LOST = (
    "the run directory holds no journal any more, and the members' copies are the only ones; they train on to their "
    "bound and wait. To rebuild it, on the machine of the head: atoll up --recover-from-members {run_id}"
)
JOURNAL_DAMAGED = (
    "the journal in the run directory cannot be read: {why}. The members have copies of it, train on to their bound "
    "and wait. To rebuild it, on the machine of the head: atoll up --recover-from-members {run_id} (the files that are "
    "there stay, as *.damaged)"
)
DAMAGED = ".damaged"
ANSWER_S = 10.0
# The tables of a head that came back name its controllers at once; the processes take longer.
FIND_S, START_S = 5.0, 90.0
PAUSE_S = 0.5
RECOVER_S = 120.0


def set_aside_damaged(run_dir: Path) -> None:
    """Give the files of a journal that cannot be read other names, so that a rebuilt one can take their place."""
    for path in segment_paths(run_dir):
        number, aside = 1, path.with_name(path.name + DAMAGED)
        while aside.exists():
            number += 1
            aside = path.with_name(f"{path.name}{DAMAGED}.{number}")
        path.rename(aside)


def ask_copies(handles: Mapping[str, Any], term: Term) -> dict[str, Handed]:
    """Every member's copy of the journal and the term that it obeys from now on; `(None, ())` of one without answer."""
    import ray

    asked = {name: handle.attach.remote(term) for name, handle in handles.items()}
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_S)
    answers: dict[str, Handed] = {}
    for name, answer in asked.items():
        try:
            handed = ray.get(answer, timeout=0)
            if handed is not None:  # one that only waits for a place is no member
                answers[name] = handed
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            answers[name] = (None, ())
    return answers


def main() -> int:
    """Find the controller of a run and let it rebuild its journal; prints one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run_id")
    parser.add_argument("--address", required=True)
    parser.add_argument("--node-ip", required=True)
    parser.add_argument("--force", action="store_true")
    options = parser.parse_args()

    import ray

    ray.init(
        address=options.address,
        namespace=NAMESPACE,
        logging_level=logging.ERROR,
        log_to_driver=False,
        configure_logging=False,
        _node_ip_address=options.node_ip,
    )
    began_s = time.monotonic()
    while True:
        try:
            controller: Any = ray.get_actor(controller_name(options.run_id), namespace=NAMESPACE)
        except ValueError:
            if time.monotonic() - began_s > FIND_S:
                return _say({"error": "no controller of such a run is in the tables of this cluster"})
            time.sleep(PAUSE_S)
            continue
        try:
            if not hasattr(controller, "recover"):
                return _say({"error": "it is a pipeline, and only islands keep copies of the journal"})
            rows: int = ray.get(controller.recover.remote(options.force), timeout=RECOVER_S)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            if time.monotonic() - began_s > START_S:
                return _say({"error": f"its controller does not answer: {_first_line(error)}"})
            time.sleep(PAUSE_S)
        except ray.exceptions.RayTaskError as error:
            return _say({"error": _first_line(error.cause or error)})
        else:
            return _say({"rows": rows})


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _say(values: Mapping[str, object]) -> int:
    print(json.dumps(values), flush=True)
    return 1 if "error" in values else 0


if __name__ == "__main__":
    sys.exit(main())
