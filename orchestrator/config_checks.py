"""Checks of a run configuration that look at several settings together, and need neither data nor a cluster."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from orchestrator.config_problem import Problem
from orchestrator.names import label_problem
from orchestrator.pipeline_checks import check_pipeline_settings
from orchestrator.strategy_checks import check_strategy
from strategies.config import REMEMBERING
from strategies.robust import FUNCTION_OF, RULE_MINIMA

if TYPE_CHECKING:
    from orchestrator.config import RunConfig

MIN_ISLANDS = 3  # with fewer nobody can be outvoted
MEMBER_NAME = re.compile(r"island-(0|[1-9][0-9]*)")


def find_problems(config: RunConfig) -> Iterator[Problem]:
    """All contradictions of a configuration whose single values are right."""
    yield from check_data(config)
    yield from check_own_packs(config)
    yield from check_model(config)
    yield from check_training(config)
    yield from check_fit_batch(config)
    yield from check_islands(config)
    yield from check_strategy(config)
    yield from check_exchange(config)
    yield from check_pipeline_settings(config)
    yield from check_robust(config)


def check_data(config: RunConfig) -> Iterator[Problem]:
    """The samples come from exactly one place."""
    path, corpus, samples = config.data.path, config.data.corpus, config.data.samples
    given = {"data.path": path, "data.corpus": corpus, "data.samples": samples}
    places = {key: value for key, value in given.items() if value is not None}
    if not places:
        remedy = (
            "data.corpus = 'stdlib', data.path = a folder made by `atoll data pack`, or data.samples = the size of the "
            "dataset that the loop brings"
        )
        yield Problem(key="data.path", message="neither data.path nor data.corpus is set", remedy=remedy)
    if len(places) > 1:
        told = " and ".join(f"{key} = {value!r}" for key, value in places.items())
        all_of = "both" if len(places) == 2 else "all"
        message = f"{told} are {all_of} set, a run takes one of them"
        key = list(places)[1]
        yield Problem(key=key, message=message, remedy=f"remove one; `--set {key}=` unsets it")


def check_own_packs(config: RunConfig) -> Iterator[Problem]:
    """Packs of single islands: who has them, and where."""
    data = config.data
    for name, own in data.per_island.items():
        key = f"data.per_island.{name}"
        if (remedy := _unknown_island(config, name)) is not None:
            yield Problem(key=key, message=f"{key}: the run has no island of this name", remedy=remedy)
        if not own.path.startswith(("/", "~")):
            message = f"{key}.path = {own.path!r} does not begin with / or ~"
            yield Problem(key=f"{key}.path", message=message, remedy="the whole path on the machine of that island")
    if not data.per_island:
        return
    num = sum(own.tokens for own in data.per_island.values())
    if num > config.train.tokens:
        message = f"{num} tokens of single islands' own packs are more than train.tokens = {config.train.tokens}"
        yield Problem(key="data.per_island", message=message, remedy="fewer tokens there, or more in all")
    if data.samples is not None:
        message = "data.per_island names packs, and data.samples says that the loop brings its own dataset"
        yield Problem(key="data.per_island", message=message, remedy="data.path or data.corpus for all islands")
    if config.pipeline.stages is not None:
        message = "data.per_island in a pipeline: the stages of a model see each other's samples"
        yield Problem(key="data.per_island", message=message, remedy="remove it, or train without [pipeline]")


def _unknown_island(config: RunConfig, name: str) -> str | None:
    """How islands are called, if the run can never have one of this name; with machines that join it has any number."""
    match, islands = MEMBER_NAME.fullmatch(name), config.run.islands
    if islands == "auto" or config.run.elastic:
        return None if match is not None else "islands are called island-0, island-1, ..."
    return (
        None
        if match is not None and int(match[1]) < islands
        else f"islands are called island-0 to island-{islands - 1}"
    )


def check_model(config: RunConfig) -> Iterator[Problem]:
    """The sizes of the built-in decoder fit together, and another model's settings are not mixed with them."""
    model = config.model
    if model.factory is not None:
        if model.init_from is not None:
            message = f"model.init_from = {model.init_from!r} belongs to the built-in model, model.factory is set too"
            yield Problem(key="model.init_from", message=message, remedy="load the weights inside the factory")
        return
    if model.options:
        message = f"model.options = {model.options!r} is handed to model.factory, which is not set"
        yield Problem(key="model.options", message=message, remedy="set model.factory, or remove model.options")
    kv_heads = model.kv_heads or model.heads
    if model.dim % model.heads:
        message = f"model.heads = {model.heads} does not divide model.dim = {model.dim}"
        yield Problem(key="model.heads", message=message, remedy=f"one of {_divisors(model.dim)}")
    elif model.dim // model.heads % 2:
        width = model.dim // model.heads
        message = f"model.dim / model.heads = {width} is odd, the rotary embedding turns pairs of values"
        yield Problem(key="model.heads", message=message, remedy="choose heads so that dim / heads is even")
    if model.heads % kv_heads:
        message = f"model.kv_heads = {kv_heads} does not divide model.heads = {model.heads}"
        yield Problem(key="model.kv_heads", message=message, remedy=f"one of {_divisors(model.heads)}")


