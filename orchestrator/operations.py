"""What the user asks of a run while it goes on: other settings, a pause, a snapshot, the way back to an older one."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator import events as ev
from orchestrator.closing import closing_of
from orchestrator.judgement import Judgement
from orchestrator.run_state import RunState
from workers.live_settings import holds_at_once
from workers.records import PauseRecord, RollbackRecord, SettingRecord


def rollback_problem(state: RunState, versions: Sequence[int], chains: Sequence[str]) -> str | None:
    """Why a run cannot go back to these versions; None if it can."""
    if not state.heads:
        return "the run has no version yet"
    if state.pair_rows:
        return "the run gossips: what pairs have committed since cannot be taken back"
    if len(versions) != state.num_fragments:
        return f"the snapshot has {len(versions)} fragments, the run has {state.num_fragments}"
    for fragment, (n, chain) in enumerate(zip(versions, chains, strict=True)):
        if state.chain(fragment, n) != chain:
            return f"version {n} of fragment {fragment} in the snapshot is no part of the run's history"
    if all(head.version.n == n for head, n in zip(state.heads, versions, strict=True)):
        return "the run is at these versions"
    return None


class Operations(Judgement):
    """Every request becomes a row first; members hear of it by that row."""

    def _settings_requested(self, event: ev.SettingsRequested) -> None:
        """From the next version on: no transition that anybody may be computing now changes.

        `[exchange]` holds at once: only the controller decides by it, and who waits for a quorum cannot wait longer.
        """
        if not self.state.heads:
            self._say("no setting can change before there is a version 0", level="warning")
            return
        known = self.state.settings.newest()
        for key, value in event.values:
            if key not in known or known[key] != value:
                since = tuple(head.version.n + (0 if holds_at_once(key) else 1) for head in self.state.heads)
                self._log(SettingRecord(key=key, value=value, since=since))
                self._say(f"{key} = {value!r} from version {min(since)} on")
        for exchange in self.exchanges:
            exchange.config = self.exchange_at(exchange.fragment)
            exchange.closing = closing_of(self.strategy_at(exchange.fragment))
        self._tell_all()

    def _pause_requested(self, event: ev.PauseRequested) -> None:
        if event.paused == self.state.paused:
            return
        self._log(PauseRecord(paused=event.paused, why=event.why))
        self._say("the run is paused" if event.paused else "the run goes on")
        self._tell_all()

    def _save_requested(self) -> None:
        if self.started and self.save_asked is None and self.stopping is None:
            self._ask_save(f"v{max(head.version.n for head in self.state.heads)}")

    def _rollback_requested(self, event: ev.RollbackRequested) -> None:
        """Everybody is fenced and settled, commits are taken back, and all begin again from the snapshot.

        What no member may go on from cannot be kept by anybody: members forget what they hold when they read the row,
        and the newest snapshot of the history, which is the one that is meant, is loaded as after the death of all.
        """
        problem = rollback_problem(self.state, event.versions, event.chains)
        if problem is not None or self.stopping is not None or self.state.stopped is not None:
            self._say(f"no rollback to {event.name}: {problem or 'the run is stopping'}", level="warning")
            return
        why = f"the run goes back to {event.name}"
        for exchange in self.exchanges:
            self._effects(exchange, exchange.discard(why))
        for member in self.state.live():
            self._log_fence(member, why, refused=False)
        self._settle_all()
        self._log(RollbackRecord(name=event.name, versions=event.versions, chains=event.chains, why=event.why))
        self.after_flush.append((self._last_seq(), self.rows[-1].record))
        self._say(f"{why}: {event.why}", level="warning")
        for exchange in self.exchanges:
            exchange.config = self.exchange_at(exchange.fragment)
            exchange.closing = closing_of(self.strategy_at(exchange.fragment))
        self.eval_asked = self.save_asked = None
        self.final_saved, self.saved_versions = False, ()
        self.next_eval = self._first_eval()
        self.without_snapshot.clear()
        self.refusals.clear()
