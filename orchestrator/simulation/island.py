"""One member process in symbols: the counterpart of `workers/sync.py`, with the same machine inside.

It carries out the machine's commands as jobs that take virtual time, and plays the training thread: at each step
boundary reset, take states, apply what is due, obey orders, send what is due, train. A change in `workers/sync.py`
belongs here too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.simulation import jobs
from orchestrator.simulation.copies import Copies
from orchestrator.simulation.requests import Busy, Fetch, FetchFailed, Job
from orchestrator.simulation.shared_log import SharedLog
from orchestrator.simulation.symbols import (
    NonFinite,
    Replica,
    StateChunk,
    StateTorn,
    Store,
    bits_of,
    must,
)
from workers import member_events as ev
from workers import member_rules as rules
from workers import messages as msg
from workers import ranges
from workers.member import MemberMachine
from workers.open_steps import OpenSteps
from workers.orders import can_obey
from workers.record_log import RecordLog
from workers.records import CommitRecord, OfferId

if TYPE_CHECKING:
    from orchestrator.simulation.cluster import Cluster


class Island:
    """One process: alive, frozen or dead."""

    def __init__(self, cluster: Cluster, *, name: str, nonce: str, index: int) -> None:
        """`index`: which member of the scenario it is."""
        scenario = cluster.scenario
        self.cluster, self.name, self.first_nonce = cluster, name, nonce
        self.batch_size, self.step_s = scenario.batch_sizes[index], scenario.step_s[index]
        self.device = cluster.rng.randrange(scenario.devices)
        self.node = f"node-{index % scenario.num_nodes}"
        self.address = f"{name}/{nonce}"
        self.alive, self.frozen, self.doomed = True, False, False
        info = msg.ProcessInfo(
            address=self.address, node=self.node, weight=self.batch_size * 8, batch_size=self.batch_size
        )
        self.machine = MemberMachine(
            run_id=scenario.plan.run_id, name=name, nonce=nonce, info=info, num_chunks=scenario.num_chunks
        )
        self.machine.pace.tick_s = scenario.heartbeat_s
        if scenario.one_log:
            self.machine.log = SharedLog(cluster.one_journal)
        self.replica = Replica(
            names=cluster.names,
            num_chunks=scenario.num_chunks,
            feedback=scenario.feedback,
            settings_at=lambda fragment, n: self.machine.log.settings.of_members(fragment, n),
            sets_aside=scenario.plan.strategy.delay > 0,
        )
        self.store = Store()
        exchange = scenario.plan.exchange
        kept = Copies(self, staleness_limit=exchange.staleness_limit) if scenario.plan.keeps_copies else None
        self.copies: Copies | None = kept
        self.offset_s = cluster.rng.uniform(0, 1000.0)
        self.rate = 1.0 + cluster.rng.uniform(-1, 1) * scenario.clock_skew
        self.bodies: list[msg.MemberBody] = []
        self.orders: deque[msg.Evaluate | msg.Save | msg.Stop] = deque()
        self.steps_done = OpenSteps()
        self.schedule = scenario.schedule(self.machine.round_steps, self.machine.changes_of)
        self.staged_chunks: dict[tuple[int, str], list[StateChunk]] = {}
        self.base_samples = 0
        self.deferred: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self.parked: list[tuple[Island, Job, Fetch, float]] = []
        self.poison = 0
        self.slowdown = 1.0
        self.stuck = False  # its training thread never comes back from a step, everything else goes on
        self.stuck_step: tuple[int, tuple[ranges.Range, ...]] | None = None
        self.lies = False
        self.distorts = False
        self.corrupt = False
        self.floors = [0 for _ in scenario.num_chunks]
        self.seen_content: list[object] = [None for _ in scenario.num_chunks]  # by `Checks`
        self.seen_work: list[object] = [None for _ in scenario.num_chunks]
        self._turn = 0
        self._asleep = False

    # ------------------------------------------------------------ life

    def clock(self) -> float:
        """This process's own clock."""
        return self.offset_s + self.cluster.time.now * self.rate

    def begin_with(self, log: RecordLog, states: Mapping[int, list[StateChunk]]) -> None:
        """Before `start`: what a standby has gathered, of a version that may be old."""
        for fragment, chunks in states.items():
            self.replica.install(fragment, chunks, included=False, fresh=True)
            self._moved(log.commit(fragment, chunks[0].n))
        self.machine.begin_with(log, {f: (chunks[0].n, chunks[0].chain) for f, chunks in states.items()})

    def start(self) -> None:
        """Ask to be a member; start the heartbeat and the training thread."""
        self._carry_out(self.machine.join_now(self.clock()))
        self.cluster.time.after(self.cluster.scenario.heartbeat_s, self._heartbeat)
        self._next_turn(0.0)

    def freeze(self) -> None:
        """The process is stopped: nothing happens in it until `thaw`."""
        self.frozen = True

    def thaw(self) -> None:
        """Go on with everything that arrived meanwhile."""
        self.frozen = False
        while self.deferred and not self.frozen and self.alive:
            action, args = self.deferred.popleft()
            action(*args)

    def unstick(self) -> None:
        """The training thread goes on with the step that it hung in."""
        step, self.stuck, self.stuck_step = self.stuck_step, False, None
        if step is not None:
            self.run(self._stepped, *step)

    def run(self, action: Callable[..., None], *args: Any) -> None:
        """Run something in this process: now, after a freeze, or never if it is dead."""
        if not self.alive:
            return
        if self.frozen:
            self.deferred.append((action, args))
        else:
            action(*args)

    def deliver(self, batch: msg.Batch) -> None:
        """A batch from the controller arrived."""
        self.run(self._handle, ev.Delivered(batch=batch))

    def _heartbeat(self) -> None:
        if self.alive:
            self.cluster.time.after(self.cluster.scenario.heartbeat_s, self._heartbeat)
            if not self.frozen:
                self._handle(ev.Tick())

    def _handle(self, event: ev.Event) -> None:
        if self.cluster.trace is not None and not isinstance(event, ev.Tick):
            self.cluster.note(f"{self.machine.nonce} <- {_short(event)}")
        before = self.cluster.checks.obedience(self, event)
        self._carry_out(self.machine.handle(event, self.clock()))
        self.cluster.checks.member(self)
        must(before is None or before == self.cluster.checks.obedience(self, event), 10, "a lower term is obeyed")

    # ------------------------------------------------------------ commands

    def _carry_out(self, commands: Sequence[ev.Command]) -> None:
        wake = False
        for command in commands:
            match command:
                case ev.Post(body=body):
                    self.bodies.append(body)
                case ev.Wake():
                    wake = True
                case ev.Order(body=order):
                    self.orders.append(order)
                    wake = True
                case ev.Copies(body=told):
                    if self.copies is not None:
                        self.copies.told(told)
                case ev.Forget():
                    self._forget(command)
                case ev.BuildGenesis():
                    self._work(jobs.build_genesis(self))
                case ev.FetchPieces():
                    self._work(jobs.fetch_pieces(self, command))
                case ev.Knock():
                    self._work(jobs.knock(self, command))
                case ev.Reduce():
                    self._work(jobs.reduce(self, command))
                case ev.FetchResults():
                    self._work(jobs.fetch_results(self, command))
                case ev.ComputeNext():
                    self._work(jobs.compute_next(self, command))
                case ev.VerifyAnchor():
                    self._work(jobs.verify_anchor(self, command))
                case ev.LoadState():
                    self._work(jobs.load_state(self, command))
                case ev.FetchState():
                    self._work(jobs.fetch_state(self, command))
        if self.bodies:
            bodies, self.bodies = tuple(self.bodies), []
            self.cluster.post(self, self.machine.envelope(*bodies))
        if wake and self._asleep:
            self._next_turn(0.0)

    def _forget(self, command: ev.Forget) -> None:
        for prefix in command.prefixes:
            self.store.discard(prefix)
        for digest in command.digests:
            self.store.content.pop((command.fragment, digest), None)
        self.store.discard(f"result/{command.fragment}")

    # ------------------------------------------------------------ jobs

    def _work(self, job: Job) -> None:
        self.resume(job, None)

    def resume(self, job: Job, value: Any) -> None:
        """Go on with a job that got what it waited for (an exception is raised inside it)."""
        try:
            request = job.throw(value) if isinstance(value, FetchFailed) else job.send(value)
        except StopIteration as stop:
            if stop.value is not None:
                self._handle(stop.value)
            return
        if isinstance(request, Busy):
            self.cluster.time.after(request.seconds, self.run, self.resume, job, None)
        else:
            self.cluster.fetch(self, job, request)

    # ------------------------------------------------------------ the training thread

    def _next_turn(self, delay_s: float) -> None:
        self._turn += 1
        self._asleep = False
        self.cluster.time.after(delay_s, self.run, self._take_turn, self._turn)

    def _take_turn(self, turn: int) -> None:
        if turn == self._turn:
            self._boundary()
            self.cluster.checks.member(self)

    def _boundary(self) -> None:
        self._reset_if_wanted()
        self._take_states()
        self._apply_due()
        self.cluster.checks.displacements(self)
        if self._obey_order():
            return
        if not self.machine.holds_all() or self.machine.reset_wanted:
            self._wait("state")
            return
        if self.copies is not None and self.copies.at_boundary():
            self._wait("local state")
            return
        if not self.machine.drop_asked:
            self._send_due()
        if self.machine.drop_asked:
            self._wait("drop")
        else:
            self._next_batch()

    def _wait(self, reason: str) -> None:
        self.machine.pace.begin("waiting", self.clock())
        if self.machine.waiting != reason:
            self.machine.waiting = reason
            self.cluster.time.after(0.0, self.run, self._handle, ev.Tick())
        self._next_turn(self.cluster.scenario.heartbeat_s)
        self._asleep = True

    def _reset_if_wanted(self) -> None:
        if not self.machine.reset_wanted:
            return
        self.replica.reset()
        if self.copies is not None:
            self.copies.forget()
        self.steps_done.clear()
        self.store.discard("piece")
        if self.machine.dropped_to is not None:
            self.floors = [self.machine.dropped_to for _ in self.floors]
        else:
            self.floors = [0 for _ in self.floors]
        self._carry_out(self.machine.was_reset(self.clock()))
        self.schedule.restart()

    def _take_states(self) -> None:
        for key in list(self.staged_chunks):
            if self.staged_chunks[key][0].n <= self.machine.fragments[key[0]].n:
                del self.staged_chunks[key]
        for fragment, state in enumerate(self.machine.fragments):
            if state.staged is None:
                continue
            record = self.machine.log.next(fragment, state.chain) if state.n >= 0 else None
            pending = state.pending
            included = record is not None and pending is not None and rules.included(record, pending.id)
            fresh = not self.steps_done
            self.replica.install(
                fragment, self.staged_chunks.pop((fragment, state.staged.chain)), included=included, fresh=fresh
            )
            self._carry_out(self.machine.installed(fragment, self.clock()))
            self._count_again()
            self.schedule.moved(fragment, self._anchor_progress(), included=included and self.schedule.own_pace)

    def _apply_due(self) -> None:
        for fragment in range(len(self.machine.fragments)):
            while (due := self.machine.due(fragment)) is not None:
                if due.included and self._held_back(fragment):
                    self.cluster.counts["results held back"] += 1
                    break
                record = due.record
                payloads = jobs.stored_results(self, fragment, record.chunk_digests)
                assert payloads is not None, "a due result is not in the store"
                try:
                    self.replica.apply(
                        fragment, payloads, n=record.n, chain=record.chain, sealed=record.digest, included=due.included
                    )
                except StateTorn as error:
                    self._torn(fragment, record, str(error))
                    return
                self._carry_out(self.machine.applied(fragment, record, self.clock()))
                self._moved(record)
                self.schedule.moved(fragment, self._anchor_progress(), included=due.included)
                self._trim()

    def _held_back(self, fragment: int) -> bool:
        return not self.schedule.is_due(fragment) and self._can_train() and not self._waited_out()

    def _waited_out(self) -> bool:
        return self.schedule.waited_out(self.clock(), self.cluster.scenario.wait_s)

    def _torn(self, fragment: int, record: CommitRecord, why: str) -> None:
        self._carry_out(self.machine.applied(fragment, record, self.clock()))
        self._carry_out(self.machine.lost_state(fragment, "diverged", why, self.clock()))

    def _moved(self, record: CommitRecord | None) -> None:
        if record is not None:
            added = self.cluster.samples_in(record) if len(self.machine.fragments) == 1 else 0
            self.base_samples = max(self.base_samples, record.base_samples + added)

    def _count_again(self) -> None:
        self.base_samples = 0
        for fragment, state in enumerate(self.machine.fragments):
            self._moved(self.machine.log.commit(fragment, state.n))

    def _trim(self) -> None:
        self.steps_done.committed(min(state.watermark for state in self.machine.fragments))

    def open_steps(self, fragment: int) -> int:
        """Inner steps that this fragment has not committed."""
        return self.steps_done.beyond(self.machine.fragments[fragment].watermark)

    def _anchor_progress(self) -> float:
        return min(self.base_samples / self.cluster.scenario.plan.total_samples, 1.0)

    def _send_due(self) -> None:
        standstill = self._at_standstill()
        for fragment, state in enumerate(self.machine.fragments):
            steps = self.open_steps(fragment)
            if state.pending is not None or steps == 0 or state.staged is not None or self.machine.drop_asked:
                continue
            if self.machine.log.next(fragment, state.chain) is not None:
                continue
            on_time = self.schedule.on_time(fragment, self._anchor_progress())
            joins = self.schedule.joins(late=state.late, open_seen=self.machine.open_seen(fragment))
            if on_time or standstill or joins:
                self._send(fragment, steps)

    def _at_standstill(self) -> bool:
        """No step can be made until something is committed: what there is is offered, lest members wait in a circle."""
        stuck_inline = self.machine.waiting == "exchange" and self.cluster.scenario.inline and self._waited_out()
        return stuck_inline or not self._can_train()

    def _can_train(self) -> bool:
        machine = self.machine
        used_up = machine.consumed >= machine.num_leased() and (machine.tail or machine.waiting == "leases")
        return not (machine.leaving or used_up or self._at_bound())

    def _at_bound(self) -> bool:
        longest = self.schedule.longest_round(self._anchor_progress())
        bound = max(int(self.cluster.scenario.plan.exchange.bound_rounds * longest), 1)
        return max(self.open_steps(f) for f in range(len(self.machine.fragments))) >= bound

    def _send(self, fragment: int, steps: int) -> None:
        state = self.machine.fragments[fragment]
        try:
            encoded = self.replica.encode(fragment, lies=self.lies)
        except NonFinite as error:
            self.bodies.append(msg.FaultSeen(fault="non_finite", detail=str(error)))
            self._carry_out(self.machine.request_drop(f"its update is not finite: {error}", self.clock()))
            return
        seq = state.seq + 1
        offer_id = OfferId(member=self.machine.id, seq=seq)
        for chunk, payload in enumerate(encoded):
            self.store.put(f"piece/{fragment}/{offer_id}", chunk, payload)
        since, upto = state.watermark, self.machine.consumed
        born = self.steps_done.born(fragment, since)
        offer = msg.Offer(
            fragment=fragment, base=state.version, seq=seq, born=born, since=since, upto=upto,
            ranges=ranges.cut(self.machine.leases, since, upto), num_steps=steps, weight=self.machine.info.weight,
            chunk_digests=tuple(p.digest for p in encoded), sumsq=tuple(1.0 for _ in encoded), num_bytes=len(encoded),
        )  # fmt: skip
        self.schedule.sent(fragment, self._anchor_progress())
        self.cluster.checks.offer(self, offer)
        self._carry_out(self.machine.offered(offer, self.clock()))

    def _obey_order(self) -> bool:
        order = next((order for order in self.orders if can_obey(order, self.machine)), None)
        if order is None:
            return False
        if isinstance(order, msg.Evaluate):
            here = tuple(state.n for state in self.machine.fragments)
            samples = order.samples if here == order.versions else self.base_samples
            self.cluster.time.after(0.05, self.run, self._say_and_go, "evaluated", samples)
        elif isinstance(order, msg.Save):
            self.cluster.time.after(0.05, self.run, self._say_and_go, "saved", order)
        else:
            self.cluster.stopped(self)
        self.orders.remove(order)
        self.machine.pace.begin("evaluating", self.clock())
        self._turn += 1
        self._asleep = False
        return True

    def _say_and_go(self, what: str, order: Any) -> None:
        versions = tuple(state.n for state in self.machine.fragments)
        if min(versions) < 0:
            pass  # reset in the meantime: it is asked again, or another one
        elif what == "evaluated":
            self.bodies.append(msg.Evaluated(versions=versions, samples=order, val_loss=1.0))
        else:
            self.cluster.snapshots.write(self.replica)
            self.bodies.append(msg.Saved(name=order.name, versions=versions, local=order.local))
        self._carry_out(())
        self._next_turn(0.0)

    def _next_batch(self) -> None:
        if self.machine.leaving:
            self._wait("leaving")
            return
        if self.machine.log.paused:
            self._wait("paused")
            return
        scenario = self.cluster.scenario
        pending = [f for f, state in enumerate(self.machine.fragments) if state.pending is not None]
        overdue = [f for f in pending if self.schedule.is_due(f) and not scenario.overlap]
        for fragment in overdue:
            self.schedule.wait_begins(fragment, self.clock())
        if overdue and (scenario.inline or not self._waited_out()):
            self._wait("exchange")
            return
        if self._at_bound():
            self._wait("bound")
            return
        if len(pending) > 1 and not overdue:
            self.cluster.counts["steps with several exchanges under way"] += 1
        todo = self.machine.next_ranges(self.batch_size)
        if not todo:
            self._wait("leases")
            return
        self.machine.waiting = ""
        if pending:
            self.replica.hold_displacement()
        self._turn += 1
        self._asleep = False
        self.machine.pace.begin("step", self.clock())
        self.cluster.time.after(self.step_s * self.slowdown, self.run, self._stepped, self._turn, todo)

    def _stepped(self, turn: int, todo: tuple[ranges.Range, ...]) -> None:
        if self.stuck:
            self.stuck_step = (turn, todo)
            return
        self.machine.pace.stepped(self.clock())
        bad = self.poison > 0
        self.poison = max(self.poison - 1, 0)
        self.replica.step(samples=bits_of(todo), bad=bad)
        self.schedule.total_steps += 1
        end = self.machine.consumed + ranges.count(todo)
        self.steps_done.add(end, [state.n for state in self.machine.fragments])
        first = self.machine.consumed == 0
        self.machine.consumed_to(end, self.schedule.total_steps, self.step_s * self.rate)
        self.cluster.steps += 1
        if first:
            self._handle(ev.Tick())
        self._take_turn(turn)


def _short(event: ev.Event) -> str:
    if isinstance(event, ev.Delivered):
        batch = event.batch
        bodies = ", ".join(type(body).__name__ for body in batch.bodies)
        return f"batch {batch.term} rows {batch.rows_from}+{len(batch.rows)} [{bodies}]"
    return str(event)[:200]
