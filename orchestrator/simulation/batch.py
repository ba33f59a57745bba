"""Many seeds on all cores, with results that are kept: interrupt and go on at will.

Every seed that counts has at least `MIN_EVENTS` events and `MIN_FAULTS` faults: one whose run ended before is run again
with more samples and other luck, always in the same way, so that a seed is one history for ever.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from orchestrator.simulation.run import SimulationResult, simulate
from orchestrator.simulation.scenario import Scenario, brief

MIN_EVENTS, MIN_FAULTS, MAX_TRIES = 500, 5, 8
SEEDS_A_BLOCK = 50
PACKAGES = ("orchestrator", "workers", "strategies", "faults")


def scenario_of(seed: int, attempt: int, *, members: int | None = None) -> Scenario:
    """What a seed is like at the n-th attempt: the first as drawn, each further one longer and with other luck."""
    first = brief(seed, members=members)
    if attempt == 0:
        return first
    longer = brief(seed, members=members, samples=first.plan.total_samples * 2**attempt)
    return replace(
        longer, seed=seed + (attempt << 40), fault_s=first.fault_s * 2**attempt, drain_s=first.drain_s * 2**attempt,
        max_faults=first.max_faults * 2**attempt if first.max_faults is not None else None,
    )  # fmt: skip


def run_seed(seed: int, *, members: int | None = None, trace: bool = False) -> SimulationResult:
    """One seed, run again while it came to less than it should; `counts["attempts of the seed"]` says how often."""
    for attempt in range(MAX_TRIES):
        result = simulate(seed, scenario=scenario_of(seed, attempt, members=members), trace=trace)
        if not result.ok or (result.num_events >= MIN_EVENTS and result.num_faults >= MIN_FAULTS):
            break
    result.counts["attempts of the seed"] = attempt + 1
    return result


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """What came of some consecutive seeds; `violations` are `(seed, invariant, problem)`.

    `least_events`, `least_faults`: of that one of them which had the fewest.
    """

    first: int
    num: int
    num_events: int
    num_faults: int
    least_events: int
    least_faults: int
    seconds: float
    counts: dict[str, int]
    violations: tuple[tuple[int, int, str], ...]

    def to_json(self) -> dict[str, Any]:
        """A line of the kept results."""
        return {name: getattr(self, name) for name in self.__slots__}


def run_block(first: int, num: int, members: int | None) -> Block:
    """Some seeds one after the other, in this process; `seconds` is its own time."""
    began_s = _cpu_s()
    counts: Counter[str] = Counter()
    events, faults = [], []
    violations = []
    with collected_at_the_end():
        for seed in range(first, first + num):
            result = run_seed(seed, members=members)
            events.append(result.num_events)
            faults.append(result.num_faults)
            counts.update(result.counts)
            if not result.ok:
                violations.append((seed, result.invariant, result.problem))
    return Block(
        first=first, num=num, num_events=sum(events), num_faults=sum(faults), least_events=min(events),
        least_faults=min(faults), seconds=_cpu_s() - began_s,
        counts=dict(sorted(counts.items())), violations=tuple(violations),
    )  # fmt: skip


@contextmanager
def collected_at_the_end() -> Iterator[None]:
    """No garbage collection meanwhile: it is a sixth of the time of a seed, and finds some hundred kilobytes in it."""
    enabled = gc.isenabled()
    gc.disable()
    gc.freeze()  # modules are not looked at either
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()
        if enabled:
            gc.enable()


def blocks_of(first: int, num: int) -> Iterator[tuple[int, int]]:
    """`(first, num)` of each block."""
    for start in range(first, first + num, SEEDS_A_BLOCK):
        yield start, min(SEEDS_A_BLOCK, first + num - start)


class KeptBlocks:
    """Results in a file, one line a block; those of another version of the code or other settings do not count."""

    def __init__(self, path: Path | None, *, members: int | None) -> None:
        """`path` None keeps nothing."""
        self.path, self.members, self.code = path, members, code_digest()

    def read(self) -> dict[tuple[int, int], Block]:
        """What is there, by `(first, num)`; a line that was cut off by a kill is left out."""
        if self.path is None or not self.path.exists():
            return {}
        out = {}
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if (row.pop("code"), row.pop("members")) == (self.code, self.members):
                row["violations"] = tuple(tuple(violation) for violation in row["violations"])
                out[row["first"], row["num"]] = Block(**row)
        return out

    def add(self, block: Block) -> None:
        """Append a block."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps({"code": self.code, "members": self.members, **block.to_json()})
            append_line(self.path, line)


def run_batch(
    first: int, num: int, *, members: int | None = None, workers: int | None = None, keep: Path | None = None
) -> Iterator[Block]:
    """All seeds from `first` on, block by block as they are done; kept ones come at once."""
    kept = KeptBlocks(keep, members=members)
    there = kept.read()
    missing = []
    for block in blocks_of(first, num):
        if block in there:
            yield there[block]
        else:
            missing.append(block)
    workers = workers or len(os.sched_getaffinity(0))
    if workers == 1:
        for start, size in missing:
            yield _keep(kept, run_block(start, size, members))
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures: Iterable[Future[Block]] = [pool.submit(run_block, start, size, members) for start, size in missing]
        try:
            for future in as_completed(futures):
                yield _keep(kept, future.result())
        finally:
            pool.shutdown(cancel_futures=True)


def _keep(kept: KeptBlocks, block: Block) -> Block:
    kept.add(block)
    return block


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, on a line of its own also where a kill has cut off the one before."""
    with path.open("ab+") as file:
        file.seek(max(file.tell() - 1, 0))
        torn = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * torn + line.encode() + b"\n")


def code_digest() -> str:
    """Digest of the code that a simulation runs: results of other code say nothing about this one."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.blake2b(digest_size=8)
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _cpu_s() -> float:
    times = os.times()
    return times.user + times.system
