"""A run read from its controller, wherever that is: no shared disk, and next to no work for the controller."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from orchestrator.dashboard.book import About, RunBook
from orchestrator.dashboard.feed import FeedPart
from orchestrator.errors import ClusterUnreachable, UserError

if TYPE_CHECKING:
    from ray.actor import ActorHandle

ANSWER_S = 10.0
ACT_S = 20.0


class RaySource:
    """Asks the controller of `run_id` for what is new. Ray is connected already."""

    def __init__(self, run_id: str, *, chaos: bool = False) -> None:
        """`chaos`: members may be killed from the dashboard."""
        self.run_id, self.chaos = run_id, chaos
        self.book = RunBook()
        self.book.about = About(run_id=run_id)
        self._metrics_at = 0
        self._able: tuple[str, ...] = ()
        self._controller: ActorHandle[Any] | None = None
        self._heard_s = time.monotonic()

    def able(self) -> tuple[str, ...]:
        """What the controller knows; killing only where it was allowed."""
        going_on = self.book.about.state == "running"
        return tuple(name for name in self._able if self.chaos or name != "kill") if going_on else ()

    def refresh(self) -> bool:
        """See `Source`. A controller that does not answer is asked again with the next call."""
        part = self._ask()
        if part is None:
            return False
        self._able = part.able
        self.book.about.config = part.config
        self.book.about.state = part.ended or "running"
        self.book.view = part.view
        self.book.add_records(part.rows)
        self.book.add_metrics(part.metrics)
        self._metrics_at += len(part.metrics)
        return part.is_full

    def _ask(self) -> FeedPart | None:
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        try:
            question: Any = self._handle().feed.remote(self._metrics_at, self.book.num_rows)
            part: FeedPart = ray.get(question, timeout=ANSWER_S)
        except (RayActorError, GetTimeoutError, ValueError) as error:
            self._controller = None
            if self.book.about.state == "running":
                self.book.about.state = "no answer"
                self.book.problem = f"the controller does not answer: {type(error).__name__}"
                self.book.view = None
                self.book.version += 1
            return None
        if self.book.about.state == "no answer":
            self.book.problem = ""
        return part

    def _handle(self) -> ActorHandle[Any]:
        import ray

        from orchestrator.processes import NAMESPACE, controller_name

        if self._controller is None:
            self._controller = ray.get_actor(controller_name(self.run_id), namespace=NAMESPACE)
        return self._controller

    def act(self, action: str, member: str, by: str) -> str:
        """See `Source`."""
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

        if action not in self.able():
            return f"refused: {action} is not available in this run"
        try:
            question: Any = self._handle().act.remote(action, member, by)
            outcome: str = ray.get(question, timeout=ACT_S)
        except (RayActorError, GetTimeoutError, ValueError) as error:
            return f"not done: the controller does not answer ({type(error).__name__})"
        except RayTaskError as error:
            return f"not done: {error.cause}"
        return outcome


def connect(address: str, run: str | None) -> str:
    """Join the cluster at `address` ("auto": the one that this machine is part of); returns the id of the run.

    `run`: which one, where several go on. Raises ClusterUnreachable, or UserError where that run is not there.
    """
    import os

    from orchestrator.launch import RAY_ENVIRONMENT, enter_cluster

    os.environ.update(RAY_ENVIRONMENT)
    known = enter_cluster(address)
    import ray

    from orchestrator.processes import NAMESPACE

    options: dict[str, Any] = {"namespace": NAMESPACE, "logging_level": "ERROR", "log_to_driver": False}
    if known is not None:
        options |= {"address": known.gcs_address, "_node_ip_address": known.node_ip}
    else:
        options["address"] = address
    try:
        ray.init(configure_logging=False, **options)
    except ConnectionError as error:
        raise ClusterUnreachable(
            f"no Ray cluster answers at {address!r}: {error}", place="--address", remedy="atoll up"
        ) from error
    return pick_run(runs_here(), run)


def runs_here() -> list[str]:
    """Ids of the runs whose controllers are in this cluster."""
    import ray

    from orchestrator.processes import CONTROLLER_PREFIX, NAMESPACE

    actors = ray.util.list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE]
    return sorted(name.removeprefix(CONTROLLER_PREFIX) for name in names if name.startswith(CONTROLLER_PREFIX))


def pick_run(found: list[str], wanted: str | None) -> str:
    """The run that is meant, or UserError."""
    if wanted is None and len(found) == 1:
        return found[0]
    if wanted in found:
        return wanted
    there = f"there are {', '.join(found)}" if found else "no run goes on there"
    raise UserError(
        f"run {wanted!r} is not in this cluster: {there}" if wanted else f"which run? {there}",
        place="--run",
        remedy="--run NAME" if found else "atoll dashboard RUN_DIR shows a run from its files",
    )
