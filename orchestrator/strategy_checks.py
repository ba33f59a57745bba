"""Checks of `[strategy]` with what belongs to it: what a strategy could not do is refused before anything starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from orchestrator.config_problem import Problem
from orchestrator.settings import ExchangeConfig
from strategies.codecs.backends import TRITON_CODECS
from strategies.config import DELAYED, OVERLAPPING, StrategyConfig
from strategies.schedule import periods_that_divide
from strategies.stability import largest_gamma, largest_lr, largest_lr_of_pushes, nearest_lr

if TYPE_CHECKING:
    from orchestrator.config import RunConfig

ONLY_IN_PAIRS = (
    "merge_every", "topology", "group_size", "gamma", "pair_timeout_s", "keep_gap", "near_label", "gossip_steps"
)  # fmt: skip


def check_strategy(config: RunConfig) -> Iterator[Problem]:
    """Contradictions between `[strategy]`, `[train]` and `[codec]`."""
    if config.strategy.name == "ddp":
        yield from check_ddp(config)
        return
    yield from check_fragments(config.strategy)
    yield from check_overlap(config.strategy)
    if config.strategy.in_pairs:
        yield from check_in_pairs(config)
    else:
        yield from check_outer(config.strategy)
        for key in ONLY_IN_PAIRS:
            yield from _only_in_pairs(config.strategy, key)
    yield from check_own_pace(config)
    yield from check_decoupled(config.strategy)
    yield from check_quadratic_rule(config)
    yield from check_parts(config)
    yield from check_load(config)


def check_ddp(config: RunConfig) -> Iterator[Problem]:
    """Data parallel training exchanges gradients after every step and has its optimizer outside."""
    strategy = config.strategy
    if config.run.load != "equal":
        message = f"run.load = {config.run.load!r} shares out local steps, and strategy.name = 'ddp' makes one a round"
        yield Problem(key="run.load", message=message, remedy="run.load = 'equal', and train.per_island batch sizes")
    if strategy.inner_steps != 1:
        message = f"strategy.inner_steps = {strategy.inner_steps}, but strategy.name = 'ddp' exchanges every step"
        yield Problem(key="strategy.inner_steps", message=message, remedy="strategy.inner_steps = 1")
    if strategy.warmup_sync:
        message = f"strategy.warmup_sync = {strategy.warmup_sync} has no meaning with strategy.name = 'ddp'"
        yield Problem(key="strategy.warmup_sync", message=message, remedy="strategy.warmup_sync = 0")
    if config.train.optimizer != "adamw":
        message = f"train.optimizer = {config.train.optimizer!r} is not available with strategy.name = 'ddp'"
        yield Problem(key="train.optimizer", message=message, remedy="train.optimizer = 'adamw'")
    yield from _only_with(strategy, "qsr_alpha", 0.0, "strategies with local steps")
    yield from check_overlap(strategy)


def check_fragments(strategy: StrategyConfig) -> Iterator[Problem]:
    """Fragments are told in one way, and all of them can have the same period."""
    if strategy.fragments and strategy.num_fragments not in (1, len(strategy.fragments)):
        message = (
            f"strategy.num_fragments = {strategy.num_fragments}, but strategy.fragments names "
            f"{len(strategy.fragments)} of them"
        )
        yield Problem(key="strategy.num_fragments", message=message, remedy="remove it")
    steps, parts = strategy.inner_steps, strategy.total_fragments
    if steps > 1 and steps % parts:
        message = f"strategy.inner_steps = {steps} is no multiple of the {parts} fragments, which share it evenly"
        yield Problem(key="strategy.inner_steps", message=message, remedy=periods_that_divide(steps, parts))


def check_overlap(strategy: StrategyConfig) -> Iterator[Problem]:
    """A result is due before its fragment is sent again."""
    if strategy.name not in OVERLAPPING:
        for key, default in (("overlap_steps", 0), ("merge_alpha", 0.0), ("merge_kappa", 1.0)):
            yield from _only_with(strategy, key, default, "strategy.name = 'streaming' or 'decoupled'")
        return
    last = strategy.inner_steps - 1
    if strategy.overlap_steps > last:
        message = (
            f"strategy.overlap_steps = {strategy.overlap_steps} is longer than a fragment's slot: it is sent again "
            f"after strategy.inner_steps = {strategy.inner_steps}"
        )
        yield Problem(key="strategy.overlap_steps", message=message, remedy=f"{last} or less")


def check_outer(strategy: StrategyConfig) -> Iterator[Problem]:
    """The outer step is stable where a round comes to an optimum, and keeps what the strategy needs of it."""
    outer, momentum = strategy.outer, strategy.outer_momentum
    bound = largest_lr(outer, momentum, delay=strategy.delay, eps=strategy.outer_eps)
    if strategy.own_pace:
        bound = largest_lr_of_pushes(momentum, every=strategy.momentum_every, spread=strategy.momentum_spread)
    if strategy.outer_lr >= bound:
        with_momentum = f" with strategy.outer_momentum = {momentum:g}" if outer != "sgd" else ""
        late = " applied a round late" if strategy.delay else " of pushes" if strategy.own_pace else ""
        message = (
            f"strategy.outer_lr = {strategy.outer_lr:g}{with_momentum} is unstable: strategy.outer = {outer!r}{late} "
            f"diverges near an optimum from {bound:.3g} on"
        )
        yield Problem(key="strategy.outer_lr", message=message, remedy=f"{nearest_lr(bound):g} or less")
    if outer == "adam" and strategy.name == "eager":
        message = "strategy.outer = 'adam' is not linear, strategy.name = 'eager' takes contributions back again"
        yield Problem(key="strategy.outer", message=message, remedy="'nesterov' or 'heavy-ball'")
    if outer == "adam" and strategy.warmup_sync:
        message = "strategy.outer = 'adam' would correct its bias for the steps of strategy.warmup_sync, which it lacks"
        yield Problem(key="strategy.warmup_sync", message=message, remedy="strategy.warmup_sync = 0")
    if strategy.delay and strategy.warmup_sync:
        message = (
            f"strategy.warmup_sync = {strategy.warmup_sync:g} has rounds of one step, which strategy.name = "
            f"{strategy.name!r} would apply a step late"
        )
        yield Problem(key="strategy.warmup_sync", message=message, remedy="strategy.warmup_sync = 0")


def check_in_pairs(config: RunConfig) -> Iterator[Problem]:
    """Pairs come together, their mean does not diverge, and nothing is asked of them that needs more than two."""
    strategy, islands = config.strategy, config.run.islands
    if strategy.name == "noloco":
        bound = largest_gamma(strategy.outer_momentum, 2)
        if strategy.gamma >= bound:
            message = (
                f"strategy.gamma = {strategy.gamma:g} with strategy.outer_momentum = {strategy.outer_momentum:g}: "
                f"members drift apart from {bound:.3g} on"
            )
            yield Problem(key="strategy.gamma", message=message, remedy=f"below {bound:.3g}; published: 0.7 with 0.5")
        limit = largest_lr("heavy-ball", strategy.outer_momentum)
        if strategy.outer_lr >= limit:
            message = f"strategy.outer_lr = {strategy.outer_lr:g}: the mean of all members diverges from {limit:.3g} on"
            yield Problem(key="strategy.outer_lr", message=message, remedy=f"{nearest_lr(limit):g} or less")
    if strategy.topology in ("exponential", "ring") and strategy.group_size != 2:
        message = f"strategy.group_size = {strategy.group_size}: strategy.topology = {strategy.topology!r} has pairs"
        yield Problem(key="strategy.group_size", message=message, remedy="2, or strategy.topology = 'random'")
    if strategy.topology != "near":
        for key in ("keep_gap", "near_label"):
            yield from _only_in_pairs(strategy, key, "strategy.topology = 'near'")
    if strategy.name == "noloco" and strategy.gossip_steps != 1:
        message = (
            f"strategy.gossip_steps = {strategy.gossip_steps}: strategy.name = 'noloco' would make an outer step with "
            "its momentum at each of them, without local steps in between"
        )
        yield Problem(key="strategy.gossip_steps", message=message, remedy="1, or strategy.name = 'gossip'")
    if islands != "auto" and islands < strategy.group_size:
        message = f"strategy.group_size = {strategy.group_size} needs so many islands, run.islands = {islands}"
        yield Problem(key="run.islands", message=message, remedy=f"{strategy.group_size} or more")
    wanted = {
        "strategy.num_fragments": (strategy.total_fragments, 1),
        "strategy.warmup_sync": (strategy.warmup_sync, 0.0),
        "run.load": (config.run.load, "equal"),
        "run.elastic": (config.run.elastic, False),
        "run.redundancy": (config.run.redundancy, type(config.run).model_fields["redundancy"].default),
        "robust.rule": (config.robust.rule, "mean"),
    }
    for key, (value, needed) in wanted.items():
        if value != needed:
            message = (
                f"{key} = {value!r} is not possible with strategy.name = {strategy.name!r}, whose members meet in pairs"
            )
            yield Problem(key=key, message=message, remedy=f"{key} = {needed!r}")


def _only_in_pairs(strategy: StrategyConfig, key: str, where: str = "'noloco' and 'gossip'") -> Iterator[Problem]:
    value, default = getattr(strategy, key), StrategyConfig.model_fields[key].default
    if value != default:
        with_what = f"name = {strategy.name!r}" if not strategy.in_pairs else f"topology = {strategy.topology!r}"
        message = f"strategy.{key} = {value!r} has no meaning with strategy.{with_what}"
        yield Problem(key=f"strategy.{key}", message=message, remedy=f"{default!r}: it belongs to {where}")


def check_own_pace(config: RunConfig) -> Iterator[Problem]:
    """Members that wait for nobody: nothing of what the others would have to do at the same time."""
    strategy, name = config.strategy, config.strategy.name
    if not strategy.own_pace:
        yield from _only_with(strategy, "momentum_every", 8, "strategy.name = 'async-dn'")
        yield from _only_with(strategy, "momentum_spread", 0.0, "strategy.name = 'async-dn'")
        return
    if strategy.outer != "nesterov":
        message = f"strategy.outer = {strategy.outer!r}: strategy.name = {name!r} has delayed Nesterov for it"
        yield Problem(key="strategy.outer", message=message, remedy="strategy.outer = 'nesterov'")
    most = 1 / strategy.momentum_every
    if strategy.momentum_spread > most:
        message = (
            f"strategy.momentum_spread = {strategy.momentum_spread:g}: the {strategy.momentum_every} versions of a "
            "window would take more than the whole momentum"
        )
        yield Problem(key="strategy.momentum_spread", message=message, remedy=f"{nearest_lr(most):g} or less")
    if strategy.warmup_sync:
        message = f"strategy.warmup_sync = {strategy.warmup_sync:g} is in step, strategy.name = {name!r} is not"
        yield Problem(key="strategy.warmup_sync", message=message, remedy="strategy.warmup_sync = 0")
    if config.exchange.quorum != ExchangeConfig.model_fields["quorum"].default:
        message = f"exchange.quorum = {config.exchange.quorum:g}: with strategy.name = {name!r} nobody is waited for"
        yield Problem(
            key="exchange.quorum", message=message, remedy="remove it; exchange.min_members says how few live"
        )


def check_decoupled(strategy: StrategyConfig) -> Iterator[Problem]:
    """Radial averages and adaptive grace are parts of one strategy; the grace is a share of an overlap."""
    if strategy.name == "decoupled":
        return
    if strategy.aggregate != "mean":
        message = f"strategy.aggregate = {strategy.aggregate!r} has no meaning with strategy.name = {strategy.name!r}"
        yield Problem(key="strategy.aggregate", message=message, remedy="'mean': it belongs to 'decoupled'")
    yield from _only_with(strategy, "grace_share", 0.5, "strategy.name = 'decoupled'")


def check_quadratic_rule(config: RunConfig) -> Iterator[Problem]:
    """Rounds that grow as the learning rate falls need one that falls, and one fragment."""
    strategy, train = config.strategy, config.train
    if strategy.qsr_alpha == 0:
        return
    if train.schedule == "constant":
        message = "strategy.qsr_alpha makes rounds longer as the learning rate falls, train.schedule = 'constant'"
        yield Problem(key="strategy.qsr_alpha", message=message, remedy="0, or train.schedule = 'cosine'")
    if strategy.total_fragments > 1:
        message = (
            f"strategy.qsr_alpha changes the period, which {strategy.total_fragments} fragments could not share evenly"
        )
        yield Problem(key="strategy.qsr_alpha", message=message, remedy="0, or strategy.num_fragments = 1")
    if strategy.qsr_max_steps < strategy.inner_steps:
        message = (
            f"strategy.qsr_max_steps = {strategy.qsr_max_steps} is less than strategy.inner_steps = "
            f"{strategy.inner_steps}"
        )
        yield Problem(key="strategy.qsr_max_steps", message=message, remedy=f"{strategy.inner_steps} or more")


def check_load(config: RunConfig) -> Iterator[Problem]:
    """Rounds of unequal length need results that are due when a round ends, not after so many steps of it."""
    name = config.strategy.name
    if config.run.load != "equal" and name in (*OVERLAPPING, *DELAYED):
        message = (
            f"run.load = {config.run.load!r} gives each island its own number of steps, strategy.name = {name!r} "
            "counts steps until a result is due, the same for all"
        )
        yield Problem(key="run.load", message=message, remedy="run.load = 'equal', or strategy.name = 'diloco'")


def check_parts(config: RunConfig) -> Iterator[Problem]:
    """Strategies that are named after a part have it."""
    name, codec = config.strategy.name, config.codec
    if codec.backend == "triton" and not config.train.device.startswith("cuda"):
        message = f"codec.backend = 'triton' runs on GPUs, train.device = {config.train.device!r}"
        yield Problem(key="codec.backend", message=message, remedy="train.device = 'cuda', or codec.backend = 'auto'")
    if codec.backend == "triton" and codec.name not in TRITON_CODECS:
        message = f"codec.backend = 'triton': codec.name = {codec.name!r} has no such form"
        yield Problem(key="codec.backend", message=message, remedy=f"'auto', or one of {', '.join(TRITON_CODECS)}")
    if name == "muloco" and config.train.optimizer != "muon":
        message = f"train.optimizer = {config.train.optimizer!r}, but strategy.name = 'muloco' trains with Muon"
        yield Problem(key="train.optimizer", message=message, remedy="train.optimizer = 'muon'")
    if name == "sparseloco" and codec.name != "topk":
        message = f"codec.name = {codec.name!r}, but strategy.name = 'sparseloco' sends the largest values"
        yield Problem(key="codec.name", message=message, remedy="codec.name = 'topk'")
    elif name == "sparseloco" and not codec.error_feedback:
        message = "codec.error_feedback = false: strategy.name = 'sparseloco' sends one of 64 values, the others later"
        yield Problem(key="codec.error_feedback", message=message, remedy="codec.error_feedback = true")


def _only_with(strategy: StrategyConfig, key: str, default: float, what: str) -> Iterator[Problem]:
    value = getattr(strategy, key)
    if value != default:
        message = f"strategy.{key} = {value:g} has no meaning with strategy.name = {strategy.name!r}"
        yield Problem(key=f"strategy.{key}", message=message, remedy=f"{default:g}: it belongs to {what}")
