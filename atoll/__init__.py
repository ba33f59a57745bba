"""Atoll: train one model on several machines that synchronise rarely. The public API.

    atoll.Island(model, optimizer, config)  your own training loop, in a script or as an island of a run
    atoll.train(config)                     a run on Ray, to its end
    atoll.start(config)                     the same as an object: watch its events, change it, stop it
    atoll.attach("runs/latest")             a run that goes on already, here or in a cluster
    atoll.load_config(name, overrides)      a preset or a file, with other values
    atoll.load_anchor(run_dir)              the trained parameters of a run

Importing this module is cheap: torch and Ray are imported by what needs them.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from orchestrator.version import VERSION as __version__

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from orchestrator.config import RunConfig
    from orchestrator.errors import RunFailed, UserError
    from orchestrator.handle import Run
    from orchestrator.inline import InlineRun
    from orchestrator.status import Status
    from orchestrator.summary import Summary
    from workers.context import IslandContext
    from workers.data.reader import PackReader
    from workers.island import Island as WorkerIsland
    from workers.loop_checks import LoopError
    from workers.optim import InnerOptimizer

__all__ = [
    "Config",
    "Island",
    "LoopError",
    "PackReader",
    "Run",
    "RunConfig",
    "RunFailed",
    "Status",
    "Summary",
    "UserError",
    "__version__",
    "attach",
    "device",
    "load_anchor",
    "load_config",
    "start",
    "train",
]

Config: TypeAlias = "str | Path | Mapping[str, Any] | RunConfig"
"""A preset's name, the path of a TOML file, values ({"train.tokens": 1000}), or a configuration."""

_LAZY = {
    "LoopError": "workers.loop_checks",
    "PackReader": "workers.data.reader",
    "Run": "orchestrator.handle",
    "RunConfig": "orchestrator.config",
    "Status": "orchestrator.status",
    "RunFailed": "orchestrator.errors",
    "Summary": "orchestrator.summary",
    "UserError": "orchestrator.errors",
}

_log = logging.getLogger("atoll.island")


def __getattr__(name: str) -> Any:
    """Import what is rarely needed, or takes long to import, when it is asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module 'atoll' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    """What is public."""
    return sorted(__all__)


def load_config(source: Config, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Return a checked configuration.

    Args:
        source: a preset (`"diloco"`), a TOML file, a run directory, or values over the defaults.
        overrides: values that are set in it: {"section.key": value}, or {"section": {"key": value}}.

    Raises:
        UserError: it is not found, a key is unknown, a value is wrong, or settings do not fit.
    """
    from orchestrator.own_loop import read_config

    return read_config(source, overrides)


def load_anchor(run_dir: str | Path, snapshot: str | None = None) -> dict[str, Tensor]:
    """Return the trained parameters of a run by name, from its newest (or the named) snapshot.

    For `model.load_state_dict(atoll.load_anchor("runs/latest"), strict=False)`: buffers are not part of the anchor.

    Raises:
        UserError: the directory is no run, or has no snapshot yet.
        ValueError: the snapshot is damaged.
    """
    from orchestrator.artifacts import load_anchor
    from orchestrator.rundir import open_run_dir

    return load_anchor(open_run_dir(Path(run_dir)).path, snapshot)


def train(
    config: Config, run_dir: str | Path | None = None, faults: Sequence[str] = (), *, quiet: bool = False
) -> Summary:
    """Train on Ray until the run is over, and return its summary; as `atoll train` does.

    An open connection to Ray is used, otherwise a cluster is started on this machine for the run. Ctrl-C stops the
    run so that `atoll train --resume` goes on with it; the summary then has `exit_reason = "stopped"`.

    Args:
        config: what to train. With `train.loop` every island runs that function.
        run_dir: the run's directory; default `runs/<name>-<date>-<4 hex>`.
        faults: failures to cause on purpose, such as "kill:island-1@round=15".
        quiet: print nothing.

    Raises:
        UserError: something is wrong with the settings, the data or the directory.
        RunFailed: the run ended without reaching its end.
    """
    from orchestrator.errors import RunFailed
    from orchestrator.launch import run_to_end
    from orchestrator.prepare import prepare
    from orchestrator.rundir import create_run_dir

    checked = load_config(config)
    prepared = prepare(checked, faults)
    directory = create_run_dir(checked.run.name, path=None if run_dir is None else Path(run_dir))
    with directory.lock():
        directory.record(prepared.config.to_toml())
        summary = run_to_end(prepared, directory.path, resume=False, quiet=quiet)
    if summary.exit_reason == "failed":
        raise RunFailed(
            f"the run failed: {summary.error}",
            place=str(directory.path),
            remedy=f"atoll why {directory.path}, and the logs in {directory.logs}",
        )
    return summary


