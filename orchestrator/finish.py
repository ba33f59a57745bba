"""What a run came to: the summary, from the coordinator's state, the metrics rows and the journal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.metrics import ExchangeRow, SpanRow, StepRow, read_rows
from orchestrator.summary import Summary, bytes_sent_per_param_per_round, derive_figures, first_joins
from strategies.codecs.backends import resolve_backend
from workers.ranges import count

EARLIER = "summary.before-resume.json"

if TYPE_CHECKING:
    from orchestrator.config import RunConfig
    from orchestrator.host import Host
    from orchestrator.rundir import RunDir


def build_summary(host: Host, config: RunConfig) -> Summary:
    """The summary of a run that has ended (or is about to)."""
    coordinator, plan, earlier = host.coordinator, host.plan, earlier_summary(host.run_dir)
    state = coordinator.state
    finished = host.finished
    reason = finished.reason if finished else "failed"
    tokens = state.samples_committed() * plan.seq_len
    seconds = coordinator.seconds()
    spans = (row for row in read_rows(host.run_dir.metrics) if isinstance(row, SpanRow))
    joins = dict.fromkeys(plan.islands, 0.0) | first_joins(spans) | coordinator.first_joins
    figures = derive_figures(read_rows(host.run_dir.metrics), tokens_committed=tokens, end_s=seconds, joins_s=joins)
    peaks = [row.mem_peak_bytes for row in read_rows(host.run_dir.metrics) if isinstance(row, StepRow)]
    peak = max((peak for peak in peaks if peak), default=None)
    rows = (row for row in read_rows(host.run_dir.metrics) if isinstance(row, ExchangeRow))
    # Of every life of controller and islands, however it ended; the last term is what was sent since the last commit.
    sent = sum(row.bytes for row in rows) + coordinator.bytes_sent() - coordinator.bytes_counted
    members_per_round = sum(len(commit.roster) for history in state.history for commit in history)
    return Summary(
        run_id=plan.run_id,
        exit_reason=reason,  # type: ignore[arg-type]
        error=(finished.detail or "unknown") if finished and reason == "failed" else None,
        seconds=seconds,
        params=state.num_params,
        initial_val_loss=state.evaluations[0].val_loss if state.evaluations else None,
        final_val_loss=state.evaluations[-1].val_loss if len(state.evaluations) > 1 else None,
        tokens_committed=tokens,
        tokens_lost=state.lost * plan.seq_len,
        tokens_dropped=count(state.dropped) * plan.seq_len,
        tokens_reissued=state.reissued * plan.seq_len,
        exchanges_committed=sum(head.version.n for head in state.heads),
        exchanges_discarded=sum(exchange.discards for exchange in coordinator.exchanges)
        + (earlier.exchanges_discarded if earlier else 0),
        bytes_sent=sent,
        control_bytes_sent=host.counts["control_bytes"] + (earlier.control_bytes_sent if earlier else 0),
        bytes_sent_per_param_per_round=bytes_sent_per_param_per_round(
            sent, params=state.num_params, num_contributions=members_per_round, num_fragments=len(state.heads)
        ),
        tokens_per_s=figures.tokens_per_s,
        compute_utilization=figures.compute_utilization,
        goodput=figures.goodput,
        codec_backend=resolve_backend(config.codec.backend)[0],
        peak_memory_bytes=peak,
        anchor_digest=state.heads[0].digest if len(state.heads) == 1 else _combined(host),
        faults=figures.faults,
        seq_len=plan.seq_len,
        journal_rows=len(coordinator.rows),
        journal_hash=coordinator.rows[-1].hash,
    )


def set_aside(run_dir: RunDir) -> None:
    """A run goes on: the summary of its stop is no summary any more, but its counts go into the next one."""
    if run_dir.summary.exists():
        run_dir.summary.replace(run_dir.path / EARLIER)


def earlier_summary(run_dir: RunDir) -> Summary | None:
    """The summary of the last stop of a run that was resumed."""
    path = run_dir.path / EARLIER
    return Summary.model_validate_json(path.read_text(encoding="utf-8")) if path.exists() else None


def _combined(host: Host) -> str | None:
    from workers.digest import combine

    heads = host.coordinator.state.heads
    return combine([head.digest for head in heads]) if heads else None
