"""One island: a model replica that trains locally and takes part in the exchanges.

    with Island(model, optimizer) as island:
        for batch in island.batches():
            loss = loss_fn(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            island.step(loss)

`batches()` yields the leased samples in order and does everything that belongs to a step boundary in between:
applies commits, sends contributions, evaluates, saves, waits, and ends when the run does. The built-in loop
(`run_builtin_loop`) is written with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from strategies.fragments import FragmentSpec, TensorSpec, default_chunk_values, plan_fragments
from strategies.registry import build_strategy
from strategies.strategy import Strategy
from workers import messages as msg
from workers import sync as sy
from workers.context import IslandContext, IslandSpec, current
from workers.data.permutation import sample_ids
from workers.data.reader import PackReader
from workers.device import peak_memory_bytes, resolve_device
from workers.inner_loop import InnerLoop, StepStats, evaluate
from workers.jobs import MemberStore
from workers.local_state import load_local, read_meta, save_local
from workers.member import MemberMachine
from workers.model.factory import LossFn, ModelBundle, build_model, next_token_loss
from workers.model.flops import measured_matmul_flops
from workers.optim import InnerOptimizer, build_optimizer
from workers.replica import Replica
from workers.schedule import lr_at
from workers.snapshot import write_snapshot
from workers.timeline import Timeline

ROW_EVERY_S = 0.1


class NoContext(RuntimeError):
    """An island was made outside of a run."""

    def __init__(self) -> None:
        """The message says how to get a run."""
        super().__init__(
            "workers.island.Island needs a run around it: use atoll.Island, which starts one in this process, "
            "or set train.loop = 'package.module:function' and start it with `atoll train`"
        )


class Island:
    """The facade of an island; use it as a context manager on the thread that trains."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: InnerOptimizer,
        *,
        loss_fn: LossFn | None = None,
        context: IslandContext | None = None,
        flops_per_token: float | None = None,
    ) -> None:
        """`loss_fn(model, batch)` is used for evaluation; default: next-token loss of a model that returns logits."""
        found = context or current()
        if found is None:
            raise NoContext
        self.context, self.spec = found, found.spec
        self.model, self.optimizer = model, optimizer
        self.bundle = ModelBundle(model=model, loss_fn=loss_fn or next_token_loss, flops_per_token=flops_per_token)
        self.sync: sy.IslandSync | None = None
        self.timeline = Timeline(clock=found.clock)
        self._yielded = 0
        self._progress = 0.0
        self._loss_sum, self._loss_count, self._row_s = 0.0, 0, float("-inf")
        self._waits = {"data": 0.0, "sync": 0.0}
        self._stepped = True

    # ------------------------------------------------------------ life

    def __enter__(self) -> Self:
        """Join the run: serve, ask to be a member, take up a saved local state if the run is resumed."""
        self.reader = PackReader(self.spec.pack)
        self.total_samples = -(-self.spec.train.tokens // self.reader.index.seq_len)
        self.device = next(self.model.parameters()).device
        self.sync = self._build_sync()
        meta = read_meta(self._local_dir()) if self.spec.resume else None
        if meta is not None and meta["run_id"] == self.spec.run_id:
            load_local(self._local_dir(), meta, self.sync, self.model, self.optimizer)
        self.context.deliver = self.sync.deliver
        self.sync.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the run: the control thread ends; the transport goes on serving until the process ends it."""
        if self.sync is not None:
            self.sync.close()

    def _build_sync(self) -> sy.IslandSync:
        spec, context = self.spec, self.context
        tensors = {name: p.data for name, p in self.model.named_parameters() if p.requires_grad}
        strategy = strategy_of(spec)
        fragments = fragments_of(tensors, strategy, spec)
        replica = Replica(specs=fragments, strategy=strategy, tensors=tensors, total_samples=self.total_samples)
        seq_len = self.reader.index.seq_len
        info = msg.ProcessInfo(
            address=context.transport.address,
            node=context.node,
            batch_size=spec.train.batch_size,
            weight=spec.train.batch_size * seq_len,
        )
        machine = MemberMachine(
            run_id=spec.run_id,
            name=spec.name,
            nonce=context.nonce,
            info=info,
            num_chunks=[fragment.num_chunks for fragment in fragments],
        )
        settings = sy.SyncSettings(
            batch_size=spec.train.batch_size,
            timeout_s=spec.timeout_s,
            wait_s=spec.wait_s,
            heartbeat_s=spec.heartbeat_s,
            bound_rounds=spec.bound_rounds,
            total_samples=self.total_samples,
        )
        assert isinstance(context.store, MemberStore)
        return sy.IslandSync(
            machine=machine,
            replica=replica,
            store=context.store,
            transport=context.transport,
            post=context.post,
            clock=context.clock,
            settings=settings,
            executor=context.executor,
            on_reset=self._forget_moments,
        )

    def _forget_moments(self) -> None:
        """After a reset the inner optimizer starts afresh: its moments belong to work that was dropped (H4)."""
        for part in getattr(self.optimizer, "optimizers", (self.optimizer,)):
            part.state.clear()

    def _local_dir(self) -> Path:
        return self.spec.run_dir / "snapshots" / "local" / self.spec.name

    # ------------------------------------------------------------ the loop

    @property
    def progress(self) -> float:
        """Share of the run's tokens, 0 to 1, that the learning rate follows; the same rule on every island."""
        return self._progress

    def batches(self) -> Iterator[Tensor]:
        """Yield int64 tokens (B, seq_len + 1) on the model's device until the run ends or is stopped."""
        while (batch := self.next_batch(blocking=True)) is not None:
            yield batch

    def next_batch(self, *, blocking: bool) -> Tensor | None:
        """The next batch; None at the end, and without `blocking` also when there is nothing to do yet."""
        assert self.sync is not None, "use the island as a context manager"
        if not self._stepped:
            raise RuntimeError("island.step(loss) must be called once for each batch, after optimizer.step()")
        while True:
            action = self.sync.boundary()
            match action:
                case sy.TrainOn():
                    return self._load(action)
                case sy.WaitFor():
                    self.timeline.enter("sync" if action.reason != "state" else "start")
                    if not blocking:
                        return None
                    began = self.context.clock()
                    self.sync.wait(action.timeout_s)
                    kind = "data" if action.reason == "leases" else "sync"
                    self._waits[kind] += self.context.clock() - began
                case sy.EvaluateNow():
                    self.timeline.enter("evaluate")
                    self.sync.say(self._evaluate(action.samples))
                case sy.SaveNow(order=order):
                    versions = write_snapshot(self.spec.run_dir / "snapshots", order.name, self.sync.replica)
                    self.sync.say(msg.Saved(name=order.name, versions=versions, local=False))
                case sy.Finished(save=save):
                    self._finish(save)
                    self.finished = True
                    return None
            for row in self.timeline.take():
                self.sync.observe(*row)

    finished = False

    def _finish(self, save: bool) -> None:
        assert self.sync is not None
        self.timeline.enter(None)
        for row in self.timeline.take():
            self.sync.observe(*row)
        if save:
            save_local(self._local_dir(), self.sync, self.model, self.optimizer)
            versions = tuple(part.n for part in self.sync.replica.parts)
            self.sync.say(msg.Saved(name=self.spec.name, versions=versions, local=True))
        self.sync.flush_rows()

    def _load(self, action: sy.TrainOn) -> Tensor:
        self.timeline.enter("compute")
        positions = np.concatenate([np.arange(a, b, dtype=np.int64) for a, b in action.ranges])
        ids = sample_ids(positions, size=self.reader.num_samples("train"), seed=self.spec.train.seed)
        batch = torch.from_numpy(self.reader.batch(ids)).to(self.device, torch.int64)
        self._yielded, self._progress, self._stepped = len(positions), action.progress, False
        self._began = self.context.clock()
        return batch

    def step(self, loss: Tensor | float, *, stats: StepStats | None = None) -> None:
        """One inner step is finished; `loss` is its mean loss, for the record."""
        assert self.sync is not None and not self._stepped, "island.step without a batch"
        self._stepped = True
        if self.sync.replica.strategy.contribution == "gradient":
            gradients = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None and p.requires_grad}
            self.sync.replica.add_gradients(gradients)
            for parameter in self.model.parameters():
                parameter.grad = None
        now = self.context.clock()
        seconds = now - self._began
        if self.spec.pace_s > seconds:
            time.sleep(self.spec.pace_s - seconds)
            now = self.context.clock()
            seconds = now - self._began
        self.sync.stepped(self._yielded)
        self._record(float(loss), stats, now, seconds)
        if self.context.on_step is not None:
            self.context.on_step()

    def _record(self, loss: float, stats: StepStats | None, now: float, seconds: float) -> None:
        assert self.sync is not None
        self._loss_sum, self._loss_count = self._loss_sum + loss, self._loss_count + 1
        if now - self._row_s < ROW_EVERY_S:
            return
        self._row_s = now
        tokens = self._yielded * self.reader.index.seq_len
        flops = self.bundle.flops_per_token
        self.sync.observe(
            now,
            {
                "kind": "step",
                "step": self.sync.total_steps,
                "progress": self._progress,
                "loss": self._loss_sum / self._loss_count,
                "lr": stats.lr if stats else None,
                "grad_norm": stats.grad_norm if stats else None,
                "tokens_per_s": tokens / seconds,
                "mfu": flops * tokens / seconds / self._peak_flops() if flops else None,
                "step_ms": 1e3 * seconds,
                "data_wait_ms": 1e3 * self._waits["data"],
                "sync_wait_ms": 1e3 * self._waits["sync"],
                "mem_peak_bytes": peak_memory_bytes(self.device),
            },
        )
        self._loss_sum, self._loss_count = 0.0, 0
        self._waits = {"data": 0.0, "sync": 0.0}

    def _peak_flops(self) -> float:
        return measured_matmul_flops(self.device, self.spec.train.precision)

    def _evaluate(self, samples: int) -> msg.Evaluated:
        assert self.sync is not None
        loss = evaluate_anchor(self.bundle, self.sync.replica, self.reader, self.spec)
        versions = tuple(part.n for part in self.sync.replica.parts)
        return msg.Evaluated(versions=versions, samples=samples, val_loss=loss)


