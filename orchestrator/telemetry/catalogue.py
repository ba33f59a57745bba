"""The names of all metrics, their kind, labels and meaning: the one list that code, documents and dashboards share.

Every sample has the label `run`. Those of one island have `island` (its name, which its successors keep) and `worker`
(its incarnation, such as `island-1.2`) as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

PREFIX = "atoll_"
RUN = ("run",)
WORKER = ("run", "island", "worker")


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


ALL = (
    _gauge("run_seconds", "Seconds since the start of the run, on the controller's clock."),
    _gauge("progress_ratio", "Committed share of the run's tokens, 0 to 1."),
    _counter("tokens_committed", "Tokens that count: every fragment has committed them."),
    _counter("tokens_lost", "Tokens whose work was lost with a member; their samples are leased again."),
    _gauge("validation_loss", "Newest validation loss of the anchor, nats per token."),
    _gauge("live_members", "Incarnations that the journal holds as live."),
    _gauge("suspect_members", "Live members that have been silent for exchange.suspect_s."),
    _gauge("version", "Newest committed version of a fragment.", ("run", "fragment")),
    _gauge("exchange_seconds", "Last commit of a fragment: from its closing to the commit.", ("run", "fragment")),
    _counter("exchange_attempts", "Attempts of all committed exchanges.", ("run", "fragment")),
    _counter("sent_bytes", "Payload bytes that all members have sent."),
    _counter("control_bytes", "Bytes of control messages of members and controller."),
    _counter("faults", "Faults that this controller has seen.", ("run", "fault")),
    _counter("journal_rows", "Rows of the journal."),
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
BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in ALL}


def sample(short: str, value: float, *labels: str) -> Sample:
    """A sample of the metric `atoll_<short>` (counters: `atoll_<short>_total`)."""
    metric = BY_NAME.get(PREFIX + short) or BY_NAME[f"{PREFIX}{short}_total"]
    assert len(labels) == len(metric.labels), f"{metric.name} has the labels {metric.labels}, got {labels}"
    return Sample(metric=metric, labels=labels, value=float(value))
