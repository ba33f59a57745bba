"""Leases: how much, to whom, how the last ones are shared; and every sample's fate under arbitrary histories."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orchestrator import leases, ledger
from orchestrator.ledger_model import chain_of
from orchestrator.run_state import Membership, RunState
from orchestrator.simulation.bookkeeping import Bookkeeping
from workers import ranges
from workers.records import (
    GENESIS_HASH,
    CommitRecord,
    DropRecord,
    FenceRecord,
    GenesisRecord,
    JoinRecord,
    LeaseRecord,
    MemberId,
    Record,
    RevokeRecord,
    RosterEntry,
    Row,
    SettleRecord,
    TermRecord,
    make_row,
    roster_digest,
)

PLAN = leases.Plan(total_samples=1000, inner_steps=10, bound_rounds=4.0)


def run_of(*names: str, fragments: int = 1) -> RunState:
    state = RunState()
    state.apply(TermRecord(lineage=0, number=1, controller="c"))
    state.apply(GenesisRecord(maker="a.1", digests=("g",) * fragments, num_params=1, num_chunks=(1,) * fragments))
    for name in names:
        state.apply(JoinRecord(member=name, incarnation=1, nonce=name, node="n"))
    return state


def member(name: str) -> MemberId:
    return MemberId(name=name, incarnation=1)


def grant(state: RunState, consumed: dict[str, int], *, batch: int = 2, plan: leases.Plan = PLAN) -> list[LeaseRecord]:
    records = leases.grant(state, {member(name): (batch, done) for name, done in consumed.items()}, plan)
    for record in records:
        state.apply(record)
    return records


def num(records: list[LeaseRecord]) -> dict[str, int]:
    return {record.member: ranges.count(record.ranges) for record in records}


def test_members_are_filled_up_to_two_rounds() -> None:
    state = run_of("a", "b")
    assert num(grant(state, {"a": 0, "b": 0})) == {"a": 40, "b": 40}
    assert grant(state, {"a": 0, "b": 0}) == []


def test_member_that_trains_on_gets_more_up_to_its_bound() -> None:
    state = run_of("a")
    grant(state, {"a": 0})
    total = 40
    for consumed in range(0, 200, 2):
        total += sum(num(grant(state, {"a": min(consumed, total)})).values())
    assert total == PLAN.bound_steps * 2


def test_returned_samples_are_issued_first() -> None:
    state = run_of("a", "b")
    grant(state, {"a": 0, "b": 0})
    state.apply(FenceRecord(member="a", incarnation=1, why="died"))
    state.apply(SettleRecord(member="a", incarnation=1))
    assert state.free == ((0, 40),)
    state.apply(JoinRecord(member="a", incarnation=2, nonce="a2", node="n"))
    records = leases.grant(state, {MemberId(name="a", incarnation=2): (2, 0)}, PLAN)
    assert records[0].ranges == ((0, 40),) and records[0].index == 0


def test_last_samples_are_shared_in_whole_batches() -> None:
    state = run_of("a", "b", "c")
    given = num(grant(state, {"a": 0, "b": 0, "c": 0}, plan=replace(PLAN, total_samples=20)))
    assert given == {"a": 8, "b": 6, "c": 6}
    assert leases.left_to_issue(state, replace(PLAN, total_samples=20)) == 0


def test_share_out_gives_everybody_what_it_wants_if_there_is_enough() -> None:
    demands = {member("a"): (10, 2), member("b"): (0, 2), member("c"): (4, 4)}
    assert leases.share_out(demands, 14) == {member("a"): 10, member("c"): 4}
    assert leases.share_out(demands, 5) == {member("a"): 2, member("c"): 3}
    assert leases.share_out(demands, 0) == {}


# ---------------------------------------------------------------- arbitrary histories

NAMES = ("a", "b", "c")


class Histories(RuleBasedStateMachine):
    """Grant, commit, fence, settle, drop, revoke, restart in any order, against sets of samples and the ledger."""

    @initialize(fragments=st.integers(1, 3), total=st.integers(20, 120))
    def begin(self, fragments: int, total: int) -> None:
        self.fragments, self.rows = fragments, list[Row]()
        self.state, self.book = RunState(), Bookkeeping()
        self.plan = leases.Plan(total_samples=total, inner_steps=2, bound_rounds=2.0)
        self.terms = 0
        self.in_roster: dict[MemberId, set[int]] = {}  # fenced members that a fixed roster may still hold
        self.restart()
        self.log(
            GenesisRecord(maker="a.1", digests=("g",) * fragments, num_params=1, num_chunks=(1,) * fragments),
        )
        for name in NAMES:
            self.join(name)

    def log(self, record: Record) -> None:
        row = make_row(len(self.rows), self.rows[-1].hash if self.rows else GENESIS_HASH, record)
        self.state.apply(record)
        self.book.apply(row)
        self.rows.append(row)

    def live(self) -> list[MemberId]:
        return self.state.live()

    # ------------------------------------------------------------ steps

    def join(self, name: str) -> None:
        incarnation = self.state.last_incarnation.get(name, 0) + 1
        self.log(JoinRecord(member=name, incarnation=incarnation, nonce=f"{name}{incarnation}", node="n"))

    @rule()
    def restart(self) -> None:
        self.terms += 1
        self.serials = [0] * getattr(self, "fragments", 0)
        self.in_roster = {}
        self.log(TermRecord(lineage=0, number=self.terms, controller=f"c{self.terms}"))

    @rule(name=st.sampled_from(NAMES))
    def come_back(self, name: str) -> None:
        if name not in self.state.current:
            self.join(name)

    @rule(batch=st.integers(1, 4), consumed=st.integers(0, 40))
    def lease(self, batch: int, consumed: int) -> None:
        able = {m: (batch, min(consumed, self.state.members[m].num_leased)) for m in self.live()}
        for record in leases.grant(self.state, able, self.plan):
            self.log(record)

    @rule(data=st.data())
    def commit(self, data: Any) -> None:
        fragment = data.draw(st.integers(0, self.fragments - 1))
        roster = []
        for m in [*self.live(), *(m for m, done in self.in_roster.items() if fragment not in done)]:
            entry = self.state.members[m]
            since = entry.watermarks[fragment]
            if entry.settled or entry.num_leased <= since or not data.draw(st.booleans()):
                continue
            upto = data.draw(st.integers(since + 1, entry.num_leased))
            roster.append(
                RosterEntry(
                    member=m.name, incarnation=m.incarnation, seq=len(self.rows), since=since, upto=upto,
                    ranges=self.state.offered_ranges(m, since, upto), num_steps=1, coefficient=0.1,
                )
            )  # fmt: skip
            if m in self.in_roster:
                self.in_roster[m].add(fragment)
        if not roster:
            return
        head = self.state.heads[fragment].version
        self.serials[fragment] += 1
        entries = tuple(sorted(roster, key=lambda e: (e.member, e.incarnation)))
        record = CommitRecord(
            fragment=fragment, n=head.n + 1, prev_chain=head.chain, chain="", serial=self.serials[fragment], attempt=1,
            roster=entries, roster_digest=roster_digest(entries), chunk_digests=("r",),
            digest=f"d{len(self.rows)}", base_samples=0,
        )  # fmt: skip
        self.log(replace(record, chain=chain_of(record)))

    @rule(name=st.sampled_from(NAMES), refused=st.booleans())
    def fence(self, name: str, refused: bool) -> None:
        found = self.state.current.get(name)
        if found is not None:
            self.log(FenceRecord(member=name, incarnation=found.incarnation, why="x", refused=refused))
            self.in_roster[found] = set()

    @rule()
    def settle(self) -> None:
        for m in list(self.state.unsettled):
            self.log(SettleRecord(member=m.name, incarnation=m.incarnation))
            self.in_roster.pop(m, None)

    @rule(data=st.data(), name=st.sampled_from(NAMES))
    def drop(self, data: Any, name: str) -> None:
        found = self.state.current.get(name)
        if found is None:
            return
        entry = self.state.members[found]
        low = max(entry.watermarks)
        if entry.num_leased > min(entry.watermarks):
            upto = data.draw(st.integers(low, entry.num_leased))
            if upto > min(entry.watermarks):
                self.log(DropRecord(member=name, incarnation=found.incarnation, upto=upto, why="stale"))

    @precondition(lambda self: any(head.version.n for head in self.state.heads))
    @rule(data=st.data())
    def revoke(self, data: Any) -> None:
        able = [f for f, head in enumerate(self.state.heads) if head.version.n]
        fragment = data.draw(st.sampled_from(able))
        head = self.state.heads[fragment].version
        self.log(RevokeRecord(fragment=fragment, n=head.n, chain=head.chain))

    # ------------------------------------------------------------ what must hold

    @invariant()
    def every_sample_has_one_fate(self) -> None:
        if getattr(self, "rows", None) and self.state.heads:
            self.book.check(self.state)

    def teardown(self) -> None:
        if not getattr(self, "rows", None):
            return
        found = ledger.recompute(self.rows)
        assert found.ok, found.findings
        assert found.samples()["full"] == self.state.samples_committed()
        assert tuple(found.free) == self.state.free and tuple(found.dropped) == self.state.dropped
        assert found.num_reissued == self.state.reissued


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=60, stateful_step_count=40)


def test_a_cut_of_a_long_life_is_that_of_all_its_ranges() -> None:
    rng = random.Random(5)
    member, position = Membership(id=MemberId(name="a", incarnation=1), nonce="n", node="x", watermarks=[0]), 0
    for _ in range(60):
        start = position + rng.choice((0, 0, 3))
        position = start + rng.randint(1, 6)
        member.lease([(start, position)])
    assert member.num_leased == ranges.count(member.leases) and len(member.offsets) == len(member.leases) > 10
    for _ in range(300):
        since = rng.randint(0, member.num_leased)
        upto = rng.randint(since, member.num_leased)
        assert member.cut(since, upto) == ranges.cut(member.leases, since, upto)
    with pytest.raises(ValueError, match="reaches beyond"):
        member.cut(0, member.num_leased + 1)
