"""Kill an island's process from within, exactly at one point of an exchange.

An `Injection` is handed to the launcher and travels to the islands' processes, where it is put around the context that
an island is given: what the island posts, hears and fetches goes through a tap first. The code of the island knows
nothing of it. A kill is armed from outside (`arm`), fires once, the next time its member comes to its point, and leaves
a mark (`read_marks`), so that a test can tell that it fired.

The points, in the order in which a member comes to them:

    before_offer    its pieces are published, nobody heard of its offer
    offered         its offer was accepted and announced to all
    pulling         as a part owner, in the middle of fetching pieces
    reducing        as a part owner, its part is reduced and not reported
    committed       it was told of the commit and has not applied it

And, where members meet in pairs or groups:

    meeting         it has offered, and is in the middle of fetching what its partner offers
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

from strategies.fragments import gather
from workers.context import IslandContext
from workers.jobs import MemberStore
from workers.messages import Announce, Assign, Batch, Envelope, LeaseGrant, Offer, Reduced
from workers.pair import Report
from workers.pair_messages import PairTell
from workers.records import CommitRecord
from workers.transport.base import Blob, Transport

Point = Literal["before_offer", "offered", "pulling", "reducing", "committed"]
PairPoint = Literal["meeting"]
HURRY = "hurry"


def faults_dir(run_dir: Path) -> Path:
    """Where the marks of a run are."""
    return run_dir / "faults"


def arm(run_dir: Path, member: str, point: Point | PairPoint) -> None:
    """Kill `member` the next time it comes to `point`."""
    folder = faults_dir(run_dir)
    folder.mkdir(exist_ok=True)
    (folder / f"{member}-{point}.armed").touch()


def hurry(run_dir: Path) -> None:
    """End the pace of all islands: from now on they train as fast as they can."""
    faults_dir(run_dir).mkdir(exist_ok=True)
    (faults_dir(run_dir) / HURRY).touch()


def read_marks(run_dir: Path, suffix: str = "fired") -> dict[str, dict[str, Any]]:
    """What happened, by name: "fired" (`member-point`) or "start" (`member-incarnation`, see `Tap`)."""
    paths = sorted(faults_dir(run_dir).glob(f"*.{suffix}"))
    return {path.stem: json.loads(path.read_text()) for path in paths}


def read_anchors(run_dir: Path) -> dict[str, list[tuple[int, int, str]]]:
    """By `member-incarnation`: (fragment, version, digest) of the anchors in its memory at each of its offers."""
    return {
        path.stem: [
            (int(fragment), int(n), digest)
            for fragment, n, digest in (line.split() for line in path.read_text().splitlines())
        ]
        for path in sorted(faults_dir(run_dir).glob("*.anchors"))
    }


def read_met(run_dir: Path) -> dict[int, set[str]]:
    """Round -> members that said so far that their pair of it is committed, heard or not."""
    out: dict[int, set[str]] = {}
    for path in sorted(faults_dir(run_dir).glob("*.met")):
        for line in path.read_text().splitlines():
            round_, committed = line.split()
            if int(committed):
                out.setdefault(int(round_), set()).add(path.stem.rpartition("-")[0])
    return out


@dataclass(frozen=True, kw_only=True, slots=True)
class Injection:
    """What is done to each island of a run; every step takes `pace_s` seconds longer until `hurry`."""

    pace_s: float = 0.0

    def __call__(self, context: IslandContext) -> IslandContext:
        """The context with a tap on everything that goes in and out."""
        values = {field.name: getattr(context, field.name) for field in fields(context)}
        mark = faults_dir(context.spec.run_dir) / HURRY

        def pace() -> None:
            if not mark.exists():
                time.sleep(self.pace_s)

        return _TappedContext(Tap(context), {**values, "on_step": pace if self.pace_s else context.on_step})


class Tap:
    """Watches what goes in and out of one island, and kills its process at the armed points.

    It also notes how far an incarnation's parameters are from the anchor when it is given its first samples, in the
    mark `<member>-<incarnation>.start`: `displacement` (the largest absolute difference), `version`, and `pid`; with
    each offer the digest of the anchor that is in the island's memory then (`read_anchors`); and with each report of a
    pair what became of it (`read_met`), whether the controller hears it or not.
    """

    def __init__(self, context: IslandContext) -> None:
        """`context`: that of the island, before it is tapped."""
        self._name, self._store = context.spec.name, context.store
        self._folder = faults_dir(context.spec.run_dir)
        self._version, self._incarnation, self._noted = 0, 0, 0

    def posting(self, envelope: Envelope) -> None:
        """The island is about to say something to the controller."""
        for body in envelope.bodies:
            match body:
                case Offer():
                    self._version = body.base.n
                    self._note_anchors()
                    self._at("before_offer")
                case Reduced():
                    self._at("reducing")
                case PairTell(message=Report() as report):
                    self._note_met(report)
                case _:
                    pass

    def delivered(self, batch: Batch) -> None:
        """The controller said something; the island has not heard it yet."""
        self._incarnation = batch.incarnation or self._incarnation
        if any(isinstance(row.record, CommitRecord) for row in batch.rows):
            self._at("committed")
        for body in batch.bodies:
            match body:
                case Announce() if body.offer_by.name == self._name:
                    self._version = body.offer.base.n
                    self._at("offered")
                case Assign():
                    self._version = body.base.n
                case LeaseGrant(index=0) if self._noted != self._incarnation:  # said again while it trains already
                    self._note_start()
                case _:
                    pass

    def fetching(self, keys: Sequence[str], fetch: Callable[[], object]) -> None:
        """The island is about to fetch; a kill comes when the fetch is under way."""
        points: dict[str, Point | PairPoint] = {"piece": "pulling", "gossip": "meeting"}
        point = points.get(keys[0].partition("/")[0])
        if point is not None and self._armed(point).exists():
            threading.Thread(target=fetch, daemon=True).start()
            self._at(point, about=keys[0])

    def _armed(self, point: Point | PairPoint) -> Path:
        return self._folder / f"{self._name}-{point}.armed"

    def _at(self, point: Point | PairPoint, *, about: str = "") -> None:
        armed = self._armed(point)
        if not armed.exists():
            return
        mark = {
            "pid": os.getpid(),
            "incarnation": self._incarnation,
            "version": self._version,
            "at_s": time.monotonic(),
            "about": about,
        }
        armed.write_text(json.dumps(mark))
        armed.rename(armed.with_suffix(".fired"))
        os.kill(os.getpid(), signal.SIGKILL)

    def _note_start(self) -> None:
        replica = self._store.replica if isinstance(self._store, MemberStore) else None
        if replica is None:
            return
        self._noted = self._incarnation
        with replica.lock:
            distances = [
                float((part.anchor - gather(spec, replica.tensors)).abs().max())
                for spec, part in zip(replica.specs, replica.parts, strict=True)
            ]
            versions = [part.n for part in replica.parts]
        self._folder.mkdir(exist_ok=True)
        note = {"displacement": max(distances), "version": min(versions), "pid": os.getpid()}
        (self._folder / f"{self._name}-{self._incarnation}.start").write_text(json.dumps(note))

    def _note_met(self, report: Report) -> None:
        self._folder.mkdir(exist_ok=True)
        with (self._folder / f"{self._name}-{self._incarnation}.met").open("a") as file:
            file.write(f"{report.pair.round_} {int(report.committed)}\n")

    def _note_anchors(self) -> None:
        """Hash the anchors anew: not what the island remembers, but what lies in its memory."""
        replica = self._store.replica if isinstance(self._store, MemberStore) else None
        if replica is None:
            return
        self._folder.mkdir(exist_ok=True)
        with replica.lock, (self._folder / f"{self._name}-{self._incarnation}.anchors").open("a") as file:
            for fragment, part in enumerate(replica.parts):
                file.write(f"{fragment} {part.n} {replica.digest(fragment)}\n")


class _TappedTransport:
    """A transport whose fetches pass a tap."""

    def __init__(self, inner: Transport, tap: Tap) -> None:
        self._inner, self._tap = inner, tap

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def fetch(self, address: str, keys: Sequence[str], **how: Any) -> list[Blob]:
        """As the transport does."""
        if keys:
            self._tap.fetching(keys, lambda: self._inner.fetch(address, keys, **how))
        return self._inner.fetch(address, keys, **how)


class _TappedContext(IslandContext):
    """A context whose calls in both directions pass a tap."""

    def __init__(self, tap: Tap, values: dict[str, Any]) -> None:
        self._tap = tap
        post, transport = values["post"], values["transport"]

        def tapped(envelope: Envelope) -> None:
            tap.posting(envelope)
            post(envelope)

        wrapped = cast(Transport, _TappedTransport(transport, tap))
        super().__init__(**{**values, "post": tapped, "transport": wrapped})

    @property
    def deliver(self) -> Callable[[Batch], None] | None:
        """What the island hears by, behind the tap."""
        return self._deliver

    @deliver.setter
    def deliver(self, deliver: Callable[[Batch], None] | None) -> None:
        if deliver is None:
            self._deliver: Callable[[Batch], None] | None = None
            return
        heard = deliver

        def tapped(batch: Batch) -> None:
            self._tap.delivered(batch)
            heard(batch)

        self._deliver = tapped
