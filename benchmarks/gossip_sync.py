"""Whether an exchange of a pair takes longer the more members there are: `python -m benchmarks.gossip_sync`, a minute.

Production pair machines, pair book and Arrow Flight transports on real sockets, one thread a member; every member's
uplink carries 50 Mbit/s, and every fetch of a payload takes a round trip. Members of a pair talk to each other as in a
run (`workers/pair_mail.py`); one controller gives out rosters and hears reports, one after the other. Payloads are
1 MB that stand for a model: training would compete for the cores of this one machine, as members on machines of their
own do not, and so pairs begin a little after one another. Then the same in virtual time, up to 1,024 members; and what
a member costs that dies after its send point.

Every size that is measured is kept in `results/gossip_sync.json` at once, and not measured again (`--fresh`).
Goals: under 5 % from 4 members to 16, and to 1,024 simulated; a dead member costs its partner one pair timeout, and
nobody else anything.
"""

from __future__ import annotations

import argparse
import json
import queue
import secrets
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, keep
from benchmarks.overlap import Link, LinkedTransport
from faults.virtual import LinkQuality
from orchestrator import pairing
from orchestrator.simulation.pair_scenario import PairScenario
from orchestrator.simulation.pairs import simulate_pairs
from strategies.topology import random_groups
from workers import pair as p
from workers.digest import digest
from workers.pair_mail import Heard, PairMail
from workers.records import MemberId
from workers.store import BlobStore
from workers.transport.errors import TransportError
from workers.transport.flight import FlightTransport

PACED, SIMULATED = (4, 8, 16), (4, 8, 16, 64, 256, 1024)
BYTES_PER_S, PAYLOAD_BYTES = 50e6 / 8, 1_000_000
ROUNDS, APART_S, LIMIT = 6, 0.02, 0.05
NAME = "gossip_sync"


class Member:
    """One member: its machine on a thread of its own, its transport, and how long its exchanges took."""

    def __init__(self, world: World, number: int) -> None:
        """Nothing runs before `start`."""
        self.world = world
        self.me = MemberId(name=f"m{number:04d}", incarnation=1)
        self.machine = p.PairMachine(me=self.me)
        self.events: queue.SimpleQueue[p.Event | Heard | None] = queue.SimpleQueue()
        self.store = BlobStore()
        self.transport = FlightTransport(self.store, host="127.0.0.1", token=world.token, num_connections=1)
        self.mail = PairMail(
            store=self.store, transport=self.transport, do=self._beside,
            retry_s=p.PAIR_TIMEOUT_S / p.RETRIES_PER_TIMEOUT, waits=True,
        )  # fmt: skip
        self.linked: Any = None
        self.address = ""
        self.timers: list[tuple[float, p.Event]] = []
        self.began_s = 0.0
        self.took: list[tuple[float, bool]] = []
        self.thread = threading.Thread(target=self._live, name=self.me.name)

    def begin(self, pair: p.PairId) -> None:
        """It is at its send point."""
        payload = np.full(PAYLOAD_BYTES, pair.round_ % 251, dtype=np.uint8)
        named = self.store.put(f"gossip/{pair.round_}", payload)
        self.began_s = time.monotonic()
        since = 4 * len(self.took)
        self.events.put(p.Begin(pair=pair, since=since, upto=since + 4, digest=named))

    def die(self) -> None:
        """As a process that is gone: it says nothing more, and nobody can fetch from it."""
        self.events.put(None)
        self.thread.join()
        self.mail.close()
        self.transport.stop()

    def _beside(self, job: Callable[[], Heard | None]) -> None:
        def done() -> None:
            if (heard := job()) is not None:
                self.events.put(heard)

        self.world.pool.submit(done)

    def _listen(self) -> None:
        talks = self.machine.state in ("collecting", "ready") and self.machine.pair is not None
        pairs = (self.machine.pair,) if talks else ()
        self.mail.listen(self.me, pairs, lambda member: self.world.members[member.name].address)  # type: ignore[arg-type]

    def _live(self) -> None:
        while True:
            until = min((at for at, _ in self.timers), default=time.monotonic() + 60.0)
            try:
                event = self.events.get(timeout=max(until - time.monotonic(), 0.0))
            except queue.Empty:
                event = min(self.timers, key=lambda entry: entry[0])[1]
                self.timers.remove((until, event))
            if event is None:
                return
            said = self.mail.hear(event) if isinstance(event, Heard) else event
            for command in self.machine.handle(said) if said is not None else ():
                self._obey(command)
            self._listen()

    def _obey(self, command: p.Command) -> None:
        match command:
            case p.Say(to=to, message=message):
                self.mail.say(to, message)
            case p.Tell(message=message):
                self.world.post(lambda: self.world.told(message))
            case p.FetchPayload(offer=offer):
                self.world.pool.submit(self._fetch, offer)
            case p.KeepTime(pair=pair):
                now, part_s = time.monotonic(), p.PAIR_TIMEOUT_S / p.RETRIES_PER_TIMEOUT
                self.timers = [(now + p.PAIR_TIMEOUT_S, p.TimedOut(pair=pair))]
                self.timers += [(now + i * part_s, p.RetryDue()) for i in range(1, p.RETRIES_PER_TIMEOUT)]
            case p.Apply() | p.Skip():
                self.timers.clear()
                self.took.append((time.monotonic() - self.began_s, isinstance(command, p.Apply)))

    def _fetch(self, offer: p.Offer) -> None:
        peer = self.world.members[offer.sender.name].address
        try:
            (blob,) = self.linked.fetch(
                peer, [f"gossip/{offer.pair.round_}"], timeout_s=5.0, max_bytes=PAYLOAD_BYTES
            )  # fmt: skip
            assert digest(blob.data) == offer.digest
        except TransportError:
            self.events.put(p.FetchFailed(pair=offer.pair, member=offer.sender))
            return
        self.events.put(p.Fetched(pair=offer.pair, member=offer.sender))


