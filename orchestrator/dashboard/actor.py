"""A dashboard as an actor beside the controller: for a run whose Ray nobody else can enter."""

from __future__ import annotations

import ray

from orchestrator.dashboard.ray_source import RaySource
from orchestrator.dashboard.server import Dashboard
from orchestrator.processes import NAMESPACE

DASHBOARD_PREFIX = "dashboard/"


@ray.remote(num_cpus=0, max_restarts=0)
class DashboardActor:
    """Serves one run from its controller."""

    def __init__(self, run_id: str, host: str, port: int, chaos: bool) -> None:
        """Nothing is opened before `start`."""
        self.dashboard = Dashboard(RaySource(run_id, chaos=chaos), host=host, port=port)
        self.link = ""

    async def start(self) -> str:
        """Open the port; returns the link with the token. A second call returns the same."""
        self.link = self.link or await self.dashboard.start()
        return self.link


def start_beside(run_id: str, *, host: str, port: int, chaos: bool) -> str:
    """Start the dashboard of a run as an actor, which ends with its creator; returns the link."""
    actor = DashboardActor.options(name=f"{DASHBOARD_PREFIX}{run_id}", namespace=NAMESPACE).remote(
        run_id, host, port, chaos
    )
    link: str = ray.get(actor.start.remote(), timeout=60)
    _KEPT.append(actor)
    return link


_KEPT: list[object] = []  # an actor lives as long as its handle
