"""The controller's desk: journal rows in, messages out, and the one rule between them (protocol 1.2, C10).

Every decision is a row first. Whatever tells a member of it is held back until that row is durable: `Append` goes out
at once, a message only when `Flushed` has covered all that was decided before it was written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from faults.recovery import OWN_FAULTS, Budgets
from orchestrator import events as ev
from orchestrator.membership import Roll
from orchestrator.run_state import RunState
from orchestrator.settings import ExchangeConfig, RobustConfig
from strategies.config import StrategyConfig
from workers import messages as msg
from workers.live_settings import with_changes
from workers.records import FaultRecord, MemberId, OperatorRecord, Record, Row, Term, make_row
from workers.scopes import ALL_SHARED, Scopes, scopes_of

Recipients = MemberId | str | list[MemberId]
"""A member, a process without incarnation by its nonce, or all members at that moment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """What the coordinator needs to know of the run's configuration.

    `own_samples`: how many of the samples are of a pack that one island alone has, by name; `own_wait_s`: how long the
    run's end waits for an island that is away and has some left.
    """

    run_id: str
    islands: tuple[str, ...]
    total_samples: int
    seq_len: int
    exchange: ExchangeConfig
    strategy: StrategyConfig
    eval_every: float
    start_timeout_s: float
    snapshot_every_s: float
    replace_dead: bool
    max_restarts: int
    max_refusals: int = 3
    max_early_deaths: int | None = 5
    restart_window_s: float = 3600.0
    backoff_s: float = 1.0
    judges_hangs: bool = True
    rate: Callable[[float], float] | None = None
    warmup: float = 0.0
    load: Literal["equal", "by_speed"] = "equal"
    keeps_copies: bool = False
    own_samples: tuple[tuple[str, int], ...] = ()
    own_wait_s: float = 600.0
    robust: RobustConfig = field(default_factory=RobustConfig)

    def budgets(self) -> Budgets:
        """What may fail how often; what is taken away from a member may be taken away any number of times."""
        own = dict.fromkeys(OWN_FAULTS, self.max_restarts)
        return Budgets(
            per_kind={**own, "lost": None, "preempted": None},
            window_s=self.restart_window_s,
            early=self.max_early_deaths,
            backoff_s=self.backoff_s,
        )

    def scopes(self) -> Scopes:
        """Whose the samples of the run are."""
        return scopes_of(self.total_samples, dict(self.own_samples)) if self.own_samples else ALL_SHARED

    def inner_steps_at(self, progress: float, strategy: StrategyConfig | None = None) -> int:
        """Local steps of a round that starts at `progress`; `rate` is the inner learning rate there.

        `strategy`: `[strategy]` as it was changed since the run began.
        """
        return (strategy or self.strategy).inner_steps_at(progress, self.rate, self.warmup)


def may_tell(decided: int, flushed: int) -> bool:
    """A message may leave once every row that was decided before it is durable (C10)."""
    return decided <= flushed


