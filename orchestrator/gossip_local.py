"""A gossip run in one process: production pair machines, pair book, outer steps, data and transport; no all-reduce.

Members take turns on one thread, one inner step each, and time is counted in turns. Every `inner_steps` of its own a
member is at its send point: it publishes its payload in its store and begins the exchange that the newest roster names;
its partner fetches over the loopback transport. Training goes on meanwhile. Samples are leased and committed by what
pairs report: what a dead member did since the last commit it is in is free again, and nothing else.

Every `merge_every` rounds, and at the end until nothing is open, the round's roster is one group of all members: the
full merge, after which all anchors are equal. That is what is evaluated.

This is no run of `atoll train` yet: no journal on disk, no snapshots, no processes. For tests and `make bench-robust`.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from orchestrator.build import island_name, num_islands, pack_path, resolve
from orchestrator.config import RunConfig
from orchestrator.pairing import Command as BookCommand
from orchestrator.pairing import Fenced, FenceWanted, PairBook, PairRecord, Publish, Row, Send, Settled, Write
from strategies import topology as topo
from strategies.errors import SettingError
from strategies.fragments import TensorSpec, default_chunk_values, plan_fragments
from strategies.gossip import NoLoCo
from workers import pair as p
from workers import ranges
from workers.data.permutation import sample_ids
from workers.data.reader import PackReader
from workers.device import resolve_device
from workers.digest import digest
from workers.gossip_replica import STEPS, Averaging, GossipReplica, PayloadDamaged, Shared
from workers.inner_loop import InnerLoop, evaluate
from workers.loop_checks import synchronised
from workers.model.factory import build_model
from workers.optim import build_optimizer
from workers.ranges import Range
from workers.records import MemberId
from workers.samples import cut, evenly_spread, positions_of
from workers.store import BlobStore
from workers.transport.errors import TransportError
from workers.transport.loopback import LoopbackNetwork, LoopbackTransport

TURN_S = 0.05
MAX_TURNS = 1_000_000
FROM_CONTROLLER = (p.Recorded, p.Asked, p.Gone)
TOPOLOGIES = ("random", "exponential", "ring", "near")


@dataclass(frozen=True, kw_only=True, slots=True)
class GossipSettings:
    """Who meets whom, and what they do. `step`: `noloco` or `gossip` (D-SGD); `pair_timeout_s` in virtual time.

    `topology`: `random`, `exponential`, `ring`, or `near`: within `regions` (member -> region), but for the share
    `keep_gap` of the rounds, which keeps so much of the spectral gap.
    """

    step: str = "noloco"
    topology: str = "random"
    inner_steps: int = 50
    alpha: float = 0.5
    beta: float = 0.7
    gamma: float = 0.7
    group_size: int = 2
    merge_every: int = 0
    pair_timeout_s: float = p.PAIR_TIMEOUT_S
    seed: int = 0
    regions: Mapping[str, str] = field(default_factory=dict)
    keep_gap: float = 0.5

    def build_step(self) -> NoLoCo | Averaging:
        """The outer step. Raises SettingError, with the bound, for one that is not stable."""
        if self.step not in STEPS:
            raise SettingError(f"step = {self.step!r} is not known; known are {', '.join(STEPS)}")
        if self.step == "gossip":
            return Averaging()
        return NoLoCo(alpha=self.alpha, beta=self.beta, gamma=self.gamma, group_size=min(self.group_size, 2))

    def check(self, num_members: int) -> None:
        """Raise SettingError, with the reason, for what cannot converge."""
        self.build_step()
        if self.topology not in TOPOLOGIES:
            raise SettingError(f"topology = {self.topology!r} is not known; known are {', '.join(TOPOLOGIES)}")
        if self.topology in ("exponential", "ring") and self.group_size != 2:
            raise SettingError(f"topology = {self.topology!r} has pairs, group_size = {self.group_size}")
        if self.merge_every < 0 or self.inner_steps < 1:
            raise SettingError(f"merge_every = {self.merge_every}, inner_steps = {self.inner_steps}: at least 0 and 1")
        topo.check_group_size(num_members, self.group_size)
        names = [island_name(i) for i in range(num_members)]
        if self.topology == "near":
            topo.check_keep_gap(self.keep_gap)
            self.groups(names, 0, pairs_only=True)
        if self.topology in ("exponential", "ring"):
            period = topo.period_of_exponential(num_members) if self.topology == "exponential" else 2
            rounds = [self.groups(names, round_, pairs_only=True) for round_ in range(period)]
            topo.check_converges([topo.group_matrix(names, groups) for groups in rounds])

    def groups(self, names: list[str], round_: int, *, pairs_only: bool = False) -> topo.Groups:
        """Who meets in a round: everybody where a full merge is due."""
        if not pairs_only and self.is_merge(round_):
            return topo.everybody(names)
        if len(names) < max(self.group_size, 2):
            return topo.everybody(names) if len(names) > 1 else ()
        if self.topology == "exponential":
            return topo.exponential_pairs(names, round_=round_)
        if self.topology == "ring":
            return topo.ring_pairs(names, round_=round_)
        if self.topology == "near":
            return topo.near_groups(
                names, regions=self.regions, seed=self.seed, round_=round_, size=self.group_size,
                keep_gap=self.keep_gap,
            )  # fmt: skip
        return topo.random_groups(names, seed=self.seed, round_=round_, size=self.group_size)

    def is_merge(self, round_: int) -> bool:
        """Whether a round is a scheduled full merge."""
        return self.merge_every > 0 and (round_ + 1) % self.merge_every == 0


@dataclass(kw_only=True)
class Member:
    """One incarnation: its machine, tensors, transport, and the samples that it was leased."""

    me: MemberId
    machine: p.PairMachine
    replica: GossipReplica
    inner: InnerLoop
    store: BlobStore
    transport: LoopbackTransport
    leases: list[Range] = field(default_factory=list)
    consumed: int = 0
    watermark: int = 0
    steps: int = 0
    roster: tuple[int, p.PairId | None] = (-1, None)
    shared: dict[MemberId, Shared] = field(default_factory=dict)
    timers: list[tuple[float, p.Event]] = field(default_factory=list)
    alive: bool = True


class GossipRun:
    """Members and the pair book of one run, in one process."""

    def __init__(self, config: RunConfig, settings: GossipSettings) -> None:
        """Builds all members with the same parameters. Raises SettingError for what cannot converge."""
        self.config, self.settings = resolve(config), settings
        settings.check(num_islands(self.config))
        pack = pack_path(self.config)
        assert pack is not None, "gossip in one process reads a pack"
        self.reader = PackReader(pack)
        self.total_samples = -(-self.config.train.tokens // self.reader.index.seq_len)
        self.final = False
        self.book = PairBook(topology=lambda names, round_: self._groups(list(names), round_))
        self.network, self.members = LoopbackNetwork(), dict[str, Member]()
        self.queue: deque[tuple[MemberId, p.Event]] = deque()
        self.rows: list[Row] = []
        self.now_s, self.next_position, self.turns = 0.0, 0, 0
        self.free: tuple[Range, ...] = ()
        self.committed: tuple[Range, ...] = ()
        self.leases: dict[MemberId, list[Range]] = {}
        self.incarnations: Counter[str] = Counter()
        self.published_s = float("-inf")
        self.counts: Counter[str] = Counter()
        self.partners: set[int] = set()
        self.waits_s: dict[tuple[MemberId, p.PairId], float] = {}
        self.longest_s = 0.0
        for index in range(num_islands(self.config)):
            self.spawn(island_name(index))

    def _groups(self, names: list[str], round_: int) -> topo.Groups:
        return topo.everybody(names) if self.final else self.settings.groups(names, round_)

    # ------------------------------------------------------------ members

    def spawn(self, name: str) -> Member:
        """A new incarnation, from the parameters of the seed, or the anchor of a living member."""
        config = self.config
        torch.set_num_threads(config.train.threads)
        index = self.reader.index
        bundle = build_model(config.model, vocab_size=index.vocab_size, seq_len=index.seq_len, seed=config.train.seed)
        device = resolve_device("cpu", index=0)
        tensors = {key: value.data for key, value in synchronised(bundle.model).items()}
        specs = [TensorSpec(name=key, shape=tuple(value.shape)) for key, value in tensors.items()]
        num_values = sum(spec.numel for spec in specs)
        chunk = default_chunk_values(num_values, block=1)
        (whole,) = plan_fragments(specs, num_fragments=1, pattern="sequential", chunk_values=chunk)
        self.incarnations[name] += 1
        me = MemberId(name=name, incarnation=self.incarnations[name])
        store = BlobStore()
        transport = LoopbackTransport(self.network, str(me), store)
        transport.start()
        member = Member(
            me=me,
            machine=p.PairMachine(me=me),
            replica=GossipReplica(spec=whole, tensors=tensors, step=self.settings.build_step()),
            inner=InnerLoop(bundle, build_optimizer(bundle.model, config.train), config.train, device),
            store=store,
            transport=transport,
        )
        self.bundle = bundle
        donor = next((m for m in self.members.values() if m.alive), None)
        if donor is not None and self.incarnations[name] > 1:
            member.replica.begin_from(
                Shared(
                    anchor_N=donor.replica.anchor_N, displacement_N=donor.replica.displacement(),
                    momentum_N=donor.replica.momentum_N,
                )
            )  # fmt: skip
        self.members[name] = member
        self.leases[me] = member.leases
        self._obey_book(self.book.join(me))
        return member

    def kill(self, name: str, *, noticed: bool = True) -> None:
        """A member's process is gone; `noticed`: the controller is told, as Ray does at once."""
        member = self.members[name]
        member.alive = False
        member.transport.stop()
        if noticed:
            self.fence(name)

    def fence(self, name: str) -> None:
        """The controller's final verdict on a member's incarnation."""
        self._obey_book(self.book.fence(self.members[name].me))
        self._settle()

    def restart_controller(self) -> None:
        """The controller dies and another one reads its rows; what was on the way to it or from it is lost."""
        self.book = PairBook(topology=lambda names, round_: self._groups(list(names), round_))
        self.book.replay(self.rows)
        self.queue = deque((to, event) for to, event in self.queue if not isinstance(event, FROM_CONTROLLER))
        self.published_s = self.now_s

    def alive(self) -> list[Member]:
        """Members whose processes live, in order."""
        return [member for _, member in sorted(self.members.items()) if member.alive]

    # ------------------------------------------------------------ leases

    def _lease(self, member: Member) -> None:
        """Another round's samples, what was given back first."""
        ahead = member.leases and ranges.count(member.leases) > member.consumed
        if ahead or self.book.live.get(member.me.name) != member.me:
            return
        wanted = self.settings.inner_steps * self.config.train.batch_size
        taken, self.free = ranges.take(self.free, wanted)
        fresh = min(wanted - ranges.count(taken), self.total_samples - self.next_position)
        if fresh > 0:
            taken = (*taken, (self.next_position, self.next_position + fresh))
            self.next_position += fresh
        ranges.append(member.leases, taken)

    def is_done(self) -> bool:
        """Whether every sample is committed."""
        return ranges.count(self.committed) == self.total_samples

    def _commit(self, record: PairRecord) -> None:
        for span in record.spans:
            new = ranges.cut(self.leases[span.member], span.since, span.upto)
            assert ranges.intersect(self.committed, new) == (), f"{record.pair}: a sample is committed twice"
            self.committed = ranges.union(self.committed, new)

    def _give_back(self, row: Settled) -> None:
        lost = ranges.cut(self.leases[row.member], row.watermark, ranges.count(self.leases[row.member]))
        self.free = ranges.union(self.free, lost)
        self.counts["samples given back"] += ranges.count(lost)

    # ------------------------------------------------------------ messages

    def _obey_book(self, commands: list[BookCommand]) -> None:
        for command in commands:
            match command:
                case Write(row=row):
                    self.rows.append(row)
                    if isinstance(row, PairRecord):
                        self._commit(row)
                        self.partners.add(len(row.spans))
                    elif isinstance(row, Settled):
                        self._give_back(row)
                    elif isinstance(row, Fenced):
                        self.counts["fenced"] += 1
                case Send(to=to, message=message):
                    self.queue.append((to, message))
                case Publish(round_=round_, pairs=pairs):
                    self.published_s = self.now_s
                    for member in self.alive():
                        mine = next((pair for pair in pairs if member.me in pair.members), None)
                        member.roster = (round_, mine)
                case FenceWanted(member=member_id):
                    if self.members[member_id.name].me == member_id:
                        self.kill(member_id.name)

    def _settle(self) -> None:
        while self.queue:
            to, event = self.queue.popleft()
            member = self.members.get(to.name)
            if member is not None and member.me == to and member.alive:
                self._handle(member, event)

    def _handle(self, member: Member, event: p.Event) -> None:
        for command in member.machine.handle(event):
            match command:
                case p.Say(to=to, message=message):
                    self.queue.append((to, message))
                case p.Tell(message=p.Report() as report):
                    self._obey_book(self.book.report(report))
                case p.Tell(message=p.Query() as query):
                    self._obey_book(self.book.query(query))
                case p.FetchPayload(offer=offer):
                    self.queue.append((member.me, self._fetch(member, offer)))
                case p.KeepTime(pair=pair):
                    self.waits_s[member.me, pair] = self.now_s
                    timeout_s = self.settings.pair_timeout_s
                    member.timers.append((self.now_s + timeout_s, p.TimedOut(pair=pair)))
                    every_s = timeout_s / p.RETRIES_PER_TIMEOUT
                    for turn in range(1, 3 * p.RETRIES_PER_TIMEOUT):
                        member.timers.append((self.now_s + turn * every_s, p.RetryDue(pair=pair)))
                case p.Apply(pair=pair, offers=offers):
                    self._apply(member, pair, offers)
                case p.Skip(pair=pair):
                    member.replica.skip()
                    self._over(member, pair, "skipped")

    def _fetch(self, member: Member, offer: p.Offer) -> p.Event:
        address = self.members[offer.sender.name].transport.address
        size = 12 * member.replica.spec.numel
        try:
            (blob,) = member.transport.fetch(address, [_key(offer.pair)], timeout_s=5.0, wait_s=0.0, max_bytes=size)
            if digest(blob.data) != offer.digest:
                return p.FetchFailed(pair=offer.pair, member=offer.sender)
            member.shared[offer.sender] = member.replica.parse(blob.data)
        except (TransportError, PayloadDamaged):
            return p.FetchFailed(pair=offer.pair, member=offer.sender)
        return p.Fetched(pair=offer.pair, member=offer.sender)

    def _apply(self, member: Member, pair: p.PairId, offers: tuple[p.Offer, ...]) -> None:
        merge = self.final or self.settings.is_merge(pair.round_)
        shared = [member.shared[offer.sender] for offer in offers]
        member.replica.apply(shared, own=pair.members.index(member.me), merge=merge)
        member.watermark = next(offer.upto for offer in offers if offer.sender == member.me)
        self._over(member, pair, "applied")

    def _over(self, member: Member, pair: p.PairId, what: str) -> None:
        member.shared = {}
        member.timers = [(at, event) for at, event in member.timers if not isinstance(event, p.TimedOut)]
        self.counts[what] += 1
        began_s = self.waits_s.pop((member.me, pair), self.now_s)
        self.longest_s = max(self.longest_s, self.now_s - began_s)

    # ------------------------------------------------------------ turns

    def turn(self) -> None:
        """Every member makes a step if it has samples, exchanges what is due, and hears what is due."""
        self.now_s += TURN_S
        self.turns += 1
        for member in self.alive():
            self._lease(member)
            self._train(member)
            if self._at_send_point(member):
                self._send(member)
            due = [event for at, event in member.timers if at <= self.now_s]
            member.timers = [(at, event) for at, event in member.timers if at > self.now_s]
            for event in due:
                self.queue.append((member.me, event))
            self._settle()
        self._next_round_if_due()

    def _train(self, member: Member) -> None:
        upto = min(member.consumed + self.config.train.batch_size, ranges.count(member.leases))
        todo = ranges.cut(member.leases, member.consumed, upto)
        if not todo:
            return
        positions = positions_of(todo)
        ids = sample_ids(positions, size=self.reader.num_samples("train"), seed=self.config.train.seed)
        batch = torch.from_numpy(self.reader.batch(ids))
        member.inner.step(batch, progress=self.progress())
        member.consumed += len(positions)
        member.steps += 1

    def progress(self) -> float:
        """Share of the run's samples that were trained on."""
        open_ = sum(member.consumed - member.watermark for member in self.alive())
        return min((ranges.count(self.committed) + open_) / self.total_samples, 1.0)

    def _at_send_point(self, member: Member) -> bool:
        round_, pair = member.roster
        if pair is None or round_ <= member.machine.last_round or member.machine.state != "idle":
            return False
        used_up = member.consumed == ranges.count(member.leases)
        return used_up or (member.steps > 0 and member.steps % self.settings.inner_steps == 0)

    def _send(self, member: Member) -> None:
        _, pair = member.roster
        assert pair is not None
        data = member.replica.publish()
        member.store.discard("gossip")
        digest_hex = member.store.put(_key(pair), data)
        member.shared = {member.me: member.replica.parse(data)}
        begin = p.Begin(pair=pair, since=member.watermark, upto=member.consumed, digest=digest_hex)
        self._handle(member, begin)
        self._settle()

    def _next_round_if_due(self) -> None:
        """A roster for the next send point, once everybody who lives is done with this one, or a round has passed."""
        at_end = self.next_position >= self.total_samples and not self.free
        self.final = self.final or (at_end and all(m.consumed == ranges.count(m.leases) for m in self.alive()))
        done = all(
            m.roster[1] is None or (m.machine.last_round >= m.roster[0] and m.machine.state == "idle")
            for m in self.alive()
        )
        period_s = max(self.settings.inner_steps * TURN_S, self.settings.pair_timeout_s)
        if done or self.now_s - self.published_s > period_s:
            self._obey_book(self.book.next_round())
            self._settle()

    def run(self, *, max_turns: int = MAX_TURNS) -> None:
        """Turn until every sample is committed and the last exchange was a full merge of all who live."""
        for _ in range(max_turns):
            if self.is_done() and self.merged():
                return
            if self.is_done():
                self.final = True
            self.turn()
        raise RuntimeError(f"not done after {max_turns} turns: {ranges.count(self.committed)} of {self.total_samples}")

    def merged(self) -> bool:
        """Whether all living members have the same anchor and nothing beyond it."""
        return len({m.replica.digest() for m in self.alive()}) == 1 and not any(m.shared for m in self.alive())

    def val_loss(self) -> float:
        """Validation loss of the merged model, nats per token."""
        assert self.merged(), "what is evaluated is the full merge"
        replica = self.alive()[0].replica
        params, offset = {}, 0
        for spec in replica.spec.tensors:
            params[spec.name] = replica.anchor_N[offset : offset + spec.numel].view(spec.shape)
            offset += spec.numel
        return evaluate(self.bundle, params, self._windows(), precision="fp32")

    def _windows(self) -> Iterator[torch.Tensor]:
        wanted = evenly_spread(self.reader.num_samples("val"), self.config.eval.windows)
        for ids in cut(wanted, self.config.eval.batch_size):
            yield torch.from_numpy(self.reader.batch(ids, "val"))

    def close(self) -> None:
        """End all transports."""
        for member in self.members.values():
            if member.alive:
                member.transport.stop()


def _key(pair: p.PairId) -> str:
    return f"gossip/{pair.round_}"
