"""The state of one stage: parameters and the moments of Adam as flat vectors, moved from version to version.

The next state is computed beside the present one and gets a digest; only when its step is on the record does the
holder move to it. All arithmetic is of single-rounding operations (`OuterAdam`), so that all holders of a stage have
the same bits from the same gradients. AdamW: https://arxiv.org/abs/1711.05101, decay on matrices only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from strategies.outer_adam import OuterAdam
from workers.config import TrainConfig
from workers.digest import combine, digest
from workers.pipeline.layers import StageModel
from workers.pipeline.spec import PipelineSpec

PARAMS, FIRST, SECOND = "params", "first", "second"
FIELDS = (PARAMS, FIRST, SECOND)
Flats = dict[tuple[str, str], Tensor]
"""(unit, field) -> flat vector."""


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
        """Version 0: the model's values, and moments of zero."""
        flats: Flats = {}
        for unit in spec.units_of(stage):
            values = [model.names[name].detach().reshape(-1) for name in spec.slots(unit)]
            flats[unit, PARAMS] = torch.cat(values)
            flats[unit, FIRST] = torch.zeros_like(flats[unit, PARAMS])
            flats[unit, SECOND] = torch.zeros_like(flats[unit, PARAMS])
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

    def compute_next(self, gradients: Mapping[str, Tensor], *, lr: float, scale: float) -> Next:
        """The state after a step with these gradients (unit -> flat sum), times `scale`; see `OuterAdam`."""
        flats: Flats = {}
        for unit in self.spec.units_of(self.stage):
            held = tuple(self.flats[unit, field] for field in FIELDS)
            gradient = gradients[unit] if scale == 1.0 else gradients[unit] * scale
            decayed = self._decayed(unit, held[0], lr)
            params, (first, second) = _adam(self.spec.train, lr).step(
                decayed, (held[1], held[2]), gradient, scale=None, version=self.version, progress=0.0
            )
            flats |= {(unit, PARAMS): params, (unit, FIRST): first, (unit, SECOND): second}
        self.next = Next(version=self.version + 1, flats=flats, digest=_digest(flats))
        return self.next

    def apply(self, digest_hex: str) -> bool:
        """Move to the next state if it is the one with this digest; False if it is not here."""
        if self.next is None or self.next.digest != digest_hex:
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
        for unit in self.spec.units_of(self.stage):
            start = 0
            for name, shape in self.spec.slots(unit).items():
                size = math.prod(shape)
                self._model.names[name].data = self.flats[unit, PARAMS][start : start + size].view(shape)
                start += size


def flatten(spec: PipelineSpec, stage: int, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by parameter name -> one flat vector for each unit of the stage."""
    return {
        unit: torch.cat([named[name].detach().reshape(-1) for name in spec.slots(unit)])
        for unit in spec.units_of(stage)
    }


def _adam(train: TrainConfig, lr: float) -> OuterAdam:
    return OuterAdam(lr=lr, beta1=train.beta1, beta2=train.beta2, eps=train.eps)


def _digest(flats: Flats) -> str:
    return combine([digest(flat.numpy()) for _, flat in sorted(flats.items())])
