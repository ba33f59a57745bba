"""What the controllers of islands and of pipelines keep and answer alike: logs, stacks, notifications, a pause."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.alarms import NotifyConfig
from orchestrator.errors import UserError
from orchestrator.events import PauseRequested
from orchestrator.log_files import MAX_LOG_BYTES, tail_of
from orchestrator.log_shipping import EVERY_S, LogCopy
from orchestrator.notify import Notifier
from workers.data.placing import pack_files
from workers.stack import add_stack, dump_stack

log = logging.getLogger("atoll.controller")


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """One process of a run: `label` names its incarnation as logs do, `pid` is of the machine `node`."""

    label: str
    pid: int
    node: str


class Caretaker:
    """Mixed into a controller's actor, whose processes it looks after."""

    run_dir: Path
    run_id: str
    pack: Path | None
    log_of: dict[str, Path]  # nonce -> log; of islands those that this life started
    own: ExitStack

    def _task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something beside the rest."""
        raise NotImplementedError

    async def begin(self) -> None:
        """See `ControllerActor.begin`."""
        raise NotImplementedError

    async def _ready(self) -> None:
        """Begin; raise UserError where the run cannot be asked for anything."""
        raise NotImplementedError

    def _do(self, event: Any) -> None:
        """Hand an event to the brain, which knows its kind; whatever goes wrong with it ends this process."""
        raise NotImplementedError

    def _said(self) -> dict[str, Any]:
        """What every answer has: fields of `orchestrator.answers.Asked`."""
        raise NotImplementedError

    def _running(self, member: str) -> Running | None:
        """A member's process, if it has begun; `member` may name an incarnation."""
        raise NotImplementedError

    def _names(self) -> Sequence[str]:
        """Members that have a process."""
        raise NotImplementedError

    def _is_there(self, nonce: str) -> bool:
        """Whether a process has not ended."""
        raise NotImplementedError

    # ------------------------------------------------------------ what people ask

    async def pause(self) -> dict[str, Any]:
        """No samples are trained on any more, until `resume`; what is under way is finished."""
        await self._ready()
        self._do(PauseRequested(paused=True, why="asked to"))
        return self._said()

    async def resume(self) -> dict[str, Any]:
        """Training goes on after `pause`."""
        await self._ready()
        self._do(PauseRequested(paused=False, why="asked to"))
        return self._said()

    async def logs(self, member: str | None = None, max_bytes: int = MAX_LOG_BYTES) -> dict[str, Any]:
        """The end of a log: of the newest incarnation of `member` (or of `island-1.2`), None: of the controller."""
        await self.begin()
        return await asyncio.get_running_loop().run_in_executor(None, tail_of, self.run_dir, member, max_bytes)

    async def stack(self, member: str) -> dict[str, Any]:
        """What every thread of a member does at this moment; kept in the run's logs. Also of one that hangs."""
        await self._ready()
        found = self._running(member)
        if found is None:
            known = ", ".join(sorted(self._names())) or "none"
            raise UserError(f"no process of {member!r} runs", remedy=f"one of these: {known}")
        where = NodeAffinitySchedulingStrategy(found.node, soft=False)
        dump = ray.remote(dump_stack).options(num_cpus=0, max_retries=0, scheduling_strategy=where)
        text = str(await dump.remote(found.pid))
        file = add_stack(self.run_dir / "logs", found.label, text)
        return {"run": self.run_id, "member": found.label, "text": text, "file": str(file)}

    async def pack_files(self) -> dict[str, bytes]:
        """The index of the run's pack, and its tokenizer: for a machine that has no copy of it."""
        if self.pack is None:
            return {}
        return await asyncio.get_running_loop().run_in_executor(None, pack_files, self.pack)

    # ------------------------------------------------------------ what it keeps

    async def _collect_log(self, nonce: str, handle: ActorHandle[Any]) -> None:
        """Where a process's machine does not share the run's directory, its log is copied here as it grows."""
        copy = LogCopy(path=self.log_of.pop(nonce), read=handle.read_log.remote)
        probe = copy.path.with_name(f".probe-{nonce}")
        with suppress(RayActorError, RayTaskError):
            await handle.has_log_at.remote(str(probe))
            if probe.exists():
                probe.unlink()
                return
            log.info("the logs of %s are copied from its machine", copy.path.stem)
            while self._is_there(nonce):
                await copy.grow()
                await asyncio.sleep(EVERY_S)

    def _notifier(self, config: NotifyConfig) -> Notifier:
        """What runs `notify.command`, until the run's directory is given up."""
        notifier = Notifier(config, {"run": self.run_id, "run_dir": str(self.run_dir)})
        notifier.start()
        self.own.callback(notifier.close, config.timeout_s)
        return notifier