class World:
    """Members and the controller, which handles one message after the other on its thread."""

    def __init__(self, num: int) -> None:
        """Starts everything; `close` ends it."""
        self.token = secrets.token_hex(16)
        self.jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.pool = ThreadPoolExecutor(4 * num)  # for each member: what it listens to, and what it fetches
        self.book = pairing.PairBook(topology=lambda names, round_: random_groups(names, seed=1, round_=round_))
        self.members = {member.me.name: member for member in (Member(self, number) for number in range(num))}
        for member in self.members.values():
            member.transport.start()
            member.address = member.transport.address
        links = {member.transport.address: Link(BYTES_PER_S) for member in self.members.values()}
        for member in self.members.values():
            member.linked = LinkedTransport(member.transport, links)
            member.thread.start()
            self.book.join(member.me)
        self.thread = threading.Thread(target=self._control, name="controller")
        self.thread.start()

    def post(self, job: Callable[[], None]) -> None:
        """The controller does this when its turn comes."""
        self.jobs.put(job)

    def _control(self) -> None:
        while (job := self.jobs.get()) is not None:
            job()

    def told(self, message: p.Report | p.Query) -> None:
        """A member reports, or asks."""
        book = self.book
        self.carry_out(book.report(message) if isinstance(message, p.Report) else book.query(message))

    def carry_out(self, commands: list[pairing.Command]) -> list[p.PairId]:
        """What the book says to members; returns the pairs of a new round."""
        pairs: list[p.PairId] = []
        for command in commands:
            if isinstance(command, pairing.Send):
                self.members[command.to.name].events.put(command.message)
            elif isinstance(command, pairing.Publish):
                pairs += command.rounds[0][1]
        return pairs

    def round(self, *, dies: bool = False) -> list[Member]:
        """Everybody meets its partner once; returns who did. `dies`: one does right after its send point."""
        while any(member.machine.is_waiting for member in self.members.values()):  # for the record of the last one
            time.sleep(0.005)
        published: queue.SimpleQueue[list[p.PairId]] = queue.SimpleQueue()
        self.post(lambda: published.put(self.carry_out(self.book.next_round())))
        pairs = published.get(timeout=30.0)
        met = [self.members[member.name] for pair in pairs for member in pair.members]
        before = {member.me: len(member.took) for member in met}
        for number, pair in enumerate(pairs):
            for member in pair.members:
                self.members[member.name].begin(pair)
            if dies and number == 0:
                met.remove(self.members[pair.leader.name])
                self.members[pair.leader.name].die()
            time.sleep(APART_S)
        until = time.monotonic() + 3 * p.PAIR_TIMEOUT_S + len(pairs) * APART_S
        while any(len(member.took) == before[member.me] for member in met):
            assert time.monotonic() < until, "an exchange has no end"
            time.sleep(0.005)
        return met

    def close(self) -> None:
        """End all threads and transports."""
        for member in self.members.values():
            if member.thread.is_alive():
                member.die()
        self.jobs.put(None)
        self.thread.join()
        self.pool.shutdown()


