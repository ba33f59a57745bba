"""One stage peer without its process: requests in, replies out, tensors over a transport.

Pull only (ADR 3): a request names keys in the requester's store; the peer fetches the tensors from there, computes,
puts its reply into its own store and answers with the key. Replies of backward calls stay until the step is committed,
for a trainer whose first answer was lost.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from strategies.codecs.base import is_finite
from workers.pipeline.accumulator import Accumulator, Begin
from workers.pipeline.boundary import Boundary
from workers.pipeline.calls import Call, evaluation_of
from workers.pipeline.gradients import Gradients, GradientStore
from workers.pipeline.layers import StageModel
from workers.pipeline.stage import BackwardResult, Loss, backward, backward_with_loss, evaluating, forward, seeded
from workers.store import BlobStore
from workers.transport.base import Transport

FETCH_TIMEOUT_S = 30.0
RAW_TYPES = {"int64": torch.int64, "float32": torch.float32}
"""Types in which the first stage's input and the last stage's targets travel as they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A call with where its tensors are: at `address`, under keys. `weight`: the microbatch's share of the batch.

    `input_key`: the encoded activation; in the first stage the raw input (`input_type`). `other_key`: the encoded
    gradient of the output; in the last stage the raw targets (`other_type`); "" for a forward that is no evaluation.
    """

    call: Call
    address: str
    input_key: str
    other_key: str
    input_shape: tuple[int, ...]
    other_shape: tuple[int, ...] = ()
    input_type: str = "encoded"
    other_type: str = "encoded"
    weight: float = 1.0
    round_: int = 0
    behind: int = 0

    @property
    def version(self) -> int:
        """Of the parameters that it is made with: as many updates as there were steps, less those that are delayed."""
        return self.call.version - self.behind


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """`begin` is RUN after a forward, DONE after a backward, else why nothing was done.

    `key`: of the encoded tensor in the peer's store, "" where there is none; `shape`: of that tensor. `seconds`: the
    peer's own time for it, where it was measured.
    """

    begin: Begin
    key: str = ""
    shape: tuple[int, ...] = ()
    loss: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetched:
    """The tensors of a call: the stage's input, and for a backward the gradient of its output (or the targets)."""

    x: Tensor
    other: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Counted:
    """What a trainer may ask for again."""

    loss: float | None
    shape: tuple[int, ...]


class NotFinite(ValueError):
    """What a call made is not finite: nothing of it counts, and nothing is sent on."""

    def __init__(self, peer: str, call: Call) -> None:
        super().__init__(peer, call)
        self.peer, self.call = peer, call

    def __str__(self) -> str:
        """Who made what."""
        call = self.call
        what = "output" if call.direction == "forward" else "a gradient"
        where = f"microbatch {call.microbatch}: {what} of stage {call.stage}"
        return f"{where}: a value is nan or infinite, so it is not finite (step {call.step}, {self.peer})"


