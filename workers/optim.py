"""Inner optimizers, and their whole state as named tensors.

AdamW (https://arxiv.org/abs/1711.05101) in torch's fused form, with decay on matrices only. Muon
(https://kellerjordan.github.io/posts/muon/) as `torch.optim.Muon` for hidden matrices, AdamW for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from workers.config import TrainConfig
from workers.model.errors import ModelError
from workers.uncompiled import uncompiled

HEAD_NAMES = frozenset({"lm_head", "head", "classifier", "output_head"})
"""Modules whose matrix is an output head, which Muon leaves to AdamW as it does embeddings."""


class InnerOptimizer(Protocol):
    """What the inner loop asks of an optimizer; every `torch.optim.Optimizer` has it."""

    param_groups: list[dict[str, Any]]

    def step(self) -> Any:
        """Update the parameters from their gradients."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch does."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""


class MuonWithAdamW:
    """`torch.optim.Muon` and `torch.optim.AdamW` behind the face of one optimizer."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (muon, adamw)
        # The groups themselves, not copies: who sets a learning rate here sets it there.
        self.param_groups: list[dict[str, Any]] = [*muon.param_groups, *adamw.param_groups]

    def step(self) -> None:
        """Update all parameters from their gradients."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both: `{"muon": ..., "adamw": ...}`."""
        muon, adamw = self.optimizers
        return {"muon": muon.state_dict(), "adamw": adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        muon, adamw = self.optimizers
        muon.load_state_dict(state_dict["muon"])
        adamw.load_state_dict(state_dict["adamw"])
        self.param_groups = [*muon.param_groups, *adamw.param_groups]


def build_optimizer(model: nn.Module, train: TrainConfig) -> InnerOptimizer:
    """Build the optimizer of `[train]` over the trainable parameters of `model`, which is already on its device.

    Each group holds `peak_lr`, which the schedule scales. Raises ModelError where Muon would have nothing to do.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if train.optimizer == "adamw":
        return _adamw(list(named.values()), train)
    hidden = {name for name in hidden_matrices(model) if name in named}
    if not hidden:
        raise ModelError(
            f"train.optimizer = 'muon': {type(model).__qualname__} has no trainable matrices besides embeddings "
            "and heads; set train.optimizer = 'adamw'"
        )
    muon = uncompiled(torch.optim.Muon)(
        [{"params": [named[name] for name in named if name in hidden], "peak_lr": train.muon_lr}],
        lr=train.muon_lr,
        momentum=train.muon_momentum,
        weight_decay=train.weight_decay,
    )
    rest = [named[name] for name in named if name not in hidden]
    return MuonWithAdamW(muon, _adamw(rest, train)) if rest else muon


def hidden_matrices(model: nn.Module) -> list[str]:
    """Names of the two-dimensional parameters that are no embedding and no head (see `HEAD_NAMES`)."""
    outer = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    names = []
    for name, parameter in model.named_parameters():
        owner = name.split(".")[-2] if "." in name else ""
        if parameter.ndim == 2 and id(parameter) not in outer and owner not in HEAD_NAMES:
            names.append(name)
    return names


def _adamw(parameters: list[nn.Parameter], train: TrainConfig) -> torch.optim.AdamW:
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    others = [parameter for parameter in parameters if parameter.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": train.weight_decay, "peak_lr": train.lr},
        {"params": others, "weight_decay": 0.0, "peak_lr": train.lr},
    ]
    return uncompiled(torch.optim.AdamW)(
        [group for group in groups if group["params"]],
        lr=train.lr,
        betas=(train.beta1, train.beta2),
        eps=train.eps,
        fused=all(parameter.is_floating_point() for parameter in parameters),
    )


# The state as tensors --------------------------------------------------------------------------------------------
#
# "state/<parameter>/<key>" and "group/<index>/<key>", with a suffix where the value was no tensor:
# "#int", "#float", "#bool", or "#floats" for a tuple of floats. So any torch optimizer comes back exactly.

_ENCODERS: dict[type, tuple[str, torch.dtype]] = {
    bool: ("#bool", torch.bool),
    int: ("#int", torch.int64),
    float: ("#float", torch.float64),
}
_DECODERS: dict[str, Callable[[Tensor], Any]] = {
    "bool": lambda value: bool(value.item()),
    "int": lambda value: int(value.item()),
    "float": lambda value: float(value.item()),
    "floats": lambda value: tuple(value.tolist()),
}


def export_state(optimizer: InnerOptimizer, model: nn.Module) -> dict[str, Tensor]:
    """Copy the optimizer's whole state into named CPU tensors (moments, step counts, numbers of the groups).

    What a group holds besides numbers (switches such as `foreach`) comes from building the optimizer again.
    Raises ModelError for an optimizer that keeps something else per parameter, such as LBFGS.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for part in _parts(optimizer):
        for parameter, state in part.state.items():
            for key, value in state.items():
                name = f"state/{names[id(parameter)]}/{key}"
                if not _encode(tensors, name, value) and value is not None:
                    raise ModelError(
                        f"the optimizer {type(part).__qualname__} keeps a {type(value).__qualname__} as {name!r}; "
                        "only tensors and numbers can be saved: use an optimizer that keeps those"
                    )
    for index, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if key != "params":
                _encode(tensors, f"group/{index}/{key}", value)
    return tensors


def import_state(optimizer: InnerOptimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `export_state` returned, bit for bit, into a new optimizer over the same parameters.

    Raises ModelError that names the first entry that belongs to no parameter or group or has another shape.
    """
    parameters = dict(model.named_parameters())
    owners = {
        id(p): (part, group) for part in _parts(optimizer) for group in part.param_groups for p in group["params"]
    }
    for part in _parts(optimizer):
        part.state.clear()
    for full_name, tensor in tensors.items():
        kind, _, rest = full_name.partition("/")
        owner, _, key = rest.rpartition("/")
        key, value = _decode(key, tensor)
        if kind == "group" and owner.isdecimal() and int(owner) < len(optimizer.param_groups):
            optimizer.param_groups[int(owner)][key] = value
        elif kind == "state" and owner in parameters and id(parameters[owner]) in owners:
            part, group = owners[id(parameters[owner])]
            part.state[parameters[owner]][key] = _placed(full_name, key, value, parameters[owner], group)
        else:
            raise ModelError(f"saved optimizer state {full_name!r} belongs to nothing in this optimizer and model")


def _parts(optimizer: InnerOptimizer) -> tuple[torch.optim.Optimizer, ...]:
    if isinstance(optimizer, MuonWithAdamW):
        return optimizer.optimizers
    assert isinstance(optimizer, torch.optim.Optimizer), f"{type(optimizer).__qualname__} is no torch optimizer"
    return (optimizer,)


def _encode(tensors: dict[str, Tensor], name: str, value: object) -> bool:
    """Add one value, if it is of a kind that comes back exactly."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().to("cpu", copy=True)
    elif type(value) in _ENCODERS:
        suffix, dtype = _ENCODERS[type(value)]
        tensors[name + suffix] = torch.tensor(value, dtype=dtype)
    elif isinstance(value, tuple) and all(type(item) is float for item in value):
        tensors[name + "#floats"] = torch.tensor(value, dtype=torch.float64)
    else:
        return False
    return True


def _decode(key: str, tensor: Tensor) -> tuple[str, Any]:
    bare, _, suffix = key.partition("#")
    return bare, _DECODERS[suffix](tensor) if suffix else tensor.clone()


def _placed(full_name: str, key: str, value: Any, parameter: nn.Parameter, group: Mapping[str, Any]) -> Any:
    if not isinstance(value, Tensor):
        return value
    # Factored moments (Adafactor) have the parameter's shape with ones in it; other ranks are the optimizer's affair.
    fits = value.ndim != parameter.ndim or all(a in (1, b) for a, b in zip(value.shape, parameter.shape, strict=True))
    if not fits:
        raise ModelError(
            f"saved optimizer state {full_name!r} has shape {tuple(value.shape)}, "
            f"the parameter has {tuple(parameter.shape)}"
        )
    if key == "step" and not (group.get("fused") or group.get("capturable")):
        return value  # torch keeps these step counts on the CPU
    return value.to(parameter.device)