def paced(num: int) -> dict[str, Any]:
    """Seconds of an exchange among so many members, a first round aside; and with one that dies."""
    world = World(num)
    try:
        for _ in range(1 + ROUNDS):
            world.round()
        took = [one for member in world.members.values() for one in member.took[1:]]
        assert all(applied for _, applied in took), "nobody died, and somebody skipped"
        met = world.round(dies=True)
        last = sorted(member.took[-1] for member in met)
    finally:
        world.close()
    seconds = [s for s, _ in took]
    return {
        "median_s": statistics.median(seconds),
        "slowest_s": max(seconds),
        "dead_partner_s": max(s for s, applied in last if not applied),
        "others_s": max(s for s, applied in last if applied),
        "num_skipped": sum(not applied for _, applied in last),
    }


def simulated(num: int) -> dict[str, Any]:
    """The same in virtual time, everybody at once, with a controller that handles one message at a time."""
    scenario = PairScenario(
        seed=1, num_members=num, rounds=2, drain_rounds=1, link=LinkQuality(min_delay_s=0.02, max_delay_s=0.02),
        fault_gap_s=None, jitter_s=0.0, line_bytes_per_s=BYTES_PER_S, payload_bytes=PAYLOAD_BYTES,
    )  # fmt: skip
    result = simulate_pairs(scenario)
    assert result.ok, result.problem
    return {"median_s": result.sync_s()}


def slope(found: dict[str, dict[str, Any]]) -> float:
    """How much longer the slowest size takes than the smallest one."""
    smallest = found[min(found, key=int)]["median_s"]
    return float(max(one["median_s"] for one in found.values()) / smallest - 1.0)


def report(result: dict[str, dict[str, dict[str, Any]]]) -> bool:
    """Print the table; whether all goals are met."""
    met = True
    for what in ("paced", "simulated"):
        for num, one in sorted(result[what].items(), key=lambda entry: int(entry[0])):
            print(f"{what:9} {num:>5} members: {', '.join(f'{key} {value:.4g}' for key, value in one.items())}")
        found = slope(result[what])
        print(f"{what}: slope {100 * found:+.1f} % (goal: under {100 * LIMIT:.0f} %)")
        met &= found < LIMIT
    for one in result["paced"].values():
        met &= one["dead_partner_s"] <= p.PAIR_TIMEOUT_S + 0.1 and one["num_skipped"] == 1
        met &= one["others_s"] <= one["slowest_s"] * (1 + LIMIT)
    return met


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing, keep and report it; 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="measure what was measured before, too")
    options = parser.parse_args(arguments)
    path, kinds = RESULTS / f"{NAME}.json", {"paced": (PACED, paced), "simulated": (SIMULATED, simulated)}
    known = json.loads(path.read_text()) if path.exists() and not options.fresh else {}
    result: dict[str, dict[str, dict[str, Any]]] = {kind: dict(known.get(kind, {})) for kind in kinds}
    for kind, (sizes, measure) in kinds.items():
        for num in sizes:
            if str(num) not in result[kind]:
                result[kind][str(num)] = measure(num)
                keep(NAME, result)
    return int(not report(result))


if __name__ == "__main__":
    sys.exit(main())