class Desk:
    """Journal, outbox and clock of one controller life."""

    def __init__(self, plan: RunPlan, rows: Sequence[Row], term: Term, *, now: float, started_s: float = 0.0) -> None:
        """`rows`: the journal so far, its last row being this term's; `started_s`: run time that had passed before."""
        self.term, self.rank = term, term.rank
        self.rows: list[Row] = []
        self.state = RunState()
        for row in rows:
            self._replay(row)
        self.plan = plan
        exchange = plan.exchange
        self.flushed = len(self.rows) - 1
        self.zero_s = now - started_s
        self.now = now
        self.roll = Roll(
            suspect_s=exchange.suspect_s, limbo_s=exchange.limbo_s, heartbeat_s=exchange.heartbeat_s,
            judges_hangs=plan.judges_hangs,
        )  # fmt: skip
        self.pending: list[Row] = []
        self.held: deque[tuple[int, Recipients, tuple[msg.ControllerBody, ...]]] = deque()  # by rising number
        self.after_flush: list[tuple[int, Record]] = []
        self.nonces: dict[str, tuple[str, MemberId | None]] = {}
        self.commands: list[ev.Command] = []
        self.num_batches = 0
        self.ended = False
        self.stale_messages = 0
        self.num_events = 0

    def seconds(self) -> float:
        """Run time: seconds since the run's start on the controller's clock."""
        return self.now - self.zero_s

    def progress(self) -> float:
        """Committed share of the run's samples."""
        return min(self.state.samples_committed() / self.plan.total_samples, 1.0)

    def strategy_at(self, fragment: int) -> StrategyConfig:
        """`[strategy]` as it holds for a fragment's next transition."""
        values = self.state.settings.at(fragment, self.state.heads[fragment].version.n) if self.state.heads else ()
        return with_changes(self.plan.strategy, "strategy", values)

    def exchange_at(self, fragment: int) -> ExchangeConfig:
        """`[exchange]` as it holds for a fragment's next transition."""
        values = self.state.settings.at(fragment, self.state.heads[fragment].version.n) if self.state.heads else ()
        return with_changes(self.plan.exchange, "exchange", values)

    def inner_steps_of(self, fragment: int) -> int:
        """Local steps of a fragment's round that begins now."""
        return self.plan.inner_steps_at(self.progress(), self.strategy_at(fragment))

    def longest_round(self) -> int:
        """Local steps of a round of the fragment that has the longest."""
        return max(self.inner_steps_of(fragment) for fragment in range(max(self.state.num_fragments, 1)))

    # ------------------------------------------------------------ journal

    def _replay(self, row: Row) -> None:
        self.state.apply(row.record)
        self.rows.append(row)

    def _log(self, *records: Record) -> None:
        for record in records:
            last = self.rows[-1].hash
            row = make_row(len(self.rows), last, record)
            self._replay(row)
            self.pending.append(row)

    def _last_seq(self) -> int:
        return len(self.rows) - 1

    def _fault(self, fault: str, member: str, detail: str, *, injected: bool) -> None:
        self._log(
            FaultRecord(fault=fault, member=member, injected=injected, t_s=round(self.seconds(), 6), detail=detail)
        )

    def _operated(self, event: ev.Operated) -> None:
        self._log(
            OperatorRecord(
                action=event.action, member=event.member, by=event.by, outcome=event.outcome,
                t_s=round(self.seconds(), 6),
            )
        )  # fmt: skip

    # ------------------------------------------------------------ outbox

    def _tell(self, to: MemberId | str, *bodies: msg.ControllerBody) -> None:
        """Queue bodies for a member (or, for a process without incarnation, a nonce) until all decided is flushed."""
        self.held.append((self._last_seq(), to, bodies))

    def _tell_all(self, *bodies: msg.ControllerBody) -> None:
        live, processes = self.state.live(), self.roll.processes
        here = live if len(processes) == len(live) else [member for member in live if member in processes]
        self.held.append((self._last_seq(), here, bodies))

    def _sync(self, member: MemberId) -> None:
        self._tell(member)

    def _emit(self) -> None:
        if self.pending:
            self.commands.append(ev.Append(rows=tuple(self.pending)))
            self.pending = []
        if not self.held:
            return
        held, due = self.held, []
        while held and may_tell(held[0][0], self.flushed):
            due.append(held.popleft())
        slices: dict[int, tuple[Row, ...]] = {}  # many lack the same rows
        if len(due) == 1:  # mostly
            _, to, bodies = due[0]
            if isinstance(to, list):
                self._send_to_all(to, bodies, slices)
            else:
                self._send(to, bodies, slices)
            return
        grouped: dict[MemberId | str, tuple[msg.ControllerBody, ...]] = {}
        for _, to, bodies in due:
            for one in to if isinstance(to, list) else (to,):
                grouped[one] = grouped[one] + bodies if one in grouped else bodies
        for one, all_bodies in grouped.items():
            self._send(one, all_bodies, slices)

    def _send_to_all(
        self, members: list[MemberId], bodies: tuple[msg.ControllerBody, ...], slices: dict[int, tuple[Row, ...]]
    ) -> None:
        """`_send` to each, for what everybody is told and nothing else: thousands of times in a row."""
        processes, end, tell = self.roll.processes, self.flushed + 1, self.commands.append
        run_id, term, number = self.plan.run_id, self.term, self.num_batches
        for member in members:
            process = processes.get(member)
            if process is None:
                continue
            rows_from = process.rows_sent
            if rows_from not in slices:
                slices[rows_from] = tuple(self.rows[rows_from:end])
            if rows_from < end:
                process.rows_sent = end
            number += 1
            name, incarnation = member
            tell(
                ev.Send(
                    msg.Batch(
                        run_id, term, name, incarnation, process.nonce, rows_from, slices[rows_from], bodies, number
                    )
                )
            )
        self.num_batches = number

    def _send(
        self, to: MemberId | str, bodies: tuple[msg.ControllerBody, ...], slices: dict[int, tuple[Row, ...]]
    ) -> None:
        if isinstance(to, str):
            name, member = self.nonces.get(to, ("", None))
            nonce, rows_from = to, 0
            rows: tuple[Row, ...] = ()
        else:
            process = self.roll.processes.get(to)
            if process is None:
                return
            name, member, nonce, rows_from, rows = to.name, to, process.nonce, process.rows_sent, ()
            if rows_from <= self.flushed:  # mostly it has them all
                if rows_from not in slices:
                    slices[rows_from] = tuple(self.rows[rows_from : self.flushed + 1])
                rows = slices[rows_from]
                process.rows_sent = self.flushed + 1
        self.num_batches += 1
        incarnation = member.incarnation if member is not None else None
        batch = msg.Batch(
            self.plan.run_id, self.term, name, incarnation, nonce, rows_from, rows, bodies, self.num_batches
        )
        self.commands.append(ev.Send(batch))

    def _say(self, text: str, *, member: str = "", level: str = "info") -> None:
        self.commands.append(ev.Say(text=text, member=member, level=level))

    def _metric(self, **row: Any) -> None:
        self.commands.append(ev.Metric(row=row))
