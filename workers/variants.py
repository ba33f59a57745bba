"""The strategy and the fragments that an island's settings describe, and how they change while the run goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from torch import Tensor

from strategies.codecs.stochastic import mix
from strategies.fragments import FragmentSpec, TensorSpec, default_chunk_values, plan_fragments
from strategies.registry import build_strategy, warm_up
from strategies.strategy import Strategy
from workers.context import IslandSpec
from workers.live_settings import with_changes
from workers.record_log import RecordLog
from workers.records import Scalar
from workers.replica import Replica
from workers.schedule import agreed_rate


class Variants:
    """The strategies of a run whose settings were changed while it went on; each is built once. Any thread."""

    def __init__(self, spec: IslandSpec, configured: Strategy) -> None:
        """`configured`: the strategy without any change."""
        self._spec, self._lock = spec, threading.Lock()
        self._known: dict[tuple[tuple[str, Scalar], ...], Strategy] = {(): configured}

    def of(self, values: tuple[tuple[str, Scalar], ...]) -> Strategy:
        """The strategy with these values."""
        with self._lock:
            if values not in self._known:
                strategy = strategy_of(self._spec, values)
                for codec in (strategy.codec, strategy.result_codec):
                    warm_up(codec)
                self._known[values] = strategy
            return self._known[values]


def follow_settings(replica: Replica, spec: IslandSpec, log: Callable[[], RecordLog]) -> None:
    """From now on a replica computes each transition with the settings that the journal has for its version."""
    variants = Variants(spec, replica.strategy)
    replica.variants = lambda fragment, n: variants.of(log().settings.of_members(fragment, n))


def strategy_of(spec: IslandSpec, changes: tuple[tuple[str, Scalar], ...] = ()) -> Strategy:
    """The strategy that an island's settings describe, with what was changed since."""
    train = spec.train
    # Members that round at random must not do it alike: averaging is to cancel it.
    key = mix(train.seed, spec.index)
    config = with_changes(spec.strategy, "strategy", changes)
    codec = with_changes(spec.codec, "codec", changes)
    return build_strategy(config, codec, lr_at=partial(agreed_rate, train=train), train=train, codec_key=key)


def fragments_of(tensors: dict[str, Tensor], strategy: Strategy, spec: IslandSpec) -> tuple[FragmentSpec, ...]:
    """How the live parameters are divided into fragments and chunks; the same on every member."""
    numel = sum(tensor.numel() for tensor in tensors.values())
    chunk = spec.chunk_values or default_chunk_values(-(-numel // strategy.num_fragments), strategy.codec.block)
    return plan_fragments(
        [TensorSpec(name=name, shape=tuple(tensor.shape)) for name, tensor in tensors.items()],
        num_fragments=strategy.num_fragments,
        pattern=strategy.pattern,
        groups=strategy.groups,
        chunk_values=chunk,
    )
