"""The simulated cluster: processes, controllers, links between them, and what a supervisor (Ray) does about deaths."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

from faults.virtual import VirtualDisk, VirtualNetwork, VirtualTime
from orchestrator import events as ev
from orchestrator.simulation.checks import Checks
from orchestrator.simulation.controller import Controller
from orchestrator.simulation.island import Island
from orchestrator.simulation.requests import Fetch, FetchFailed, Job
from orchestrator.simulation.scenario import Scenario
from orchestrator.simulation.shared_log import OneJournal
from orchestrator.simulation.standbys import Standbys, States
from orchestrator.simulation.symbols import Names, Snapshots, must
from workers.messages import Batch, Envelope
from workers.record_log import RecordLog
from workers.records import CommitRecord, MemberId, Row

HEAD = "head"


class Cluster:
    """Everything there is in one simulated run."""

    def __init__(self, scenario: Scenario, *, trace: list[str] | None = None) -> None:
        """`trace`: where to note what happens, one line each; None notes nothing."""
        self.scenario, self.trace = scenario, trace
        self.rng = random.Random(scenario.seed * 2 + 1)
        self.time = VirtualTime()
        self.network = VirtualNetwork(self.time, self.rng, scenario.link)
        self.disk: VirtualDisk[Row] = VirtualDisk()
        self.names = Names()
        self.one_journal = OneJournal()
        self.snapshots = Snapshots()
        self.counts: Counter[str] = Counter()
        self.checks = Checks(self)
        self.standbys = Standbys(self, scenario.standby)
        self.islands: dict[str, list[Island]] = {name: [] for name in scenario.plan.islands}
        self.by_address: dict[str, Island] = {}
        self.controllers: list[Controller] = []
        self.num_controllers = 0
        self.num_spawned = 0
        self.leaving: set[str] = set()
        self.distorted: set[str] = set()  # digests of results that were reduced wrongly on purpose
        self.liars: set[MemberId] = set()
        self.finished = self.gave_up = False
        self.faulty = scenario.rates is not None
        self.steps = 0
        self.exchange_rows: list[dict[str, Any]] = []
        self._samples_in: dict[tuple[int, str], int] = {}

    def start(self) -> None:
        """One controller, all islands."""
        self.start_controller()
        self.standbys.start()
        for name in self.islands:
            self.time.after(0.1 * self.rng.random(), self.spawn, name)

    def note(self, text: str) -> None:
        """A line for the trace."""
        if self.trace is not None:
            self.trace.append(f"{self.time.now:9.4f} {text}")

    # ------------------------------------------------------------ processes

    def spawn(self, name: str, standby: tuple[RecordLog, States] | None = None) -> Island:
        """A new process of a member; `standby`: what it has at hand if it has waited."""
        self.num_spawned += 1
        index = self.scenario.plan.islands.index(name)
        island = Island(self, name=name, nonce=f"{name}#{self.num_spawned}", index=index)
        self.islands[name].append(island)
        self.by_address[island.address] = island
        self.note(f"{island.first_nonce} starts on {island.node}")
        if standby is not None and standby[1]:
            self.counts["places taken by a standby with a state"] += 1
            island.begin_with(*standby)
        island.start()
        return island

    def processes(self) -> Iterator[Island]:
        """All living processes."""
        for islands in self.islands.values():
            for island in islands:
                if island.alive:
                    yield island

    def spawn_soon(self, name: str, why: str) -> None:
        """The controller asks for a new process; the supervisor starts it, and sometimes ends the old one first."""
        self.note(f"spawn {name}: {why}")
        self.counts["spawns"] += 1
        delay = self.scenario.spawn_s * (0.5 + self.rng.random()) * (0.1 if self.standbys.waits() else 1.0)
        self.time.after(delay, self._spawn_now, name, self.rng.random() < 0.5)

    def _spawn_now(self, name: str, end_old: bool) -> None:
        if end_old:
            for island in self.islands[name]:
                if island.alive and self.may_kill(island):
                    self.kill(island)
        self.spawn(name, self.standbys.take())

    def end_process(self, name: str, nonce: str, why: str) -> None:
        """The controller asks that a process be ended."""
        for island in self.islands[name]:
            if island.alive and nonce.split("+")[0] == island.first_nonce:
                self.note(f"end {nonce}: {why}")
                island.doomed = True
                self.time.after(self.rng.random(), self._end_now, island)

    def _end_now(self, island: Island) -> None:
        if island.alive:
            self.kill(island)

    def leave(self, name: str, away_s: float) -> None:
        """Somebody asks a member to leave, again and again until it has gone; a while later it is started again."""
        self.leaving.add(name)
        for island in self.islands[name]:
            island.doomed = True
        self._ask_to_leave(name, away_s)

    def _ask_to_leave(self, name: str, away_s: float) -> None:
        if not any(island.alive for island in self.islands[name]):
            self.leaving.discard(name)
            self.counts["left"] += 1
            self.time.after(away_s, self._come_back, name)
            return
        for controller in self.controllers:
            self.time.after(0.01, controller.handle, ev.LeaveRequested(name=name, why="asked to"))
        self.time.after(0.5, self._ask_to_leave, name, away_s)

    def _come_back(self, name: str) -> None:
        if not any(island.alive for island in self.islands[name]):
            self.spawn(name)

    def stopped(self, island: Island) -> None:
        """A process obeys `Stop`: it ends by itself."""
        self.note(f"{island.first_nonce} stops")
        self.kill(island)

    def kill(self, island: Island) -> None:
        """A process is dead from now on."""
        if not island.alive:
            return
        island.alive = False
        self.islands[island.name].remove(island)
        for waiting, job, request, _ in island.parked:
            self._fail(waiting, job, request, "its process died")
        island.parked.clear()

    def may_kill(self, island: Island) -> bool:
        """Whether the run survives its death without a snapshot: another living process holds a committed version."""
        if not any(part.n >= 0 for part in island.replica.parts):
            return True
        return self.survives([other for other in self.processes() if other is not island])

    def survives(self, islands: list[Island]) -> bool:
        """Whether these processes hold, of every fragment, an intact version of the path that is not being revoked."""
        others = [island for island in islands if not island.doomed]
        for fragment in range(len(self.scenario.num_chunks)):
            sealed = self.checks.book.digests[fragment] if self.checks.book.digests else {}
            path = self.checks.path(fragment)
            doubted = self.checks.doubted(fragment)
            if not any(
                part.n >= 0
                and part.chain in path
                and part.chain not in doubted
                and o.replica.digest(fragment) == sealed[part.chain]
                for o in others
                for part in (o.replica.parts[fragment],)
            ):
                return False
        return True

    # ------------------------------------------------------------ controllers

    def start_controller(self) -> None:
        """A new controller life."""
        self.num_controllers += 1
        self.controllers.append(Controller(self, number=self.num_controllers))

    def lost(self, controller: Controller, why: str) -> None:
        """A controller ended; the supervisor starts another one unless there is one."""
        self.note(f"{controller.name} ends: {why}")
        controller.alive = False
        if controller in self.controllers:
            self.controllers.remove(controller)
        if not self.controllers:
            self.time.after(0.1 + self.scenario.restart_s * self.rng.random(), self._restart_controller)

    def crash_head(self) -> None:
        """The machine of the journal goes down: all controllers end, and what was not synced may be lost."""
        self.disk.crash(self.rng)
        for controller in list(self.controllers):
            self.lost(controller, "its machine went down")

    def _restart_controller(self) -> None:
        if not self.controllers and not self.finished:
            self.start_controller()

    def owns_journal(self, controller: Controller) -> bool:
        """The journal's fence: whether no newer segment exists."""
        return self.disk.newest() == controller.segment.number

    def began(self, controller: Controller) -> None:
        """A controller life began: its shell finds the processes of the live members, and starts those it lacks."""
        assert controller.coordinator is not None
        if self.num_controllers == 1:
            return
        state = controller.coordinator.state
        for name, islands in self.islands.items():
            member = state.current.get(name)
            nonce = state.members[member].nonce.split("+")[0] if member is not None else ""
            if not any(island.alive and island.first_nonce == nonce for island in islands):
                self.spawn_soon(name, "not there")

    def report_death(self, name: str, nonce: str | None) -> None:
        """Ray tells the controllers that a process is gone (true or not)."""
        for target in self.controllers:
            event = ev.ProcessDied(name=name, nonce=nonce, why="the actor died")
            self.time.after(0.05 + 0.3 * self.rng.random(), target.handle, event)

    def finish(self, controller: Controller, reason: str, detail: str) -> None:
        """The run is over."""
        self.note(f"{controller.name} finishes: {reason} {detail}")
        gave_up = reason == "failed" and "before its first step" in detail and self.counts["faults"] > 0
        must(reason == "done" or gave_up, 0, f"the run ended as {reason}: {detail}")
        self.finished = True
        if gave_up:
            self.give_up(detail)

    def give_up(self, why: str) -> None:
        """What happened is beyond what the protocol promises without snapshots: the run ends here, soundly."""
        self.note(f"given up: {why}")
        self.counts["given up"] += 1
        self.finished = self.gave_up = True

    # ------------------------------------------------------------ messages

    def post(self, island: Island, envelope: Envelope) -> None:
        """A member's envelope goes to whoever it takes for the controller: with two alive, to either or both."""
        targets = self.controllers
        if len(targets) > 1:
            targets = [c for c in targets if self.rng.random() < 0.7]
        for controller in targets:
            self.network.send(island.name, HEAD, controller.receive, envelope)

    def send(self, controller: Controller, batch: Batch) -> None:
        """A controller's batch goes to the process with its nonce."""
        base = batch.nonce.split("+")[0]
        for island in self.islands[batch.name]:
            if island.first_nonce == base:
                self.network.send(HEAD, island.name, island.deliver, batch)

    # ------------------------------------------------------------ transport

    def fetch(self, island: Island, job: Job, request: Fetch) -> None:
        """A process asks another one for blobs."""
        self.time.after(self.network.delay_s(), self._at_server, island, job, request)

    def _at_server(self, island: Island, job: Job, request: Fetch) -> None:
        server = self.by_address[request.address]
        timeout = self.scenario.timeout_s
        if not server.alive:
            self._fail(island, job, request, "nobody listens there")
        elif not self.network.linked(island.name, server.name):
            self.time.after(timeout, self._fail, island, job, request, "no answer")
        elif server.frozen:
            self.time.after(timeout, self._fail, island, job, request, "no answer in time")
        else:
            answer = request.look(server)
            if answer is not None:
                self._answer(island, job, answer)
            elif request.wait_s:
                entry = (island, job, request, self.time.now + request.wait_s)
                server.parked.append(entry)
                self.time.after(request.wait_s, self._give_up, server, entry)
            else:
                self._fail(island, job, request, "it has no such blob")

    def look_again(self, server: Island) -> None:
        """Something was published: serve whoever waits for it."""
        for entry in list(server.parked):
            answer = entry[2].look(server)
            if answer is not None:
                server.parked.remove(entry)
                if self.network.linked(entry[0].name, server.name):
                    self._answer(entry[0], entry[1], answer)
                else:
                    self._fail(entry[0], entry[1], entry[2], "the link broke")

    def _give_up(self, server: Island, entry: tuple[Island, Job, Fetch, float]) -> None:
        if entry in server.parked:
            server.parked.remove(entry)
            self._fail(entry[0], entry[1], entry[2], "it has no such blob in time")

    def _answer(self, island: Island, job: Job, answer: Any) -> None:
        self.time.after(self.network.delay_s(), island.run, island.resume, job, answer)

    def _fail(self, island: Island, job: Job, request: Fetch, why: str) -> None:
        self.counts["fetches failed"] += 1
        error = FetchFailed(f"{request.address}: {why}")
        self.time.after(self.network.delay_s(), island.run, island.resume, job, error)

    # ------------------------------------------------------------ notes

    def samples_in(self, record: CommitRecord) -> int:
        """Samples that a commit counts: every member asks."""
        key = (record.fragment, record.chain)
        if key not in self._samples_in:
            self._samples_in[key] = sum(entry.upto - entry.since for entry in record.roster)
        return self._samples_in[key]

    def metric(self, row: dict[str, Any]) -> None:
        """A row for metrics.jsonl: the simulator keeps those about exchanges."""
        if row["kind"] == "exchange":
            self.exchange_rows.append(row)
