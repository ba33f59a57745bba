"""What the controller asks of members besides exchanges: evaluations, snapshots, local states; and the run's end."""

from __future__ import annotations

import math
from collections.abc import Sequence

from orchestrator import events as ev
from orchestrator.desk import Desk, RunPlan
from workers import messages as msg
from workers.records import EvaluationRecord, MemberId, Row, SnapshotRecord, StopRecord, Term


class Agenda(Desk):
    """Things to do in rotation, and when the run is over."""

    final_attempts = 3
    ask_again_s = 60.0  # a request that was not answered is made again

    def __init__(self, plan: RunPlan, rows: Sequence[Row], term: Term, *, now: float, started_s: float = 0.0) -> None:
        """See `Desk`."""
        super().__init__(plan, rows, term, now=now, started_s=started_s)
        self.started = self.state.has_issued
        self.eval_asked: tuple[MemberId, int, float] | None = None
        self.eval_turn = 0
        self.next_eval = self._first_eval()
        self.save_asked: tuple[MemberId, str, float] | None = None
        self.last_save_s = now
        self.final_saved = False
        self.final_failures = 0
        self.saved_versions: tuple[int, ...] = ()
        self.stopping: ev.StopRequested | None = None
        self.begun_stop_s = now
        self.local_saved: set[str] = set()
        self.local_failed: set[str] = set()

    # ------------------------------------------------------------ evaluation

    def _first_eval(self) -> float:
        every, due = self.plan.eval_every, self.plan.eval_every
        while due <= self.progress() + 1e-9:
            due += every
        return due

    def _ask_evaluation(self, version: int) -> None:
        """A living member in rotation evaluates the anchor."""
        able = [m for m, p in sorted(self.roll.processes.items()) if p.ready() and p.status != "suspect"]
        if not able:
            self.eval_asked = None
            return
        member = able[self.eval_turn % len(able)]
        self.eval_turn += 1
        self.eval_asked = (member, version, self.now)
        versions = tuple(head.version.n for head in self.state.heads)
        self._tell(member, msg.Evaluate(versions=versions, samples=self.state.samples_committed()))

    def _evaluated(self, member: MemberId, body: msg.Evaluated) -> None:
        if self.eval_asked and self.eval_asked[0] == member:
            self.eval_asked = None
        if any(e.samples == body.samples for e in self.state.evaluations):
            return
        loss = body.val_loss
        finite = loss if loss is not None and math.isfinite(loss) else None
        self._log(EvaluationRecord(member=str(member), versions=body.versions, samples=body.samples, val_loss=finite))
        if loss is not None:
            self._metric(
                kind="eval", t_s=self.seconds(), member=member.name, version=max(body.versions),
                progress=body.samples / self.plan.total_samples, val_loss=loss,
                tokens_committed=body.samples * self.plan.seq_len,
            )  # fmt: skip
        self._finish_if_done()

    # ------------------------------------------------------------ snapshots

    def _ask_save(self, name: str) -> None:
        able = [m for m, p in sorted(self.roll.processes.items()) if p.ready() and p.status != "suspect"]
        if able:
            member = able[-1]
            self.save_asked = (member, name, self.now)
            self.last_save_s = self.now
            self._tell(member, msg.Save(name=name, local=False))

    def _saved(self, member: MemberId, body: msg.Saved) -> None:
        if body.local:
            self.local_saved.add(member.name)
            self._stop_if_saved()
            return
        if self.save_asked and (self.save_asked[1] == body.name or self.save_asked[1][0] == body.name[0] == "v"):
            self.save_asked = None
        self._log(SnapshotRecord(name=body.name, versions=body.versions))
        self.saved_versions = body.versions
        if body.name == "final" and body.versions == tuple(h.version.n for h in self.state.heads):
            self.final_saved = True
        self._finish_if_done()

    def _save_failed(self, member: MemberId, detail: str) -> None:
        """It is asked again in a while; a run that is done and cannot keep what it made has failed."""
        self._say(f"{member} could not write a snapshot: {detail}", member=member.name, level="warning")
        if self.done():
            self.final_failures += 1
            if self.final_failures >= self.final_attempts:
                self._end("failed", f"the last snapshot cannot be written: {detail}")

    # ------------------------------------------------------------ the end

    def done(self) -> bool:
        """Whether every sample of the run has a final fate."""
        return self.started and self.state.samples_accounted() >= self.plan.total_samples

    def _finish_if_done(self) -> None:
        if not self.done() or self.stopping is not None or self.state.stopped is not None:
            return
        evaluated = any(e.samples == self.state.samples_committed() for e in self.state.evaluations)
        if not evaluated:
            if self.eval_asked is None:
                self._ask_evaluation(self.state.heads[0].version.n)
            elif self.eval_asked[1] != self.state.heads[0].version.n:
                self._ask_evaluation(self.state.heads[0].version.n)
        if not self.final_saved and (self.save_asked is None or self.save_asked[1] != "final"):
            self._ask_save("final")
        if evaluated and self.final_saved:
            self._end("done", "")

    def _end(self, reason: str, detail: str) -> None:
        if self.state.stopped is not None:
            return
        self._log(StopRecord(reason=reason, detail=detail))
        self.after_flush.append((self._last_seq(), self.rows[-1].record))
        self._tell_all(msg.Stop(save=False))

    def _stop_requested(self, event: ev.StopRequested) -> None:
        if not event.save:
            self._stop_now(event)
            return
        if self.stopping is None:
            self.stopping = event
            self.begun_stop_s = self.now
            self._close_nothing_more()
            self._ask_save("stop")
            self._tell_all(msg.Stop(save=True))
            self._stop_if_saved()

    def _close_nothing_more(self) -> None:
        """Exchanges that are closed end as they would; the others wait for the run to be resumed."""
        raise NotImplementedError

    def _stop_now(self, event: ev.StopRequested) -> None:
        """Stop without waiting for anybody."""
        raise NotImplementedError

    def _stop_if_saved(self) -> None:
        failed = self.local_failed - self.local_saved
        if self.stopping is not None and {m.name for m in self.roll.processes} <= self.local_saved | failed:
            without = f", but not of {', '.join(sorted(failed))}: no space" if failed else ""
            self._end("stopped", f"stopped by the user; local states are saved{without}")
