"""The names of all metrics, their kind, labels and meaning: the one list that code, documents and dashboards share.

Every sample has the label `run`. Those of one island have `island` (its name, which its successors keep) and `worker`
(its incarnation, such as `island-1.2`) as well. Those of a pipeline have `stage`, and `peer`, the name under which a
process serves a stage. What islands and pipelines have in common is `COMMON`; in a pipeline a stage is a fragment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

PREFIX = "atoll_"
RUN = ("run",)
WORKER = ("run", "island", "worker")
STAGE = ("run", "stage")
PEER = ("run", "stage", "peer")


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One metric; a counter never falls while one controller lives, and begins again with the next."""

    name: str
    kind: Literal["gauge", "counter"]
    help: str
    labels: tuple[str, ...] = RUN


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A value of a metric; `labels` are those of the catalogue, in their order."""

    metric: Metric
    labels: tuple[str, ...]
    value: float


def _gauge(name: str, text: str, labels: tuple[str, ...] = RUN) -> Metric:
    return Metric(name=PREFIX + name, kind="gauge", help=text, labels=labels)


def _counter(name: str, text: str, labels: tuple[str, ...] = RUN) -> Metric:
    return Metric(name=f"{PREFIX}{name}_total", kind="counter", help=text, labels=labels)


COMMON = (
    _gauge("run_seconds", "Seconds since the start of the run, on the controller's clock."),
    _gauge("progress_ratio", "Committed share of the run's tokens, 0 to 1."),
    _counter("tokens_committed", "Tokens that count: every fragment has committed them."),
    _gauge("validation_loss", "Newest validation loss of the anchor, nats per token."),
    _gauge("live_members", "Incarnations that the journal holds as live."),
    _gauge("version", "Newest committed version of a fragment.", ("run", "fragment")),
    _counter("sent_bytes", "Payload bytes that all members have sent."),
    _counter("faults", "Faults that this controller has seen.", ("run", "fault")),
    _counter("journal_rows", "Rows of the journal."),
)
ISLANDS = (
    _counter("tokens_lost", "Tokens whose work was lost with a member; their samples are leased again."),
    _gauge("suspect_members", "Live members that have been silent for exchange.suspect_s."),
    _gauge("exchange_seconds", "Last commit of a fragment: from its closing to the commit.", ("run", "fragment")),
    _counter("exchange_attempts", "Attempts of all committed exchanges.", ("run", "fragment")),
    _counter("control_bytes", "Bytes of control messages of members and controller."),
    _counter("lost_metric_rows", "Rows of metrics.jsonl that could not be written or read."),
    _gauge("island_up", "1: heard of, 0: suspect. A dead island has no sample.", WORKER),
    _gauge("island_loss", "Training loss, mean over the steps of its last report, nats per token.", WORKER),
    _gauge("island_tokens_per_second", "Training speed without waits.", WORKER),
    _gauge("island_step_seconds", "Mean time of an inner step in its last report.", WORKER),
    _gauge("island_learning_rate", "Learning rate of its last step.", WORKER),
    _gauge("island_gradient_norm", "Gradient norm of its last step.", WORKER),
    _gauge("island_memory_peak_bytes", "Peak memory so far.", WORKER),
    _counter("island_steps", "Inner steps of this incarnation.", WORKER),
    _counter("island_sent_bytes", "Payload bytes that this incarnation's process has sent.", WORKER),
    _counter("island_phase_seconds", "Time spent computing, synchronising, waiting, ...", (*WORKER, "phase")),
)
PIPELINES = (
    _gauge("pipeline_loss", "Training loss of the newest step, nats per token."),
    _gauge("pipeline_step_seconds", "Time that the newest step took."),
    _counter("pipeline_steps", "Steps that this controller has seen committed."),
    _counter("pipeline_moves", "Moves of peers between stages."),
    _gauge("stage_peers", "Peers that serve a stage.", STAGE),
    _gauge("stage_buddies", "Processes of other stages that keep a copy of its state.", STAGE),
    _gauge("peer_forwards_per_second", "Speed of a peer, as trainers measure it (a backward is 2.5).", PEER),
    _gauge("peer_queue", "Calls that trainers have sent to a peer and it has not answered.", PEER),
    _gauge("peer_memory_bytes", "Memory of the peer's process.", PEER),
    _counter("peer_busy_seconds", "Time that the peer's process has spent inside calls.", PEER),
)
ALL = COMMON + ISLANDS + PIPELINES
BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in ALL}


def sample(short: str, value: float, *labels: str) -> Sample:
    """A sample of the metric `atoll_<short>` (counters: `atoll_<short>_total`)."""
    metric = BY_NAME.get(PREFIX + short) or BY_NAME[f"{PREFIX}{short}_total"]
    assert len(labels) == len(metric.labels), f"{metric.name} has the labels {metric.labels}, got {labels}"
    return Sample(metric=metric, labels=labels, value=float(value))
