"""A member of a gossip run: the shell of every island, with a `PairMachine` beside its own machine.

    training thread --boundary()--> at its send point: publish anchor and displacement; `Begin`
    controller --> PairRosters --> PairPlan; PairHear --> PairMachine --> PairTell --> controller
    partners --> PairMail --> PairMachine --> PairMail, fetches of payloads --> partners
    PairMachine --> Apply --> training thread, at its next boundary: `GossipReplica.apply`

From the roster to `Apply` a group needs nobody but itself, and rosters are known of rounds to come: without the
controller members go on until they have no roster left, `MOST_UNRECORDED` commits, or a full merge to make. Full merges
are ordinary exchanges, and wait for the pair that is going on, and until all of it is on the record; while one is under
way no pair begins. The machine's timers are looked at with every event and heartbeat.
"""

from __future__ import annotations

from dataclasses import dataclass

from strategies.config import StrategyConfig
from strategies.gossip import NoLoCo
from workers import member_events as ev
from workers import messages as msg
from workers import pair as p
from workers.actions import Action
from workers.digest import digest
from workers.gossip_replica import Averaging, GossipReplica, GossipStep, PayloadDamaged, Shared
from workers.pair_mail import Heard, PairMail
from workers.pair_messages import PairHear, PairRosters, PairTell
from workers.pair_plan import PairPlan
from workers.records import MemberId
from workers.sync import IslandSync
from workers.transport.errors import TransportError


def step_of(config: StrategyConfig) -> GossipStep:
    """What a group does. Raises SettingError for what is not stable."""
    if config.name == "gossip":
        return Averaging()
    return NoLoCo(alpha=config.outer_momentum, beta=config.outer_lr, gamma=config.gamma)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fetched:
    """A partner's payload is here."""

    event: p.Fetched
    shared: Shared


