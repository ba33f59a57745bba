"""Judging members and acting on it: silence, hangs, slowness, deaths; what is started again and what is given up.

Verdicts come from `Roll` (`faults/detector.py`, `faults/stragglers.py`), what is done about the end of a process from
`RecoveryPolicy` (`faults/recovery.py`). Here they become rows, messages and commands.
"""

from __future__ import annotations

from collections.abc import Sequence

from faults.recovery import GIVEN_UP, KINDS, GiveUp, Kind, RecoveryPolicy
from orchestrator import events as ev
from orchestrator import leaving, quorum
from orchestrator.desk import RunPlan
from orchestrator.exchange_rules import Fleet
from orchestrator.lifecycle import Lifecycle
from orchestrator.membership import Process, Verdict
from workers.records import HUNG, FaultRecord, MemberId, Row, StopRecord, Term

EARLY_DEATHS = 3
SILENT_S = 1.0  # a suspect heard more recently hangs, or is far behind
SHORT_FOR_S = 5.0
QUORUM_S_PER_MEMBER = 5e-4
"""Whether there are enough of them is looked at no more often than this: ten thousand every 5 s."""
SAY_AGAIN_S = 60.0
UNSEEN: tuple[Kind, ...] = ("lost", "hung")
"""Ends of a process that never joined which nobody would hear of otherwise: not even Ray noticed them."""


