"""One controller life: the production coordinator behind a virtual journal (the shell that Ray is in production).

Claim a segment, read the older ones, write the term, replay; then every event goes into the coordinator and every
command out of it. Rows are written, synced and checked against a newer segment one step after the other; the
controller can end between any two of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator import events as ev
from orchestrator.coordinator import Coordinator
from workers.messages import Envelope
from workers.records import GENESIS_HASH, CommitRecord, Row, Term, TermRecord, make_row

if TYPE_CHECKING:
    from orchestrator.simulation.cluster import Cluster

FULL_RETRY_S = 0.3


class Controller:
    """A process that runs a coordinator."""

    def __init__(self, cluster: Cluster, *, number: int) -> None:
        """Creating it claims the next segment: every older controller is fenced from now on."""
        self.cluster, self.name = cluster, f"controller-{number}"
        self.alive = True
        self.segment = cluster.disk.create()
        self.coordinator: Coordinator | None = None
        self.waiting: list[Row] = []
        self.writing: list[Row] = []
        self.said_full = False
        self.fail_next_sync = False
        self.doomed_at = ""
        cluster.note(f"{self.name} claims segment {self.segment.number}")
        self._later(self._read)

    # ------------------------------------------------------------ life

    def _later(self, action: object, delay_s: float | None = None) -> None:
        delay = self.cluster.scenario.flush_s * self.cluster.rng.random() * 2 if delay_s is None else delay_s
        self.cluster.time.after(delay, self._if_alive, action)

    def _if_alive(self, action: object) -> None:
        if self.alive:
            action()  # type: ignore[operator]

    def _read(self) -> None:
        """Read the older segments to their end; write the term that continues them."""
        cluster = self.cluster
        rows = cluster.disk.history(before=self.segment.number)
        for segment in cluster.disk.segments:
            if segment.number < self.segment.number:
                cluster.disk.sync(segment)
        self.term = Term(lineage=0, number=self.segment.number, controller=self.name)
        record = TermRecord(lineage=0, number=self.term.number, controller=self.name)
        self.rows = [*rows, make_row(len(rows), rows[-1].hash if rows else GENESIS_HASH, record)]
        self.writing = [self.rows[-1]]
        self._later(self._write)

    def _begin(self) -> None:
        cluster = self.cluster
        cluster.note(f"{self.name} begins term {self.term} with {len(self.rows)} rows")
        cluster.checks.began(self.rows)
        self.coordinator = Coordinator(cluster.scenario.plan, self.rows, self.term, now=self._now())
        self.coordinator.ask_again_s = 5.0
        cluster.began(self)
        self._tick()

    def _now(self) -> float:
        return self.cluster.time.now + 100.0 * self.segment.number

    def _tick(self) -> None:
        self.handle(ev.Tick())
        self._later(self._tick, self.cluster.scenario.tick_s)

    # ------------------------------------------------------------ journal

    def _append(self, rows: tuple[Row, ...]) -> None:
        self.waiting += rows
        if not self.writing:
            self._take_rows()

    def _take_rows(self) -> None:
        if self.waiting:
            self.writing, self.waiting = self.waiting, []
            self._later(self._write)

    def _ends_here(self, stage: str) -> bool:
        """An injected end at a step of the append of a commit; half of the time the machine goes down with it."""
        if self.doomed_at != stage or not any(isinstance(row.record, CommitRecord) for row in self.writing):
            return False
        if self.cluster.rng.random() < 0.5:
            self.cluster.crash_head()
        else:
            self.cluster.lost(self, f"injected, {stage} of a commit")
        return True

    def _write(self) -> None:
        if self._ends_here("before write"):
            return
        if self.cluster.disk.full:
            if not self.said_full and self.coordinator is not None:
                self.said_full = True
                self.handle(ev.JournalFullNow())
            self._later(self._write, FULL_RETRY_S)
            return
        self.said_full = False
        self.cluster.disk.write(self.segment, self.writing)
        self._later(self._sync)

    def _sync(self) -> None:
        if self._ends_here("after write"):
            return
        if self.fail_next_sync:
            self.cluster.lost(self, "its journal cannot be synced")
            return
        self.cluster.disk.sync(self.segment)
        self._later(self._check)

    def _check(self) -> None:
        if self._ends_here("after sync"):
            return
        if not self.cluster.owns_journal(self):
            self.cluster.lost(self, "a newer segment exists")
            return
        rows, self.writing = self.writing, []
        if self.coordinator is None:
            self._begin()
        else:
            self.cluster.checks.flushed(self, rows)
            self.handle(ev.Flushed(seq=rows[-1].seq))
        if self.alive and not self.writing:
            self._take_rows()

    # ------------------------------------------------------------ events and commands

    def receive(self, envelope: Envelope) -> None:
        """An envelope from a member arrived."""
        if self.alive and self.coordinator is not None:
            self.handle(ev.Received(envelope=envelope))

    def handle(self, event: ev.Event) -> None:
        """Step the coordinator and carry its commands out."""
        if not self.alive or self.coordinator is None:
            return
        cluster, coordinator = self.cluster, self.coordinator
        if cluster.trace is not None and not isinstance(event, ev.Tick):
            cluster.note(f"{self.name} <- {_short(event)}")
        commands = coordinator.handle(event, self._now())
        for command in commands:
            match command:
                case ev.Append(rows=rows):
                    cluster.checks.appended(self, rows)
                    self._append(rows)
                case ev.Send(batch=batch):
                    cluster.checks.sent(self, batch)
                    cluster.send(self, batch)
                case ev.Say(text=text, level=level):
                    cluster.note(f"{self.name} {level}: {text}")
                case ev.Spawn(name=name, why=why):
                    cluster.spawn_soon(name, why)
                case ev.End(name=name, nonce=nonce, why=why):
                    cluster.end_process(name, nonce, why)
                case ev.Metric(row=row):
                    cluster.metric(row)
                case ev.Finish(reason=reason, detail=detail):
                    cluster.finish(self, reason, detail)
                case ev.RolledBack(versions=versions):
                    cluster.snapshots.set_aside(versions)
                case ev.Die(why=why):
                    cluster.lost(self, why)
                    return
        cluster.checks.controller(self)


def _short(event: ev.Event) -> str:
    if isinstance(event, ev.Received):
        envelope = event.envelope
        bodies = ", ".join(type(b).__name__ for b in envelope.bodies)
        return f"{envelope.name}.{envelope.incarnation} ({envelope.nonce}, obeys {envelope.term}): {bodies}"
    return str(event)[:200]
