"""A dashboard as an actor in the cluster: it outlives whoever started it, and ends after its run."""

from __future__ import annotations

import asyncio

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.dashboard.ray_source import RaySource, runs_here
from orchestrator.dashboard.server import Dashboard
from orchestrator.processes import NAMESPACE

PREFIX = "dashboard/"
LOOK_S = 30.0
START_S = 60.0


@ray.remote(num_cpus=0, max_restarts=0)
class DashboardActor:
    """Serves one run from its controller."""

    def __init__(self, run_id: str, host: str, port: int, chaos: bool) -> None:
        """Nothing is opened before `start`."""
        self.run_id = run_id
        self.dashboard = Dashboard(RaySource(run_id, chaos=chaos), host=host, port=port)
        self.link = ""

    async def start(self) -> str:
        """Open the port; returns the link with the token. A second call returns the same."""
        if not self.link:
            self.link = await self.dashboard.start()
            self.watch = asyncio.get_running_loop().create_task(self._until_over())
        return self.link

    async def _until_over(self) -> None:
        """The controller stays some minutes after the end of its run; then nobody has anything to show."""
        while self.run_id in await asyncio.to_thread(runs_here):
            await asyncio.sleep(LOOK_S)
        await self.dashboard.stop()
        ray.kill(ray.get_runtime_context().current_actor)


def start_in_cluster(run_id: str, *, host: str, port: int, chaos: bool) -> str:
    """Start the dashboard of a run on this node, or find the one that is there; returns the link."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = DashboardActor.options(
        name=f"{PREFIX}{run_id}",
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        scheduling_strategy=here,
    ).remote(run_id, host, port, chaos)
    link: str = ray.get(actor.start.remote(), timeout=START_S)
    return link
