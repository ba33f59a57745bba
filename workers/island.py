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
(`workers/loops.py`) is written with it. What a user's script uses is `atoll.Island`, which puts a run around it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn

from strategies.registry import warm_up
from workers import messages as msg
from workers import ranges
from workers import sync as sy
from workers.actions import EvaluateNow, Finished, SaveNow, TrainOn, WaitFor
from workers.buddy import LocalCopies
from workers.context import IslandContext, IslandSpec, current
from workers.device import peak_memory_bytes
from workers.inner_loop import StepStats, evaluate
from workers.jobs import MemberStore
from workers.local_state import keep_local, load_local
from workers.loop_checks import BufferWatch, ChangeWatch, LoopError, ParameterGuard, synchronised
from workers.member import MemberMachine
from workers.model.factory import LossFn, ModelBundle, next_token_loss
from workers.model.flops import measured_matmul_flops
from workers.optim import InnerOptimizer
from workers.pace import Pace
from workers.pack_access import open_own_pack, open_pack
from workers.pair_sync import PairSync
from workers.record_log import RecordLog
from workers.records import StopRecord
from workers.replica import Replica, StateChunk
from workers.samples import (
    Collate,
    Ids,
    SampleSource,
    check_own_data,
    cut,
    evenly_spread,
    numbers_of,
    open_source,
    positions_of,
)
from workers.saved import read_meta
from workers.scopes import Scopes, scopes_of
from workers.snapshot_writer import build_writer, snapshot_place
from workers.sync_settings import SyncSettings
from workers.timeline import WAITING_IN, Timeline
from workers.variants import follow_settings, fragments_of, strategy_of

log = logging.getLogger("atoll.island")