def start(config: Config, run_dir: str | Path | None = None, faults: Sequence[str] = ()) -> Run:
    """Start a run on Ray and return at once with a `Run`, whose `wait` gives the summary.

        with atoll.start("debug") as run:
            for row in run.events():
                print(row.record)

    An open connection to Ray is used, `run.address`, or a cluster that is started on this machine and ends with it.
    Arguments as of `train`. Raises UserError, ClusterUnreachable.
    """
    from orchestrator.client import RayRuns
    from orchestrator.handle import Run
    from orchestrator.launch import RaySession
    from orchestrator.prepare import prepare
    from orchestrator.rundir import create_run_dir

    checked = load_config(config)
    prepared = prepare(checked, faults)
    directory = create_run_dir(checked.run.name, path=None if run_dir is None else Path(run_dir))
    with contextlib.ExitStack() as stack:
        stack.enter_context(directory.lock())
        directory.record(prepared.config.to_toml())
        session = stack.enter_context(RaySession(prepared.config))
        session.start(directory.path.resolve(), prepared.pack, prepared.faults, resume=False)
        name = directory.path.resolve().name
        return Run(RayRuns(name), name, stack=stack.pop_all(), run_dir=directory.path, owned=True)


def attach(target: str | Path | None = None, run: str | None = None) -> Run:
    """Return a run that goes on already; it goes on when the object is closed.

    Args:
        target: a run directory, an address of Ray, or the join string of a cluster; default: the newest run here.
        run: its name, where several go on there.

    Raises:
        UserError: no such run goes on.
        ClusterUnreachable: nobody answers there.
    """
    from orchestrator.client import connect, directory_of
    from orchestrator.handle import Run

    place = None if target is None else str(target)
    with contextlib.ExitStack() as stack:
        runs = stack.enter_context(connect(place))
        standing = runs.ask("standing", run)
        directory = directory_of(place)
        path = directory.path if directory is not None else Path(standing["run_dir"])
        here = path if (path / "config.toml").is_file() else None
        return Run(runs, standing["run"], stack=stack.pop_all(), run_dir=here, owned=False)


def device() -> torch.device:
    """Return where the model of this island belongs: by `train.device` inside a run, else the first GPU or the CPU."""
    from workers.context import current
    from workers.device import resolve_device

    context = current()
    if context is None:
        return resolve_device("auto")
    return resolve_device(context.spec.train.device, index=context.spec.index)


