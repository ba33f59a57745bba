"""The production machines under random faults on a virtual network: invariants after every event, and mutants.

Every seed kills, cuts, delays, doubles and forgets; then the faults stop and the run must finish with every sample
accounted for. Each rule of the protocol is then taken out of the production code: the simulator must notice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest import mock

import pytest

from orchestrator.simulation.batch import collected_at_the_end, run_seed
from orchestrator.simulation.run import simulate
from orchestrator.simulation.scenario import FaultRates, draw
from workers.messages import ExchangeId
from workers.records import Term

SEEDS = (*range(40), 219, 5414, 9346, 22508)  # the last ones once failed
MUTANT_SEEDS = range(2000)

MUTANTS: dict[str, tuple[str, Callable[..., object]]] = {
    "C1 one copy is enough": (
        "orchestrator.exchange_rules.enough_copies",
        lambda holders, config, fleet: bool(list(holders)),
    ),
    "C2 every offer believes it was included": ("workers.member_rules.included", lambda record, offer: True),
    "C2 work under way is forgotten whatever the record says": (
        "workers.member_rules.aside_after",
        lambda aside, *, included: None,
    ),
    "C3 settle at once": ("orchestrator.lifecycle.may_settle", lambda member, exchanges: True),
    "C4 the samples of a suspect are given back": (
        "orchestrator.lifecycle.ended_members",
        lambda state, roll: [
            member
            for member, entry in state.members.items()
            if not entry.settled
            and (not entry.live or (member in roll.processes and roll.processes[member].status == "suspect"))
        ],
    ),
    "C5 exchange ids repeat": (
        "orchestrator.exchange_rules.make_exchange_id",
        lambda term, serial: ExchangeId(term=Term(lineage=0, number=0, controller=""), serial=serial),
    ),
    "C6 parts survive a new roster": ("orchestrator.exchange_rules.parts_after_roster_change", dict),
    "C7 partial samples are issued again": (
        "orchestrator.run_state.first_returned",
        lambda watermarks: min(watermarks, default=0),
    ),
    "C8 a residual does not wait for its record": (
        "workers.member_rules.residual_after",
        lambda residual, next_residual, *, included: next_residual,
    ),
    "C10 told before it is flushed": ("orchestrator.desk.may_tell", lambda decided, flushed: True),
}


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    with collected_at_the_end():
        yield


def test_no_seed_breaks_an_invariant() -> None:
    results = {seed: simulate(seed) for seed in SEEDS}
    assert [f"seed {s}: invariant {r.invariant}: {r.problem}" for s, r in results.items() if not r.ok] == []
    assert sum(result.num_faults for result in results.values()) >= 5 * len(SEEDS), "the faults did not fire"
    for rare in ("results held back", "steps with several exchanges under way"):
        assert sum(result.counts.get(rare, 0) for result in results.values()) > 50, f"no {rare}"


def test_a_seed_replays_exactly() -> None:
    first, second = simulate(7), simulate(7)
    assert (first.digest, first.num_events, first.counts) == (second.digest, second.num_events, second.counts)


@pytest.mark.parametrize("name", MUTANTS)
def test_taking_a_rule_out_is_noticed(name: str) -> None:
    target, without = MUTANTS[name]
    with mock.patch(target, without):
        assert any(not run_seed(seed).ok for seed in MUTANT_SEEDS), f"{target} can be taken out unnoticed"


def test_members_that_hang_are_ended_and_the_run_goes_on() -> None:
    """Only hangs and slow members: without the verdict on hangs the run would never finish."""
    found = {seed: draw(seed) for seed in range(200, 209)}
    rates = FaultRates(
        mean_gap_s=0.5, kill=0, kill_holders=0, kill_all=0, false_verdict=0, hang=0, stick=3.0, slow=1.0, cut=0,
        cut_pair=0, controller_crash=0, crash_at_append=0, zombie=0, journal_full=0, sync_error=0, nan=0, lie=0,
        corrupt_anchor=0, wrong_digest=0,
    )  # fmt: skip
    chosen = {seed: replace(scenario, rates=rates) for seed, scenario in found.items() if scenario.num_members >= 4}
    results = {seed: simulate(seed, scenario=scenario) for seed, scenario in chosen.items()}
    assert [f"seed {s}: {r.problem}" for s, r in results.items() if not r.ok] == []
    assert sum(r.counts.get("fault stick", 0) for r in results.values()) >= len(results)
    assert sum(r.counts.get("spawns", 0) for r in results.values()) > 0, "nobody was ended"
    assert any(
        not simulate(seed, scenario=replace(scenario, plan=replace(scenario.plan, judges_hangs=False))).ok
        for seed, scenario in chosen.items()
    ), "runs finish without the verdict, too"
