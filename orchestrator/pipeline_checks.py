"""Checks of `[pipeline]` that need neither data nor a cluster."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from orchestrator.config_problem import Problem

if TYPE_CHECKING:
    from orchestrator.config import RunConfig

PEER_NAME = re.compile(r"peer-(0|[1-9][0-9]*)")


def check_pipeline_settings(config: RunConfig) -> Iterator[Problem]:
    """What a pipeline cannot do, with the numbers."""
    pipeline = config.pipeline
    if pipeline.stages is None:
        return
    yield from _sizes(config)
    yield from _others(config)


def _sizes(config: RunConfig) -> Iterator[Problem]:
    pipeline = config.pipeline
    stages = pipeline.stages
    assert stages is not None, "looked at before"
    layers = config.model.layers + 2
    if config.model.factory is None and stages > layers:  # a list of layers is counted when it is there
        message = (
            f"pipeline.stages = {stages}, and the model has {layers} layers (embedding, {config.model.layers} decoder "
            "layers, head): a stage needs at least one"
        )
        yield Problem(key="pipeline.stages", message=message, remedy=f"at most {layers}, or more model.layers")
    if pipeline.microbatches < stages:
        message = (
            f"pipeline.microbatches = {pipeline.microbatches} is less than pipeline.stages = {stages}: some stage "
            "would always wait"
        )
        yield Problem(key="pipeline.microbatches", message=message, remedy=f"at least {stages}, or fewer stages")
    if pipeline.microbatches < pipeline.trainers:
        message = (
            f"pipeline.microbatches = {pipeline.microbatches} is less than pipeline.trainers = {pipeline.trainers}"
        )
        yield Problem(key="pipeline.trainers", message=message, remedy=f"at most {pipeline.microbatches}")
    if pipeline.in_flight > pipeline.microbatches:
        message = (
            f"pipeline.in_flight = {pipeline.in_flight} is more than pipeline.microbatches = {pipeline.microbatches}, "
            "all that a step has"
        )
        yield Problem(key="pipeline.in_flight", message=message, remedy=f"at most {pipeline.microbatches}")
    if pipeline.min_peers > pipeline.peers:
        message = f"pipeline.min_peers = {pipeline.min_peers} is more than pipeline.peers = {pipeline.peers}"
        yield Problem(key="pipeline.min_peers", message=message, remedy=f"at most {pipeline.peers}")
    if pipeline.backward_timeout_s < pipeline.forward_timeout_s:
        message = (
            f"pipeline.backward_timeout_s = {pipeline.backward_timeout_s:g} is shorter than "
            f"pipeline.forward_timeout_s = {pipeline.forward_timeout_s:g}, and a backward runs the forward again"
        )
        yield Problem(key="pipeline.backward_timeout_s", message=message, remedy="2.5 times as long")
    for name in pipeline.pace_of:
        match = PEER_NAME.fullmatch(name)
        if match is None or int(match[1]) >= pipeline.num_peers:
            message = f"pipeline.pace_of names {name!r}, which the run does not have"
            yield Problem(key="pipeline.pace_of", message=message, remedy=f"peer-0 to peer-{pipeline.num_peers - 1}")


def _others(config: RunConfig) -> Iterator[Problem]:
    """Settings of islands that a pipeline has no use for are refused, and not passed over."""
    yield from _synchronisation(config)
    needed = {
        "model.init_from": (config.model.init_from, None),
        "train.loop": (config.train.loop, None),
        "train.optimizer": (config.train.optimizer, "adamw"),
        "train.precision": (config.train.precision, "fp32"),
        "train.device": (config.train.device, "cpu"),
        "data.samples": (config.data.samples, None),
        "run.elastic": (config.run.elastic, False),
        "run.standby": (config.run.standby, 0),
        "run.redundancy": (config.run.redundancy, "none"),
        "run.snapshots": (config.run.snapshots, None),
        "robust.rule": (config.robust.rule, "mean"),
        "robust.verify": (config.robust.verify, False),
    }
    for key, (value, wanted) in needed.items():
        if value != wanted:
            message = f"{key} = {value!r}, and a pipeline (pipeline.stages = {config.pipeline.stages}) does without it"
            remedy = f"{key} = {wanted!r}" if wanted is not None else f"unset it (`--set {key}=`)"
            yield Problem(key=key, message=message, remedy=remedy)


def _synchronisation(config: RunConfig) -> Iterator[Problem]:
    """Peers of a stage add gradients after every step (ddp), or what steps of their own moved (diloco, streaming)."""
    strategy = config.strategy
    where = f"a pipeline (pipeline.stages = {config.pipeline.stages})"
    if strategy.name not in ("ddp", "diloco", "streaming"):
        message = f"strategy.name = {strategy.name!r}, and {where} synchronises its stages by ddp, diloco or streaming"
        yield Problem(key="strategy.name", message=message, remedy="strategy.name = 'ddp', 'diloco' or 'streaming'")
    if strategy.name == "streaming":
        yield from _streaming(config)
    if strategy.name == "ddp" and config.codec.error_feedback:
        message = f"codec.error_feedback = True, and {where} with strategy.name = 'ddp' does without it"
        remedy = "codec.error_feedback = False: microbatches go to other peers in every step, so residuals have no home"
        yield Problem(key="codec.error_feedback", message=message, remedy=remedy)
    if strategy.name != "ddp" and config.pipeline.delayed:
        message = f"pipeline.delayed = True, and peers that step on their own (strategy.name = {strategy.name!r}) wait"
        message += " for no update"
        yield Problem(key="pipeline.delayed", message=message, remedy="pipeline.delayed = False")
    plain = {
        "strategy.warmup_sync": (strategy.warmup_sync, 0.0),
        "strategy.qsr_alpha": (strategy.qsr_alpha, 0.0),
        "strategy.num_fragments": (1 if strategy.name == "streaming" else strategy.num_fragments, 1),
        "strategy.fragments": (strategy.fragments, []),
    }
    for key, (value, wanted) in plain.items():
        if value != wanted:
            message = f"{key} = {value!r}, and {where} does without it"
            yield Problem(key=key, message=message, remedy=f"{key} = {wanted!r}")


def _streaming(config: RunConfig) -> Iterator[Problem]:
    """Fragments of a stage are exchanged one after the other: one of them has come back when the next one leaves."""
    strategy = config.strategy
    parts, steps = strategy.num_fragments, strategy.inner_steps
    if steps < parts:
        message = f"strategy.inner_steps = {steps} is less than strategy.num_fragments = {parts}, which take turns"
        yield Problem(key="strategy.inner_steps", message=message, remedy=f"{parts} or a multiple of it")
    last = max(steps // parts - 1, 0)
    if strategy.overlap_steps > last:
        message = (
            f"strategy.overlap_steps = {strategy.overlap_steps}: in a pipeline the next fragment of a stage is sent "
            f"strategy.inner_steps / strategy.num_fragments = {max(steps // parts, 1)} steps after this one, whose "
            "result must be there by then"
        )
        yield Problem(key="strategy.overlap_steps", message=message, remedy=f"{last} or less")
