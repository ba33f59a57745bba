"""A thousand seeds of kills, joins, hangs and moves for each kind of pipeline, on symbols.

    python -m benchmarks.swarm_seeds [--seeds 1000] [--again]   # goes on; keeps results/swarm_seeds.json

`routing` is `simulate_swarm()`: router, accumulator and rebalancer under lost messages and cuts. The others are
`simulate_brain()`: the controller with gradients after every step, updates delayed by one, DiLoCo and streaming inside
stages. Each seed asserts "once per stage", "never empty" and "progress resumes"; the modules say how. Seconds are of
this process, on one core.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from benchmarks.common import RESULTS, keep
from orchestrator.simulation.swarm import SwarmResult, simulate_swarm
from orchestrator.simulation.swarm_brain import simulate_brain

KINDS: dict[str, Callable[[int], SwarmResult]] = {
    "routing": simulate_swarm,
    "every step": lambda seed: simulate_brain(seed, rounds=False),
    "delayed": lambda seed: simulate_brain(seed, rounds=False, delayed=True),
    "diloco": lambda seed: simulate_brain(seed, rounds=True),
    "streaming": lambda seed: simulate_brain(seed, rounds=True, streaming=True),
}


def run_kind(kind: str, seeds: int) -> dict[str, object]:
    """All seeds of a kind; `broken` names those that broke a rule, with it."""
    began_s = time.process_time()
    counts: Counter[str] = Counter()
    broken: list[str] = []
    num_events, virtual_s = 0, 0.0
    for seed in range(seeds):
        result = KINDS[kind](seed)
        counts.update(result.counts)
        num_events, virtual_s = num_events + result.num_events, virtual_s + result.seconds
        if not result.ok:
            broken.append(f"seed {seed}: {result.problem}")
            print(f"{kind}, {broken[-1]}", flush=True)
    seconds = time.process_time() - began_s
    print(f"{kind}: {seeds} seeds, {len(broken)} broken, {num_events:,} events, {seconds:.0f} s", flush=True)
    return {
        "seeds": seeds,
        "broken": broken,
        "events": num_events,
        "virtual_hours": virtual_s / 3600,
        "seconds": seconds,
        "counts": dict(sorted(counts.items())),
    }


def main() -> int:
    """Every kind that has not been run with so many seeds; 1 if a rule was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--again", action="store_true", help="also kinds that were run before")
    options = parser.parse_args()
    found = _kept(RESULTS / "swarm_seeds.json")
    for kind in KINDS:
        known = found.get(kind, {})
        if options.again or known.get("seeds") != options.seeds or known.get("broken"):
            found[kind] = run_kind(kind, options.seeds)
            keep("swarm_seeds", {"kinds": found})
    return int(any(kind["broken"] for kind in found.values()))


def _kept(path: Path) -> dict[str, dict[str, object]]:
    if not path.exists():
        return {}
    kinds: dict[str, dict[str, object]] = json.loads(path.read_text())["kinds"]
    return kinds


if __name__ == "__main__":
    raise SystemExit(main())