class StagePeer:
    """Computes for one stage.

    `optimizer(parameters)` makes the optimizer of those that the stage owns; None: somebody else steps them, and says
    so with `committed`.
    """

    def __init__(
        self,
        *,
        name: str,
        stage: int,
        num_stages: int,
        model: StageModel,
        loss_fn: Loss,
        boundary: Boundary,
        optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None,
        store: BlobStore,
        transport: Transport,
        seed: int = 0,
        ordered: bool = True,
        version: int = 0,
        num_open_steps: int = 1,
    ) -> None:
        self.name, self.stage = name, stage
        self.model = model
        self.accumulator = Accumulator(version=version, num_open_steps=num_open_steps)
        self.gradients = GradientStore(ordered=ordered)
        self.transport = transport
        # What is counted, apart from what is computed: a withdrawal does not wait for the call under way.
        self.book = threading.RLock()
        self._is_last = stage == num_stages - 1
        self._loss_fn, self._boundary, self._store, self._seed = loss_fn, boundary, store, seed
        self._counted: dict[tuple[int, int], _Counted] = {}
        self._device = next(iter(model.names.values())).device
        owned = [parameter for name, parameter in model.names.items() if name != model.copy_of]
        # A stage that holds nothing but the copy has nothing to step.
        self._optimizer = optimizer(list(owned)) if owned and optimizer is not None else None

    def fetch(self, request: Request) -> Fetched:
        """The tensors that a call needs; may run beside another call. Raises what transport and codec raise."""
        x = self._input(request)
        if not request.other_key:
            return Fetched(x=x, other=None)
        other = self._fetch(request.address, request.other_key, request.other_shape, request.other_type)
        return Fetched(x=x, other=other)

    def run(self, request: Request, fetched: Fetched | None = None) -> Reply:
        """Do a call. Raises what transport and codec raise; nothing is counted then."""
        one = self._forward if request.call.direction == "forward" else self._backward
        return one(request, fetched)

    def _forward(self, request: Request, fetched: Fetched | None) -> Reply:
        call = request.call
        if request.version != self.accumulator.version:
            return Reply(begin=Begin.OTHER_VERSION)
        tensors = fetched or self.fetch(request)
        with self._seeded(call), evaluating(self.model, call.step < 0):
            y = forward(self.model, tensors.x)
            self._must_be_finite(call, y)
            if tensors.other is not None:
                with torch.no_grad():
                    return Reply(begin=Begin.RUN, loss=float(self._loss_fn(y, tensors.other)))
        return Reply(begin=Begin.RUN, key=self._put(call, y), shape=tuple(y.shape))

    def _backward(self, request: Request, fetched: Fetched | None) -> Reply:
        call = request.call
        with self.book:
            if request.version != self.accumulator.version and request.behind:
                # Parameters have moved on: this attempt is promised never to count, unless it does already.
                if self.accumulator.withdraw(call.step, call.microbatch, call.attempt):
                    return self.reply_again(call)
                return Reply(begin=Begin.OTHER_VERSION)
            begin = self.accumulator.begin(call.step, call.microbatch, call.attempt)
            if begin is Begin.DONE:
                return self.reply_again(call)
        if begin is not Begin.RUN:
            return Reply(begin=begin)
        try:
            result = self._compute(request, fetched or self.fetch(request))
            # Before it counts: a gradient that cannot be sent must not be in the sum.
            gradient = result.input_gradient
            self._must_be_finite(call, *result.gradients.values(), *([] if gradient is None else [gradient]))
            if gradient is not None and self.stage > 0:
                self._put(call, gradient)
        except BaseException:
            with self.book:
                self.accumulator.fail(call.step, call.microbatch)
            raise
        with self.book:
            if not self.accumulator.finish(call.step, call.microbatch):
                return Reply(begin=Begin.WITHDRAWN)
            self.gradients.add(call.step, call.microbatch, result.gradients)
            self._counted[(call.step, call.microbatch)] = _Counted(
                loss=None if result.loss is None else float(result.loss),
                shape=() if gradient is None else tuple(gradient.shape),
            )
            return self.reply_again(call)

    def _must_be_finite(self, call: Call, *values: Tensor) -> None:
        """Who makes what is not a number says so himself: in another peer's result nobody could tell whose it is."""
        if call.step >= 0 and not all(is_finite(value.detach()) for value in values):
            raise NotFinite(self.name, call)

    def _compute(self, request: Request, fetched: Fetched) -> BackwardResult:
        assert fetched.other is not None, "a backward has a gradient or targets"
        with self._seeded(request.call):
            if self._is_last:
                return backward_with_loss(self.model, fetched.x, fetched.other, self._loss_fn, weight=request.weight)
            return backward(self.model, fetched.x, fetched.other)

    def reply_again(self, call: Call) -> Reply:
        """The reply of a backward that is counted here."""
        key = self._key(call)
        counted = self._counted[(call.step, call.microbatch)]
        return Reply(begin=Begin.DONE, key=key if key in self._store else "", shape=counted.shape, loss=counted.loss)

    def withdraw(self, call: Call) -> Reply | None:
        """The reply of a backward that is counted here; None: it is not, and this attempt never will be."""
        with self.book:
            if self.accumulator.withdraw(call.step, call.microbatch, call.attempt):
                return self.reply_again(call)
            return None

    def apply(self, step: int, reduced: Gradients, *, copies: Gradients | None = None) -> None:
        """The step is committed with this sum of gradients. `copies`: new values of parameters owned elsewhere."""
        for name, parameter in self.model.names.items():
            if name != self.model.copy_of:
                parameter.grad = reduced[name].clone()
        if self._optimizer is not None:
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, value in (copies or {}).items():
                self.model.names[name].copy_(value)
        self.committed(step)

    def committed(self, step: int) -> None:
        """The step is committed and in the parameters: forget what was counted in it."""
        with self.book:
            self.accumulator.commit(step)
            self._forget(step)

    def restart(self, step: int) -> None:
        """The step is begun anew, in a higher round."""
        with self.book:
            self.accumulator.restart(step)
            self._forget(step)

    def _forget(self, step: int) -> None:
        self.gradients.drop(step)
        self._counted = {key: one for key, one in self._counted.items() if key[0] != step}
        self._store.discard(f"pipeline/{step}")
        self._store.discard(f"pipeline/{evaluation_of(step)}")

    def fence(self, step: int) -> None:
        """This peer was given up for a step: what it counted there is dropped."""
        with self.book:
            self.accumulator.fence(step)
            self.gradients.drop(step)

    def take_state(self, mate: StagePeer) -> None:
        """Take parameters and optimizer of another peer of the stage in this process, at its version."""
        with torch.no_grad():
            for name, parameter in self.model.names.items():
                parameter.copy_(mate.model.names[name])
        if self._optimizer is not None and mate._optimizer is not None:
            self._optimizer.load_state_dict(copy.deepcopy(mate._optimizer.state_dict()))

    def _seeded(self, call: Call) -> AbstractContextManager[None]:
        return seeded(
            seed=self._seed, step=call.step, microbatch=call.microbatch, stage=self.stage, device=self._device
        )

    def _input(self, request: Request) -> Tensor:
        return self._fetch(request.address, request.input_key, request.input_shape, request.input_type)

    def _fetch(self, address: str, key: str, shape: tuple[int, ...], kind: str) -> Tensor:
        num_values = math.prod(shape)
        num_bytes = 8 * num_values if kind in RAW_TYPES else self._boundary.num_bytes(num_values)
        data = self.transport.fetch(address, (key,), timeout_s=FETCH_TIMEOUT_S, max_bytes=num_bytes)[0].data
        if kind in RAW_TYPES:
            return torch.from_numpy(data).view(RAW_TYPES[kind]).view(shape).to(self._device)
        return self._boundary.decode(data, shape, self._device)

    def _put(self, call: Call, values: Tensor) -> str:
        key, backward = self._key(call), call.direction == "backward"
        payload = self._boundary.encode(
            values, step=call.step, microbatch=call.microbatch, stage=self.stage, gradient=backward
        )
        self._store.put(key, payload)
        return key

    @staticmethod
    def _key(call: Call) -> str:
        return f"pipeline/{call.step}/{call.microbatch}/{call.stage}/{call.direction}"
