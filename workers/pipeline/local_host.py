"""A stage peer that makes steps of its own: DiLoCo (arXiv 2311.08105) and Streaming DiLoCo (2501.18512) in a stage.

Between two synchronisations every peer of a stage has parameters of its own, with an AdamW of its own. Numbered calls
of a round, beside those of `PeerHost`: `Collect` and `LocalStep` for each step (what was counted; step with it), then
`OfferWork` (how far from the anchor; can be fetched), `Reduce`, `Spread` and `Apply` of the anchor. With fragments a
synchronisation is of one of them, and steps may go on until it is applied. What the codec lost of an offer is added to
the next one if the offer was in the commit (exchange protocol, section 1.5).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from strategies.codecs.base import is_finite
from strategies.merge import advance_included, rebase
from workers.optim import build_optimizer
from workers.pipeline.host import Damaged, PeerError, PeerHost
from workers.pipeline.layers import StageModel
from workers.pipeline.messages import (
    Applied,
    Apply,
    Done,
    FromPeer,
    Have,
    LocalStep,
    Offered,
    OfferWork,
    Spread,
    ToPeer,
)
from workers.pipeline.peer import Request, StagePeer
from workers.pipeline.spec import PipelineSpec
from workers.pipeline.state import PARAMS, Flats, StageState, flatten, parts_of, spread_out
from workers.store import BlobStore
from workers.transport.base import Transport


@dataclass(frozen=True, kw_only=True, slots=True)
class _Offer:
    """What was offered to the synchronisation that starts from an anchor, and the residuals if it is included.

    `moved`: the displacements themselves, by unit, where steps go on meanwhile; `num_steps`: that were made before it.
    """

    version: int
    round_: int
    fragments: tuple[int, ...]
    residuals: dict[str, Tensor]
    moved: dict[str, Tensor]
    num_steps: int


class LocalWork:
    """The parameters of one peer that serves, on their way from the anchor; `model` holds them."""

    def __init__(self, spec: PipelineSpec, model: StageModel, anchor: StageState) -> None:
        self._spec, self._model, self._stage = spec, model, anchor.stage
        self._parameters = nn.ParameterDict({name.replace(".", "/"): p for name, p in model.names.items()})
        self._optimizer = build_optimizer(self._parameters, spec.train)
        self._num_steps = 0
        self.residuals: dict[str, Tensor] = {}
        self.offer: _Offer | None = None
        with torch.no_grad():
            for name, value in spread_out(spec, anchor.stage, anchor.flats).items():
                model.names[name].copy_(value)

    def step(self, gradients: Mapping[str, Tensor], *, scale: float, lr: float) -> None:
        """One step of AdamW. `scale` makes a mean of the sum; the norm that is clipped is of this stage alone."""
        for name, parameter in self._model.names.items():
            parameter.grad = gradients[name] * scale
        if self._spec.train.grad_clip > 0:
            nn.utils.clip_grad_norm_(list(self._model.names.values()), self._spec.train.grad_clip)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._num_steps += 1

    def displacement(self, anchor: Flats, fragments: Collection[int] | None = None) -> dict[str, Tensor]:
        """Anchor less parameters, by unit; of some fragments, or of all."""
        own = flatten(self._spec, self._stage, self._model.names, fragments=fragments)
        return {unit: torch.sub(anchor[unit, PARAMS], flat) for unit, flat in own.items()}

    def offered(self, order: OfferWork, moved: dict[str, Tensor], residuals: dict[str, Tensor]) -> None:
        """This can be fetched now."""
        self.offer = _Offer(
            version=order.version,
            round_=order.round_,
            fragments=order.fragments,
            residuals=residuals,
            moved=moved if self._spec.strategy.overlap_steps else {},
            num_steps=self._num_steps,
        )

    def has_offered(self, order: OfferWork) -> bool:
        """Whether the order was obeyed before."""
        known = self.offer
        wanted = (order.version, order.round_, order.fragments)
        return known is not None and (known.version, known.round_, known.fragments) == wanted

    @torch.no_grad()
    def moved(self, before: Flats, after: Flats, *, included: Collection[int]) -> None:
        """The anchor moved: go on from it by the rule of `strategies/merge.py`.

        With an offer that is not in it, or without one, be translated along, and offer that the next time. Raises
        Damaged for parameters that are not finite: what was lost behind the offer would be covered up, and nobody would
        hear that this process loses numbers.
        """
        offer, strategy = self.offer, self._spec.strategy
        for unit in self._spec.units_of(self._stage):
            old, new = before[unit, PARAMS], after[unit, PARAMS]
            is_in = self._spec.fragment_of(unit) in included
            if old is new and not is_in:
                continue
            progressed: Tensor | None = None
            if is_in:
                assert offer is not None, "what was not offered is not included"
                self.residuals |= {unit: offer.residuals[unit]} if unit in offer.residuals else {}
                if offer.num_steps != self._num_steps:
                    progressed = offer.moved[unit]
            offered = {} if progressed is None else parts_of(self._spec, unit, progressed)
            olds, news = parts_of(self._spec, unit, old), parts_of(self._spec, unit, new)
            for name in olds:
                parameter = self._model.names[name]
                theta, a, b = parameter.detach().reshape(-1).clone(), olds[name].reshape(-1), news[name].reshape(-1)
                if not is_finite(theta):
                    raise Damaged(f"{name} of stage {self._stage} holds values that are not finite, behind its offer")
                if is_in:
                    d = offered[name].reshape(-1) if name in offered else None
                    advance_included(theta, a, b, d, alpha=strategy.merge_alpha, kappa=strategy.merge_kappa)
                else:
                    rebase(theta, a, b)
                parameter.copy_(theta.view_as(parameter))
        self.offer = None

    @contextmanager
    def at(self, anchor: StageState) -> Iterator[None]:
        """What is computed meanwhile is computed with the anchor: what a validation is of."""
        own = {name: parameter.data for name, parameter in self._model.names.items()}
        for name, value in spread_out(self._spec, self._stage, anchor.flats).items():
            self._model.names[name].data = value
        try:
            yield
        finally:
            for name, parameter in self._model.names.items():
                parameter.data = own[name]


class LocalHost(PeerHost):
    """See the module."""

    def __init__(
        self, spec: PipelineSpec, process: str, store: BlobStore, transport: Transport, **clocks: Callable[..., Any]
    ) -> None:
        super().__init__(spec, process, store, transport, **clocks)
        self.work: LocalWork | None = None
        self._applies_at: int | None = None

    def do(self, order: ToPeer) -> FromPeer:
        """See `PeerHost.do`."""
        match order:
            case LocalStep():
                return self._step(order)
            case OfferWork():
                return self._offer(order)
        return super().do(order)

    def _bind(self, state: StageState, peer: StagePeer) -> None:
        self.work, self._applies_at = LocalWork(self.spec, peer.model, state), None
        with self._noted:
            self._rounds.clear()  # of another name's calls

    def _waits(self, version: int) -> bool:
        # From the first sight of the next anchor on: a call of that step must not run before it is applied.
        return self._applies_at is not None and version >= self._applies_at

    def _computes_with(self, request: Request) -> AbstractContextManager[None]:
        """An evaluation is of the anchor, which all peers of the stage have; their own parameters differ."""
        if request.call.step >= 0 or self.work is None or self.serving is None:
            return nullcontext()
        return self.work.at(self.held[self.serving.stage])

    def _mine(self, name: str) -> tuple[StagePeer, LocalWork]:
        if self.serving is None or self.serving.name != name or self.work is None:
            raise PeerError(f"{self.process} does not serve as {name}")
        return self.serving, self.work

    def _step(self, order: LocalStep) -> Done:
        with self._orders, self._compute:
            peer, work = self._mine(order.peer)
            book = peer.accumulator
            while book.version < order.step:
                if book.offer(book.version):
                    raise PeerError(f"{order.peer} was never told that step {book.version} is over")
                peer.committed(book.version)
            if book.version > order.step:
                return Done()
            if order.counted and book.offer(order.step) != order.counted:
                found = book.offer(order.step)
                raise PeerError(f"{order.peer} counted {found} in step {order.step}, the journal says {order.counted}")
            if order.counted:
                gradients = peer.gradients.parts(order.step, 0)[0]
                # Each was weighted as one of all microbatches of the step.
                scale = self.spec.pipeline.microbatches / len(order.counted)
                work.step(gradients, scale=scale, lr=order.lr)
            peer.committed(order.step)
        with self._moved:
            self._moved.notify_all()
        return Done()

    def _offer(self, order: OfferWork) -> Offered:
        with self._orders, self._compute:
            peer, work = self._mine(order.peer)
            if work.has_offered(order):
                return Offered(microbatches=())
            state = self._state_at(peer.stage, order.version)
            if peer.accumulator.version != order.step:
                raise PeerError(f"{order.peer} has made {peer.accumulator.version} steps, not {order.step}")
            moved = work.displacement(state.flats, order.fragments)
            if not all(map(is_finite, moved.values())):
                raise Damaged(f"{order.peer} has parameters that are not finite, and offers nothing")
            residuals = self._pieces.publish_work(
                f"piece/{order.version}/{order.round_}/{order.peer}/0",
                moved,
                work.residuals,
                counters=(order.version, zlib.crc32(order.peer.encode())),
            )
            work.offered(order, moved, residuals)
        return Offered(microbatches=())

    def _spread(self, order: Spread) -> Have:
        have = super()._spread(order)
        with self._orders:
            if self.serving is not None and self.serving.stage == order.stage:
                self._applies_at = order.applies_at
        return have

    def _apply(self, order: Apply) -> Applied:
        with self._orders, self._compute:
            state = self.held.get(order.stage)
            if state is None or state.version > order.step:
                return Applied(done=state is not None)
            before = state.flats
            if not state.apply(order.digest, order.version):
                return Applied(done=False)
            if self.serving is not None and self.serving.stage == order.stage and self.work is not None:
                self.work.moved(before, state.flats, included=order.included)
        self._pieces.publish_state(state)
        self._pieces.forget(order.step)
        with self._moved:
            self._applies_at = None
            self._moved.notify_all()
        return Applied(done=True)


def build_host(
    spec: PipelineSpec, process: str, store: BlobStore, transport: Transport, **clocks: Callable[..., Any]
) -> PeerHost:
    """The host that the run's strategy asks for."""
    kind = LocalHost if spec.is_local else PeerHost
    return kind(spec, process, store, transport, **clocks)
