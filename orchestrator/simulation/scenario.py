"""What one simulated run is like: drawn from its seed, or given."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from faults.virtual import LinkQuality
from orchestrator.coordinator import RunPlan
from orchestrator.settings import ExchangeConfig
from strategies.config import StrategyConfig
from strategies.schedule import overlap_steps_at
from workers.live_settings import with_changes
from workers.records import Scalar
from workers.send_schedule import SendSchedule

Changes = tuple[tuple[str, Scalar], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultRates:
    """Relative frequencies of the faults, and the mean time between two of them in seconds."""

    mean_gap_s: float
    kill: float = 3.0
    kill_holders: float = 0.7
    kill_all: float = 0.3
    false_verdict: float = 1.0
    hang: float = 1.5
    stick: float = 0.7
    slow: float = 0.7
    cut: float = 2.0
    cut_pair: float = 2.0
    controller_crash: float = 1.5
    crash_at_append: float = 1.5
    zombie: float = 0.7
    journal_full: float = 0.5
    sync_error: float = 0.3
    nan: float = 0.7
    lie: float = 0.7
    corrupt_anchor: float = 0.4
    wrong_digest: float = 0.6
    leave: float = 0.0  # not a fault: members that are asked to leave, and come back
    change_settings: float = 0.0  # nor are these: what the user asks of a run
    pause: float = 0.0
    rollback: float = 0.0
    distort: float = 0.0  # a member that reduces wrongly for others, for a while: only with robust.verify


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """Everything that a simulated run depends on, besides the order of random draws. Times in virtual seconds.

    Faults begin after `calm_commits` commits (or as many seconds), and stop `fault_s` later, or after `max_faults` of
    them. `restart_s`: longest time without a controller. `one_log`: members share one copy of the journal (only where
    nothing fails).
    """

    seed: int
    num_members: int
    num_nodes: int
    num_chunks: tuple[int, ...]
    plan: RunPlan
    batch_sizes: tuple[int, ...]
    step_s: tuple[float, ...]
    overlap: bool
    inline: bool
    feedback: bool
    devices: int
    link: LinkQuality
    fault_s: float
    rates: FaultRates | None
    drain_s: float
    heartbeat_s: float = 0.25
    tick_s: float = 0.2
    timeout_s: float = 1.5
    wait_s: float = 1.0
    flush_s: float = 0.01
    spawn_s: float = 1.0
    restart_s: float = 1.5
    max_faults: int | None = None
    calm_commits: int = 0
    standby: int = 0
    clock_skew: float = 0.1
    check_every: int = 100
    one_log: bool = False

    def schedule(self, own_steps: Callable[[int], int], values_of: Callable[[int], Changes]) -> SendSchedule:
        """When a process of this run sends what.

        Args:
            own_steps: its share of a round of so many steps.
            values_of: what was changed of the settings and holds for a fragment's next transition.
        """
        plan, strategy = self.plan, self.plan.strategy

        def steps_at(fragment: int, progress: float) -> int:
            values = values_of(fragment)
            now = with_changes(strategy, "strategy", values) if values else strategy
            return own_steps(plan.inner_steps_at(progress, now))

        def overlap_at(fragment: int, progress: float) -> int:
            now = with_changes(strategy, "strategy", values_of(fragment))
            overlap = now.inner_steps if now.delay else now.overlap_steps
            return overlap_steps_at(overlap, plan.inner_steps_at(progress, now), whole_round=now.delay > 0)

        return SendSchedule(
            num_fragments=len(self.num_chunks),
            staggered=strategy.name not in ("diloco", "async-dn"),
            inner_steps=steps_at,
            overlap_at=overlap_at,
            own_pace=strategy.own_pace,
        )


def draw_strategy(seed: int, *, fragments: int, steps: int) -> StrategyConfig:
    """DiLoCo, or one of those that train while fragments are under way, with offsets (a draw of its own)."""
    rng = random.Random(f"strategy 0 {seed}")
    if rng.random() < 0.5:
        other = random.Random(
            f"strategy 1 {seed}"
        )  # later strategies have a draw of their own: others keep their seeds
        chance = other.random()
        if chance < 0.35:
            return StrategyConfig(
                name="async-dn", inner_steps=steps, num_fragments=min(fragments, 2) if steps > 1 else 1
            )
        if chance < 0.6:
            even = max(steps // fragments, 1) * fragments
            return StrategyConfig(
                name="decoupled", inner_steps=even, num_fragments=fragments, overlap_steps=other.randrange(even),
                merge_alpha=other.choice((0.0, 0.5)), grace_share=other.choice((0.0, 0.5, 1.0)),
            )  # fmt: skip
        return StrategyConfig(inner_steps=steps, num_fragments=fragments)
    even = max(steps // fragments, 1) * fragments  # a period that divides
    name = rng.choice(("streaming", "streaming", "delayed", "eager"))
    if name == "streaming":
        return StrategyConfig(
            name="streaming", inner_steps=even, num_fragments=fragments, overlap_steps=rng.randrange(even),
            merge_alpha=rng.choice((0.0, 0.5)),
        )  # fmt: skip
    return StrategyConfig(name="eager" if name == "eager" else "delayed", inner_steps=even, num_fragments=fragments)


def draw(seed: int, *, members: int | None = None, faults: bool = True, samples: int | None = None) -> Scenario:
    """The scenario of a seed; what is given is not drawn."""
    rng = random.Random(seed)
    num = members or rng.choice((1, 2, 2, 3, 3, 3, 4, 4, 5, 6))
    fragments = rng.choice((1, 1, 2, 2, 3))
    steps = rng.choice((1, 2, 3, 4))
    batch_sizes = tuple(rng.choice((1, 2, 2, 3)) for _ in range(num))
    total = samples or rng.randint(25, 60) * num
    step_s = rng.choice((0.02, 0.05, 0.1))
    exchange = ExchangeConfig(
        quorum=rng.choice((0.3, 0.5, 0.5, 0.7, 1.0)),
        min_members=None,
        grace_s=rng.choice((0.0, 0.1, 0.5)),
        progress_timeout_s=rng.choice((0.8, 1.5, 3.0)),
        copies=rng.choice((1, 2, 2, 2, 3)),
        staleness_limit=rng.choice((2, 4, 16)),
        bound_rounds=rng.choice((1.0, 2.0, 4.0)),
        wait_s=rng.choice((0.0, 0.3, 1.0)),
        heartbeat_s=0.25,
        suspect_s=rng.choice((0.8, 1.5)),
        limbo_s=rng.choice((3.0, 6.0)),
    )
    plan = RunPlan(
        run_id="sim", islands=tuple(f"island-{i}" for i in range(num)), total_samples=total, seq_len=8,
        exchange=exchange, strategy=draw_strategy(seed, fragments=fragments, steps=steps),
        eval_every=rng.choice((0.2, 0.5, 2.0)), start_timeout_s=rng.choice((1.0, 4.0)),
        snapshot_every_s=rng.choice((1.0, 5.0, 1e9)), replace_dead=True, max_restarts=1_000_000,
        max_refusals=1_000_000, max_early_deaths=None, backoff_s=0.0,
    )  # fmt: skip
    lossy = faults and rng.random() < 0.7
    link = LinkQuality(
        min_delay_s=0.001, max_delay_s=rng.choice((0.005, 0.02, 0.1)),
        loss=rng.choice((0.0, 0.02, 0.1)) if lossy else 0.0, duplicate=rng.choice((0.0, 0.05)) if lossy else 0.0,
        straggle=rng.choice((0.0, 0.02, 0.05)) if lossy else 0.0, straggle_s=rng.choice((0.3, 2.0)),
    )  # fmt: skip
    rates = FaultRates(mean_gap_s=rng.choice((0.15, 0.3, 0.6))) if faults else None
    drawn = Scenario(
        seed=seed, num_members=num, num_nodes=rng.choice((1, 2, num)),
        num_chunks=tuple(rng.choice((1, 2, 3)) for _ in range(fragments)), plan=plan, batch_sizes=batch_sizes,
        step_s=tuple(step_s * rng.choice((1.0, 1.0, 1.0, 1.5, 3.0)) for _ in range(num)),
        overlap=rng.random() < 0.3, inline=rng.random() < 0.15, 
        feedback=rng.random() < 0.6, devices=rng.choice((1, 2)), link=link,
        fault_s=rng.choice((3.0, 6.0)), rates=rates, drain_s=90.0, wait_s=exchange.wait_s,
        timeout_s=rng.choice((0.5, 1.5)), clock_skew=0.1 if faults else 0.0,
    )  # fmt: skip
    load: Literal["equal", "by_speed"] = rng.choice(("equal", "by_speed"))
    shared = plan.strategy.name in ("diloco", "async-dn")
    return replace(drawn, plan=replace(plan, load=load if shared else "equal"))


def brief(seed: int, *, members: int | None = None, samples: int | None = None) -> Scenario:
    """The same kinds of runs and faults in less: a run that has just enough rounds for its faults to hit.

    Processes and controllers are back sooner, and the lost are given up sooner, so that there are commits between
    faults; these begin once the run has begun, and stop before most of it is a drain that nothing disturbs. A seed in
    fifty is as long as `draw` has it; a few have many members.
    """
    rng = random.Random(f"brief {seed}")
    if members is None and seed % 50 == 7:
        return draw(seed, samples=samples)
    crowd = {811: 100, 61: 24, 561: 24}.get(seed % 1000)
    long = draw(seed, members=members or crowd)
    assert long.rates is not None
    num = long.num_members
    total = rng.randint(14, 24) + (12 if num < 3 else num) if num < 20 else 4 * num
    calm = rng.choice((0, 1, 2)) * (2 if long.plan.strategy.own_pace else 1)
    strategy = long.plan.strategy
    if num >= 20 and strategy.own_pace:  # each push is a version that everybody fetches
        strategy = StrategyConfig(inner_steps=strategy.inner_steps)
    exchange = long.plan.exchange.model_copy(update={"limbo_s": rng.choice((1.5, 2.5)), "suspect_s": 0.8})
    return replace(
        long,
        plan=replace(long.plan, total_samples=samples or total, strategy=strategy, exchange=exchange),
        calm_commits=calm, fault_s=rng.choice((3.0, 5.0)), max_faults=rng.randint(5, 8),
        rates=replace(long.rates, mean_gap_s=rng.choice((0.05, 0.1, 0.15))),
        spawn_s=0.3, restart_s=0.4, standby=rng.choice((0, 0, 1, 2)),
    )  # fmt: skip


def crowd(members: int, *, rounds: int = 3, seed: int = 0) -> Scenario:
    """Many members, each alone on its node, over slow links, that train for some rounds without faults: what it costs.

    Rounds of eight steps of 1 to 1.5 s; heartbeats every 5 s, since those of ten thousand are 2,000 messages a second
    then; a tick a second, which is as often as the controller looks at ten thousand members.
    """
    rng = random.Random(f"crowd {seed}")
    exchange = ExchangeConfig(
        heartbeat_s=5.0, suspect_s=20.0, limbo_s=120.0, grace_s=2.0, wait_s=60.0, progress_timeout_s=30.0
    )
    plan = RunPlan(
        run_id="sim", islands=tuple(f"island-{i:05d}" for i in range(members)), total_samples=8 * members * rounds,
        seq_len=8, exchange=exchange, strategy=StrategyConfig(inner_steps=8), eval_every=0.5, start_timeout_s=60.0,
        snapshot_every_s=1e9, replace_dead=True, max_restarts=10,
    )  # fmt: skip
    return Scenario(
        seed=seed, num_members=members, num_nodes=members, num_chunks=(8,), plan=plan, batch_sizes=(1,) * members,
        step_s=tuple(rng.uniform(1.0, 1.5) for _ in range(members)), overlap=False, inline=False, feedback=True,
        devices=1, link=LinkQuality(min_delay_s=0.02, max_delay_s=0.2), fault_s=0.0, rates=None, drain_s=600.0,
        heartbeat_s=exchange.heartbeat_s, tick_s=1.0, timeout_s=10.0, wait_s=exchange.wait_s, clock_skew=0.01,
        check_every=100 * members, one_log=True,
    )  # fmt: skip
