"""The simulator: events a second with few and with a hundred members, and what ten thousand cost the controller.

    python -m benchmarks.simulator [--seeds 400] [--members 10000]

Times are those of this process (CPU), so that other load on the machine changes them less. The large run is `crowd` in
`orchestrator/simulation/scenario.py`, without faults: rounds of 8 steps of 1 to 1.5 s, so that an exchange comes every
10 to 15 s (`exchange_period_s`; rounds of a real run are longer), heartbeats every 5 s, a tick a second. Counted is all
time inside `Coordinator.handle` from the first commit on, whatever it was for: every message that members send, their
heartbeats between exchanges, the ticks, the rows of the journal with their hashes; divided by members and exchanges.
The shell's work (files, sockets) is not in it.

Two figures: the same events told once more to a fresh brain in a process of its own, as a controller has one
(`microseconds_per_member_and_exchange`; it must come to the same journal); and what they took among the simulated
members, whose objects displace those of the controller from the processor's caches between any two events.
"""

from __future__ import annotations

import argparse
import gc
import pickle
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self
from unittest import mock

from benchmarks.common import keep
from orchestrator import events as ev
from orchestrator.coordinator import Coordinator, RunPlan
from orchestrator.simulation.batch import run_block
from orchestrator.simulation.run import simulate
from orchestrator.simulation.scenario import crowd, draw
from workers.records import Row, Term

BOUNDS = {"events_per_s_100_members": 15_000, "microseconds_per_member_and_exchange": 100}


def small(seeds: int) -> dict[str, float]:
    """Ordinary seeds, and how long so many of them would take on two cores."""
    block = run_block(0, seeds, None)
    assert not block.violations, block.violations[0]
    seed_s = block.seconds / seeds
    return {
        "seeds": seeds,
        "events_per_s": block.num_events / block.seconds,
        "events_per_seed": block.num_events / seeds,
        "least_events": block.least_events,
        "least_faults": block.least_faults,
        "seconds_of_2000_seeds_on_two_cores": 2_000 * seed_s / 2,
        "minutes_of_100000_seeds_on_two_cores": 100_000 * seed_s / 2 / 60,
    }


def hundred() -> dict[str, float]:
    """A hundred members with faults of every kind, as `draw` has them; invariants as in every run."""
    began_s = time.process_time()
    result = simulate(1, scenario=draw(1, members=100))
    seconds = time.process_time() - began_s
    assert result.ok, result.problem
    return {"events": result.num_events, "faults": result.num_faults, "events_per_s": result.num_events / seconds}


class Recorder:
    """What a controller was told, in a file, and what its brain needed for it among the simulated members."""

    def __init__(self, file: Path) -> None:
        """`file`: written while it records."""
        self.path, self.file = file, file.open("wb")
        self.begun = False
        self.costs = Costs()
        self.last_hash = ""

    def __enter__(self) -> Self:
        """Coordinators made from now on are recorded; there must be one."""
        begin, handle = Coordinator.__init__, Coordinator.handle

        def began(brain: Coordinator, plan: RunPlan, rows: Sequence[Row], term: Term, *, now: float) -> None:
            assert not self.begun, "the controller was started again: nothing is to fail here"
            self.begun = True
            pickle.dump((plan, list(rows), term, now), self.file, protocol=5)
            begin(brain, plan, rows, term, now=now)

        def told(brain: Coordinator, event: ev.Event, now: float) -> list[ev.Command]:
            pickle.dump((event, now), self.file, protocol=5)
            commands = self.costs.of(partial(handle, brain, event, now), brain, event)
            self.last_hash = brain.rows[-1].hash
            return commands

        self._patches = [
            mock.patch.object(Coordinator, "__init__", began), mock.patch.object(Coordinator, "handle", told)
        ]  # fmt: skip
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        """No more."""
        self.file.close()
        for patch in self._patches:
            patch.stop()

    def again(self) -> Costs:
        """The same told to a fresh brain in a process of its own, as controllers have one."""
        context = get_context("spawn")
        with context.Pool(1) as pool:
            costs, last_hash = pool.apply(replayed, (self.path,))
        assert last_hash == self.last_hash, "it came to other decisions"
        return costs


