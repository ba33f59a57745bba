"""Peers and trainers of a pipeline without tensors, for `orchestrator/simulation/swarm_brain.py`.

They follow `PeerHost`, `LocalHost` and `TrainerHost` call by call; a gradient is the microbatch that it is of, a state
the multiset of those that are in it, and its digest names both.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Protocol

from orchestrator.pipeline.plan import PipelinePlan
from workers.pipeline.accumulator import Accumulator, Begin
from workers.pipeline.calls import Call
from workers.pipeline.messages import (
    Alive,
    Applied,
    Apply,
    Collect,
    Done,
    DropStage,
    Evaluate,
    FenceStep,
    FromPeer,
    FromTrainer,
    Have,
    Holds,
    LocalStep,
    Offered,
    OfferWork,
    OpenStep,
    PeerPlace,
    Ping,
    Probe,
    Probed,
    Reduce,
    Reduced,
    Spread,
    TakeStage,
    ToPeer,
)
from workers.pipeline.trainer_desk import TrainerDesk

Content = Counter[tuple[int, int]]
"""(step, microbatch) -> how often it is in a state."""

Piece = tuple[int, int, str, int]
"""Step, round, peer and number of a contribution."""


class SymbolError(Exception):
    """An order that cannot be obeyed."""


class World(Protocol):
    """What peers and trainers ask of it."""

    now_s: float

    def peer_at(self, address: str) -> SymbolPeer:
        """Who can be fetched from; raises SymbolError."""

    def send(self, trainer: SymbolTrainer, place: PeerPlace, call: Call, round_: int, behind: int) -> None:
        """A call goes out."""

    def withdraw(self, trainer: SymbolTrainer, place: PeerPlace, call: Call, round_: int) -> None:
        """A withdrawal goes out."""

    def hear(self, trainer: SymbolTrainer, message: FromTrainer) -> None:
        """A trainer tells the controller."""


@dataclass(frozen=True, slots=True)
class State:
    """One stage at a version: what is in each of its fragments."""

    stage: int
    version: int
    contents: tuple[Content, ...]

    @property
    def digest(self) -> str:
        """Names it."""
        text = f"{self.stage}/{self.version}/{[sorted(content.items()) for content in self.contents]}"
        return blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(kw_only=True, slots=True)
class _Serving:
    name: str
    stage: int
    book: Accumulator
    sums: dict[int, dict[int, int]] = field(default_factory=dict)  # step -> microbatch -> version it was made with
    own: list[Content]  # by fragment, steps of its own since the anchor
    offered: dict[int, Content] = field(default_factory=dict)
    applies_at: int | None = None


class SymbolPeer:
    """See `PeerHost` and `LocalHost`."""

    def __init__(self, world: World, address: str, plan: PipelinePlan) -> None:
        self._world, self._address, self._plan = world, address, plan
        self._is_local = plan.sync_steps > 0
        self.held: dict[int, State] = {}
        self._next: dict[int, State] = {}
        self.serving: _Serving | None = None
        self._rounds: dict[int, int] = {}
        self._pieces: dict[Piece, dict[int, Content]] = {}  # fragment -> what is in it
        self._made_with: dict[Piece, int] = {}
        self._results: dict[tuple[int, int, int, str, int], tuple[Content, ...]] = {}

    def present(self) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, str], ...], int | None]:
        """What it holds, what it could move to, and what it serves."""
        held = tuple((stage, state.version) for stage, state in sorted(self.held.items()))
        following = tuple((stage, state.digest) for stage, state in sorted(self._next.items()))
        return held, following, self.serving.stage if self.serving is not None else None

    # ------------------------------------------------------------ trainers

    def call(self, call: Call, round_: int, behind: int = 0) -> Begin:
        """See `PeerHost.call`."""
        serving = self.serving
        if serving is None or serving.name != call.peer:
            return Begin.OTHER_VERSION
        if serving.applies_at is not None and call.version >= serving.applies_at:
            return Begin.OTHER_VERSION
        if not self._is_current(call.step, round_):
            return Begin.OTHER_VERSION
        is_at = call.version - behind == serving.book.version
        if call.direction == "forward":
            return Begin.RUN if is_at else Begin.OTHER_VERSION
        if not is_at and behind:
            done = serving.book.withdraw(call.step, call.microbatch, call.attempt)
            return Begin.DONE if done else Begin.OTHER_VERSION
        begin = serving.book.begin(call.step, call.microbatch, call.attempt)
        if begin is not Begin.RUN:
            return begin
        if not serving.book.finish(call.step, call.microbatch):
            return Begin.WITHDRAWN
        known = serving.sums.setdefault(call.step, {})
        assert call.microbatch not in known, f"{call} was added before"
        known[call.microbatch] = serving.book.version
        return Begin.DONE

    def withdraw(self, call: Call, round_: int) -> bool:
        """See `PeerHost.withdraw`."""
        serving = self.serving
        if serving is None or serving.name != call.peer or not self._is_current(call.step, round_):
            return False
        return serving.book.withdraw(call.step, call.microbatch, call.attempt)

    def _is_current(self, step: int, round_: int) -> bool:
        known = self._rounds.get(step, 0)
        if round_ > known:
            self._rounds[step] = round_
            if self.serving is not None:
                self.serving.book.restart(step)
                self.serving.sums.pop(step, None)
        return round_ >= known

    # ------------------------------------------------------------ the controller

    def do(self, order: ToPeer) -> FromPeer:
        """Obey; raises SymbolError."""
        match order:
            case Probe():
                return Probed(seconds=0.01 * len(self._address))
            case TakeStage():
                return self._take(order)
            case Collect():
                return self._collect(order)
            case Reduce():
                return self._reduce(order)
            case Spread():
                return self._spread(order)
            case Apply():
                return self._apply(order)
            case LocalStep():
                self._step(order)
            case OfferWork():
                return self._offer(order)
            case Ping():
                return Alive(progress=0, owes=False)
            case FenceStep(peer=name, step=step, round_=round_):
                if self.serving is not None and self.serving.name == name and self._is_current(step, round_):
                    self.serving.book.fence(step)
                    self.serving.sums.pop(step, None)
            case DropStage(stage=stage):
                if self.serving is None or self.serving.stage != stage:
                    self.held.pop(stage, None)
                    self._next.pop(stage, None)
        return Done()

    def _take(self, order: TakeStage) -> Holds:
        state = self.held.get(order.stage)
        if state is None or state.version != order.version:
            state = self._obtain(order)
            self.held[order.stage] = state
            self._next.pop(order.stage, None)
        name = order.serve_as
        step = order.step if order.step is not None else state.version
        known = self.serving
        if name is not None and (known is None or known.name != name or known.book.version != step):
            own: list[Content] = [Counter() for _ in range(self._plan.num_fragments)]
            self.serving = _Serving(name=name, stage=order.stage, book=self._new_book(step), own=own)
            if self._is_local:
                self._rounds.clear()
        return Holds(stage=order.stage, version=state.version, digest=state.digest)

    def _new_book(self, step: int) -> Accumulator:
        return Accumulator(version=step, num_open_steps=2 if self._plan.delayed else 1)

    def _obtain(self, order: TakeStage) -> State:
        for address in order.sources:
            try:
                held = self._world.peer_at(address).held.get(order.stage)
            except SymbolError:
                continue
            if held is not None and held.version == order.version:
                return held
        if order.sources or order.version != 0:
            raise SymbolError(f"stage {order.stage} at version {order.version} cannot be pulled from {order.sources}")
        return State(order.stage, 0, tuple(Counter() for _ in range(self._plan.num_fragments)))

    def _collect(self, order: Collect) -> Offered:
        serving = self.serving
        if serving is None or serving.name != order.peer:
            return Offered(microbatches=())
        if not self._is_current(order.step, order.round_):
            raise SymbolError(f"{order.peer} is in a newer round of step {order.step}")
        offer = serving.book.offer(order.step)
        made = serving.sums.get(order.step, {})
        assert set(offer) == made.keys(), f"{order.peer}: {offer}, {serving.sums}"
        for microbatch in offer:
            key = (order.step, order.round_, order.peer, microbatch)
            self._pieces[key], self._made_with[key] = {0: Counter([(order.step, microbatch)])}, made[microbatch]
        return Offered(microbatches=offer)

    def _reduce(self, order: Reduce) -> Reduced:
        groups = []
        fragment = self._plan.layout.fragment_of.get(order.unit, 0)
        for group in order.groups:
            total: Content = Counter()
            versions: set[int] = set()
            for part in group:
                peer = self if part.address == self._address else self._world.peer_at(part.address)
                for number in part.numbers:
                    piece = peer._pieces.get((order.step, order.round_, part.peer, number))
                    if piece is None:
                        raise SymbolError(f"{part.address} has no piece of {part.peer}")
                    total.update(piece[fragment])
                    if not self._is_local:
                        versions.add(peer._made_with[order.step, order.round_, part.peer, number])
            assert len(versions) <= 1, f"step {order.step} was made with different parameters: {versions}"
            groups.append(total)
        for chunk in order.chunks:
            self._results[order.step, order.round_, order.attempt, order.unit, chunk] = tuple(groups)
        return Reduced(sums=tuple((chunk, 1.0) for chunk in order.chunks))

    def _spread(self, order: Spread) -> Have:
        state = self.held.get(order.stage)
        if state is None or state.version != order.step:
            raise SymbolError(f"stage {order.stage} is not held at {order.step}")
        added: dict[str, list[tuple[Content, ...]]] = {}
        for unit, chunk, attempt, address in order.owners:
            peer = self if address == self._address else self._world.peer_at(address)
            found = peer._results.get((order.step, order.round_, attempt, unit, chunk))
            if found is None:
                raise SymbolError(f"{address} has no result of {unit}")
            added.setdefault(unit, []).append(found)
        contents = tuple(map(Counter, state.contents))
        for unit, results in added.items():
            assert all(one == results[0] for one in results), f"chunks of {unit} differ: {results}"
            if unit.partition(".")[0] == f"stage-{order.stage}":
                contents[self._plan.layout.fragment_of.get(unit, 0)].update(results[0][0])
        version = order.step + 1 if order.next_version is None else order.next_version
        self._next[order.stage] = State(order.stage, version, contents)
        if self._is_local and self.serving is not None and self.serving.stage == order.stage:
            self.serving.applies_at = order.applies_at
        return Have(digest=self._next[order.stage].digest)

    def _apply(self, order: Apply) -> Applied:
        state, following = self.held.get(order.stage), self._next.get(order.stage)
        if state is not None and state.version > order.step:
            return Applied(done=True)
        if state is None or following is None or (following.digest, following.version) != (order.digest, order.version):
            return Applied(done=False)
        self.held[order.stage] = self._next.pop(order.stage)
        serving = self.serving
        if serving is not None and serving.stage == order.stage:
            if self._is_local:
                for fragment in order.included:
                    assert fragment in serving.offered, "what was not offered is not included"
                    serving.own[fragment] = serving.own[fragment] - serving.offered[fragment]
                serving.offered, serving.applies_at = {}, None
            else:
                serving.book.commit(order.step)
                serving.sums.pop(order.step, None)
        self._rounds = {step: round_ for step, round_ in self._rounds.items() if step > order.step}
        self._pieces = {key: piece for key, piece in self._pieces.items() if key[0] != order.step}
        return Applied(done=True)

    # ------------------------------------------------------------ steps of its own

    def _mine(self, name: str) -> _Serving:
        if self.serving is None or self.serving.name != name:
            raise SymbolError(f"it does not serve as {name}")
        return self.serving

    def _step(self, order: LocalStep) -> None:
        serving = self._mine(order.peer)
        book = serving.book
        while book.version < order.step:
            if book.offer(book.version):
                raise SymbolError(f"{order.peer} was never told that step {book.version} is over")
            book.commit(book.version)
        if book.version > order.step:
            return
        if order.counted and book.offer(order.step) != order.counted:
            raise SymbolError(f"{order.peer} counted {book.offer(order.step)}, not {order.counted}")
        for own in serving.own:
            own.update((order.step, microbatch) for microbatch in order.counted)
        book.commit(order.step)
        serving.sums.pop(order.step, None)

    def _offer(self, order: OfferWork) -> Offered:
        serving = self._mine(order.peer)
        state = self.held.get(serving.stage)
        if state is None or state.version != order.version:
            raise SymbolError(f"stage {serving.stage} is not held at {order.version}")
        if serving.book.version != order.step:
            raise SymbolError(f"{order.peer} has made {serving.book.version} steps, not {order.step}")
        serving.offered = {fragment: Counter(serving.own[fragment]) for fragment in order.fragments}
        self._pieces[order.version, order.round_, order.peer, 0] = dict(serving.offered)
        return Offered(microbatches=())


class SymbolTrainer(TrainerDesk):
    """A trainer of symbols: what it makes of messages is what `TrainerHost` makes of them."""

    def __init__(self, world: World, name: str, nonce: str, plan: PipelinePlan) -> None:
        super().__init__(name, plan.layout.num_stages, plan.pipeline, lambda: world.now_s, sticky=plan.sync_steps > 0)
        self._world, self.nonce = world, nonce

    def _lay_out(self, message: OpenStep | Evaluate) -> tuple[int, ...]:
        return message.microbatches if isinstance(message, OpenStep) else (0, 1)

    def _send(self, place: PeerPlace, call: Call) -> None:
        self._world.send(self, place, call, self.round_, self._behind)

    def _withdraw(self, place: PeerPlace, call: Call) -> None:
        self._world.withdraw(self, place, call, self.round_)

    def _report(self, message: FromTrainer) -> None:
        self._world.hear(self, message)

    def _loss(self, stage: int) -> float | None:
        return 1.0

    def _score(self) -> float:
        return 1.0

    def _forget(self, step: int) -> None:
        pass

    def replied(self, call: Call, round_: int, begin: Begin, seconds: float) -> None:
        """A peer answered."""
        if not self._is_stale(call, round_):
            self._answered(call, begin, seconds)

    def withdrawn(self, call: Call, round_: int, done: bool) -> None:
        """A peer answered a withdrawal."""
        if not self._is_stale(call, round_):
            self._given_back(call, done=done)

    def beat(self) -> None:
        """Time has passed, and the heart beats."""
        self.tick()
        self._world.hear(self, self.heartbeat())
