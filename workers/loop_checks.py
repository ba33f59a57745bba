"""What can be wrong with a loop of the user's own, found where it happens and said in the words of the loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from workers.optim import InnerOptimizer

log = logging.getLogger("atoll.island")

NAMES_SHOWN = 4
STEPS_WITHOUT_CHANGE = 32


class LoopError(ValueError):
    """A loop uses an island in a way that cannot work; the message says what to write instead."""


def synchronised(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that islands exchange, by name: those that are trained. A shared one counts once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class ParameterGuard:
    """The parameters as they were when the island began: they are read and written in place from then on."""

    def __init__(self, model: nn.Module, optimizer: InnerOptimizer, *, device: str) -> None:
        """Look at model and optimizer; `device` is `train.device`. Raises LoopError."""
        parameters = synchronised(model)
        if not parameters:
            raise LoopError(f"{_name(model)} has no trainable parameter, so there is nothing to train")
        _check_types(parameters)
        self.device = _one_device(parameters, device)
        self.left_out = _check_optimizer(model, parameters, optimizer)
        owners = {id(p): (module, key) for module in model.modules() for key, p in module._parameters.items()}
        self._watched = [(name, *owners[id(p)], p, p.data_ptr()) for name, p in parameters.items()]

    def warn(self) -> None:
        """Say in the log what can work and is rarely meant."""
        if self.left_out:
            log.warning("not in the optimizer, so they stay as they are: %s", _list(self.left_out))

    def check(self) -> None:
        """Raise LoopError if a parameter is not the same tensor any more; takes well under a microsecond for each."""
        for name, module, key, parameter, address in self._watched:
            if module._parameters.get(key) is parameter and parameter.data_ptr() == address and parameter.requires_grad:
                continue
            raise LoopError(
                f"parameter {name!r} is not the tensor any more that it was when the island began (replaced, moved, "
                "converted or frozen). Do model.to(...), model.half(), requires_grad_() and the like before "
                "`with atoll.Island(...)`; load_state_dict() copies in place and is fine at any time"
            )


def _check_types(parameters: dict[str, nn.Parameter]) -> None:
    wrong = [f"{name} ({value.dtype})" for name, value in parameters.items() if value.dtype != torch.float32]
    if wrong:
        raise LoopError(
            f"parameters must be float32 to be synchronised, and these are not: {_list(wrong)}. Keep the model in "
            "float32 (model.float()) and compute in bf16 with torch.autocast; or freeze them with requires_grad_(False)"
        )


def _one_device(parameters: dict[str, nn.Parameter], wanted: str) -> torch.device:
    places: dict[torch.device, str] = {}
    for name, parameter in parameters.items():
        places.setdefault(parameter.device, name)
    if len(places) > 1:
        where = ", ".join(f"{name} on {device}" for device, name in places.items())
        raise LoopError(f"an island keeps its model on one device, and this one is on {len(places)}: {where}")
    device = next(iter(places))
    if device.type == "meta":
        raise LoopError("the model is on the device 'meta', which has no values: create it on a real one")
    given = torch.device(wanted) if wanted != "auto" else device
    if given.type != device.type or (given.index is not None and given.index != device.index):
        raise LoopError(
            f"train.device = {wanted!r}, but the model is on {device}: write model.to(atoll.device()) before the "
            "optimizer is made, or set train.device"
        )
    return device


def _check_optimizer(model: nn.Module, parameters: dict[str, nn.Parameter], optimizer: InnerOptimizer) -> list[str]:
    """Names of the trainable parameters that the optimizer does not have."""
    ours = {id(parameter) for parameter in model.parameters()}
    theirs = [p for group in optimizer.param_groups for p in group["params"]]
    strangers = sum(1 for p in theirs if id(p) not in ours)
    if strangers:
        raise LoopError(
            f"{strangers} of the {len(theirs)} parameters in the optimizer do not belong to the model that was given: "
            "make the optimizer of model.parameters() after the model is complete, wrapped and on its device"
        )
    held = {id(p) for p in theirs}
    left_out = [name for name, parameter in parameters.items() if id(parameter) not in held]
    if len(left_out) == len(parameters):
        raise LoopError("the optimizer has none of the model's trainable parameters")
    return left_out


class BufferWatch:
    """Finds the buffers that training changes (the statistics of BatchNorm): islands do not exchange those."""

    def __init__(self, model: nn.Module) -> None:
        """Copies the buffers, until the first step has shown which of them change."""
        self._model = model
        self._before: dict[str, Tensor] | None = {name: value.clone() for name, value in _buffers(model)}

    def first_step_done(self) -> tuple[str, ...]:
        """Names of the buffers that the first step changed, warned of once; empty when called again."""
        before, self._before = self._before, None
        if before is None:
            return ()
        changed = tuple(n for n, now in _buffers(self._model) if n in before and not torch.equal(before[n], now))
        if changed:
            log.warning(
                "buffers are not synchronised, each island keeps its own: %s. Evaluations use those of the island that "
                "evaluates, and a replaced island begins with fresh ones; GroupNorm or LayerNorm have none",
                _list(changed),
            )
        return changed


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The persistent buffers: what is in the state dict and no parameter."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in model.state_dict().items():
        if name not in parameters and isinstance(value, Tensor):
            yield name, value.detach()


class ChangeWatch:
    """Whether the loop's optimizer moves the parameters: a loop that forgets it would train for hours in vain."""

    def __init__(self, parameters: dict[str, nn.Parameter], *, wanted: bool) -> None:
        """`wanted`: False where the outer step is the optimizer (`strategy.name = 'ddp'`)."""
        self._parameters, self._wanted = parameters, wanted
        self._steps = 0
        self._open = True

    def step(self, anchor_tensors: Callable[[], dict[str, Tensor]]) -> None:
        """After each step; `anchor_tensors` gives the last common state. Free once it is known. Raises LoopError."""
        if not self._open:
            return
        self._steps += 1
        anchor = anchor_tensors()
        # Looks until it finds one that moved: after a step of any optimizer that is the first.
        moved = any(not torch.equal(p.detach(), anchor[name]) for name, p in self._parameters.items())
        if moved and not self._wanted:
            raise LoopError(
                "strategy.name = 'ddp' averages gradients and makes the optimizer's step itself: leave out "
                "optimizer.step() and optimizer.zero_grad(), and call island.step(loss) right after loss.backward()"
            )
        if not moved and self._wanted and self._steps >= STEPS_WITHOUT_CHANGE:
            raise LoopError(
                f"no parameter has changed in {self._steps} steps: call optimizer.step() before island.step(loss), "
                "with an optimizer of this model and a learning rate above 0"
            )
        self._open = not moved and self._steps < STEPS_WITHOUT_CHANGE


def _list(names: list[str] | tuple[str, ...]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _name(model: nn.Module) -> str:
    return type(model).__qualname__
