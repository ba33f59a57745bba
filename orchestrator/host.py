"""The shell around a coordinator that does not depend on where members run: journal, metrics, log, summary.

A host turns commands into effects and effects into events. Subclasses or owners provide three callbacks: deliver a
batch to a process, start a process, end a process. Used by the Ray controller and by runs in one process.
"""

from __future__ import annotations

import logging
import pickle
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from orchestrator import events as ev
from orchestrator.alarms import Alarm, Alarms
from orchestrator.coordinator import Coordinator, RunPlan
from orchestrator.finish import set_aside
from orchestrator.journal import FileJournal, JournalFull, claim_segment, open_segment
from orchestrator.journal_recovery import recover as recover_rows
from orchestrator.metrics import FaultEvent, MetricsWriteError, MetricsWriter, RowError, row_from_dict
from orchestrator.metrics import Row as MetricsRow
from orchestrator.rollback import set_aside_later
from orchestrator.rundir import RunDir
from workers.messages import Batch, Envelope
from workers.records import Row, Term

log = logging.getLogger("atoll.controller")

FULL_RETRY_S = 1.0

Handed = tuple[Term | None, tuple[Row, ...]]


class Host:
    """One controller life: a coordinator on a journal file."""

    def __init__(
        self,
        *,
        plan: RunPlan,
        run_dir: Path,
        controller: str,
        clock: Callable[[], float],
        deliver: Callable[[Batch], None],
        spawn: Callable[[str, str], None],
        end: Callable[[str, str, bool], None],
    ) -> None:
        """`clock`: monotonic seconds; `deliver`, `spawn(name, why)`, `end(name, nonce, save_stack)` must not block."""
        self.plan, self.run_dir, self.clock = plan, RunDir(run_dir), clock
        self.controller = controller
        self._deliver, self._spawn, self._end = deliver, spawn, end
        self.finished: ev.Finish | None = None
        self.closed = False
        self.died: ev.Die | None = None
        self.counts: Counter[str] = Counter()
        self.blocked: deque[ev.Append] = deque()
        self.blocked_since = 0.0
        self.fault_rows_written: dict[tuple[str, float], FaultEvent] = {}
        self.started_s = 0.0
        self.alarms: Alarms | None = None
        self.tell: Callable[[Alarm], None] = lambda alarm: None
        self.rolled_back: Callable[[Sequence[int]], None] = partial(set_aside_later, self.run_dir.snapshots)
        self.watchers: list[Callable[[MetricsRow], None]] = []  # of the rows that go into metrics.jsonl

    def open(self, *, outage_s: float = 0.0) -> None:
        """Take over the journal and begin; `outage_s`: how long nobody had it. Raises JournalError, Fenced."""
        self._begin(open_segment(self.run_dir.path, controller=self.controller), outage_s)

    def recover(self, ask: Callable[[Term], Mapping[str, Handed]], *, force: bool = False) -> None:
        """The journal was lost: rebuild it from what the members agree on, and begin with it; see `rebuild`."""
        self.go_on(self.rebuild(ask, force=force))

    def rebuild(self, ask: Callable[[Term], Mapping[str, Handed]], *, force: bool = False) -> FileJournal:
        """The journal out of what more than half of the members agree on (protocol 1.2 rule 5); nothing begins yet.

        `ask(term)` hands the new term to every process that is known and returns their answers by process name; a
        process that does not answer is in it with `(None, ())`. May block. Raises JournalError when too few agree.
        """
        lineage = 1
        while True:
            journal = claim_segment(self.run_dir.path, controller=self.controller, lineage=lineage)
            answers = ask(journal.term)
            higher = [
                term.lineage for term, _ in answers.values() if term is not None and term.rank > journal.term.rank
            ]
            if not higher:
                break
            journal.close(merge=False)
            lineage = max(higher) + 1
        copies = [rows for term, rows in answers.values() if term is not None]
        try:
            journal.begin(recover_rows(copies, num_members=len(answers), force=force))
        except BaseException:
            journal.close(merge=False)
            journal.path.unlink()
            raise
        return journal

    def go_on(self, journal: FileJournal) -> None:
        """Begin with a rebuilt journal."""
        self._begin(journal)
        self.handle(ev.Recovered())

    def _begin(self, journal: FileJournal, outage_s: float = 0.0) -> None:
        self.journal = journal
        set_aside(self.run_dir)
        self.metrics = MetricsWriter(self.run_dir.metrics).open()
        before = _seconds_so_far(self.run_dir) + outage_s
        self.coordinator = Coordinator(
            self.plan, self.journal.rows, self.journal.term, now=self.clock(), started_s=before
        )

    def close(self) -> None:
        """End this life; merge the journal's segments after a clean end. Whoever still speaks is heard no more."""
        self.closed = True
        self.metrics.close()
        self.journal.close(merge=self.finished is not None)

    # ------------------------------------------------------------ events

    def receive(self, envelope: Envelope) -> None:
        """An envelope from a member."""
        if self.closed:
            return
        self.counts["control_bytes"] += len(pickle.dumps(envelope, protocol=5))
        self.handle(ev.Received(envelope=envelope))

    def tick(self) -> None:
        """Time passed; a full disk is tried again."""
        if self.blocked:
            if self.clock() - self.blocked_since < FULL_RETRY_S:
                return
            self._retry()
        self.handle(ev.Tick())
        self._write_faults()
        if self.alarms is not None:
            brain = self.coordinator
            num_live, exchange = len(brain.roll.processes), brain.exchange_at(0)
            self._alarm(self.alarms.on_time(num_live, brain.seconds(), started=brain.started, exchange=exchange))

    def handle(self, event: ev.Event) -> None:
        """One event, and everything that follows from it."""
        todo: deque[ev.Event] = deque([event])
        while todo and self.died is None:
            for command in self.coordinator.handle(todo.popleft(), self.clock()):
                answer = self._carry_out(command)
                if answer is not None:
                    todo.append(answer)

    def _carry_out(self, command: ev.Command) -> ev.Event | None:
        match command:
            case ev.Append():
                if self.alarms is not None:
                    for row in command.rows:
                        self._alarm(self.alarms.on_record(row.record, self.coordinator.seconds()))
                return self._append(command)
            case ev.Send(batch=batch):
                self.counts["control_bytes"] += len(pickle.dumps(batch, protocol=5))
                self._deliver(batch)
            case ev.Spawn(name=name, why=why):
                self._spawn(name, why)
            case ev.End(name=name, nonce=nonce, save_stack=save_stack):
                self._end(name, nonce, save_stack)
            case ev.Metric(row=row):
                self._metric(row)
                if self.alarms is not None:
                    self._alarm(self.alarms.on_metric(row, self.coordinator.seconds()))
            case ev.Say(text=text, member=member, level=level):
                log.log(getattr(logging, level.upper()), text, extra={"member": member})
            case ev.Finish():
                self._write_faults()
                self.finished = command
            case ev.RolledBack(versions=versions):
                self.rolled_back(versions)
            case ev.Die():
                self.died = command
        return None

    def _alarm(self, alarms: Sequence[Alarm]) -> None:
        for alarm in alarms:
            self.tell(alarm)

    def _append(self, command: ev.Append) -> ev.Event | None:
        """Write and flush; only then may anybody hear of it. A journal that fails otherwise ends this controller."""
        if self.blocked:
            self.blocked.append(command)
            return None
        try:
            self.journal.append_rows(command.rows)
        except JournalFull as error:
            log.warning("%s", error)
            self.blocked.append(command)
            self.blocked_since = self.clock()
            return ev.JournalFullNow()
        return ev.Flushed(seq=command.rows[-1].seq)

    def _retry(self) -> None:
        while self.blocked:
            command = self.blocked[0]
            try:
                self.journal.append_rows(command.rows)
            except JournalFull:
                self.blocked_since = self.clock()
                return
            self.blocked.popleft()
            self.handle(ev.Flushed(seq=command.rows[-1].seq))

    # ------------------------------------------------------------ metrics

    def _metric(self, values: dict[str, object]) -> None:
        if values.get("kind") == "step":
            values["eta_s"] = self._eta()
        try:
            row = row_from_dict(values)
            if row is not None:
                self._watched(row)
                self.metrics.append(row)
        except RowError as error:
            self.counts["bad_rows"] += 1
            log.warning("a metrics row was dropped: %s", error)
        except MetricsWriteError as error:
            self.counts["lost_rows"] += 1
            log.warning("%s", error)

    def _watched(self, row: MetricsRow) -> None:
        for watcher in self.watchers:
            watcher(row)

    def _eta(self) -> float | None:
        """Seconds left at the run's mean speed so far; None before the first commit."""
        done, seconds = self.coordinator.progress(), self.coordinator.seconds()
        return seconds * (1.0 - done) / done if done > 0 else None

    def _write_faults(self) -> None:
        for track in self.coordinator.faults:
            row = FaultEvent(
                t_s=track.detected_s,
                fault=track.fault,
                member=track.member,
                injected_s=track.injected_s,
                detected_s=track.detected_s,
                next_commit_s=track.next_commit_s,
                back_s=track.back_s,
                contributed_s=track.contributed_s,
                estimated=track.estimated,
            )
            key = (track.member, track.detected_s)
            if self.fault_rows_written.get(key) != row:
                self.fault_rows_written[key] = row
                self._watched(row)
                try:
                    self.metrics.append(row)
                except MetricsWriteError as error:
                    log.warning("%s", error)


def _seconds_so_far(run_dir: RunDir) -> float:
    """Run time that earlier controllers have seen, from the last metrics row; 0 for a new run."""
    from orchestrator.metrics import read_rows

    if not run_dir.metrics.exists():
        return 0.0
    latest = 0.0
    for row in read_rows(run_dir.metrics):
        latest = max(latest, getattr(row, "t_s", 0.0), getattr(row, "end_s", 0.0))
    return latest


class Pulse:
    """Calls a function every `seconds` on a thread of its own until it is stopped."""

    def __init__(self, seconds: float, function: Callable[[], None]) -> None:
        """Nothing runs before `start`."""
        self._seconds, self._function = seconds, function
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, and wait for the call under way."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=10)

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            self._function()
