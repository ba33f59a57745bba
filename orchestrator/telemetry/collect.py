"""From the controller's state and the rows of `metrics.jsonl` to samples. Pure: reads, never decides."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from orchestrator.metrics import ExchangeRow, Row, SpanRow, StepRow
from orchestrator.telemetry.catalogue import Sample, sample

if TYPE_CHECKING:
    from orchestrator.host import Host


class Book:
    """What the newest rows said, to be joined with the coordinator's state when somebody asks."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self.steps: dict[str, StepRow] = {}
        self.exchanges: dict[int, ExchangeRow] = {}
        self.attempts: Counter[int] = Counter()
        self.phases: defaultdict[tuple[str, int, str], float] = defaultdict(float)

    def note(self, row: Row) -> None:
        """A row was written."""
        match row:
            case StepRow():
                self.steps[row.member] = row
            case SpanRow():
                self.phases[row.member, row.incarnation, row.phase] += row.end_s - row.start_s
            case ExchangeRow():
                self.exchanges[row.fragment] = row
                self.attempts[row.fragment] += row.attempts
            case _:
                pass

    def samples(self, host: Host) -> tuple[Sample, ...]:
        """Everything in the catalogue that is known now; an island that is gone has no samples but its phases."""
        return (*self._of_run(host), *self._of_fragments(host), *self._of_islands(host))

    def _of_run(self, host: Host) -> Iterator[Sample]:
        coordinator, plan, run = host.coordinator, host.plan, host.plan.run_id
        state = coordinator.state
        processes = coordinator.roll.processes
        yield sample("run_seconds", coordinator.seconds(), run)
        yield sample("progress_ratio", coordinator.progress(), run)
        yield sample("tokens_committed", state.samples_committed() * plan.seq_len, run)
        yield sample("tokens_lost", state.lost * plan.seq_len, run)
        loss = state.evaluations[-1].val_loss if state.evaluations else None
        if loss is not None:
            yield sample("validation_loss", loss, run)
        yield sample("live_members", len(state.live()), run)
        yield sample("suspect_members", sum(p.status == "suspect" for p in processes.values()), run)
        yield sample("sent_bytes", coordinator.bytes_sent(), run)
        yield sample("control_bytes", host.counts["control_bytes"], run)
        yield sample("journal_rows", len(coordinator.rows), run)
        yield sample("lost_metric_rows", host.counts["bad_rows"] + host.counts["lost_rows"], run)
        for fault, num in sorted(Counter(track.fault for track in coordinator.faults).items()):
            yield sample("faults", num, run, fault)

    def _of_fragments(self, host: Host) -> Iterator[Sample]:
        run = host.plan.run_id
        for fragment, head in enumerate(host.coordinator.state.heads):
            yield sample("version", head.version.n, run, str(fragment))
        for fragment, row in sorted(self.exchanges.items()):
            yield sample("exchange_seconds", row.seconds, run, str(fragment))
            yield sample("exchange_attempts", self.attempts[fragment], run, str(fragment))

    def _of_islands(self, host: Host) -> Iterator[Sample]:
        coordinator, run = host.coordinator, host.plan.run_id
        for member, process in sorted(coordinator.roll.processes.items()):
            of = (run, member.name, str(member))
            yield sample("island_up", process.status != "suspect", *of)
            if process.hello is not None:
                yield sample("island_sent_bytes", process.hello.bytes_sent, *of)
                yield sample("island_steps", process.hello.steps, *of)
            row = self.steps.get(member.name)
            if row is None or row.incarnation != member.incarnation:
                continue
            yield sample("island_tokens_per_second", row.tokens_per_s, *of)
            yield sample("island_step_seconds", row.step_ms / 1000, *of)
            for name, value in (
                ("island_loss", row.loss),
                ("island_learning_rate", row.lr),
                ("island_gradient_norm", row.grad_norm),
                ("island_memory_peak_bytes", row.mem_peak_bytes),
            ):
                if value is not None:
                    yield sample(name, value, *of)
        for (name, incarnation, phase), seconds in sorted(self.phases.items()):
            yield sample("island_phase_seconds", seconds, run, name, f"{name}.{incarnation}", phase)
