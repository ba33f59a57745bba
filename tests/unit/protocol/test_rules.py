"""Every rule of the protocol is one small function; take any of them out, and some trace comes out wrong."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from unittest import mock

import pytest
import test_apart
import test_closing
import test_coordinator
import test_exchange
import test_joining
import test_leave
import test_member
import test_revocation
import test_robust_exchange

from orchestrator import exchange_rules, leaving
from workers import member_rules
from workers.messages import ExchangeId
from workers.records import Term

Rule = Callable[..., object]

WITHOUT: dict[str, Rule] = {
    "orchestrator.exchange_rules.offer_problem": lambda offer, member, head: None,
    "orchestrator.exchange_rules.expected_members": lambda open_, fleet, among=None: list(fleet.members.values()),
    "orchestrator.exchange_rules.offers_needed": lambda config, num_expected: 1,
    "orchestrator.exchange_rules.awaited_members": lambda open_, expected: [],
    "orchestrator.exchange_rules.close_reason": lambda open_, fleet, awaited, config, now: "at once",
    "orchestrator.exchange_rules.staleness_factor": lambda staleness: 1.0,
    "orchestrator.exchange_rules.push_factor": lambda staleness: 1.0,
    "orchestrator.closing.push_reason": lambda open_, fleet, config, now, turned_away: "at once",
    "orchestrator.closing.adaptive_grace_s": lambda **settings: 0.0,
    "orchestrator.exchange_rules.eligible_weight": lambda fleet, roster: float(sum(offer.weight for offer in roster)),
    "orchestrator.exchange_rules.coefficients": lambda offers, fleet: [1 / len(offers)] * len(offers),
    "orchestrator.exchange_rules.able_owners": lambda fleet: [m.id for m in fleet.members.values()],
    "orchestrator.exchange_rules.far_behind": lambda member: False,
    "orchestrator.exchange_rules.reaching_owners": lambda able, roster, cut: list(able),
    "orchestrator.exchange_rules.deal_chunks": lambda num_chunks, owners: (min(owners),) * num_chunks,
    "orchestrator.exchange_rules.redeal_chunks": lambda owners, lost, left: (min(left),) * len(owners),
    "orchestrator.exchange_rules.copies_needed": lambda config, fleet: (1, 1),
    "orchestrator.exchange_rules.enough_copies": lambda holders, config, fleet: bool(list(holders)),
    "orchestrator.exchange_rules.refused_lengths": lambda offers, times: {},
    "orchestrator.exchange_rules.length_of": lambda offer: 1.0,
    "orchestrator.exchange_rules.as_fp32": lambda values: list(values),
    "orchestrator.exchange_rules.is_current": lambda open_, exchange, attempt: open_ is not None,
    "orchestrator.exchange_rules.parts_after_roster_change": dict,
    "orchestrator.exchange_rules.make_exchange_id": lambda term, serial: ExchangeId(
        term=Term(lineage=0, number=0, controller=""), serial=serial
    ),
    "workers.member_rules.included": lambda record, offer: True,
    "workers.member_rules.obeys": lambda mine, theirs: True,
    "workers.member_rules.supersedes": lambda new, old: True,
    "workers.member_rules.lacks_version": lambda state, log, fragment, version: False,
    "orchestrator.lifecycle.may_speak": lambda entry, nonce: entry is not None,
    "orchestrator.lifecycle.ended_members": lambda state, roll: [],
    "orchestrator.lifecycle.may_settle": lambda member, exchanges: True,
    "orchestrator.lifecycle.state_is_lost": lambda processes, num_fragments, *, all_live: False,
    "orchestrator.lifecycle.outlived": lambda successor, asked_s: True,
    "orchestrator.leaving.has_handed_over": lambda process, entry, exchanges: True,
    "orchestrator.leaving.is_held": lambda heads, others: True,
    "orchestrator.revocation.all_promise": lambda question, processes: True,
    "orchestrator.desk.may_tell": lambda decided, flushed: True,
    "orchestrator.run_state.first_returned": lambda watermarks: min(watermarks, default=0),
}
# They act on tensors: C2 and C8 in tests/sim/.
ELSEWHERE = {"workers.member_rules.residual_after", "workers.member_rules.aside_after"}


def traces() -> Iterator[Callable[[], None]]:
    for module in (
        test_closing,
        test_apart,
        test_exchange,
        test_coordinator,
        test_joining,
        test_member,
        test_revocation,
        test_leave,
        test_robust_exchange,
    ):
        for name, function in vars(module).items():
            if name.startswith("test_") and not inspect.signature(function).parameters:
                yield function


def functions_of(module: ModuleType) -> set[str]:
    own = inspect.getmembers(module, inspect.isfunction)
    return {f"{module.__name__}.{name}" for name, function in own if function.__module__ == module.__name__}


def test_no_rule_is_forgotten() -> None:
    assert (
        functions_of(exchange_rules) | functions_of(member_rules) | functions_of(leaving) <= WITHOUT.keys() | ELSEWHERE
    )


@pytest.mark.parametrize("target", WITHOUT)
def test_a_rule_that_is_taken_out_is_missed(target: str) -> None:
    with mock.patch(target, WITHOUT[target]):
        for trace in traces():
            try:
                trace()
            except Exception:  # whatever goes wrong without the rule
                return
    pytest.fail(f"{target} can be taken out unnoticed")
