"""A run of a cluster that this process is connected to by Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orchestrator.dashboard.controller_source import ControllerSource, NoAnswer, pick_run
from orchestrator.dashboard.feed import FeedPart
from orchestrator.errors import ClusterUnreachable

if TYPE_CHECKING:
    from ray.actor import ActorHandle

ANSWER_S = 10.0
ACT_S = 20.0


class RaySource(ControllerSource):
    """Asks over the Ray that this process is connected to."""

    _controller: ActorHandle[Any] | None = None

    def _feed(self, metrics_at: int, journal_at: int) -> FeedPart:
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        try:
            question: Any = self._handle().feed.remote(metrics_at, journal_at)
            part: FeedPart = ray.get(question, timeout=ANSWER_S)
        except (RayActorError, GetTimeoutError, ValueError) as error:
            self._controller = None
            raise NoAnswer(type(error).__name__) from error
        return part

    def _handle(self) -> ActorHandle[Any]:
        import ray

        from orchestrator.processes import NAMESPACE, controller_name

        if self._controller is None:
            self._controller = ray.get_actor(controller_name(self.run_id), namespace=NAMESPACE)
        return self._controller

    def _carry_out(self, action: str, member: str, by: str) -> str:
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

        try:
            question: Any = self._handle().act.remote(action, member, by)
            outcome: str = ray.get(question, timeout=ACT_S)
        except (RayActorError, GetTimeoutError, ValueError) as error:
            raise NoAnswer(type(error).__name__) from error
        except RayTaskError as error:
            return f"not done: {error.cause}"
        return outcome


def connect(address: str, run: str | None) -> str:
    """Join the cluster at `address` ("auto": the one that this machine is part of); returns the id of the run.

    `run`: which one, where several go on. Raises ClusterUnreachable, or UserError where that run is not there.
    """

    from orchestrator.launch import enter_cluster, set_ray_environment

    set_ray_environment(address)
    known = enter_cluster(address, asked="--address")
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
