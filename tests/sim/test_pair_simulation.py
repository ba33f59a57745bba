"""The pair commit under loss, death, cuts and crashes; and that the simulator sees when a rule is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from faults.virtual import LinkQuality
from orchestrator.pairing import Command as BookCommand
from orchestrator.pairing import LedgerContradiction, PairBook, Send
from orchestrator.simulation.pair_scenario import PairResult, PairScenario
from orchestrator.simulation.pairs import simulate_pairs
from workers import pair as p
from workers.records import MemberId

HARD = LinkQuality(loss=0.25, duplicate=0.1, straggle=0.2, straggle_s=4.0)
CLEAN = LinkQuality(min_delay_s=0.02, max_delay_s=0.02)


def hard(seed: int, *, size: int = 2) -> PairScenario:
    """Short rounds, slow payloads and many faults: most of them hit an exchange."""
    return PairScenario(
        seed=seed, num_members=size * 2 + seed % 4, group_size=size, rounds=10, inner_s=5.0, payload_bytes=6e6,
        fault_gap_s=1.5, link=HARD, jitter_s=1.0,
    )  # fmt: skip


def run(scenarios: Sequence[PairScenario]) -> tuple[Counter[str], list[PairResult]]:
    counts, results = Counter[str](), []
    for scenario in scenarios:
        result = simulate_pairs(scenario)
        counts.update(result.counts)
        counts["doubts"] += sum(exchange.doubted for exchange in result.exchanges)
        counts["committed after a doubt"] += sum(e.doubted and e.committed for e in result.exchanges)
        results.append(result)
    return counts, results


@pytest.mark.parametrize("size", [2, 3])
def test_all_or_none_and_an_exact_ledger_under_every_fault(size: int) -> None:
    counts, results = run([hard(seed, size=size) for seed in range(350)])
    assert [(r.seed, r.invariant, r.problem) for r in results if not r.ok] == []
    for kind in ("kill", "cut", "cut_pair", "cut_head", "crash", "crash_at_row", "away", "commits", "skipped"):
        assert counts[kind] > 30, f"{kind} hardly happened: {counts}"
    assert counts["commits without a controller"] > 30, counts
    assert max(r.counts["most unrecorded"] for r in results) >= (p.MOST_UNRECORDED if size == 2 else 2)
    assert counts["doubts"] > 15 and counts["committed after a doubt"] > 1, counts


def test_a_seed_is_one_history() -> None:
    assert simulate_pairs(hard(3)) == simulate_pairs(hard(3))
    assert simulate_pairs(hard(3)).exchanges != simulate_pairs(hard(4)).exchanges


# ---------------------------------------------------------------- rules removed


class GuessesWhenInDoubt(p.PairMachine):
    """A bound follower gives up at its timeout."""

    def _doubt(self) -> None:
        self._give_up("no answer")


class HearsOthersInDoubt(p.PairMachine):
    """It asks the controller, and still obeys a late `Commit` of the leader."""

    def _current(self, event: p.Event) -> None:
        if self.state == "doubt" and isinstance(event, p.Commit):
            self._commit()
        else:
            p.PairMachine._current(self, event)


class LeadsWithoutVotes(p.PairMachine):
    """The leader applies when it has the payloads."""

    def _go_on(self) -> None:
        self.votes |= set(self._members())
        p.PairMachine._go_on(self)


class GivesUpAfterTheCommit(p.PairMachine):
    """A leader that has applied says `Abort` to who asks again."""

    def _answer(self, message: p.Offer | p.Ready) -> None:
        self.out.append(p.Say(to=message.sender, message=p.Abort(pair=message.pair, sender=self.me, why="over")))


class ForgetsWhatItRestsOn(p.PairMachine):
    """Its offers and reports do not name the commits before them."""

    def _known(self) -> tuple[p.Commitment, ...]:
        return ()


class KeepsWhatItHeardToItself(p.PairMachine):
    """It reports its own commits alone, and not those that its partners' rest on."""

    def _known(self) -> tuple[p.Commitment, ...]:
        return tuple(one for one in p.PairMachine._known(self) if self.me in one.pair.members)


class SettlesAtOnce(PairBook):
    """Leases of a fenced member go back while a partner may still commit its work."""

    def _settle(self) -> None:
        kept, self.open = self.open, {}
        PairBook._settle(self)
        self.open = kept


class HearsTheFenced(PairBook):
    """Reports of fenced incarnations count."""

    def _may_speak(self, pair: p.PairId, sender: MemberId) -> bool:
        return pair in self.open or pair in self.outcomes


class ClosesBeforeEverybodyAsked(PairBook):
    """The leader is fenced: that is enough, whatever others have heard from it."""

    def _try_to_close(self, pair: p.PairId) -> None:
        if pair.leader in self.fenced:
            self._close(pair, False)


class ClosesWhatIsCarried(PairBook):
    """Nobody of the exchange is left to tell of it: that is enough, whomever they met since."""

    def _may_be_carried(self, pair: p.PairId) -> bool:
        return False


