"""One simulated run: faults for a while, then a drain in which everything must finish; the result, or the violation."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field

from orchestrator.run_state import JournalContradiction
from orchestrator.simulation.cluster import Cluster
from orchestrator.simulation.faults import Chaos
from orchestrator.simulation.scenario import Scenario, draw
from orchestrator.simulation.symbols import Violation, must


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulationResult:
    """What came of a seed. `problem` is empty if all invariants held; `digest` is equal for equal runs.

    `seconds` is virtual time; `counts` are faults by kind, commits, discards, steps and so on; `trace` is filled only
    if it was asked for.
    """

    seed: int
    problem: str
    invariant: int
    num_events: int
    num_faults: int
    seconds: float
    digest: str
    counts: dict[str, int]
    trace: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether all invariants held."""
        return not self.problem


def simulate(seed: int, *, scenario: Scenario | None = None, trace: bool = False) -> SimulationResult:
    """Run one seed to its end. Prints nothing; whatever goes wrong is in the result."""
    scenario = scenario or draw(seed)
    lines: list[str] | None = [] if trace else None
    cluster = Cluster(scenario, trace=lines)
    problem, invariant = "", 0
    try:
        drive(cluster)
    except Violation as violation:
        problem, invariant = violation.story, violation.number
    except (
        JournalContradiction,
        AssertionError,
        KeyError,
        ValueError,
        IndexError,
        TypeError,
        AttributeError,
        NameError,
    ) as error:
        problem = "".join(traceback.format_exception(error)[-3:]).strip() or repr(error)
        invariant = 2 if isinstance(error, JournalContradiction) else 0
    if problem:
        cluster.note(f"VIOLATION of invariant {invariant}: {problem}")
    return _result(cluster, problem, invariant)


def drive(cluster: Cluster) -> None:
    """Faults, then the drain."""
    scenario, time = cluster.scenario, cluster.time
    cluster.start()
    chaos = Chaos(cluster, scenario.rates) if scenario.rates is not None else None
    check_every = scenario.check_every
    while chaos is not None and not chaos.is_over() and not cluster.finished:
        must(time.run_next(), 11, "nothing is left to happen")
        if time.num_events % check_every == 0:
            cluster.checks.everything()
    if chaos is not None:
        chaos.heal_all()
    deadline_s = time.now + scenario.drain_s
    while not cluster.finished:
        must(time.run_next(), 11, "nothing is left to happen")
        if time.num_events % check_every == 0:
            cluster.checks.everything()
        if time.now > deadline_s:
            must(False, 11, f"not finished {scenario.drain_s:g} s after faults stopped: {_standing(cluster)}")
    if not cluster.gave_up:
        cluster.checks.end()


def _standing(cluster: Cluster) -> str:
    out = []
    for controller in cluster.controllers:
        c = controller.coordinator
        if c is not None:
            open_ = [(e.open.state, e.open.attempt) if e.open else None for e in c.exchanges]
            out.append(
                f"{controller.name} heads {[h.version.n for h in c.state.heads]} open {open_} "
                f"accounted {c.state.samples_accounted()}/{c.plan.total_samples} free {c.state.free} "
                f"roll {[(str(m), p.status) for m, p in c.roll.processes.items()]} "
                f"live {[str(m) for m in c.state.live()]}"
            )
    for island in cluster.processes():
        m = island.machine
        states = [(s.n, s.watermark, str(s.pending.id) if s.pending else None) for s in m.fragments]
        out.append(f"{m.nonce} {m.incarnation} waiting {m.waiting} consumed {m.consumed}/{m.num_leased()} {states}")
    return "; ".join(out)


def _result(cluster: Cluster, problem: str, invariant: int) -> SimulationResult:
    counts = cluster.counts
    counts["steps"] = cluster.steps
    counts["samples lost"] = max((c.coordinator.state.lost for c in cluster.controllers if c.coordinator), default=0)
    counts["commits"] = len(cluster.exchange_rows)
    counts["rows"] = len(cluster.checks.rows)
    counts["lost messages"] = cluster.network.num_lost
    counts["doubled messages"] = cluster.network.num_doubled
    counts["attempts"] = sum(row["attempts"] for row in cluster.exchange_rows)
    return SimulationResult(
        seed=cluster.scenario.seed, problem=problem, invariant=invariant, num_events=cluster.time.num_events,
        num_faults=counts["faults"], seconds=cluster.time.now,
        digest=f"{cluster.checks.book.last_hash}/{cluster.time.num_events}/{cluster.time.now!r}",
        counts=dict(sorted(counts.items())), trace=tuple(cluster.trace or ()),
    )  # fmt: skip