def check_training(config: RunConfig) -> Iterator[Problem]:
    """Micro-batches are of equal size, otherwise the mean of their losses is not the loss of the batch."""
    names = ["", *config.train.per_island]
    for name in names:
        train = config.train.for_island(name)
        if train.batch_size % train.accumulation:
            key = f"train.per_island.{name}" if name else "train.accumulation"
            message = f"train.accumulation = {train.accumulation} does not divide train.batch_size = {train.batch_size}"
            where = f" for {name}" if name else ""
            yield Problem(key=key, message=message + where, remedy=f"one of {_divisors(train.batch_size)}")


def check_fit_batch(config: RunConfig) -> Iterator[Problem]:
    """The batch is measured for the built-in loop, which takes it in one piece."""
    if not config.train.fit_batch:
        return
    if config.train.loop is not None:
        message = f"train.fit_batch measures the built-in loop, and train.loop = {config.train.loop!r} is set"
        yield Problem(key="train.fit_batch", message=message, remedy="set train.batch_size yourself")
    names = [name for name in ["", *config.train.per_island] if config.train.for_island(name).accumulation > 1]
    if names:
        where = f"train.per_island.{names[0]}.accumulation" if names[0] else "train.accumulation"
        message = f"{where} cuts a batch into pieces, and train.fit_batch looks for the largest single piece"
        yield Problem(key="train.fit_batch", message=message, remedy="train.accumulation = 1")


def check_islands(config: RunConfig) -> Iterator[Problem]:
    """Settings of single islands name islands that the run has."""
    islands = config.run.islands
    for name in config.train.per_island:
        if (remedy := _unknown_island(config, name)) is not None:
            message = f"train.per_island.{name}: the run has no island of this name"
            yield Problem(key="train.per_island", message=message, remedy=remedy)
    for key, value in config.run.labels.items():
        if (wrong := label_problem(key, value)) is not None:
            yield Problem(key="run.labels", message=f"run.labels: {wrong}", remedy="as in atoll join --label KEY=VALUE")
    least = config.exchange.min_members
    if islands != "auto" and not config.run.elastic and least is not None and least > islands:
        message = f"exchange.min_members = {config.exchange.min_members} is more than run.islands = {islands}"
        yield Problem(key="exchange.min_members", message=message, remedy=f"at most {islands}")
    if config.run.redundancy == "buddy" and islands == 1 and not config.run.elastic:
        message = "run.redundancy = 'buddy', and run.islands = 1 has nobody who could keep a copy"
        yield Problem(key="run.redundancy", message=message, remedy="run.redundancy = 'none', or more islands")


