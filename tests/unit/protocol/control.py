"""A coordinator with a journal in memory and members made of messages: traces are written as what is said to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from orchestrator import events as ev
from orchestrator.coordinator import Coordinator, RunPlan
from orchestrator.exchange_rules import OpenExchange
from orchestrator.run_state import Membership, RunState
from orchestrator.settings import ExchangeConfig, RobustConfig
from strategies.config import StrategyConfig
from workers import messages as msg
from workers.records import GENESIS_HASH, MemberId, OfferId, Record, Row, Term, TermRecord, make_row

BATCH = 2


def run_plan(*, members: int, fragments: int, samples: int, steps: int, exchange: dict[str, object]) -> RunPlan:
    settings: dict[str, object] = {"quorum": 0.5, "grace_s": 2.0, "progress_timeout_s": 5.0, "suspect_s": 3.0}
    return RunPlan(
        run_id="run",
        islands=tuple(f"island-{i}" for i in range(members)),
        total_samples=samples,
        seq_len=8,
        exchange=ExchangeConfig.model_validate({**settings, "limbo_s": 30.0, **exchange}),
        strategy=StrategyConfig(inner_steps=steps, num_fragments=fragments),
        eval_every=0.5,
        start_timeout_s=10.0,
        snapshot_every_s=1e9,
        replace_dead=True,
        max_restarts=100,
        max_refusals=3,
    )


@dataclass
class Control:
    """One controller life after the other on one journal."""

    members: int = 3
    fragments: int = 1
    chunks: int = 2
    samples: int = 400
    steps: int = 4
    exchange: dict[str, object] = field(default_factory=dict)
    load: Literal["equal", "by_speed"] = "equal"
    step_s: dict[str, float] = field(default_factory=dict)  # what members measured
    strategy: dict[str, object] = field(default_factory=dict)
    robust: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.plan = run_plan(
            members=self.members,
            fragments=self.fragments,
            samples=self.samples,
            steps=self.steps,
            exchange=self.exchange,
        )
        strategy = self.plan.strategy.model_dump() | self.strategy
        self.plan = replace(self.plan, load=self.load, strategy=StrategyConfig.model_validate(strategy))
        self.plan = replace(self.plan, robust=RobustConfig.model_validate(self.robust))
        self.now = 0.0
        self.hold = False  # rows are written but not flushed
        self.rows: list[Row] = []
        self.unflushed: list[Row] = []
        self.sent: list[msg.Batch] = []
        self.said: list[str] = []
        self.spawned: list[str] = []
        self.ended: list[str] = []
        self.finished: ev.Finish | None = None
        self.died: ev.Die | None = None
        self.nonces: dict[str, str] = {}
        self.consumed: dict[str, int] = {}
        self.versions: dict[str, list[int]] = {}
        self.terms = 0
        self.restart()

    # ------------------------------------------------------------ the controller

    def restart(self, *, lose_unflushed: bool = True) -> None:
        """A new life on the same journal; what was not flushed is lost, or survives."""
        if not lose_unflushed:
            self.rows += self.unflushed
        self.unflushed = []
        self.terms += 1
        record = TermRecord(lineage=0, number=self.terms, controller=f"c{self.terms}")
        last = self.rows[-1].hash if self.rows else GENESIS_HASH
        self.rows.append(make_row(len(self.rows), last, record))
        self.term = Term(lineage=0, number=self.terms, controller=f"c{self.terms}")
        self.coordinator = Coordinator(self.plan, list(self.rows), self.term, now=self.now)

    @property
    def state(self) -> RunState:
        return self.coordinator.state

    def open(self, fragment: int = 0) -> OpenExchange:
        found = self.coordinator.exchanges[fragment].open
        assert found is not None, "no exchange is open"
        return found

    def head(self, fragment: int = 0) -> int:
        return self.state.heads[fragment].version.n

    def handle(self, event: ev.Event) -> None:
        for command in self.coordinator.handle(event, self.now):
            match command:
                case ev.Append(rows=rows):
                    self.unflushed += rows
                case ev.Send(batch=batch):
                    self.sent.append(batch)
                case ev.Say(text=text):
                    self.said.append(text)
                case ev.Spawn(name=name):
                    self.spawned.append(name)
                case ev.End(nonce=nonce):
                    self.ended.append(nonce)
                case ev.Finish():
                    self.finished = command
                case ev.Die():
                    self.died = command
                case _:
                    pass
        if not self.hold:
            self.flush()

    def flush(self) -> None:
        """What was written is durable now."""
        while self.unflushed:
            rows, self.unflushed = self.unflushed, []
            self.rows += rows
            self.handle(ev.Flushed(seq=rows[-1].seq))

    def tick(self, seconds: float = 0.0, *, quiet: Sequence[str] = ()) -> None:
        """Time passes in steps of a second; members that are not `quiet` send heartbeats."""
        until = self.now + seconds
        while True:
            self.now = min(self.now + 1.0, until)
            for name in self.state.current:
                if name not in quiet:
                    self.hello(name)
            self.handle(ev.Tick())
            if self.now >= until:
                return

    def records(self, kind: type[Record]) -> list[Record]:
        return [row.record for row in self.rows if isinstance(row.record, kind)]

    # ------------------------------------------------------------ members

    def id(self, name: str) -> MemberId:
        return self.state.current[name]

    def entry(self, name: str) -> Membership:
        return self.state.members[self.id(name)]

    def envelope(
        self, name: str, *bodies: msg.MemberBody, nonce: str = "", incarnation: int | None = -1
    ) -> msg.Envelope:
        nonce = nonce or self.nonces[name]
        known = self.state.nonces.get(nonce)
        number = known.incarnation if known is not None else None
        return msg.Envelope(
            run_id="run",
            term=None,
            name=name,
            incarnation=number if incarnation == -1 else incarnation,
            nonce=nonce,
            bodies=bodies,
        )

    def say(self, name: str, *bodies: msg.MemberBody, nonce: str = "") -> None:
        self.handle(ev.Received(envelope=self.envelope(name, *bodies, nonce=nonce)))

    def told(self, name: str, kind: type[msg.ControllerBody]) -> list[msg.ControllerBody]:
        """Bodies of a kind that the present process of a member was told, oldest first."""
        mine = [batch for batch in self.sent if batch.nonce == self.nonces[name]]
        return [body for batch in mine for body in batch.bodies if isinstance(body, kind)]

    def info(self, name: str, node: str = "") -> msg.ProcessInfo:
        return msg.ProcessInfo(address=f"at-{name}", node=node or f"node-{name}", weight=16, batch_size=BATCH)

    def join(self, name: str, *, nonce: str = "", ready: bool = False, node: str = "") -> None:
        nonce = nonce or f"{name}-process-{len(self.state.nonces)}"
        body = msg.Join(info=self.info(name, node), ready=ready)
        self.handle(ev.Received(envelope=self.envelope(name, body, nonce=nonce, incarnation=None)))
        if nonce in self.state.nonces:
            self.nonces[name], self.consumed[name] = nonce, 0
            self.versions[name] = [-1] * self.fragments

    def hello(self, name: str, *, waiting: str = "", leased: int | None = None) -> None:
        entry = self.entry(name)
        open_ = [exchange.open for exchange in self.coordinator.exchanges] or [None] * self.fragments
        reports = tuple(
            msg.FragmentReport(
                n=n,
                chain="",
                holds_next=False,
                barred=None,
                watermark=0,
                exchange=x.id if x is not None else None,
                attempt=x.attempt if x is not None else 0,
                spread=x is not None and x.state == "spread",
            )
            for n, x in zip(self.versions[name], open_, strict=True)
        )
        self.say(
            name,
            msg.Hello(
                info=self.info(name),
                journal_len=len(self.rows),
                num_leased=entry.num_leased if leased is None else leased,
                consumed=self.consumed[name],
                steps=self.consumed[name] // BATCH,
                bytes_sent=0,
                fragments=reports,
                waiting=waiting,
                median_step_s=self.step_s.get(name, 0.0),
            ),
        )

    def start(self) -> None:
        """All join, the first makes version 0, all hold it, all have leases."""
        for i in range(self.members):
            self.join(f"island-{i}")
        self.say(
            "island-0",
            msg.GenesisMade(
                digests=tuple(f"g{f}" for f in range(self.fragments)),
                num_params=10,
                num_chunks=(self.chunks,) * self.fragments,
            ),
        )
        for i in range(self.members):
            self.ready(f"island-{i}")

    def ready(self, name: str) -> None:
        """A member holds the head of every fragment."""
        self.versions[name] = [head.version.n for head in self.state.heads]
        self.hello(name)

    # ------------------------------------------------------------ exchanges

    def make_offer(self, name: str, fragment: int = 0, *, steps: int = 0, born: int | None = None) -> msg.Offer:
        """What a member offers after `steps` inner steps above its watermark (default: a whole round)."""
        entry = self.entry(name)
        since = entry.watermarks[fragment]
        upto = since + (steps or self.steps) * BATCH
        head = self.state.heads[fragment].version
        self.consumed[name] = max(self.consumed[name], upto)
        return msg.Offer(
            fragment=fragment,
            base=head,
            seq=head.n + 1,
            born=head.n if born is None else born,
            since=since,
            upto=upto,
            ranges=self.state.offered_ranges(self.id(name), since, upto),
            num_steps=steps or self.steps,
            weight=16,
            chunk_digests=tuple(f"{name}{c}" for c in range(self.chunks)),
            sumsq=(1.0,) * self.chunks,
            num_bytes=100,
        )

    def offer(self, name: str, fragment: int = 0, *, steps: int = 0, born: int | None = None) -> OfferId:
        body = self.make_offer(name, fragment, steps=steps, born=born)
        offer = OfferId(member=self.id(name), seq=body.seq)
        self.say(name, body)
        return offer

    def reduce(self, *names: str, fragment: int = 0) -> None:
        """Owners (all, or those named) finish their parts."""
        open_ = self.open(fragment)
        for owner in sorted(set(open_.owners)):
            if not names or owner.name in names:
                self.say(owner.name, self.reduced(owner.name, fragment))

    def reduced(self, name: str, fragment: int = 0) -> msg.Reduced:
        open_ = self.open(fragment)
        mine = [chunk for chunk, owner in enumerate(open_.owners) if owner == self.id(name)]
        return msg.Reduced(
            fragment=fragment,
            exchange=open_.id,
            attempt=open_.attempt,
            roster_digest=open_.roster_digest,
            chunks=tuple((chunk, f"r{chunk}-{open_.roster_digest[:6]}") for chunk in mine),
        )

    def have(self, name: str, fragment: int = 0, *, digest: str = "next") -> None:
        open_ = self.open(fragment)
        digests = tuple(open_.reduced[chunk] for chunk in range(self.chunks))
        body = msg.Have(
            fragment=fragment,
            exchange=open_.id,
            attempt=open_.attempt,
            results=msg.results_digest(digests),
            next_digest=digest,
        )
        self.say(name, body)

    def missing(self, owner: str, offer: OfferId, fragment: int = 0) -> None:
        open_ = self.open(fragment)
        self.say(
            owner,
            msg.Missing(fragment=fragment, exchange=open_.id, attempt=open_.attempt, offer=offer, why="no answer"),
        )

    def refused(self, owner: str, offer: OfferId, fragment: int = 0) -> None:
        open_ = self.open(fragment)
        body = msg.Refused(fragment=fragment, exchange=open_.id, attempt=open_.attempt, offer=offer, why="not finite")
        self.say(owner, body)

    def commit(self, *names: str, fragment: int = 0) -> None:
        """A whole exchange of all members (or of those named); they hold the new version afterwards."""
        everybody = names or tuple(sorted(self.state.current))
        for name in everybody:
            self.offer(name, fragment)
        if self.open(fragment).state == "open":
            self.tick(self.plan.exchange.grace_s + 1)
        self.reduce(fragment=fragment)
        before = self.head(fragment)
        for name in sorted(self.state.current):
            if self.head(fragment) == before:
                self.have(name, fragment)
        assert self.head(fragment) == before + 1
        for name in sorted(self.state.current):
            self.versions[name][fragment] = self.head(fragment)
            self.hello(name)

    def die(self, name: str) -> None:
        self.handle(ev.ProcessDied(name=name, nonce=self.nonces[name], why="killed"))
