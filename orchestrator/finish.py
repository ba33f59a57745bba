"""What a run came to: the summary, from the coordinator's state, the metrics rows and the journal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.metrics import StepRow, read_rows
from orchestrator.summary import Summary, bytes_sent_per_param_per_round, derive_figures

if TYPE_CHECKING:
    from orchestrator.config import RunConfig
    from orchestrator.host import Host


def build_summary(host: Host, config: RunConfig) -> Summary:
    """The summary of a run that has ended (or is about to)."""
    coordinator, plan = host.coordinator, host.plan
    state = coordinator.state
    finished = host.finished
    reason = finished.reason if finished else "failed"
    tokens = state.samples_committed() * plan.seq_len
    seconds = coordinator.seconds()
    joins = {name: 0.0 for name in plan.islands}
    joins.update(coordinator.first_joins)
    figures = derive_figures(read_rows(host.run_dir.metrics), tokens_committed=tokens, end_s=seconds, joins_s=joins)
    peak = max(
        (r.mem_peak_bytes for r in read_rows(host.run_dir.metrics) if isinstance(r, StepRow) and r.mem_peak_bytes),
        default=None,
    )
    sent = coordinator.bytes_sent()
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
        tokens_lost=coordinator.samples_lost * plan.seq_len,
        tokens_reissued=state.reissued * plan.seq_len,
        exchanges_committed=sum(head.version.n for head in state.heads),
        exchanges_discarded=sum(exchange.discards for exchange in coordinator.exchanges),
        bytes_sent=sent,
        control_bytes_sent=host.counts["control_bytes"],
        bytes_sent_per_param_per_round=bytes_sent_per_param_per_round(
            sent, params=state.num_params, num_contributions=members_per_round, num_fragments=len(state.heads)
        ),
        tokens_per_s=figures.tokens_per_s,
        compute_utilization=figures.compute_utilization,
        goodput=figures.goodput,
        codec_backend="torch",
        peak_memory_bytes=peak,
        anchor_digest=state.heads[0].digest if len(state.heads) == 1 else _combined(host),
        faults=figures.faults,
        seq_len=plan.seq_len,
        journal_rows=len(coordinator.rows),
        journal_hash=coordinator.rows[-1].hash,
    )


def _combined(host: Host) -> str | None:
    from workers.digest import combine

    heads = host.coordinator.state.heads
    return combine([head.digest for head in heads]) if heads else None
