"""The simulator: events a second with few and with a hundred members, and what ten thousand cost the controller.

    python -m benchmarks.simulator [--seeds 400] [--members 10000]

Times are those of this process (CPU), so that other load on the machine changes them less. Of the large run without
faults, `crowd` in `orchestrator/simulation/scenario.py`, the time inside `Coordinator.handle` counts from the first
commit on, divided by members and commits: all messages that members send for an exchange, their heartbeats (one in
5 s) and the controller's ticks; journal and transport are the shell's.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections import Counter
from unittest import mock

from benchmarks.common import keep
from orchestrator import events as ev
from orchestrator.coordinator import Coordinator
from orchestrator.simulation.batch import run_block
from orchestrator.simulation.run import simulate
from orchestrator.simulation.scenario import crowd, draw

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


def many(members: int) -> dict[str, object]:
    """A run without faults in which only the controller's time is taken."""
    spent_s, calls = Counter[str](), Counter[str]()
    handle = Coordinator.handle

    def timed(self: Coordinator, event: ev.Event, now: float) -> list[ev.Command]:
        began_s = time.thread_time()
        commands = handle(self, event, now)
        kind = "start" if not (self.state.heads and self.state.heads[0].version.n) else _kind(event)
        spent_s[kind] += time.thread_time() - began_s
        calls[kind] += 1
        return commands

    began_s = time.process_time()
    gc.disable()  # its pauses are those of the simulated members' objects, and would fall on whoever runs
    try:
        with mock.patch.object(Coordinator, "handle", timed):
            result = simulate(0, scenario=crowd(members))
    finally:
        gc.enable()
    assert result.ok, result.problem
    exchanges = result.counts["commits"] - 1
    per = {kind: 1e6 * seconds / members / exchanges for kind, seconds in spent_s.items() if kind != "start"}
    return {
        "members": members,
        "exchanges": exchanges,
        "events": result.num_events,
        "seconds": time.process_time() - began_s,
        "virtual_seconds": result.seconds,
        "microseconds_per_member_and_exchange": sum(per.values()),
        "of_these": per,
        "messages_per_member_and_exchange": {
            kind: num / members / exchanges for kind, num in calls.items() if kind != "start"
        },
        "start_microseconds_per_member": 1e6 * spent_s["start"] / members,
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
