"""The state of one stage: parameters and the moments of Adam as flat vectors, moved from version to version.

Where peers make steps of their own (`PipelineSpec.is_local`), it is the stage's anchor, with the states of the outer
step in place of Adam's moments.

The next state is computed beside the present one and gets a digest; only when its step is on the record does the
holder move to it. All arithmetic is of single-rounding operations (`OuterAdam`), so that all holders of a stage have
the same bits from the same gradients. AdamW: https://arxiv.org/abs/1711.05101, decay on matrices only.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from strategies.outer_adam import OuterAdam
from strategies.outer_choice import build_outer
from workers.config import TrainConfig
from workers.digest import combine, digest
from workers.pipeline.layers import StageModel
from workers.pipeline.spec import PipelineSpec

PARAMS, FIRST, SECOND = "params", "first", "second"
Flats = dict[tuple[str, str], Tensor]
"""(unit, field) -> flat vector."""


def fields_of(spec: PipelineSpec) -> tuple[str, ...]:
    """The vectors of each unit, the parameters first."""
    if not spec.is_local:
        return (PARAMS, FIRST, SECOND)
    return (PARAMS, *(f"outer-{number}" for number in range(build_outer(spec.strategy).num_states)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Next:
    """A state that is computed and not moved to."""

    version: int
    flats: Flats
    digest: str


class StageState:
    """See the module; `version` counts the steps that are in it."""

    def __init__(self, spec: PipelineSpec, stage: int, flats: Flats, *, version: int) -> None:
        self.spec, self.stage, self.version = spec, stage, version
        self.flats = flats
        self.next: Next | None = None
        self._model: StageModel | None = None

    @classmethod
    def begin(cls, spec: PipelineSpec, stage: int, model: StageModel) -> StageState:
        """Version 0: the model's values, and all else zero."""
        flats: Flats = {}
        for unit in spec.units_of(stage):
            values = [model.names[name].detach().reshape(-1) for name in spec.slots(unit)]
            flats[unit, PARAMS] = torch.cat(values)
            for field in fields_of(spec)[1:]:
                flats[unit, field] = torch.zeros_like(flats[unit, PARAMS])
        return cls(spec, stage, flats, version=0)

    @property
    def digest(self) -> str:
        """Of all vectors, in order."""
        return _digest(self.flats)

    @property
    def num_bytes(self) -> int:
        """Memory of the present state."""
        return sum(flat.nbytes for flat in self.flats.values())

    def bind(self, model: StageModel) -> None:
        """From now on this model's parameters are those of the state."""
        self._model = model
        self._point()

    def bind_nothing(self) -> None:
        """The model that it had is not served any more."""
        self._model = None

    def compute_next(
        self,
        gradients: Mapping[str, Tensor],
        *,
        lr: float,
        scale: float,
        version: int | None = None,
        rounds: Mapping[str, int] | None = None,
    ) -> Next:
        """The state after a step with these gradients (unit -> flat sum), times `scale`; see `OuterAdam`.

        Of an anchor: after an outer step with these displacements, to `version`; units without one stay. `rounds`: how
        many outer steps each unit has made.
        """
        if self.spec.is_local:
            assert version is not None, "an anchor moves to the version that its stage has reached"
            flats = self._outer_step(gradients, rounds or {})
            self.next = Next(version=version, flats=flats, digest=_digest(flats))
            return self.next
        flats = {}
        for unit in self.spec.units_of(self.stage):
            held = tuple(self.flats[unit, field] for field in fields_of(self.spec))
            gradient = gradients[unit] if scale == 1.0 else gradients[unit] * scale
            decayed = self._decayed(unit, held[0], lr)
            params, (first, second) = _adam(self.spec.train, lr).step(
                decayed, (held[1], held[2]), gradient, scale=None, version=self.version, progress=0.0
            )
            flats |= {(unit, PARAMS): params, (unit, FIRST): first, (unit, SECOND): second}
        self.next = Next(version=self.version + 1, flats=flats, digest=_digest(flats))
        return self.next

    def _outer_step(self, displacements: Mapping[str, Tensor], rounds: Mapping[str, int]) -> Flats:
        outer, fields = build_outer(self.spec.strategy), fields_of(self.spec)
        flats: Flats = {}
        for unit in self.spec.units_of(self.stage):
            held = [self.flats[unit, field] for field in fields]
            if unit in displacements:
                g = displacements[unit]
                params, states = outer.step(
                    held[0], tuple(held[1:]), g, scale=outer.prepare([g]), version=rounds[unit], progress=0.0
                )
                held = [params, *states]
            flats |= {(unit, field): value for field, value in zip(fields, held, strict=True)}
        return flats

    def apply(self, digest_hex: str, version: int) -> bool:
        """Move to the next state if it is this version with this digest; False if it is not here."""
        if self.next is None or (self.next.digest, self.next.version) != (digest_hex, version):
            return False
        self.flats, self.version, self.next = self.next.flats, self.next.version, None
        self._point()
        return True

    def _decayed(self, unit: str, params: Tensor, lr: float) -> Tensor:
        factor = torch.tensor(1.0 - lr * self.spec.train.weight_decay, dtype=params.dtype)
        out = params.clone()
        start = 0
        for shape in self.spec.slots(unit).values():
            size = math.prod(shape)
            if len(shape) >= 2:
                out[start : start + size].mul_(factor)
            start += size
        return out

    def _point(self) -> None:
        """Let the model's parameters be views of the vectors: nothing is copied."""
        if self._model is None:
            return
        for name, value in spread_out(self.spec, self.stage, self.flats).items():
            self._model.names[name].data = value


def flatten(
    spec: PipelineSpec, stage: int, named: Mapping[str, Tensor], *, fragments: Collection[int] | None = None
) -> dict[str, Tensor]:
    """Tensors by parameter name -> one flat vector for each unit of the stage, or for those of some fragments."""
    return {
        unit: torch.cat([named[name].detach().reshape(-1) for name in spec.slots(unit)])
        for unit in spec.units_of(stage)
        if fragments is None or spec.fragment_of(unit) in fragments
    }


def spread_out(spec: PipelineSpec, stage: int, flats: Flats) -> dict[str, Tensor]:
    """The parameters of flat vectors by name: views."""
    found: dict[str, Tensor] = {}
    for unit in spec.units_of(stage):
        found |= parts_of(spec, unit, flats[unit, PARAMS])
    return found


def parts_of(spec: PipelineSpec, unit: str, flat: Tensor) -> dict[str, Tensor]:
    """A unit's flat vector by parameter name: views."""
    found: dict[str, Tensor] = {}
    start = 0
    for name, shape in spec.slots(unit).items():
        size = math.prod(shape)
        found[name] = flat[start : start + size].view(shape)
        start += size
    return found


def _adam(train: TrainConfig, lr: float) -> OuterAdam:
    return OuterAdam(lr=lr, beta1=train.beta1, beta2=train.beta2, eps=train.eps)


def _digest(flats: Flats) -> str:
    return combine([digest(flat.numpy()) for _, flat in sorted(flats.items())])
