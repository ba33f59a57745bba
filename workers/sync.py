"""The shell around a member's machine: queue, threads, transport, and the step boundary of the training thread.

    controller --deliver()--> queue --> MemberMachine --> commands --> transport, replica --> events --> queue
    training thread --boundary()--> what to do next: train on these samples, evaluate, save, wait, stop

With an executor of threads the queue has a thread of its own and fetches run beside training. Without one everything
happens inside `pump()` and `boundary()`: islands in one process, deterministic, for tests and benchmarks.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor

from strategies.codecs.base import NonFiniteError
from strategies.strategy import Strategy
from workers import member_events as ev
from workers import member_rules as rules
from workers import messages as msg
from workers import ranges
from workers.actions import DOING, Action, TrainOn, WaitFor
from workers.buddy import LocalCopies
from workers.control_thread import ControlThread, Echo
from workers.job_threads import JobThreads
from workers.jobs import Jobs, MemberStore, content_key, piece_key
from workers.link_rows import LinkRows
from workers.member import MemberMachine
from workers.memory import give_back
from workers.open_steps import OpenSteps
from workers.orders import next_order
from workers.record_log import GENESIS_CHAIN, RecordLog
from workers.records import CommitRecord, OfferId, Row, Term
from workers.replica import Replica, StateChunk, StateTorn, as_bytes
from workers.send_schedule import SendSchedule
from workers.snapshot import SnapshotPlace
from workers.sync_settings import SyncSettings
from workers.transport.base import Transport

__all__ = ["IslandSync", "SyncSettings"]


class IslandSync:
    """One member: its machine, its tensors and its transport."""

    def __init__(
        self,
        *,
        machine: MemberMachine,
        replica: Replica,
        store: MemberStore,
        transport: Transport,
        post: Callable[[msg.Envelope], None],
        clock: Callable[[], float],
        settings: SyncSettings,
        executor: Executor | None = None,
        snapshots: SnapshotPlace | None = None,
        on_reset: Callable[[], None] | None = None,
        copies: LocalCopies | None = None,
    ) -> None:
        """`post` hands an envelope to the controller and must not block; `executor` None = everything inline.

        `snapshots`: where the run's durable snapshots are. `copies`: keeps local states twice, where the run does.
        """
        self.machine, self.replica, self.store, self.transport = machine, replica, store, transport
        self.post, self.clock, self.settings, self.executor = post, clock, settings, executor
        self.on_reset, self.copies = on_reset, copies
        store.replica = replica
        self.changed = threading.Condition(threading.RLock())
        self.events: queue.SimpleQueue[ev.Event | None] = queue.SimpleQueue()
        self.threads = JobThreads(executor, self.events, self.abort)
        self.bodies: list[msg.MemberBody] = []
        self.orders: deque[msg.Evaluate | msg.Save | msg.Stop] = deque()
        self.rows: list[tuple[float, dict[str, object]]] = []
        self.steps_done = OpenSteps()
        self.schedule = SendSchedule(
            num_fragments=len(machine.fragments),
            staggered=replica.strategy.staggered,
            inner_steps=lambda f, progress: machine.round_steps(self._strategy_of(f).inner_steps(progress)),
            overlap_at=lambda f, progress: self._strategy_of(f).overlap_at(progress),
            own_pace=replica.strategy.own_pace,
        )
        self.base_samples = 0
        self.stopped = False
        self.failure: BaseException | None = None
        self._news = self._news_seen = 0
        self.jobs = Jobs(
            replica=replica,
            store=store,
            transport=transport,
            log=lambda: machine.log,
            lock=self.changed,
            timeout_s=settings.timeout_s,
            threaded=executor is not None,
            post=self.events.put if executor is not None else None,
            snapshots=snapshots,
            clock=clock,
        )
        if copies is not None:
            copies.bind(self)
        self._thread: ControlThread | None = None
        self._echo = Echo()
        self.links = LinkRows(transport, self.observe)

    # ------------------------------------------------------------ life

    def start(self) -> None:
        """Serve, and ask to be a member. With an executor, start the control thread."""
        self._carry_out(self.machine.join_now(self.clock()))
        if self.executor is not None:
            self._thread = ControlThread(
                name=self.machine.name, events=self.events, lock=self.changed, clock=self.clock,
                heartbeat_s=self.settings.heartbeat_s, handle=self._handle, say_again=self._say_again,
            )  # fmt: skip
            self._thread.start()

    def begin_with(self, log: RecordLog, states: Mapping[int, list[StateChunk]]) -> None:
        """Before `start`: what a standby has gathered. The parameters are the anchor, of a version that may be old."""
        for fragment, chunks in states.items():
            self.replica.install(fragment, chunks, included=False, fresh=True)
            self._moved(log.commit(fragment, chunks[0].n))
        self.machine.begin_with(log, {f: (chunks[0].n, chunks[0].chain) for f, chunks in states.items()})

    def close(self) -> None:
        """End the control thread; the transport is the caller's to stop."""
        with self.changed:
            self.stopped = True
            self.changed.notify_all()
        self.events.put(None)
        if self._thread is not None:
            self._thread.join()
        self.threads.close()

    def deliver(self, batch: msg.Batch) -> None:
        """A batch from the controller arrived (any thread)."""
        self.events.put(ev.Delivered(batch=batch))

    def attach(self, term: Term) -> tuple[Term | None, tuple[Row, ...]]:
        """A controller of a new lineage asks for the journal copy; handing it in is a promise to obey no lower term.

        Returns the term that is obeyed from now on (the caller's, unless a higher one is known) and the copy.
        """
        with self.changed:
            return self.machine.attach(term)

    def abort(self, error: BaseException) -> None:
        """End the training thread with `error` at its next step boundary (any thread)."""
        with self.changed:
            self.failure = self.failure or error
            self._wake()

    def _say_again(self) -> None:
        """The training thread is busy at a step boundary for longer than a heartbeat: it lives."""
        envelope = self._echo.again(self.machine.pace, self.clock())
        if envelope is not None:
            self.post(envelope)

    def pump(self) -> bool:
        """Inline mode: handle everything that is queued; whether there was anything."""
        busy = False
        while not self.events.empty():
            event = self.events.get()
            if event is not None:
                busy = True
                self._handle(event)
        return busy

    def tick(self) -> None:
        """Inline mode: time passed."""
        self._handle(ev.Tick())

    def _handle(self, event: ev.Event) -> None:
        with self.changed:
            if self._thread is not None and isinstance(event, ev.Tick):
                self.links.note(self.clock(), self.machine.peers)
            self.machine.bytes_sent = self.transport.bytes_sent
            commands = self.machine.handle(event, self.clock())
            self._carry_out(commands)

    # ------------------------------------------------------------ commands

    def _carry_out(self, commands: Sequence[ev.Command]) -> None:
        for command in commands:
            match command:
                case ev.Post(body=body):
                    self.bodies.append(body)
                case ev.Wake():
                    self._wake()
                case ev.Order(body=body):
                    self.orders.append(body)
                    self._wake()
                case ev.Forget():
                    self._forget(command)
                case ev.BuildGenesis():
                    self.threads.do(self._make_genesis)
                case ev.Copies(body=told):
                    if self.copies is not None:
                        self.copies.told(told)
                case _:
                    waits = isinstance(command, ev.FetchResults | ev.Knock)
                    self.threads.do(lambda c=command: self.jobs.do(c), waits=waits)  # type: ignore[misc]
        self._flush()

    def _wake(self) -> None:
        self._news += 1
        self.changed.notify_all()

    def _make_genesis(self) -> ev.Event:
        num_params = sum(spec.numel for spec in self.replica.specs)
        return ev.GenesisBuilt(digests=self.replica.make_genesis(GENESIS_CHAIN), num_params=num_params)

    def _flush(self) -> None:
        if self.rows and any(isinstance(body, msg.Hello) for body in self.bodies):
            self._send_rows()
        if self.bodies:
            bodies, self.bodies = tuple(self.bodies), []
            envelope = self.machine.envelope(*bodies)
            self._echo.heard(envelope)
            self.post(envelope)

    def _forget(self, command: ev.Forget) -> None:
        freed = sum(self.store.discard(prefix) for prefix in command.prefixes)
        freed += self.store.discard_keys(content_key(command.fragment, digest_hex) for digest_hex in command.digests)
        self.store.discard_content(f"result/{command.fragment}", command.digests)  # the same bytes by their names
        give_back(freed)

    # ------------------------------------------------------------ the step boundary (training thread)

    @property
    def total_steps(self) -> int:
        """Inner steps of this process."""
        return self.schedule.total_steps

    def progress(self) -> float:
        """Progress of the run as this member reckons it: committed samples and its own open ones, times the fleet's."""
        open_ = self.machine.consumed - min(state.watermark for state in self.machine.fragments)
        # Rounds of one's own: others have committed much of what they trained on since.
        planned = 1.0 if self.schedule.own_pace else self.machine.fleet_samples()
        return min((self.base_samples + open_ * planned) / self.settings.total_samples, 1.0)

    def boundary(self) -> Action:
        """What the training thread does next. Applies what is due and sends what is due first; never blocks."""
        with self.changed:
            self.machine.pace.begin("exchanging", self.clock())
            action = self._decide()
            self.machine.pace.begin(DOING[type(action)], self.clock())
            return action

    def _decide(self) -> Action:
        if self.failure is not None:
            raise self.failure
        self._news_seen = self._news
        self._reset_if_wanted()
        self._take_states()
        self._apply_due()
        order = next_order(self.orders, self.machine, base_samples=self.base_samples)
        if order is not None:
            return order
        if not self.machine.holds_all() or self.machine.reset_wanted:
            return self._wait("state")
        if self.copies is not None and self.copies.at_boundary():
            return self._wait("local state")
        if not self.machine.drop_asked:
            self._send_due()
        return self._wait("drop") if self.machine.drop_asked else self._next_batch()

    def behind(self) -> bool:
        """Whether a newer version is committed than the one that is applied here."""
        with self.changed:
            log = self.machine.log
            return any(log.head(fragment) > state.n for fragment, state in enumerate(self.machine.fragments))

    def wait(self, timeout_s: float) -> None:
        """Threads only: sleep until something has changed since the last `boundary`."""
        with self.changed:
            if self._news == self._news_seen and not self.stopped:
                self.changed.wait(timeout_s)

    def _wait(self, reason: str) -> WaitFor:
        if self.machine.waiting != reason:
            self.machine.waiting = reason
            self.events.put(ev.Tick())
        return WaitFor(reason=reason, timeout_s=self.settings.heartbeat_s)

    def _reset_if_wanted(self) -> None:
        if self.machine.reset_wanted:
            self.replica.reset()
            if self.on_reset is not None:
                self.on_reset()
            if self.copies is not None:
                self.copies.forget()
            self.steps_done.clear()
            self.store.discard("piece")
            self._carry_out(self.machine.was_reset(self.clock()))
            self.schedule.restart()

    def _take_states(self) -> None:
        for key in list(self.jobs.staged):
            if self.jobs.staged[key][0].n <= self.machine.fragments[key[0]].n:
                self.jobs.staged.pop(key, None)  # overtaken by a commit
        for fragment, state in enumerate(self.machine.fragments):
            if state.staged is None:
                continue
            record = self.machine.log.next(fragment, state.chain) if state.n >= 0 else None
            pending = state.pending
            included = record is not None and pending is not None and rules.included(record, pending.id)
            fresh = not self.steps_done  # nothing uncommitted: the live parameters are the anchor
            self.replica.install(
                fragment, self.jobs.staged.pop((fragment, state.staged.chain)), included=included, fresh=fresh
            )
            self._carry_out(self.machine.installed(fragment, self.clock()))
            self._count_again()
            self.schedule.moved(fragment, self._anchor_progress(), included=included and self.schedule.own_pace)

    def _apply_due(self) -> None:
        for fragment in range(len(self.machine.fragments)):
            while (due := self.machine.due(fragment)) is not None:
                if due.included and self._held_back(fragment):
                    break
                payloads = self.jobs.payloads(fragment, due.record.chunk_digests)
                assert payloads is not None, "a due result is not in the store"
                try:
                    self.replica.apply(
                        fragment,
                        payloads,
                        n=due.record.n,
                        chain=due.record.chain,
                        base_samples=due.record.base_samples,
                        sealed=due.record.digest,
                        included=due.included,
                    )
                except StateTorn as error:
                    self._torn(fragment, due.record, str(error))
                    return
                self._carry_out(self.machine.applied(fragment, due.record, self.clock()))
                self._moved(due.record)
                self.schedule.moved(fragment, self._anchor_progress(), included=due.included)
                self._trim()

    def _held_back(self, fragment: int) -> bool:
        """Whether a result that is here waits for the step at which it is due."""
        return not self.schedule.is_due(fragment) and self._can_train() and not self._waited_out()

    def _waited_out(self) -> bool:
        return self.schedule.waited_out(self.clock(), self.settings.wait_s)

    def _torn(self, fragment: int, record: CommitRecord, why: str) -> None:
        """The state is not what everybody else has: say so, and fetch it whole."""
        self._carry_out(self.machine.applied(fragment, record, self.clock()))
        self._carry_out(self.machine.lost_state(fragment, "diverged", why, self.clock()))

    def _moved(self, record: CommitRecord | None) -> None:
        """Progress as of the newest version: what its commit had, and what it added."""
        if record is not None:
            added = sum(e.upto - e.since for e in record.roster) if len(self.machine.fragments) == 1 else 0
            self.base_samples = max(self.base_samples, record.base_samples + added)

    def _count_again(self) -> None:
        """Progress of the versions that are held now: a fetched state may be older than what was held before."""
        self.base_samples = 0
        for fragment, state in enumerate(self.machine.fragments):
            self._moved(self.machine.log.commit(fragment, state.n))

    def _trim(self) -> None:
        self.steps_done.committed(min(state.watermark for state in self.machine.fragments))

    def open_steps(self, fragment: int) -> int:
        """Inner steps that this fragment has not committed."""
        return self.steps_done.beyond(self.machine.fragments[fragment].watermark)

    def _strategy_of(self, fragment: int) -> Strategy:
        """The strategy of a fragment's next transition: settings change with versions."""
        return self.replica.variants(fragment, self.machine.fragments[fragment].n)

    def _anchor_progress(self) -> float:
        return min(self.base_samples / self.settings.total_samples, 1.0)

    def _send_due(self) -> None:
        standstill = self._at_standstill()
        for fragment, state in enumerate(self.machine.fragments):
            steps = self.open_steps(fragment)
            if state.pending is not None or steps == 0 or state.staged is not None or self.machine.drop_asked:
                continue
            if self.machine.log.next(fragment, state.chain) is not None:
                continue  # a newer version is known: this base can't be offered for any more
            on_time = self.schedule.on_time(fragment, self._anchor_progress())
            joins = self.schedule.joins(late=state.late, open_seen=self.machine.open_seen(fragment))
            if on_time or standstill or joins:
                self._send(fragment, steps)

    def _at_standstill(self) -> bool:
        """No step can be made until something is committed: what there is is offered, lest members wait in a circle."""
        # Inline nobody trains on: what was not offered yet may be what the others wait for.
        stuck_inline = self.machine.waiting == "exchange" and self.executor is None and self._waited_out()
        return stuck_inline or not self._can_train()

    def _can_train(self) -> bool:
        """Whether a step can be made without anything being committed before."""
        machine = self.machine
        used_up = machine.consumed >= machine.num_leased() and (machine.tail or machine.waiting == "leases")
        return not (machine.leaving or used_up or self._at_bound())

    def _at_bound(self) -> bool:
        bound = max(int(self.settings.bound_rounds * self.schedule.longest_round(self._anchor_progress())), 1)
        return max(self.open_steps(f) for f in range(len(self.machine.fragments))) >= bound

    def _send(self, fragment: int, steps: int) -> None:
        state = self.machine.fragments[fragment]
        try:
            share = self.machine.share(fragment)
            encoded = self.replica.encode(fragment, share=share, progress=self._anchor_progress())
        except NonFiniteError as error:
            self.bodies.append(msg.FaultSeen(fault="non_finite", detail=str(error)))
            self._carry_out(self.machine.request_drop(f"its update is not finite: {error}", self.clock()))
            return
        seq = state.seq + 1
        offer_id = OfferId(member=self.machine.id, seq=seq)
        for chunk, payload in enumerate(encoded.payloads):
            self.store.put(piece_key(fragment, offer_id, chunk), as_bytes(payload), digest_hex=encoded.digests[chunk])
        since, upto = state.watermark, self.machine.consumed
        born = self.steps_done.born(fragment, since)
        offer = msg.Offer(
            fragment=fragment,
            base=state.version,
            seq=seq,
            born=born,
            since=since,
            upto=upto,
            ranges=ranges.cut(self.machine.leases, since, upto),
            num_steps=steps,
            weight=self.machine.info.weight,
            chunk_digests=encoded.digests,
            sumsq=encoded.sumsq,
            num_bytes=encoded.num_bytes,
        )
        self.schedule.sent(fragment, self._anchor_progress())
        self._carry_out(self.machine.offered(offer, self.clock()))

    def _next_batch(self) -> Action:
        if self.machine.leaving:
            return self._wait("leaving")
        if self.machine.log.paused:
            return self._wait("paused")
        pending = [f for f, state in enumerate(self.machine.fragments) if state.pending is not None]
        overdue = [fragment for fragment in pending if self.schedule.is_due(fragment)]
        for fragment in overdue:
            self.schedule.wait_begins(fragment, self.clock())
        if overdue and (self.executor is None or not self._waited_out()):
            return self._wait("exchange")
        if self._at_bound():
            return self._wait("bound")
        todo = self.machine.next_ranges(self.settings.batch_size)
        if not todo:
            return self._wait("leases")
        self.machine.waiting = ""
        if pending:
            self.replica.hold_displacement(past_due=overdue)
        return TrainOn(ranges=todo, progress=self.progress())

    # ------------------------------------------------------------ facts from the training thread

    def stepped(self, num_samples: int, seconds: float = 0.0) -> None:
        """One inner step on `num_samples` samples is done, and took that long."""
        with self.changed:
            self.schedule.total_steps += 1
            self.machine.pace.stepped(self.clock())
            end = self.machine.consumed + num_samples
            self.steps_done.add(end, [state.n for state in self.machine.fragments])
            first = self.machine.consumed == 0
            self.machine.consumed_to(end, self.total_steps, seconds)
            if first:
                self.events.put(ev.Tick())

    def observe(self, at_s: float, row: dict[str, object]) -> None:
        """A row for metrics.jsonl, stamped with this member's clock; travels with the next heartbeat."""
        with self.changed:
            self.rows.append((at_s, row))

    def flush_rows(self) -> None:
        """Send the rows that are left: the last act of an island."""
        with self.changed:
            if self.rows:
                self._send_rows()
            self._flush()

    def _send_rows(self) -> None:
        self.bodies.append(msg.Observed(sent_s=self.clock(), rows=tuple(self.rows)))
        self.rows = []

    def say(self, body: msg.MemberBody) -> None:
        """Send one body to the controller now."""
        with self.changed:
            self.bodies.append(body)
            self._flush()