class Island:
    """Your own training loop as an island.

        with atoll.Island(model, optimizer, "diloco") as island:
            for batch in island.batches():
                loss = loss_fn(model, batch)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                island.step(loss)

    In a script or a notebook it is a run of one island in this process, with a run directory of its own. In a function
    that `train.loop` names it is one of the islands of that run. Between two batches it exchanges, evaluates and
    saves; the loop ends when `train.tokens` are committed, and the model then holds the common result.

    Of `[train]` the loop itself decides about optimizer, learning rate, clipping, accumulation, precision and threads;
    `island.progress` is there for schedules. Only trainable parameters are synchronised: buffers, such as the
    statistics of BatchNorm, stay with their island. Not thread-safe: use it on one thread.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: InnerOptimizer,
        config: Config | None = None,
        *,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        dataset: Any = None,
        val_dataset: Any = None,
        collate: Callable[[list[Any]], Any] | None = None,
        run_dir: str | Path | None = None,
        resume: bool = False,
    ) -> None:
        """Nothing starts before the `with`.

        Args:
            model: on its device, its trainable parameters in float32.
            optimizer: made of the model's parameters; anything with `step`, `zero_grad`, `param_groups`, `state_dict`.
            config: what to train on and for how long; not needed inside a run, and must be equal to the run's there.
            loss_fn: `loss_fn(model, batch)` -> mean loss, for evaluation. Without it, on a pack of tokens, the model's
                output is taken for logits (B, T, vocabulary) of the next token.
            dataset: data of your own instead of a pack: an array or tensor, a tuple or dict of them, or anything with
                `len()` and `[number]`. Its samples are leased and accounted for by their numbers, and `train.tokens`
                counts samples. Inside a run, `data.samples` must be its size.
            val_dataset: as `dataset`, to evaluate on with `loss_fn`; without it there is no validation loss.
            collate: makes a batch of a list of samples; default: torch's.
            run_dir: directory of the run, for a script; default `runs/<name>-<date>-<4 hex>`.
            resume: go on with the stopped run in `run_dir`, for a script.
        """
        self._model, self._optimizer, self._config = model, optimizer, config
        self._data = {"loss_fn": loss_fn, "dataset": dataset, "val_dataset": val_dataset, "collate": collate}
        self._run_dir, self._resume = run_dir, resume
        self._run: InlineRun | None = None
        self._island: WorkerIsland | None = None
        self._summary: Summary | None = None
        self._signals = contextlib.ExitStack()

    # ------------------------------------------------------------ the run around it

    def __enter__(self) -> Self:
        """Join the run of this process, or start one. Raises LoopError, UserError."""
        from workers.context import current
        from workers.island import Island as WorkerIsland

        context = current()
        with contextlib.ExitStack() as stack:
            if context is None:
                self._run = self._start_run()
                stack.push(self._leave)
                context = self._run.context()
            else:
                self._check_config(context)
            self._island = WorkerIsland(self._model, self._optimizer, context=context, **self._data)
            self._island.__enter__()
            stack.pop_all()
        if self._run is not None:
            self._stop_at_interrupt()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the run. In a script it ends with it: after a `break` it can be resumed, after an error it failed."""
        self._leave(kind, error, trace)

    def _start_run(self) -> InlineRun:
        """Check all that can be checked, then make the directory and start the controller."""
        from orchestrator.build import pack_path, resolve
        from orchestrator.inline import InlineRun
        from orchestrator.own_loop import script_config
        from orchestrator.preflight import check_pack
        from orchestrator.rundir import create_run_dir
        from workers.loop_checks import ParameterGuard
        from workers.samples import check_own_data, num_samples_of

        dataset = self._data["dataset"]
        if self._resume:
            config, directory = self._resumed()
        else:
            config = script_config(self._config, num_samples=None if dataset is None else num_samples_of(dataset))
        ParameterGuard(self._model, self._optimizer, device=config.train.device)
        check_own_data(config.data, **self._data)
        check_pack(config.data.path, config.data.digest)
        config = resolve(config)
        pack = pack_path(config)
        if not self._resume:
            directory = create_run_dir(config.run.name, path=None if self._run_dir is None else Path(self._run_dir))
        run = InlineRun(config, directory, pack=pack, resume=self._resume)
        run.start()
        return run

    def _resumed(self) -> tuple[RunConfig, Any]:
        from orchestrator.errors import UserError
        from orchestrator.rundir import open_run_dir

        directory = open_run_dir(None if self._run_dir is None else Path(self._run_dir))
        state = directory.state()
        if state == "done":
            raise UserError(
                f"the run in {directory.path} is done, there is nothing to resume",
                place="resume=True",
                remedy="a new run; or export what it trained with atoll export",
            )
        return load_config(directory.path), directory

    def _check_config(self, context: IslandContext) -> None:
        """Inside a run its configuration holds; another one in the script would be ignored without a word."""
        from orchestrator.own_loop import differences
        from workers.loop_checks import LoopError

        if self._run_dir is not None or self._resume:
            raise LoopError("run_dir and resume are for a script; inside a run leave them out of atoll.Island")
        if self._config is None:
            return
        found = list(differences(self._config, context.spec))
        if found:
            raise LoopError(
                f"this is {context.spec.name} of the run {context.spec.run_id}, and the configuration given to "
                f"atoll.Island is another one: {'; '.join(found)}. Leave it out inside a run, or make them equal"
            )

    def _leave(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        run, island = self._run, self._island
        with self._signals:
            try:
                if run is not None:
                    self._settle(run, error)
            finally:
                if island is not None:
                    island.__exit__(kind, error, trace)
        if run is not None:
            self._summary = run.finish()
            _log.info("run directory: %s", run.run_dir.path)

    def _settle(self, run: InlineRun, error: BaseException | None) -> None:
        """How the run in this process ends: it is over already, the loop was left, or it failed."""
        island = self._island
        if isinstance(error, Exception):
            for context in run.contexts.values():
                run.fail(context, error)
            if not run.contexts:
                run.stop(save=False)
        elif error is not None or island is None:
            run.stop(save=False)
        elif not island.finished:
            between_steps = island.between_steps
            run.stop(save=between_steps)
            if between_steps:
                island.leave()

    def _stop_at_interrupt(self) -> None:
        """First Ctrl-C: finish the step, save, leave the loop. The second one is an ordinary KeyboardInterrupt."""
        ours = threading.current_thread() is threading.main_thread()
        if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            return

        def stop(number: int, frame: FrameType | None) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self.stop()

        signal.signal(signal.SIGINT, stop)
        self._signals.callback(signal.signal, signal.SIGINT, signal.default_int_handler)

    # ------------------------------------------------------------ the loop

    def batches(self) -> Iterator[Any]:
        """Yield batches on the model's device until the run is over or is stopped.

        A batch is int64 tokens (B, seq_len + 1) of a pack (inputs `[:, :-1]`, targets `[:, 1:]`), or what `dataset`
        gives. B is `train.batch_size` of this island, and may be smaller at the end. Raises LoopError when `step` was
        not called for the batch before.
        """
        return self._inside().batches()

    def samples(self) -> Iterator[NDArray[np.int64]]:
        """Like `batches`, for a loop that reads its data itself: yield the numbers (B,) of the samples to train on."""
        return self._inside().samples()

    def step(self, loss: Tensor | float) -> None:
        """Say that the optimizer's step for this batch is done; `loss` is its mean loss, for the record.

        Raises LoopError when it is called twice for a batch, when the parameters are other tensors than at the start,
        or when no parameter ever changes.
        """
        self._inside().step(loss)

    def stop(self) -> None:
        """Ask a script's run to stop: `batches` ends after this step, and the run can be resumed."""
        from workers.loop_checks import LoopError

        if self._run is None:
            raise LoopError(
                "island.stop() is for a script; a run on Ray is stopped by the one who started it, by Ctrl-C"
            )
        self._run.stop(save=True)

    @property
    def progress(self) -> float:
        """Share of the run that is behind us, 0 to 1, by the same rule on every island; for schedules."""
        return self._inside().progress

    @property
    def name(self) -> str:
        """`island-0`, `island-1`, ..."""
        return self._inside().spec.name

    @property
    def num_islands(self) -> int:
        """Islands of the run."""
        return self._inside().spec.num_islands

    @property
    def run_dir(self) -> Path:
        """Directory of the run."""
        return self._inside().spec.run_dir

    @property
    def summary(self) -> Summary | None:
        """What a script's run came to, once it is over; None before, and inside a run on Ray."""
        return self._summary

    def _inside(self) -> WorkerIsland:
        if self._island is None:
            from workers.loop_checks import LoopError

            raise LoopError("an island works inside `with atoll.Island(...) as island:`")
        return self._island