def replayed(path: Path) -> tuple[Costs, str]:
    """Tell a fresh brain what a file says. Each event is decoded just before it is handled, as one from a socket is."""
    gc.disable()
    costs = Costs()
    with path.open("rb") as file:
        plan, rows, term, now = pickle.load(file)
        brain = Coordinator(plan, rows, term, now=now)
        while True:
            try:
                event, at_s = pickle.load(file)
            except EOFError:
                return costs, brain.rows[-1].hash
            costs.of(partial(brain.handle, event, at_s), brain, event)


class Costs:
    """Seconds and calls by kind of event, from the first commit on; the clock's own time is taken off."""

    def __init__(self) -> None:
        self.spent_s, self.calls = Counter[str](), Counter[str]()
        began_s = time.thread_time()
        for _ in range(10_000):
            time.thread_time()
        self.clock_s = (time.thread_time() - began_s) / 10_000

    def of(self, action: Callable[[], list[ev.Command]], brain: Coordinator, event: ev.Event) -> list[ev.Command]:
        """Carry out and count."""
        began_s = time.thread_time()
        commands = action()
        ended_s = time.thread_time()
        kind = "start" if not (brain.state.heads and brain.state.heads[0].version.n) else _kind(event)
        self.spent_s[kind] += ended_s - began_s - self.clock_s
        self.calls[kind] += 1
        return commands

    def per(self, num: int) -> dict[str, float]:
        """Microseconds by kind, divided."""
        return {kind: 1e6 * seconds / num for kind, seconds in self.spent_s.items() if kind != "start"}


def many(members: int) -> dict[str, object]:
    """A run without faults in which only the controller's time is taken."""
    began_s = time.process_time()
    gc.disable()  # its pauses are those of the simulated members' objects, and would fall on whoever runs
    try:
        with TemporaryDirectory(prefix="atoll-") as folder:
            with Recorder(Path(folder) / "told") as recorder:
                result = simulate(0, scenario=crowd(members))
            assert result.ok, result.problem
            alone = recorder.again()
    finally:
        gc.enable()
    exchanges = result.counts["commits"] - 1
    period_s = result.seconds / result.counts["commits"]
    per, beside = alone.per(members * exchanges), recorder.costs.per(members * exchanges)
    return {
        "members": members,
        "exchanges": exchanges,
        "exchange_period_s": period_s,
        "heartbeat_s": crowd(2).heartbeat_s,
        "events": result.num_events,
        "seconds": time.process_time() - began_s,
        "virtual_seconds": result.seconds,
        "microseconds_per_member_and_exchange": sum(per.values()),
        "of_these": per,
        "microseconds_per_heartbeat": per["Hello"] * members * exchanges / alone.calls["Hello"],
        "beside_the_simulated_members": sum(beside.values()),
        "messages_per_member_and_exchange": {
            kind: num / members / exchanges for kind, num in alone.calls.items() if kind != "start"
        },
        "start_microseconds_per_member": 1e6 * alone.spent_s["start"] / members,
    }


def _kind(event: ev.Event) -> str:
    if not isinstance(event, ev.Received):
        return type(event).__name__
    kinds = {type(body).__name__ for body in event.envelope.bodies}
    return "Hello" if kinds == {"Hello"} else "+".join(sorted(kinds - {"Hello"}))


def main() -> None:
    """All three, kept in `benchmarks/results/simulator.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=400)
    parser.add_argument("--members", type=int, default=10_000)
    options = parser.parse_args()
    found = {"small": small(options.seeds), "hundred": hundred(), "many": many(options.members)}
    keep("simulator", {"bounds": BOUNDS, **found})


if __name__ == "__main__":
    main()