def evaluate_anchor(bundle: ModelBundle, replica: Replica, reader: PackReader, spec: IslandSpec) -> float:
    """Mean loss (nats per token) of the anchor over a fixed, evenly spread set of validation windows."""
    num = reader.num_samples("val")
    count = min(spec.eval.windows, num)
    windows = np.arange(count, dtype=np.int64) * num // count
    batches = (
        reader.batch(windows[start : start + spec.eval.batch_size], "val")
        for start in range(0, count, spec.eval.batch_size)
    )
    anchors = replica.anchor_tensors()
    own = dict(bundle.model.named_parameters())
    params = {name: anchors.get(name, own[name]) for name in own}
    return evaluate(bundle, params, batches, precision=spec.train.precision)


def strategy_of(spec: IslandSpec) -> Strategy:
    """The strategy that an island's settings describe."""
    train = spec.train

    def rate(progress: float) -> float:
        return lr_at(progress, lr=train.lr, warmup=train.warmup, min_ratio=train.min_lr_ratio, shape=train.schedule)

    return build_strategy(spec.strategy, spec.codec, lr_at=rate, train=train)


def fragments_of(tensors: dict[str, Tensor], strategy: Strategy, spec: IslandSpec) -> tuple[FragmentSpec, ...]:
    """How the live parameters are divided into fragments and chunks; the same on every member."""
    numel = sum(tensor.numel() for tensor in tensors.values())
    chunk = spec.chunk_values or default_chunk_values(-(-numel // strategy.num_fragments), strategy.codec.block)
    return plan_fragments(
        [TensorSpec(name=name, shape=tuple(tensor.shape)) for name, tensor in tensors.items()],
        num_fragments=strategy.num_fragments,
        pattern=strategy.pattern,
        chunk_values=chunk,
    )


class BuiltinLoop:
    """The built-in loop: model and optimizer from the settings, one `advance` per inner step."""

    def __init__(self, context: IslandContext) -> None:
        """Builds the model on its device; raises ModelError for settings that do not fit."""
        spec = context.spec
        device = resolve_device(spec.train.device, index=spec.index)
        index = PackReader(spec.pack).index
        self.bundle = build_model(spec.model, vocab_size=index.vocab_size, seq_len=index.seq_len, seed=spec.train.seed)
        self.bundle.model.to(device)
        optimizer = build_optimizer(self.bundle.model, spec.train)
        self.inner = InnerLoop(self.bundle, optimizer, spec.train, device)
        self.island = Island(
            self.bundle.model,
            optimizer,
            loss_fn=self.bundle.loss_fn,
            context=context,
            flops_per_token=self.bundle.flops_per_token,
        )
        self.gradients_only = strategy_of(spec).contribution == "gradient"

    def advance(self, *, blocking: bool) -> bool:
        """One inner step, if there is something to train on; whether a step was made."""
        batch = self.island.next_batch(blocking=blocking)
        if batch is None:
            return False
        if self.gradients_only:
            self.island.step(self.inner.forward_backward(batch))
        else:
            stats = self.inner.step(batch, progress=self.island.progress)
            self.island.step(stats.loss, stats=stats)
        return True

    def run(self) -> None:
        """Train until the run ends."""
        with self.island:
            while self.advance(blocking=True):
                pass


def run_builtin_loop(context: IslandContext) -> None:
    """What an island's training thread does unless `train.loop` names another loop."""
    BuiltinLoop(context).run()


def load_loop(spec: str) -> Callable[[], None]:
    """The function that `train.loop` names; raises ModelError that says what was looked for."""
    from workers.model.factory import load_factory

    return load_factory(spec)  # type: ignore[return-value]
