"""A stage peer that makes steps of its own: DiLoCo (arXiv 2311.08105) inside a stage.

Between two synchronisations every peer of a stage has parameters of its own, with an AdamW of its own. Numbered calls
of a round, beside those of `PeerHost`: `Collect` and `LocalStep` for each step (what was counted; step with it), then
`OfferWork` (how far from the anchor; can be fetched), `Reduce`, `Spread` and `Apply` of the anchor. What the codec lost
of an offer is added to the next one if the offer was in the commit (exchange protocol, section 1.5).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from strategies.codecs.base import is_finite
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
from workers.pipeline.peer import StagePeer
from workers.pipeline.spec import PipelineSpec
from workers.pipeline.state import PARAMS, Flats, StageState, flatten, spread_out
from workers.store import BlobStore
from workers.transport.base import Transport


@dataclass(frozen=True, kw_only=True, slots=True)
class _Offer:
    """What was offered to the synchronisation that starts from an anchor, and the residual if it is included."""

    version: int
    round_: int
    residuals: dict[str, Tensor]


class LocalWork:
    """The parameters of one peer that serves, on their way from the anchor; `model` holds them."""

    def __init__(self, spec: PipelineSpec, model: StageModel, anchor: StageState) -> None:
        self._spec, self._model, self._stage = spec, model, anchor.stage
        self._parameters = nn.ParameterDict({name.replace(".", "/"): p for name, p in model.names.items()})
        self._optimizer = build_optimizer(self._parameters, spec.train)
        self.residuals: dict[str, Tensor] = {}
        self.offer: _Offer | None = None
        self._take(anchor.flats)

    @torch.no_grad()
    def _take(self, flats: Flats) -> None:
        for name, value in spread_out(self._spec, self._stage, flats).items():
            self._model.names[name].copy_(value)

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

    def displacement(self, anchor: Flats) -> dict[str, Tensor]:
        """Anchor less parameters, by unit."""
        own = flatten(self._spec, self._stage, self._model.names)
        return {unit: torch.sub(anchor[unit, PARAMS], flat) for unit, flat in own.items()}

    @torch.no_grad()
    def moved(self, before: Flats, after: Flats, *, included: bool) -> None:
        """The anchor moved: begin at it, or with an offer that is not in it be translated along, and offer it again."""
        if included:
            assert self.offer is not None, "what was not offered is not included"
            self.residuals = self.offer.residuals
            self._take(after)
        else:
            old, new = (spread_out(self._spec, self._stage, flats) for flats in (before, after))
            for name, parameter in self._model.names.items():
                parameter.add_(new[name] - old[name])
        self.offer = None


class LocalHost(PeerHost):
    """See the module."""

    def __init__(
        self, spec: PipelineSpec, process: str, store: BlobStore, transport: Transport, **clocks: Callable[..., Any]
    ) -> None:
        super().__init__(spec, process, store, transport, **clocks)
        self.work: LocalWork | None = None
        self._synchronises = False

    def do(self, order: ToPeer) -> FromPeer:
        """See `PeerHost.do`."""
        match order:
            case LocalStep():
                return self._step(order)
            case OfferWork():
                return self._offer(order)
        return super().do(order)

    def _bind(self, state: StageState, peer: StagePeer) -> None:
        self.work, self._synchronises = LocalWork(self.spec, peer.model, state), False
        self._rounds.clear()  # of another name's calls

    def _waits(self) -> bool:
        # From the first sight of the next anchor on: a call of the next step must not run before it is applied.
        return self._synchronises

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
            state = self._state_at(peer.stage, order.version)
            known = work.offer
            if known is None or (known.version, known.round_) != (order.version, order.round_):
                moved = work.displacement(state.flats)
                if not all(map(is_finite, moved.values())):
                    raise Damaged(f"{order.peer} has parameters that are not finite, and offers nothing")
                residuals = self._pieces.publish_work(
                    f"piece/{order.version}/{order.round_}/{order.peer}/0",
                    moved,
                    work.residuals,
                    counters=(order.version, zlib.crc32(order.peer.encode())),
                )
                work.offer = _Offer(version=order.version, round_=order.round_, residuals=residuals)
        return Offered(microbatches=())

    def _spread(self, order: Spread) -> Have:
        have = super()._spread(order)
        with self._orders:
            if self.serving is not None and self.serving.stage == order.stage:
                self._synchronises = True
        return have

    def _apply(self, order: Apply) -> Applied:
        with self._orders, self._compute:
            state = self.held.get(order.stage)
            if state is None or state.version > order.step:
                return Applied(done=state is not None)
            before = state.flats
            if not state.apply(order.digest):
                return Applied(done=False)
            if self.serving is not None and self.serving.stage == order.stage and self.work is not None:
                self.work.moved(before, state.flats, included=order.included)
        self._pieces.publish_state(state)
        self._pieces.forget(order.step)
        with self._moved:
            self._synchronises = False
            self._moved.notify_all()
        return Applied(done=True)


def build_host(
    spec: PipelineSpec, process: str, store: BlobStore, transport: Transport, **clocks: Callable[..., Any]
) -> PeerHost:
    """The host that the run's strategy asks for."""
    kind = LocalHost if spec.is_local else PeerHost
    return kind(spec, process, store, transport, **clocks)
