"""Where an island runs: everything its process was given, without any module-global process group.

A run's process (a Ray actor, or a thread of a local run) makes one `IslandContext` and enters it on the training
thread; `Island` finds it there.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from strategies.config import CodecConfig, StrategyConfig
from workers.config import DataConfig, EvalConfig, ModelConfig, TrainConfig
from workers.messages import Batch, Envelope
from workers.records import Row, Term
from workers.store import BlobStore
from workers.transport.base import Transport

if TYPE_CHECKING:
    from workers.inner_loop import InnerLoop


@dataclass(frozen=True, kw_only=True, slots=True)
class IslandSpec:
    """Settings of one island, resolved: no `auto` is left but the device."""

    run_id: str
    name: str
    index: int
    num_islands: int
    run_dir: Path
    pack: Path | None
    train: TrainConfig
    data: DataConfig
    model: ModelConfig
    strategy: StrategyConfig
    codec: CodecConfig
    eval: EvalConfig
    chunk_values: int | None
    timeout_s: float
    wait_s: float
    heartbeat_s: float
    bound_rounds: float
    connections: int
    pace_s: float = 0.0
    link_share: float = 0.5
    link_bytes_per_s: float | None = None
    resume: bool = False
    keep_anchors: int = 8
    snapshots: str | None = None
    keeps_copies: bool = False
    on_demand: bool = False
    staleness_limit: int = 16


@dataclass(kw_only=True, slots=True)
class IslandContext:
    """What the process around an island gives it. `post` hands an envelope to the controller and never blocks.

    The island sets `deliver`, `attach` and `abort` when it begins, which may be called from any thread, and `ended`
    when the run is over for it: "done", "stopped" or "failed". `attach` hands in its copy of the journal and promises
    to obey the term; `abort` ends its loop with an error.
    `sleep` is that of `clock`. `inner` is set by the built-in loop: what makes its steps.
    `num_sharing`: islands that share the memory of this machine, this one included. `region`: where its machine is, as
    a label of it says; nothing where none does.
    """

    spec: IslandSpec
    nonce: str
    node: str
    store: BlobStore
    transport: Transport
    post: Callable[[Envelope], None]
    clock: Callable[[], float]
    executor: Executor | None = None
    deliver: Callable[[Batch], None] | None = None
    attach: Callable[[Term], tuple[Term | None, tuple[Row, ...]]] | None = None
    abort: Callable[[BaseException], None] | None = None
    ended: str = ""
    on_step: Callable[[], None] | None = None
    sleep: Callable[[float], None] = time.sleep
    num_sharing: int = 1
    region: str = ""
    inner: InnerLoop | None = None


_CURRENT: ContextVar[IslandContext | None] = ContextVar("atoll_island", default=None)


def current() -> IslandContext | None:
    """The context of this thread, if it trains an island."""
    return _CURRENT.get()


@contextlib.contextmanager
def enter(context: IslandContext) -> Iterator[IslandContext]:
    """Make `context` the current one on this thread."""
    token = _CURRENT.set(context)
    try:
        yield context
    finally:
        _CURRENT.reset(token)
