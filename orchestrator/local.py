"""A run in one process: the production coordinator, machines, strategies and loop over the loopback transport.

Cooperative and deterministic: islands take turns on one thread, one inner step each, and time is what the turns say it
is. For tests, for `make bench-quality`, and as the reference that a run on Ray must equal bit for bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from orchestrator.build import island_spec, num_islands, pack_path, resolve, run_plan
from orchestrator.config import RunConfig
from orchestrator.events import Finish, ProcessDied, StopRequested
from orchestrator.host import Handed, Host
from orchestrator.lost_journal import set_aside_damaged
from orchestrator.segments import segment_paths
from workers.context import IslandContext
from workers.jobs import MemberStore
from workers.loops import BuiltinLoop
from workers.messages import Batch, Envelope
from workers.records import Term
from workers.transport.loopback import LoopbackNetwork, LoopbackTransport

TURN_S = 0.01
LOOK_S = 1e-6
TICK_EVERY = 50


@dataclass(kw_only=True)
class LocalIsland:
    """One island of a local run."""

    loop: BuiltinLoop
    context: IslandContext
    transport: LoopbackTransport
    inbox: deque[Batch] = field(default_factory=deque)
    alive: bool = True
    busy_until_s: float = 0.0


class LocalRun:
    """Islands and a controller in one process."""

    def __init__(self, config: RunConfig, run_dir: Path, *, resume: bool = False) -> None:
        """Nothing starts before `start`."""
        self.config = resolve(config)
        self.run_dir, self.resume = run_dir, resume
        self.now = 0.0
        self.turns = 0
        self.idle = False
        # Where steps take time, a turn in which islands only applied a commit is no reason to let half a second pass.
        train = self.config.train
        paced = any(own.pace_s for own in train.per_island.values())
        self.paced = paced or train.pace_s > 0 or self.config.run.load == "by_speed"
        self.run_id = run_dir.name
        self.pack = pack_path(self.config)
        self.network = LoopbackNetwork()
        self.islands: dict[str, LocalIsland] = {}
        self.generation = 0
        self.posted: deque[Envelope] = deque()
        self.to_spawn: list[str] = []
        self.controllers = 1
        self.host = self._new_host()

    def _new_host(self) -> Host:
        return Host(
            plan=run_plan(self.config, run_id=self.run_id, pack=self.pack),
            run_dir=self.run_dir,
            controller=f"local-{self.run_id}-{self.controllers}",
            clock=self._clock,
            deliver=self._deliver,
            spawn=lambda name, why: self.to_spawn.append(name),
            end=lambda name, nonce, save_stack: None,
        )

    def start(self) -> None:
        """Open the journal, build the islands, let them join."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.host.open()
        for name in self.host.plan.islands:
            self.spawn(name)

    def spawn(self, name: str) -> LocalIsland:
        """A new process of an island: everything it holds is fresh."""
        self.generation += 1
        index = self.host.plan.islands.index(name)
        spec = island_spec(
            self.config, index, run_id=self.run_id, run_dir=self.run_dir, pack=self.pack, resume=self.resume
        )
        if self.config.run.load == "by_speed":  # a step takes a turn: what it takes of the real clock is nobody's here
            spec = replace(spec, pace_s=max(spec.pace_s, TURN_S))
        store = MemberStore()
        transport = LoopbackTransport(self.network, f"{name}-{self.generation}", store)
        transport.start()
        context = IslandContext(
            spec=spec,
            nonce=f"{name}-{self.generation}-{self.host.coordinator.term}",
            node=name,
            store=store,
            transport=transport,
            post=self.posted.append,
            clock=self._clock,
            num_sharing=num_islands(self.config),
            sleep=lambda seconds: self._rest(name, seconds),
        )
        island = LocalIsland(loop=BuiltinLoop(context), context=context, transport=transport)
        self.islands[name] = island
        island.loop.island.__enter__()
        self.settle()
        return island

    def kill(self, name: str) -> None:
        """The process of an island is gone at once, with everything it held."""
        island = self.islands.pop(name)
        island.alive = False
        island.transport.stop()
        assert island.loop.island.sync is not None
        nonce = island.loop.island.sync.machine.nonce
        self.host.handle(ProcessDied(name=name, nonce=nonce, why="killed"))

    def restart_controller(self, *, lost_journal: bool = False, damaged: bool = False) -> None:
        """The controller dies at once and a new one takes over; with `lost_journal` its disk is gone as well.

        `damaged`: what is on the disk cannot be read, and is set aside.
        """
        self.host.metrics.close()
        self.host.journal.close(merge=False)
        self.posted.clear()
        self.controllers += 1
        self.host = self._new_host()
        if damaged:
            set_aside_damaged(self.run_dir)
        elif lost_journal:
            for segment in segment_paths(self.run_dir):
                segment.unlink()
        if damaged or lost_journal:
            self.host.recover(self._ask_copies)
        else:
            self.host.open()

    def _ask_copies(self, term: Term) -> dict[str, Handed]:
        syncs = {name: island.loop.island.sync for name, island in self.islands.items()}
        return {name: sync.attach(term) for name, sync in syncs.items() if sync is not None}

    def _clock(self) -> float:
        """Virtual time: every look at it takes a microsecond, so that nothing takes no time."""
        self.now += LOOK_S
        return self.now

    def _rest(self, name: str, seconds: float) -> None:
        """An island's step takes that much longer: it has no turn until then, and the others go on."""
        self.islands[name].busy_until_s = self.now + seconds

    def _deliver(self, batch: Batch) -> None:
        island = self.islands.get(batch.name)
        if island is not None:
            sync = island.loop.island.sync
            if sync is not None and sync.machine.nonce == batch.nonce:
                sync.deliver(batch)

    def settle(self) -> None:
        """Deliver messages and carry out commands until nothing is left to do."""
        busy = True
        while busy:
            busy = False
            while self.posted:
                busy = True
                self.host.receive(self.posted.popleft())
            for island in list(self.islands.values()):
                if island.loop.island.sync is not None:
                    busy = island.loop.island.sync.pump() or busy

    def turn(self) -> int:
        """Every island takes one step if it can; returns how many did."""
        self.now += TURN_S
        self.turns += 1
        for name in self.to_spawn:
            self.spawn(name)
        self.to_spawn.clear()
        steps = 0
        for island in list(self.islands.values()):
            if island.busy_until_s > self.now:  # paced: its step takes longer
                steps += 1
                continue
            steps += island.loop.advance(blocking=False)
            self.settle()
        if self.turns % TICK_EVERY == 0 or steps == 0:
            idle = steps == 0 and (self.idle or not self.paced)
            if idle:
                self.now += TURN_S * TICK_EVERY
            for island in list(self.islands.values()):
                if island.loop.island.sync is not None:
                    island.loop.island.sync.tick()
            self.settle()
            self.host.tick()
            self.settle()
        self.idle = steps == 0
        return steps

    def run(self, *, max_turns: int = 10_000_000, until: Callable[[], bool] | None = None) -> Finish | None:
        """Turn until the run is over, `until` says so, or `max_turns`; returns how it ended."""
        torch.set_num_threads(self.config.train.threads)
        for _ in range(max_turns):
            if self.host.finished is not None or (until is not None and until()):
                break
            self.turn()
        return self.host.finished

    def stop(self, *, save: bool = True) -> None:
        """Ask for a resumable stop and let the islands save their state; without `save`, stop at once."""
        self.host.handle(StopRequested(save=save))
        for _ in range(1000):
            self.turn()
            if self.host.finished is not None and all(i.loop.island.finished for i in self.islands.values()):
                return

    def close(self) -> None:
        """End everything."""
        for island in self.islands.values():
            island.loop.island.__exit__(None, None, None)
            island.transport.stop()
        self.host.close()
