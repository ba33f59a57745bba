"""Traces of gossip seen from the controller: whose turn it is in a schedule, who is near, and what it is told."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from control import Control

from orchestrator.pair_desk import groups_of
from orchestrator.pairing import ROUNDS_AHEAD
from strategies.config import StrategyConfig
from strategies.topology import check_converges, group_matrix
from workers import messages as msg
from workers.pair import Offer, PairId, Report
from workers.pair_messages import PairRosters, PairTell
from workers.pair_records import PairCommitRecord, PairRosterRecord


@dataclass
class Gossip(Control):
    """A controller whose members gossip, each on a machine of its own in a region."""

    regions: dict[str, str] = field(default_factory=dict)
    nodes: dict[str, str] = field(default_factory=dict)

    def info(self, name: str, node: str = "") -> msg.ProcessInfo:
        return replace(Control.info(self, name, node or self.nodes.get(name, "")), region=self.regions.get(name, ""))

    def groups(self) -> list[set[str]]:
        """Who meets whom in the present round."""
        return [{member.name for member in pair.members} for pair in next(iter(self.coordinator.book.plan.values()))]

    def newest(self, name: str) -> PairId | None:
        rosters = self.told(name, PairRosters)[-1]
        assert isinstance(rosters, PairRosters)
        return rosters.rounds[0][1]

    def meet(self) -> None:
        """All groups of the present round commit a step of each member."""
        for pair in {p for name in self.state.current if (p := self.newest(name)) is not None}:
            self.say(pair.leader.name, PairTell(message=self.report(pair)))

    def report(self, pair: PairId) -> Report:
        """The leader's, that its group has committed a step of each member."""
        offers = []
        for member in pair.members:
            since = self.entry(member.name).watermarks[0]
            self.consumed[member.name] = since + 2
            offers.append(Offer(pair=pair, sender=member, since=since, upto=since + 2, digest="x"))
        return Report(pair=pair, sender=pair.leader, committed=True, offers=tuple(offers))


def started(topology: str, **settings: object) -> Gossip:
    places = {key: settings.pop(key) for key in ("regions", "nodes") if key in settings}
    control = Gossip(members=4, samples=4000, strategy={"name": "gossip", "topology": topology, **settings}, **places)  # type: ignore[arg-type]
    control.start()
    control.tick(1.0)
    return control


EVEN, ODD = [{"island-0", "island-1"}, {"island-2", "island-3"}], [{"island-1", "island-2"}, {"island-3", "island-0"}]


@pytest.mark.parametrize("topology", ["ring", "exponential"])
def test_rosters_that_nobody_used_take_no_turn_of_a_schedule_away(topology: str) -> None:
    """Where meetings fail every second time the same half of the pairs would meet."""
    control = started(topology)
    for turn in range(4):
        before, told = len(control.records(PairRosterRecord)), len(control.told("island-0", PairRosters))
        first = control.groups()
        control.tick(40.0)
        assert len(control.records(PairRosterRecord)) == before, "of which nobody said a word it is not over"
        assert len(control.told("island-0", PairRosters)) > told, "and is told again now and then"
        pair = control.newest("island-0")
        assert pair is not None
        control.say(pair.leader.name, PairTell(message=Report(pair=pair, sender=pair.leader, committed=False)))
        control.tick(40.0)
        assert len(control.records(PairRosterRecord)) > before, "a new one, for who is left alone"
        assert control.groups() == first
        control.meet()
        other = ODD if topology == "ring" else [{"island-0", "island-2"}, {"island-1", "island-3"}]
        assert first == (other if turn % 2 else EVEN)


def test_a_new_controller_goes_on_with_the_turn_of_its_journal() -> None:
    control = started("ring")
    control.meet()
    assert control.groups() == ODD
    control.restart()
    for name in sorted(control.state.current):
        control.hello(name)
    control.tick(40.0)
    assert control.groups() == ODD, "nobody has met by it"
    control.meet()
    assert control.groups() == EVEN


def test_nobody_reports_for_another_one() -> None:
    control = started("ring")
    pair = control.newest("island-0")
    assert pair is not None and pair.leader.name != "island-3"
    control.say("island-3", PairTell(message=control.report(pair)))
    assert control.records(PairCommitRecord) == [], "the leader has not said so"
    control.say(pair.leader.name, PairTell(message=control.report(pair)))
    assert len(control.records(PairCommitRecord)) == 1


def test_near_members_meet_and_in_some_rounds_everybody_may() -> None:
    regions = {"island-0": "east", "island-1": "west", "island-2": "east", "island-3": "west"}
    control = started("near", keep_gap=0.25, regions=regions)
    seen = []
    for _ in range(16):
        seen.append(control.groups())
        control.meet()
    near = [all(len({regions[name] for name in group}) == 1 for group in groups) for groups in seen]
    assert sum(near) >= 12 and not all(near), "at least three rounds of four are near, and regions do meet"
    assert all(sorted(name for group in groups for name in group) == sorted(regions) for groups in seen)


def test_without_a_label_islands_of_a_machine_are_near() -> None:
    nodes = {f"island-{i}": f"node-{i % 2}" for i in range(4)}
    control = started("near", keep_gap=0.1, nodes=nodes)
    assert sorted(map(sorted, control.groups())) == [["island-0", "island-2"], ["island-1", "island-3"]]


def test_rosters_are_given_out_ahead_and_fixed_anew_when_somebody_comes_or_goes() -> None:
    control = started("ring")
    plan = dict(control.coordinator.book.plan)
    assert len(plan) == ROUNDS_AHEAD and len(control.records(PairRosterRecord)) == ROUNDS_AHEAD
    rosters = control.told("island-1", PairRosters)[-1]
    assert isinstance(rosters, PairRosters)
    assert [round_ for round_, _ in rosters.rounds] == list(plan)
    assert {name for name, _ in rosters.addresses} == {f"island-{i}.1" for i in range(3)}, "its neighbours, and itself"
    control.meet()
    after = dict(control.coordinator.book.plan)
    assert list(after) == [*list(plan)[1:], list(plan)[-1] + 1], "one is over, and one is added"
    assert all(after[round_] == plan[round_] for round_ in list(plan)[1:])
    control.die("island-3")
    for pair in next(iter(after.values())):
        (sender, *_) = [member for member in pair.members if member.name != "island-3"]
        control.say(sender.name, PairTell(message=Report(pair=pair, sender=sender, committed=False)))
    fresh = control.coordinator.book.plan
    assert not fresh.keys() & after.keys() and len(fresh) == ROUNDS_AHEAD
    names = {member.name for pairs in fresh.values() for pair in pairs for member in pair.members}
    assert names == {"island-0", "island-1", "island-2"}


@pytest.mark.parametrize("topology", ["random", "exponential", "ring", "near"])
def test_every_schedule_that_a_run_can_have_converges(topology: str) -> None:
    """Runs have no matrices to check: their groups are drawn. A schedule that falls apart would not be refused."""
    strategy = StrategyConfig.model_validate({"name": "gossip", "topology": topology})
    for num in (2, 3, 5, 8, 13):
        names = [f"island-{i}" for i in range(num)]
        regions = {name: "east" if i % 3 else "west" for i, name in enumerate(names)}
        rounds = [groups_of(strategy, names, r, turn=r, seed=1, regions=regions) for r in range(60)]
        assert check_converges([group_matrix(names, groups) for groups in rounds]) > 0.01, (topology, num)