class Judgement(Lifecycle):
    """Verdicts on members, and what follows from them."""

    def __init__(self, plan: RunPlan, rows: Sequence[Row], term: Term, *, now: float, started_s: float = 0.0) -> None:
        """See `Desk`. What members have failed before is in the journal; a run that was stopped begins with a clean
        sheet: whoever resumes it may have mended the cause.
        """
        super().__init__(plan, rows, term, now=now, started_s=started_s)
        self.policy = RecoveryPolicy(budgets=plan.budgets())
        self.to_spawn: dict[str, tuple[float, str]] = {}
        self.told_status: dict[MemberId, str] = {}
        self.hung: dict[MemberId, str] = {}
        self.short_of = ""
        self.short_since: float | None = None
        self.short_said_s = self.quorum_looked_s = float("-inf")
        for row in rows:
            self._remember(row)

    def _remember(self, row: Row) -> None:
        match row.record:
            case StopRecord():
                self.policy = RecoveryPolicy(budgets=self.plan.budgets())
                self.given_up.clear()
            case FaultRecord(fault=fault, member=name, detail=verdict) if fault == GIVEN_UP:
                self.given_up[name] = verdict
            case FaultRecord(fault=fault, member=name, injected=False, t_s=at_s):
                for kind in KINDS:
                    if kind == fault:
                        self.policy.note(name, kind, at_s)
            case _:
                pass

    # ------------------------------------------------------------ verdicts

    def _judge(self) -> None:
        for verdict in self.roll.judge(self.now):
            self._verdict(verdict)
        if self.now - self.begun_s > self.plan.exchange.limbo_s and not self._all_here():
            for member in self.state.live():
                if member not in self.roll.processes:  # lived before this controller, and never came back to it
                    why = "not heard by this controller, limbo is over"
                    self._verdict(Verdict(id=member, verdict="fence", reason=why))
        self._tell_statuses()

    def _verdict(self, verdict: Verdict | None) -> None:
        if verdict is None:
            return
        member, why = verdict.id, verdict.reason
        if verdict.verdict == "hung":
            self._end_hung(member, why)
            return
        self._say(f"{member} is {verdict.verdict}: {why}", member=member.name)
        self._end_silence(member)
        process = self.roll.processes.get(member)
        if verdict.verdict == "suspect" and process is not None and self.now - process.heard_s > SILENT_S:
            self.silent_since[member] = process.heard_s - self.zero_s
        if verdict.verdict in ("suspect", "slow"):
            self._fault(verdict.verdict, member.name, why, injected=False)
        elif verdict.verdict == "fence":
            self._lose_and_replace(member, "lost", why)

    def _lose_and_replace(self, member: MemberId, kind: Kind, why: str) -> None:
        process = self.roll.processes.get(member)
        self._lose(member, kind, why)
        self._fence(member, why, refused=False)
        self._replace(member.name, kind, why, stepped=process is not None and process.stepped)

    def _end_hung(self, member: MemberId, why: str) -> None:
        """Its process is ended and replaced once the fence is durable: it holds a state as long as it lives (H5).

        Where nobody else holds what it holds, it is left alone until limbo is over: what it serves may be fetched yet.
        """
        process = self.roll.processes.get(member)
        if process is None or not (self._is_held_beside(process) or process.progress().for_s > self.roll.limbo_s):
            return
        self.hung[member] = why
        self._lose(member, "hung", why)
        self._fence(member, HUNG + why, refused=False)

    def _is_held_beside(self, process: Process) -> bool:
        heads = [head.version for head in self.state.heads]
        others = [p for p in self.roll.processes.values() if p is not process and p.status != "suspect"]
        return leaving.is_held(heads, others) or self.saved_versions == tuple(head.n for head in heads)

    def _fence_flushed(self, member: MemberId, why: str) -> None:
        """A fence is durable: its process ends, and only now one that hung is replaced."""
        nonce = self.state.members[member].nonce
        self.commands.append(ev.End(name=member.name, nonce=nonce, why=why, save_stack=why.startswith(HUNG)))
        if (story := self.hung.pop(member, None)) is not None:
            self._replace(member.name, "hung", story, stepped=True)

    def _tell_statuses(self) -> None:
        """Statuses that changed go to the metrics, where `atoll status` finds them."""
        told, processes = self.told_status, self.roll.processes
        for member in self.roll.take_changed():
            process = processes.get(member)
            if process is None:
                if told.pop(member, None) is not None:
                    self._tell_status(member, "fenced", "its incarnation has ended")
            elif told.get(member) != process.status:
                told[member] = process.status
                self._tell_status(member, process.status, process.reason)

    def _tell_status(self, member: MemberId, status: str, reason: str) -> None:
        self._metric(
            kind="member", t_s=self.seconds(), member=member.name, incarnation=member.incarnation, status=status,
            reason=reason,
        )  # fmt: skip

    # ------------------------------------------------------------ deaths

    def _process_died(self, event: ev.ProcessDied) -> None:
        name, nonce, why = event.name, event.nonce, event.why
        kind: Kind = "hung" if event.hung else event.taken or ("crash" if event.raised else "died")
        member = self.state.nonces.get(nonce) if nonce else self.state.current.get(name)
        stepped = False
        if member is not None and self.state.members[member].live:
            self._lose(member, kind, why)
            process = self.roll.processes.get(member)
            stepped = process is not None and process.stepped
            self._fence(member, why, refused=False)
        elif kind in UNSEEN:
            self._say(f"{name} is {kind}: {why}", member=name, level="warning")
            self._fault(kind, name, why, injected=False)
        if event.hopeless:
            self._end("failed", f"{name}: {why}")
        else:
            self._replace(name, kind, why, stepped=stepped)

    def _replace(self, name: str, kind: Kind, why: str, *, stepped: bool) -> None:
        if self.stopping is not None or self.ended or not self.plan.replace_dead or name in self.given_up:
            return
        if name in self.leaving:  # it died on its way out
            del self.leaving[name]
            self.missing_since.pop(name, None)
            self.away_since[name] = self.seconds()
            return
        self.fenced_s.pop(name, None)
        action = self.policy.failed(name, kind, self.seconds(), stepped=stepped, why=why)
        in_row = self.policy.early[name]
        if in_row >= EARLY_DEATHS and not any(head.version.n for head in self.state.heads):
            self._end("failed", f"{name} failed {in_row} times before its first step: {why}")
        elif isinstance(action, GiveUp):
            self._give_up(name, action.verdict)
            if not self.state.live():
                self._end("failed", action.verdict)
        elif action.after_s:
            self._say(f"{name} is started again in {action.after_s:g} s: {why}", member=name)
            self.to_spawn[name] = (self.now + action.after_s, why)
        else:
            self.commands.append(ev.Spawn(name=name, why=why))

    def _spawn_due(self) -> None:
        """Processes whose wait is over are started, unless another one has taken the place meanwhile."""
        for name, (at_s, why) in list(self.to_spawn.items()):
            if self.now >= at_s:
                del self.to_spawn[name]
                if name not in self.state.current and self.stopping is None:
                    self.commands.append(ev.Spawn(name=name, why=why))

    def _miss_the_fenced(self) -> None:
        """A process that is silent since it was told of its fence hangs, or died unseen: it is replaced as well."""
        for name, fenced_s in list(self.fenced_s.items()):
            if name in self.state.current or self.now - fenced_s > self.plan.exchange.limbo_s:
                del self.fenced_s[name]
                if name not in self.state.current:
                    self._replace(name, "lost", "its process did not come back after its fence", stepped=False)

    # ------------------------------------------------------------ quorum

    def _why_not_here(self, member: MemberId) -> str:
        process = self.roll.processes.get(member)
        return f"{process.status}: {process.reason}" if process is not None else "not heard"

    def _watch_quorum(self, fleet: Fleet) -> None:
        """Whether enough members are there to commit; else who is missing and what to set, once a minute."""
        if self.now - self.quorum_looked_s < QUORUM_S_PER_MEMBER * len(self.roll.processes):
            return
        self.quorum_looked_s = self.now
        absent = {**self.given_up, **dict.fromkeys(self.away_since, "it left")}
        first = self.exchanges[0]
        short = quorum.shortfall(
            self.exchange_at(0), first.open, fleet, self.plan.islands, self._why_not_here, absent, first.closing
        )
        if not short:
            self.short_since = None
        elif self.short_since is None:
            self.short_since = self.now
        told = short if self.short_since is not None and self.now - self.short_since >= SHORT_FOR_S else ""
        if bool(told) != bool(self.short_of):
            self._metric(kind="quorum", t_s=self.seconds(), detail=told)
            if not told:
                self._say("enough members are there again")
        self.short_of = told
        if told and self.now - self.short_said_s >= SAY_AGAIN_S:
            self.short_said_s = self.now
            self._say(told, level="warning")