class PairSync(IslandSync):
    """One member that meets others in pairs or groups between full merges."""

    config: StrategyConfig
    pairs: GossipReplica | None = None
    pair_machine: p.PairMachine | None = None
    base: tuple[str, int, str] | None = None
    outcome: p.Apply | None = None
    pair_mark = 0
    pair_steps = 0
    """Meetings at this send point; `pair_mark`: local steps when the first of them began."""
    pair_samples = 0

    def begin_pairs(self, config: StrategyConfig) -> None:
        """Before `start`: how this member's run gossips."""
        self.config = config
        self.shared: dict[MemberId, Shared] = {}
        self.timeout: tuple[float, p.Event] | None = None
        self.retry_s = 0.0
        self.plan, self.addresses = PairPlan(), dict[str, str]()
        self.pairs = GossipReplica(spec=self.replica.specs[0], tensors=self.replica.tensors, step=step_of(config))
        self.mail = PairMail(
            store=self.store,
            transport=self.transport,
            do=lambda job: self.threads.do(job, waits=True),  # type: ignore[arg-type]  # `Heard` is told to `_handle`
            retry_s=config.pair_timeout_s / p.RETRIES_PER_TIMEOUT,
            waits=self.executor is not None,
        )

    def close(self) -> None:
        """End what listens to partners as well."""
        with self.changed:
            self.stopped = True
            self.mail.close()
        super().close()

    # ------------------------------------------------------------ events

    def _handle(self, event: ev.Event) -> None:
        with self.changed:
            if isinstance(event, _Fetched):
                self._fetched(event)
            elif isinstance(event, p.FetchFailed):
                self._pair(event)
            elif isinstance(event, Heard):
                if (said := self.mail.hear(event)) is not None:
                    self._pair(said)
            else:
                super()._handle(event)
                if isinstance(event, ev.Delivered) and event.batch.nonce == self.machine.nonce:
                    self._heard(event.batch)
            self._look_at_timers()
            if self.executor is not None:
                self._listen()

    def pump(self) -> bool:
        """Inline nobody waits for what partners say: have a look."""
        with self.changed:
            self._listen()
        return super().pump()

    def _listen(self) -> None:
        """To the others of the exchange that is going on, and of the next one: they may begin it before."""
        machine = self._machine()
        if machine is None or self.stopped:
            return
        going_on = machine.pair is not None and machine.state in ("collecting", "ready")
        now = [machine.pair] if machine.pair is not None and going_on else []
        self.mail.listen(machine.me, [*now, *self.plan.ahead(machine)], self._address_of)

    def _address_of(self, member: MemberId) -> str | None:
        return self.addresses.get(str(member)) or self.machine.peers.get(str(member), (None, ()))[0]

    def _heard(self, batch: msg.Batch) -> None:
        for body in batch.bodies:
            if isinstance(body, PairRosters):
                self._machine()  # a new incarnation has nothing to do with rounds of the old
                self.plan.learn(body.rounds)
                self.addresses |= dict(body.addresses)
            elif isinstance(body, PairHear):
                self._pair(body.message)

    def _fetched(self, event: _Fetched) -> None:
        if self.pair_machine is not None and self.pair_machine.pair == event.event.pair:
            self.shared[event.event.member] = event.shared
            self._pair(event.event)

    def _look_at_timers(self) -> None:
        now, machine = self.clock(), self.pair_machine
        if self.timeout is not None and self.timeout[0] <= now:
            event, self.timeout = self.timeout[1], None
            self._pair(event)
        if machine is not None and machine.is_waiting and self.retry_s <= now:
            self.retry_s = now + self.config.pair_timeout_s / p.RETRIES_PER_TIMEOUT
            self._pair(p.RetryDue())

    def _pair(self, event: p.Event) -> None:
        machine = self._machine()
        if machine is None:
            return
        for command in machine.handle(event):
            match command:
                case p.Say(to=to, message=message):
                    self.mail.say(to, message)
                case p.Tell(message=message):
                    self.bodies.append(PairTell(message=message))
                case p.FetchPayload(offer=offer):
                    self.threads.do(lambda offer=offer: self._fetch(offer))  # type: ignore[misc]
                case p.KeepTime(pair=pair):
                    self._keep_time(pair)
                case p.Apply():
                    self.outcome = command
                    self._wake()
                case p.Skip(pair=pair):
                    if machine.last_round == pair.round_ and self.outcome is None:
                        self.shared = {}
        self._flush()

    def _machine(self) -> p.PairMachine | None:
        """Of the present incarnation; a new one has nothing to do with exchanges of the old."""
        if self.machine.incarnation is None:
            return None
        if self.pair_machine is None or self.pair_machine.me != self.machine.id:
            self.pair_machine = p.PairMachine(me=self.machine.id)
            self.mail.close()
            self.timeout, self.shared, self.outcome = None, {}, None
            self.plan, self.addresses = PairPlan(), {}
        return self.pair_machine

    def _keep_time(self, pair: p.PairId) -> None:
        now, timeout_s = self.clock(), self.config.pair_timeout_s
        self.timeout = (now + timeout_s, p.TimedOut(pair=pair))
        self.retry_s = now + timeout_s / p.RETRIES_PER_TIMEOUT

    def _fetch(self, offer: p.Offer) -> ev.Event:
        failed: ev.Event = p.FetchFailed(pair=offer.pair, member=offer.sender)  # type: ignore[assignment]
        assert self.pairs is not None
        address = self._address_of(offer.sender)
        if address is None:
            return failed
        try:
            (blob,) = self.transport.fetch(
                address,
                [_key(offer.pair)],
                timeout_s=self.settings.timeout_s,
                wait_s=0.0,
                max_bytes=self.pairs.num_bytes,
            )
            if digest(blob.data) != offer.digest:
                return failed
            shared = self.pairs.parse(blob.data)
        except (TransportError, PayloadDamaged):
            return failed
        done = _Fetched(event=p.Fetched(pair=offer.pair, member=offer.sender), shared=shared)
        return done  # type: ignore[return-value]

    # ------------------------------------------------------------ the step boundary

    def progress(self) -> float:
        """As every island reckons it, with what pairs have committed since the last merge."""
        return min(super().progress() + self.pair_samples / self.settings.total_samples, 1.0)

    def _decide(self) -> Action:
        saves = any(isinstance(order, msg.Save | msg.Stop) for order in self.orders)
        if saves and self.failure is None and not self.machine.reset_wanted:
            self._apply_pair()
            if self._busy():  # what is saved must be what the journal will say
                self._news_seen = self._news
                return self._wait("exchange")
        return super()._decide()

    def _apply_due(self) -> None:
        self._apply_pair()
        super()._apply_due()
        self._follow_anchor()

    def _follow_anchor(self) -> None:
        """After a merge, a fetched state or a reset the member's own anchor is the one of the run."""
        state = self.machine.fragments[0]
        base = (self.machine.nonce, state.n, state.chain)
        if state.n < 0 or base == self.base or self.pairs is None:
            return
        if self.base is None or self.base[0] != base[0]:
            self.pairs.momentum_N.zero_()
        self.pairs.anchor_N = self.replica.parts[0].anchor.clone()
        self.pairs.offered_N = None
        self.base, self.pair_mark, self.pair_samples = base, self.schedule.total_steps, 0
        self.pair_steps = 0

    def _exchanging(self) -> bool:
        machine = self.pair_machine
        current = machine is not None and machine.me.incarnation == self.machine.incarnation
        return self.outcome is not None or (current and machine is not None and machine.state != "idle")

    def _busy(self) -> bool:
        """Whether something is not on the record that what is saved or merged now would hold."""
        machine = self.pair_machine
        current = machine is not None and machine.me.incarnation == self.machine.incarnation
        return self._exchanging() or (current and machine is not None and bool(machine.untold))

    def _apply_pair(self) -> None:
        outcome, self.outcome = self.outcome, None
        machine = self.pair_machine
        if outcome is None or machine is None or machine.me.incarnation != self.machine.incarnation:
            return
        if self.machine.reset_wanted or self.pairs is None:
            return
        own = outcome.pair.members.index(machine.me)
        self.pairs.apply([self.shared[offer.sender] for offer in outcome.offers], own)
        state, offer = self.machine.fragments[0], outcome.offers[own]
        self.pair_samples += round((offer.upto - state.watermark) * self.machine.fleet_samples())
        state.watermark, self.shared = offer.upto, {}
        self._trim()

    def _send_due(self) -> None:
        if self._exchanging():
            return
        on_time = self.schedule.on_time(0, self._anchor_progress())
        ahead = self._next_round() if not on_time else None
        if ahead is not None:
            self._meet(*ahead)
        elif not self._busy():
            super()._send_due()

    def _next_round(self) -> tuple[int, p.PairId | None] | None:
        """At a send point, with a roster, nothing under way, and samples left to offer in the next merge."""
        machine, state = self._machine(), self.machine.fragments[0]
        if machine is None or self.machine.consumed <= state.watermark:
            return None
        due = self._at_send_point() or 0 < self.pair_steps < self.config.gossip_steps
        free = state.pending is None and state.staged is None and not self.machine.open_seen(0)
        left = self.machine.consumed < self.machine.num_leased() and not self.machine.leaving
        behind = self.machine.log.next(0, state.chain) is not None
        if not (due and free and left) or behind or machine.num_unrecorded >= p.MOST_UNRECORDED:
            return None
        return self.plan.next(machine)

    def _at_send_point(self) -> bool:
        """Whether the local steps of a round are made since the last send point."""
        return self.schedule.total_steps - self.pair_mark >= self.config.inner_steps

    def _meet(self, round_: int, pair: p.PairId | None) -> None:
        """Begin an exchange, or let the round pass: it is this member's turn to meet nobody."""
        machine = self.pair_machine
        assert machine is not None and self.pairs is not None
        if self._at_send_point():
            self.pair_mark, self.pair_steps = self.schedule.total_steps, 0
        self.pair_steps += 1
        if pair is None:
            self.plan.sit_out(round_)
            return
        data = self.pairs.publish()
        self.store.discard("gossip")
        named = self.store.put(_key(pair), data)
        self.shared = {machine.me: self.pairs.parse(data)}
        self._pair(
            p.Begin(pair=pair, since=self.machine.fragments[0].watermark, upto=self.machine.consumed, digest=named)
        )


def _key(pair: p.PairId) -> str:
    return f"gossip/{pair.round_}"