ROW_EVERY_S = 0.2
LAST_COMMIT_S = 10.0
LAST_SNAPSHOT_S = 45.0  # less than what the controller waits for local states
STEP_MISSING = "island.step(loss) must be called once for each batch, after optimizer.step(); it was not called"
STEP_TWICE = "island.step(loss) was called without a new batch: call it once for each batch of island.batches()"


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
        dataset: Any = None,
        val_dataset: Any = None,
        collate: Collate | None = None,
        context: IslandContext | None = None,
        flops_per_token: float | None = None,
    ) -> None:
        """Raises LoopError for a model, an optimizer or arguments that cannot work.

        Args:
            model: on its device, in float32. optimizer: of its parameters.
            loss_fn: `loss_fn(model, batch)`, for evaluation; default: next-token loss of a model that returns logits.
            dataset: own data (`workers/samples.py`), where `data.samples` is set. val_dataset: what to evaluate on.
            collate: makes a batch of a list of samples.
            context: the run; default: that of this thread. flops_per_token: for the record.
        """
        found = context or current()
        if found is None:
            raise NoContext
        self.context, self.spec = found, found.spec
        self.model, self.optimizer = model, optimizer
        self.bundle = ModelBundle(model=model, loss_fn=loss_fn or next_token_loss, flops_per_token=flops_per_token)
        self.guard = ParameterGuard(model, optimizer, device=self.spec.train.device)
        self.device = self.guard.device
        self.sync: sy.IslandSync | None = None
        self.timeline = Timeline(clock=found.clock)
        self.finished, self.watches_changes = False, True
        self._data = {"dataset": dataset, "val_dataset": val_dataset, "collate": collate}
        check_own_data(self.spec.data, loss_fn=loss_fn, **self._data)
        self._yielded = self._looked_to = 0
        self._progress = self._loading_s = 0.0
        self._loss_sum, self._loss_count, self._row_s = 0.0, 0, float("-inf")
        self._compute_s, self._tokens = 0.0, 0
        self._last_step: tuple[float, float, StepStats | None] | None = None
        self._waits = {"data": 0.0, "sync": 0.0}
        self._stepped = True
        self._at_hand: tuple[RecordLog, dict[int, list[StateChunk]]] | None = None

    # ------------------------------------------------------------ life

    def move_to(self, context: IslandContext) -> None:
        """Be another island of the run than the one that it was built as; only before it is entered."""
        self.context, self.spec = context, context.spec

    def begin_with(self, log: RecordLog, states: dict[int, list[StateChunk]]) -> None:
        """Begin with a copy of the journal and states of all fragments (`workers/standby.py`); before it is entered."""
        self._at_hand = (log, states)

    def __enter__(self) -> Self:
        """Join the run: serve, ask to be a member, take up a saved local state if the run is resumed."""
        if self.context.deliver is not None:
            raise LoopError("a run's process makes one island: use one `with atoll.Island(...)` for the whole loop")
        self.guard.warn()
        self.sync = self._build_sync()
        self.writer = build_writer(self.spec, self.sync.say, threaded=self.context.executor is not None)
        meta = read_meta(self._local_dir()) if self.spec.resume else None
        if meta is not None and meta["run_id"] == self.spec.run_id:
            load_local(self._local_dir(), meta, self.sync, self.model, self.optimizer)
        elif self._at_hand is not None:
            self.sync.begin_with(*self._at_hand)
            self._at_hand = None
        gradients_only = self.sync.replica.strategy.contribution == "gradient"
        self._changes = ChangeWatch(synchronised(self.model), wanted=not gradients_only)
        self._buffers = BufferWatch(self.model) if self.watches_changes else None
        self.context.deliver, self.context.abort = self.sync.deliver, self.sync.abort
        self.context.attach = self.sync.attach
        self.sync.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the run: the control thread ends; the transport goes on serving until the process ends it."""
        if self.sync is not None:
            self.sync.close()
            self.writer.close()
            self.source.close()

    @cached_property
    def source(self) -> SampleSource:
        """Where its samples come from; opened when it is first needed."""
        pack = open_pack(self.context, self._peers) if self.spec.pack is not None else None
        own = open_own_pack(self.spec, pack.index) if pack is not None else None
        return open_source(self.spec.data, pack, device=self.device, own=own, **self._data)

    @cached_property
    def _scopes(self) -> Scopes:
        return scopes_of(self.total_samples, self.spec.data.own_samples(self.source.tokens_per_sample))

    def _numbers(self, positions: Ids) -> Ids:
        return numbers_of(positions, self.source, scopes=self._scopes, name=self.spec.name, seed=self.spec.train.seed)

    def _peers(self) -> Sequence[tuple[str, str]]:
        """Other members and their addresses, as far as they are known."""
        known = self.sync.machine.peers if self.sync is not None else {}
        return [(name, address) for name, (address, _) in known.items() if address != self.context.transport.address]

    @property
    def total_samples(self) -> int:
        """Samples of the whole run."""
        return -(-self.spec.train.tokens // self.source.tokens_per_sample)

    def build_replica(self) -> Replica:
        """A replica of the model under the run's strategy, without a state; compiles what has to be compiled."""
        tensors = {name: parameter.data for name, parameter in synchronised(self.model).items()}
        strategy = strategy_of(self.spec)
        for codec in (strategy.codec, strategy.result_codec):
            warm_up(codec, self.device)  # nobody waits for the compiler in an exchange
        fragments = fragments_of(tensors, strategy, self.spec)
        return Replica(specs=fragments, strategy=strategy, tensors=tensors, total_samples=self.total_samples)

    def _build_sync(self) -> sy.IslandSync:
        spec, context = self.spec, self.context
        replica = self.build_replica()
        info = msg.ProcessInfo(
            address=context.transport.address,
            node=context.node,
            region=context.region,
            batch_size=spec.train.batch_size,
            weight=spec.train.batch_size * self.source.tokens_per_sample,
        )
        machine = MemberMachine(
            run_id=spec.run_id,
            name=spec.name,
            nonce=context.nonce,
            info=info,
            num_chunks=[fragment.num_chunks for fragment in replica.specs],
        )
        machine.pace = Pace(own_loop=self.watches_changes, tick_s=spec.heartbeat_s, since_s=context.clock())
        settings = SyncSettings(
            batch_size=spec.train.batch_size,
            timeout_s=spec.timeout_s,
            wait_s=spec.wait_s,
            heartbeat_s=spec.heartbeat_s,
            bound_rounds=spec.bound_rounds,
            total_samples=self.total_samples,
        )
        follow_settings(replica, spec, lambda: machine.log)
        assert isinstance(context.store, MemberStore)
        kind = PairSync if spec.strategy.in_pairs else sy.IslandSync
        sync = kind(
            machine=machine,
            replica=replica,
            store=context.store,
            transport=context.transport,
            post=context.post,
            clock=context.clock,
            settings=settings,
            executor=context.executor,
            snapshots=snapshot_place(spec),
            on_reset=self._forget_moments,
            copies=LocalCopies(self.model, self.optimizer, spec.staleness_limit) if spec.keeps_copies else None,
        )
        if isinstance(sync, PairSync):
            sync.begin_pairs(spec.strategy)
        return sync

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

    def batches(self) -> Iterator[Any]:
        """Yield batches on the model's device until the run ends or is stopped.

        A batch is int64 tokens (B, seq_len + 1), or what the loop's own dataset gives. The last ones may be smaller.
        """
        while (batch := self.next_batch(blocking=True)) is not None:
            yield batch

    def samples(self) -> Iterator[Ids]:
        """Like `batches`, for a loop that reads its data itself: yield the numbers of the samples, int64 (B,)."""
        while (ids := self._next(blocking=True)) is not None:
            yield ids

    def next_batch(self, *, blocking: bool) -> Any:
        """The next batch; None at the end, and without `blocking` also when there is nothing to do yet."""
        ids = self._next(blocking=blocking)
        if ids is None:
            return None
        loading_s = self.context.clock()
        if not self.source.is_here(ids):
            self._fetch(ids)
        batch = self.source.batch(ids)
        self._began = self.context.clock()
        self._loading_s = self._began - loading_s
        self._waits["data"] += self._loading_s
        return batch

    @property
    def between_steps(self) -> bool:
        """Whether no batch is under way: the state can be saved."""
        return self._stepped

    def leave(self) -> None:
        """End the loop before the run's end: go on with everything but training until the run is stopped."""
        if not self.finished:
            self._next(blocking=True, training=False)

    def _next(self, *, blocking: bool, training: bool = True) -> Ids | None:
        """Everything that belongs to a step boundary; then the numbers of the next samples, or None."""
        if self.sync is None:
            raise LoopError("an island works inside `with atoll.Island(...) as island:`")
        if not self._stepped:
            raise LoopError(STEP_MISSING)
        while True:
            action = self.sync.boundary()
            match action:
                case TrainOn() if training:
                    return self._take(action)
                case TrainOn():
                    self.sync.wait(self.spec.heartbeat_s)
                case WaitFor():
                    self.timeline.enter(WAITING_IN.get(action.reason, "wait"))
                    if not blocking:
                        return None
                    began = self.context.clock()
                    self.sync.wait(action.timeout_s)
                    kind = "data" if action.reason == "leases" else "sync"
                    self._waits[kind] += self.context.clock() - began
                case EvaluateNow():
                    self.timeline.enter("evaluate")
                    self.sync.say(self._evaluate(action.samples))
                case SaveNow(order=order):
                    self.writer.order(order.name, self.sync.replica)
                case Finished(save=save):
                    self._finish(save, blocking=blocking)
                    return None
            for row in self.timeline.take():
                self.sync.observe(*row)

    def _finish(self, save: bool, *, blocking: bool) -> None:
        """The run is over for this island. After a run that is done the model holds the last anchor."""
        assert self.sync is not None
        self._write_row()
        self.timeline.enter(None)
        for row in self.timeline.take():
            self.sync.observe(*row)
        if save:
            if not self.writer.finish(LAST_SNAPSHOT_S):
                log.warning("the last snapshot is not written after %g s", LAST_SNAPSHOT_S)
            keep_local(self._local_dir(), self.sync, self.model, self.optimizer)
        self.sync.flush_rows()
        last = self.sync.machine.log.rows[-1].record if self.sync.machine.log.rows else None
        self.context.ended = last.reason if isinstance(last, StopRecord) else "stopped"
        if self.context.ended == "done":
            if blocking:
                self._catch_up()
            self.sync.replica.reset()
        self.finished = True

    def _catch_up(self) -> None:
        """Take over the last commits, which others may have applied before."""
        assert self.sync is not None
        deadline_s = self.context.clock() + LAST_COMMIT_S
        while self.sync.behind():
            if self.context.clock() > deadline_s:
                log.warning("the last commit did not arrive in %g s: the model holds the one before", LAST_COMMIT_S)
                return
            self.sync.boundary()
            self.sync.wait(self.spec.heartbeat_s)

    def _take(self, action: TrainOn) -> Ids:
        self.timeline.enter("compute")
        self._look_ahead()
        positions = positions_of(action.ranges)
        self._yielded, self._progress, self._stepped = len(positions), action.progress, False
        self._began, self._loading_s = self.context.clock(), 0.0
        return self._numbers(positions)

    def _fetch(self, ids: Ids) -> None:
        """Get the shards of the next step: that is waiting, and no step that hangs."""
        assert self.sync is not None
        for doing in ("waiting", "step"):
            with self.sync.changed:
                self.sync.machine.pace.begin(doing, self.context.clock())
            if doing == "waiting":
                self.source.fetch(ids)

    def _look_ahead(self) -> None:
        """What else is leased is fetched meanwhile, in the order in which it is going to be needed."""
        assert self.sync is not None
        machine = self.sync.machine
        if self._looked_to < machine.num_leased():
            todo = ranges.cut(machine.leases, max(machine.consumed, self._looked_to), machine.num_leased())
            self._looked_to = machine.num_leased()
            self.source.want(self._numbers(positions_of(todo)))
        elif machine.consumed == 0:
            self._looked_to = 0  # another incarnation has leases of its own

    def step(self, loss: Tensor | float, *, stats: StepStats | None = None) -> None:
        """One inner step is finished; `loss` is its mean loss, for the record. Raises LoopError."""
        if self.sync is None or self._stepped:
            raise LoopError(STEP_TWICE)
        self.guard.check()
        if self._buffers is not None:
            self._changes.step(self.sync.replica.anchor_tensors)
            self._buffers.first_step_done()
        if self.sync.replica.strategy.contribution == "gradient":
            self._hand_over_gradients()
        self._stepped = True
        now = self.context.clock()
        seconds = now - self._began
        if self.spec.pace_s > seconds:
            self.context.sleep(self.spec.pace_s - seconds)
            now = self.context.clock()
            seconds = max(now - self._began, self.spec.pace_s)  # where islands take turns, the clock goes on later
        self.sync.stepped(self._yielded, seconds + self._loading_s)
        self._record(float(loss.detach() if isinstance(loss, Tensor) else loss), stats, now, seconds)
        if self.context.on_step is not None:
            self.context.on_step()

    def _hand_over_gradients(self) -> None:
        assert self.sync is not None
        gradients = {n: p.grad for n, p in synchronised(self.model).items() if p.grad is not None}
        missing = synchronised(self.model).keys() - gradients.keys()
        if missing:
            raise LoopError(
                f"strategy.name = 'ddp' averages gradients, and {min(missing)!r} has none: call island.step(loss) "
                "right after loss.backward(), without optimizer.step() and optimizer.zero_grad()"
            )
        self.sync.replica.add_gradients(gradients)
        for parameter in self.model.parameters():
            parameter.grad = None

    def _record(self, loss: float, stats: StepStats | None, now: float, seconds: float) -> None:
        """Steps are put together in one row for at least `ROW_EVERY_S`: means over them, the last one's time."""
        self._loss_sum, self._loss_count = self._loss_sum + loss, self._loss_count + 1
        self._compute_s += seconds
        self._tokens += self._yielded * self.source.tokens_per_sample
        self._last_step = (now, 1e3 * self._compute_s / self._loss_count, stats)
        if now - self._row_s >= ROW_EVERY_S:
            self._write_row()

    def _write_row(self) -> None:
        """A row of the steps since the last one."""
        if self._last_step is None or self.sync is None:
            return
        now, step_ms, stats = self._last_step
        self._row_s, self._last_step = now, None
        tokens_per_s = self._tokens / self._compute_s
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
                "tokens_per_s": tokens_per_s,
                "mfu": flops * tokens_per_s / self._peak_flops() if flops else None,
                "step_ms": step_ms,
                "data_wait_ms": 1e3 * self._waits["data"],
                "sync_wait_ms": 1e3 * self._waits["sync"],
                "mem_peak_bytes": peak_memory_bytes(self.device),
                "compute_s": self._compute_s,
            },
        )
        self._loss_sum, self._loss_count, self._compute_s, self._tokens = 0.0, 0, 0.0, 0
        self._waits = {"data": 0.0, "sync": 0.0}

    def _peak_flops(self) -> float:
        return measured_matmul_flops(self.device, self.spec.train.precision)

    def _evaluate(self, samples: int) -> msg.Evaluated:
        assert self.sync is not None
        loss = evaluate_anchor(self.bundle, self.sync.replica, self.source, self.spec)
        if loss is None and samples == 0:
            log.info("no evaluation: the loop gave no val_dataset and loss_fn")
        versions = tuple(part.n for part in self.sync.replica.parts)
        return msg.Evaluated(versions=versions, samples=samples, val_loss=loss)


def evaluate_anchor(bundle: ModelBundle, replica: Replica, source: SampleSource, spec: IslandSpec) -> float | None:
    """Mean loss of the anchor over a fixed, evenly spread set of validation samples; None where there are none."""
    if not source.num_validation:
        return None
    pieces = list(cut(evenly_spread(source.num_validation, spec.eval.windows), spec.eval.batch_size))
    anchors = replica.anchor_tensors()
    own = dict(bundle.model.named_parameters())
    params = {name: anchors.get(name, own[name]) for name in own}
    sizes = [len(ids) for ids in pieces]
    batches = (source.validation(ids) for ids in pieces)
    return evaluate(bundle, params, batches, precision=spec.train.precision, sizes=sizes)