def check_exchange(config: RunConfig) -> Iterator[Problem]:
    """Time limits are in their order, and chunks are cut at the codec's block borders."""
    exchange, codec = config.exchange, config.codec
    ladder = (("heartbeat_s", exchange.heartbeat_s), ("suspect_s", exchange.suspect_s), ("limbo_s", exchange.limbo_s))
    for (short, short_s), (long, long_s) in pairwise(ladder):
        if short_s >= long_s:
            message = f"exchange.{long} = {long_s:g} is not longer than exchange.{short} = {short_s:g}"
            yield Problem(key=f"exchange.{long}", message=message, remedy=f"more than {short_s:g}")
    block = codec.values_per_block
    if exchange.chunk_values is not None and exchange.chunk_values % block:
        message = f"exchange.chunk_values = {exchange.chunk_values} is no multiple of codec.block = {block}"
        yield Problem(key="exchange.chunk_values", message=message, remedy=f"a multiple of {block}")
    if codec.name == "topk" and (block % 64 or block > 4096):
        message = f"codec.block = {block}: codec.name = 'topk' keeps one of 64 values and has 12 bits for an index"
        yield Problem(key="codec.block", message=message, remedy=str(min(max(round(block / 64), 1), 64) * 64))


def check_robust(config: RunConfig) -> Iterator[Problem]:
    """Enough members for the rule, and only rules that fit what the strategy makes of contributions."""
    robust, islands = config.robust, config.run.islands
    if robust.rule != "mean" and config.strategy.aggregate != "mean":
        message = f"robust.rule = {robust.rule!r} takes the place of strategy.aggregate = {config.strategy.aggregate!r}"
        yield Problem(key="robust.rule", message=message, remedy="one of the two: set the other to 'mean'")
    if robust.rule != "mean" and config.strategy.own_pace:
        message = f"robust.rule = {robust.rule!r}: with strategy.name = {config.strategy.name!r} each push is alone"
        yield Problem(key="robust.rule", message=message, remedy="'mean': there is nobody to compare a push with")
    yield from check_history(config)
    if robust.clip_times > 1.0 and robust.rule == "mean":
        message = f"robust.clip_times = {robust.clip_times:g}: robust.rule = 'mean' shortens nothing"
        yield Problem(key="robust.clip_times", message=message, remedy="1, or another robust.rule")
    if robust.clip_times > robust.refuse_times:
        message = f"robust.clip_times = {robust.clip_times:g} is above robust.refuse_times = {robust.refuse_times:g}"
        yield Problem(key="robust.clip_times", message=message, remedy=f"at most {robust.refuse_times:g}")
    if islands == "auto":
        return
    least = MIN_ISLANDS if robust.watches else 1
    if robust.rule in FUNCTION_OF and robust.rule != "median":
        times, plus = RULE_MINIMA[FUNCTION_OF[robust.rule]]
        least = max(least, (times * robust.num_wrong + plus - 1) * robust.bucket + 1)
    if islands < least:
        what = f"robust.rule = {robust.rule!r}" if robust.rule != "mean" else "robust.verify = true"
        against = f" against robust.num_wrong = {robust.num_wrong}" if robust.rule in FUNCTION_OF else ""
        in_buckets = f" in buckets of {robust.bucket}" if robust.bucket > 1 else ""
        message = f"{what}{against}{in_buckets} needs at least {least} islands, run.islands = {islands}"
        yield Problem(key="robust.rule", message=message, remedy=f"run.islands = {least}, or a smaller num_wrong")


def check_history(config: RunConfig) -> Iterator[Problem]:
    """Earlier results are there for who begins from them, on every member and with the same bits."""
    robust, strategy = config.robust, config.strategy
    if not robust.history:
        return
    if robust.rule != "centered_clip":
        message = f"robust.history = true: robust.rule = {robust.rule!r} does not begin from anything"
        yield Problem(key="robust.history", message=message, remedy="false, or robust.rule = 'centered_clip'")
    if strategy.name == "ddp" or strategy.outer not in REMEMBERING or strategy.outer_momentum == 0:
        kept = "strategy.name = 'ddp'" if strategy.name == "ddp" else f"strategy.outer = {strategy.outer!r}"
        if strategy.name != "ddp" and strategy.outer in REMEMBERING:
            kept = "strategy.outer_momentum = 0"
        message = f"robust.history = true takes earlier results from the outer momentum, which {kept} has none of"
        yield Problem(key="robust.history", message=message, remedy="strategy.outer = 'nesterov' or 'heavy-ball'")


def _divisors(number: int) -> str:
    found = [n for n in range(1, min(number, 256) + 1) if number % n == 0]
    return ", ".join(str(n) for n in found)
