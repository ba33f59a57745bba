"""What the controller's actor keeps for people: the run's directory, its islands' logs and stacks, notifications."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.actor_tools import through_cuts
from orchestrator.controls import Controls
from orchestrator.errors import UserError
from orchestrator.log_shipping import EVERY_S, LogCopy
from orchestrator.notify import notifying
from orchestrator.rollback import set_aside_later, store_of
from orchestrator.rundir import RunDirInUse
from workers.data.placing import pack_files
from workers.saved import SnapshotError
from workers.stack import add_stack, dump_stack

log = logging.getLogger("atoll.controller")


class Keeper(Controls):
    """Mixed into the controller's actor, whose processes it looks after."""

    handles: dict[str, ActorHandle[Any]]
    nonce_of: dict[str, str]
    place_of: dict[str, str]
    log_of: dict[str, Path]  # nonce -> log, of the processes that this life started
    pids: dict[str, tuple[int, str]]  # nonce -> process id and node
    pack: Path | None
    own: ExitStack

    def _task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something beside the rest."""
        raise NotImplementedError

    async def _look_after(self, name: str, nonce: str, handle: ActorHandle[Any], node: str) -> None:
        """A process has begun: its id is kept, for when it hangs, and its log is copied where that is needed."""
        self.pids[nonce] = await through_cuts(handle.pid.remote, node, name), node
        if nonce in self.log_of:
            self._task(self._collect_log(nonce, handle))

    def _own_directory(self) -> None:
        """From now on the directory says that the run goes on, whatever becomes of who started it."""
        try:
            self.own.enter_context(self.host.run_dir.lock(self.host.run_dir.controller_lock))
        except RunDirInUse as error:  # the life before is not quite gone; the journal's segments decide who writes
            log.warning("%s", error)
        if self.config.run.snapshots is not None:
            self.host.rolled_back = self._clear_store
        num_islands = len(self.host.plan.islands) if not self.config.run.elastic else 0
        self.own.enter_context(notifying(self.host, self.config.notify, run_id=self.run_id, num_islands=num_islands))

    def _clear_store(self, versions: Sequence[int]) -> None:
        self._task(self._set_aside(versions))

    async def _set_aside(self, versions: Sequence[int]) -> None:
        """Snapshots away from here that a rollback has overtaken: beside the loop, which members wait for."""
        store = store_of(self.config.run.snapshots, self.host.plan.run_id)
        in_thread = asyncio.get_running_loop().run_in_executor
        try:
            await in_thread(None, set_aside_later, self.host.run_dir.snapshots, versions, store)
        except SnapshotError as error:
            log.warning("newer snapshots stay beside those of the run as it is now: %s", error)

    async def _collect_log(self, nonce: str, handle: ActorHandle[Any]) -> None:
        """Where an island's machine does not share the run's directory, its log is copied here as it grows."""
        copy = LogCopy(path=self.log_of.pop(nonce), read=handle.read_log.remote)
        probe = copy.path.with_name(f".probe-{nonce}")
        with suppress(RayActorError, RayTaskError):
            await handle.has_log_at.remote(str(probe))
            if probe.exists():
                probe.unlink()
                return
            log.info("the logs of %s are copied from its machine", copy.path.stem)
            while nonce in self.handles:
                await copy.grow()
                await asyncio.sleep(EVERY_S)

    async def pack_files(self) -> dict[str, bytes]:
        """The index of the run's pack, and its tokenizer: for a machine that has no copy of it."""
        if self.pack is None:
            return {}
        return await asyncio.get_running_loop().run_in_executor(None, pack_files, self.pack)

    async def stack(self, member: str) -> dict[str, Any]:
        """What every thread of an island does at this moment; kept in the run's logs. Also of one that hangs."""
        await self._ready()
        name = member.partition(".")[0]
        nonce = self.nonce_of.get(name)
        if nonce is None or nonce not in self.pids:
            known = ", ".join(sorted(self.nonce_of)) or "none"
            raise UserError(f"no process of {member!r} runs", remedy=f"one of these: {known}")
        pid, node = self.pids[nonce]
        where = NodeAffinitySchedulingStrategy(node, soft=False)
        dump = ray.remote(dump_stack).options(num_cpus=0, max_retries=0, scheduling_strategy=where)
        text = str(await dump.remote(pid))
        current = self.host.coordinator.state.current.get(name)
        file = add_stack(self.run_dir / "logs", str(current) if current is not None else name, text)
        return {"run": self.run_id, "member": str(current or name), "text": text, "file": str(file)}