class RecordsWithoutWhatItRestsOn(PairBook):
    """It takes a report as if there was nothing before it."""

    def report(self, report: p.Report) -> list[BookCommand]:
        return PairBook.report(self, replace(report, rests_on=()))


class ForgetsUnheardOutcomes(PairBook):
    """Outcomes are forgotten when everybody has spoken of a later exchange, heard or not."""

    def _forget(self) -> None:
        for pair in list(self.outcomes):
            if all(m in self.fenced or self.newest.get(m, -1) > pair.round_ for m in pair.members):
                del self.outcomes[pair]


class TellsBeforeItWrites(PairBook):
    """Answers leave before the row is written."""

    def _done(self) -> list[BookCommand]:
        return sorted(PairBook._done(self), key=lambda c: type(c).__name__ == "Write")


MACHINES = [
    GuessesWhenInDoubt, LeadsWithoutVotes, GivesUpAfterTheCommit, ForgetsWhatItRestsOn, KeepsWhatItHeardToItself,
]  # fmt: skip
BOOKS = [
    SettlesAtOnce, ClosesBeforeEverybodyAsked, TellsBeforeItWrites, ClosesWhatIsCarried, RecordsWithoutWhatItRestsOn,
]  # fmt: skip


@pytest.mark.parametrize("machine", MACHINES, ids=lambda c: c.__name__)
def test_the_simulator_sees_a_rule_that_members_break(machine: type[p.PairMachine]) -> None:
    assert sees(lambda seed: replace(hard(seed), machine=machine))


@pytest.mark.parametrize("book", BOOKS, ids=lambda c: c.__name__)
def test_the_simulator_sees_a_rule_that_the_controller_breaks(book: type[PairBook]) -> None:
    assert sees(lambda seed: replace(hard(seed), book=book))


def sees(scenario: Callable[[int], PairScenario], seeds: int = 100) -> bool:
    return any(not simulate_pairs(scenario(seed)).ok for seed in range(seeds))


def doubt(
    machine: type[p.PairMachine] = p.PairMachine, book: type[PairBook] = PairBook
) -> tuple[PairBook, p.PairMachine, p.Commit, p.Report, p.Recorded]:
    """Two exchanged; the follower has asked; the leader committed, and is fenced with all its messages under way."""
    a, b = (MemberId(name=name, incarnation=1) for name in "ab")
    head = book(topology=lambda names, round_: (tuple(names),))
    for member in (a, b):
        head.join(member)
    head.next_round()
    pair = p.PairId(round_=0, members=(a, b))
    leader, follower = p.PairMachine(me=a), machine(me=b)
    for one, other in ((leader, follower), (follower, leader)):
        begun = one.handle(p.Begin(pair=pair, since=0, upto=4, digest="x"))
        other.handle(next(c.message for c in begun if isinstance(c, p.Say)))
    # The leader's offer came before the follower had begun; the follower's after the leader had.
    (ready,) = follower.handle(p.Fetched(pair=pair, member=a))
    leader.handle(p.Fetched(pair=pair, member=b))
    assert isinstance(ready, p.Say)
    applied = leader.handle(ready.message)
    commit = next(c.message for c in applied if isinstance(c, p.Say))
    report = next(c.message for c in applied if isinstance(c, p.Tell))
    (query,) = follower.handle(p.TimedOut(pair=pair))
    assert isinstance(query, p.Tell) and isinstance(query.message, p.Query)
    told = [*head.query(query.message), *head.fence(a)]
    for gone in [c.message for c in told if isinstance(c, Send) and isinstance(c.message, p.Gone)]:
        if gone.pair != pair:  # of a round to come, in which the leader could hand its commit on
            said = [c.message for c in follower.handle(gone) if isinstance(c, p.Tell)]
            told += [command for one in said if isinstance(one, p.Report) for command in head.report(one)]
    answers = [c.message for c in told if isinstance(c, Send) and isinstance(c.message, p.Recorded)]
    answer = next(message for message in answers if message.pair == pair)
    assert isinstance(commit, p.Commit) and isinstance(report, p.Report) and not answer.committed
    return head, follower, commit, report, answer


def test_who_has_asked_obeys_the_controller_alone_and_the_fenced_are_not_heard() -> None:
    head, follower, commit, report, answer = doubt()
    assert follower.handle(commit) == [] and head.report(report) == []
    assert [type(c) for c in follower.handle(answer)] == [p.Skip] and follower.state == "idle"
    assert head.num_stale == 1 and follower.num_stale == 1


def test_two_rules_whose_absence_is_too_rare_for_dice_would_show() -> None:
    _, follower, commit, _, answer = doubt(machine=HearsOthersInDoubt)
    assert any(isinstance(c, p.Apply) for c in follower.handle(commit))
    with pytest.raises(p.PairContradiction):
        follower.handle(answer)
    head, _, _, report, _ = doubt(book=HearsTheFenced)
    with pytest.raises(LedgerContradiction):
        head.report(report)


def meet(leader: p.PairMachine, follower: p.PairMachine, round_: int) -> p.Report:
    """They commit the next four samples of each; what the leader reports."""
    pair = p.PairId(round_=round_, members=(leader.me, follower.me))
    for one, other in ((leader, follower), (follower, leader)):
        begun = one.handle(p.Begin(pair=pair, since=4 * round_, upto=4 * round_ + 4, digest="x"))
        other.handle(next(c.message for c in begun if isinstance(c, p.Say)))
    (ready,) = follower.handle(p.Fetched(pair=pair, member=leader.me))
    leader.handle(p.Fetched(pair=pair, member=follower.me))
    assert isinstance(ready, p.Say)
    applied = leader.handle(ready.message)
    follower.handle(next(c.message for c in applied if isinstance(c, p.Say)))
    (report,) = [c.message for c in applied if isinstance(c, p.Tell)]
    assert isinstance(report, p.Report)
    return report


@pytest.mark.parametrize("book", [PairBook, ForgetsUnheardOutcomes])
def test_an_outcome_is_kept_until_who_reported_it_has_heard_of_it(book: type[PairBook]) -> None:
    a, b = (MemberId(name=name, incarnation=1) for name in "ab")
    head, leader, follower = (
        book(topology=lambda names, round_: (tuple(names),)),
        p.PairMachine(me=a),
        p.PairMachine(me=b),
    )
    for member in (a, b):
        head.join(member)
    head.next_round()
    first, second = meet(leader, follower, 0), meet(leader, follower, 1)
    head.report(second)  # the first one was lost, and so is the answer
    head.next_round()
    head.next_round()
    assert leader.num_unrecorded == 2 and first.pair in leader.untold
    answers = [c.message for c in head.report(first) if isinstance(c, Send) and c.to == a]
    assert answers == ([] if book is ForgetsUnheardOutcomes else [p.Recorded(pair=first.pair, committed=True)])


# ---------------------------------------------------------------- time


def quiet(num: int, **changes: object) -> PairScenario:
    """No faults, 1 MB each way at 50 Mbit/s, everybody at its send point at once."""
    scenario = PairScenario(
        seed=1, num_members=num, rounds=1, drain_rounds=1, fault_gap_s=None, jitter_s=0.0, link=CLEAN
    )
    return replace(scenario, **changes)  # type: ignore[arg-type]


def test_synchronisation_time_does_not_grow_with_the_members() -> None:
    """Slope under 5 % up to 1,024 members, with a controller that handles one message at a time."""
    times_s = {num: simulate_pairs(quiet(num)) for num in (4, 8, 16, 1024)}
    assert all(result.ok for result in times_s.values())
    slowest, quickest = (f(result.sync_s() for result in times_s.values()) for f in (max, min))
    assert slowest < 1.05 * quickest
    assert 0.16 < quickest < 0.4, "it is the time of the payload and a few messages"
    assert all(len(e.partners) == 1 for e in times_s[1024].exchanges), "no exchange is between more than two"


class WaitsForTheController(p.PairMachine):
    """It applies only when its report is on the record: what the pair commit is there to avoid."""

    def handle(self, event: p.Event) -> list[p.Command]:
        out = p.PairMachine.handle(self, event)
        held = [c for c in out if isinstance(c, p.Apply)] if not isinstance(event, p.Recorded) else []
        if held:
            self.fetching.add(self.me)
            return [c for c in out if c not in held]
        if isinstance(event, p.Recorded) and self.me in self.fetching:
            self.fetching.discard(self.me)
            report = self.outcomes[event.pair]
            return [*out, p.Apply(pair=event.pair, offers=report.offers)]
        return out


def test_the_slope_would_show_if_anybody_waited_for_the_controller() -> None:
    small, large = (simulate_pairs(quiet(num, machine=WaitsForTheController, service_s=2e-3)) for num in (4, 256))
    assert large.sync_s() > 1.2 * small.sync_s(), "far beyond the 5 % that are allowed"


def test_a_dead_member_costs_its_partner_one_timeout_and_nobody_else_anything() -> None:
    clean = simulate_pairs(quiet(16, rounds=3))
    # It dies right after the second send point, when its payload is under way; with a slow verdict.
    killed = simulate_pairs(quiet(16, rounds=3, kills=((16.01, "m0003"),)))
    assert clean.ok and killed.ok, killed.problem
    normal_s = max(e.seconds for e in clean.exchanges)
    slow = [e for e in killed.exchanges if e.seconds > normal_s * 1.01 or not e.committed]
    assert len(slow) == 1 and slow[0].partners == ("m0003",) and not slow[0].committed
    assert slow[0].seconds <= p.PAIR_TIMEOUT_S + 0.1
    cut = simulate_pairs(quiet(16, rounds=3, kills=((16.01, "m0003"),), told_s=60.0))
    slow = [e for e in cut.exchanges if e.seconds > normal_s * 1.01 or not e.committed]
    assert {e.partners for e in slow} == {("m0003",)} and len(slow) == 1, "nobody says that it died: one timeout"
    assert slow[0].seconds == pytest.approx(p.PAIR_TIMEOUT_S)
