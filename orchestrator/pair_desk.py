"""The controller of a gossip run: rosters of pairs out, reports in, rows of the journal for both (`PairBook`).

It decides nothing that members decide among themselves, and what they say to each other does not pass here
(`workers/pair_mail.py`): a group that has its roster needs nobody else, and rosters are given out ahead. A full merge
is an ordinary exchange.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from zlib import crc32

from orchestrator import pairing
from orchestrator.desk import RunPlan
from orchestrator.operations import Operations
from orchestrator.pairing import LedgerContradiction, PairBook
from strategies import topology as topo
from strategies.config import StrategyConfig
from workers import messages as msg
from workers.pair import PairId, Report
from workers.pair_messages import PairHear, PairRosters, PairTell
from workers.pair_records import PairCommitRecord, PairRosterRecord
from workers.records import MemberId, Row, Term

STALLED_TIMEOUTS = 4.0
"""After so many pair timeouts the present round is over, whatever its groups do."""


def groups_of(
    strategy: StrategyConfig, names: Sequence[str], round_: int, *, turn: int, seed: int, regions: Mapping[str, str]
) -> topo.Groups:
    """Who meets whom in a round, as `[strategy]` says.

    `turn`: rounds before in which somebody met. Schedules that repeat go by it and not by `round_`: rosters that
    nobody was there to use must not take the same turn of the schedule away each time, lest members that only it brings
    together never meet. `regions`: of each member, for topology near.
    """
    if len(names) < max(strategy.group_size, 2):
        return topo.everybody(names) if len(names) > 1 else ()
    if strategy.topology == "exponential":
        return topo.exponential_pairs(names, round_=turn)
    if strategy.topology == "ring":
        return topo.ring_pairs(names, round_=turn)
    if strategy.topology == "near":
        return topo.near_groups(
            names, regions=regions, seed=seed, round_=round_, turn=turn, size=strategy.group_size,
            keep_gap=strategy.keep_gap,
        )  # fmt: skip
    return topo.random_groups(names, seed=seed, round_=round_, size=strategy.group_size)


def group_text(pair: PairId) -> str:
    """`island-0.1+island-1.1`: how the journal names a group."""
    return "+".join(map(str, pair.members))


def read_group(round_: int, text: str) -> PairId:
    """The group that the journal names."""
    parts = [part.rpartition(".") for part in text.split("+")]
    return PairId(round_=round_, members=tuple(MemberId(name=name, incarnation=int(n)) for name, _, n in parts))


class PairDesk(Operations):
    """Pairs beside the exchanges; without a gossip strategy it does nothing."""

    def __init__(self, plan: RunPlan, rows: Sequence[Row], term: Term, *, now: float, started_s: float = 0.0) -> None:
        """See `Desk`. What the journal says of pairs is taken over."""
        super().__init__(plan, rows, term, now=now, started_s=started_s)
        self.gossips = plan.strategy.in_pairs
        self.book = PairBook(topology=self._groups)
        self.roster_s = float("-inf")
        self.turns, self.last_met = 0, -1
        if self.gossips:
            self._replay_pairs()

    def _groups(self, names: Sequence[str], round_: int) -> topo.Groups:
        infos = {name: self.roll.processes.get(member) for name, member in self.book.live.items()}
        # Whoever has not said yet where it is has a region of its own, and meets others that are left over.
        regions = {name: (one.info.region or one.info.node) if one is not None else name for name, one in infos.items()}
        seed = crc32(self.plan.run_id.encode())
        turn = self.turns + sum(before > self.last_met for before in self.book.plan)
        return groups_of(self.plan.strategy, names, round_, turn=turn, seed=seed, regions=regions)

    def _count_turn(self, round_: int) -> None:
        if round_ > self.last_met:
            self.turns, self.last_met = self.turns + 1, round_

    def _replay_pairs(self) -> None:
        members = sorted(self.state.members.items())
        out: list[pairing.Row] = []
        for member, entry in members:
            out.append(pairing.Joined(member=member))
            if not entry.live:
                out.append(pairing.Fenced(member=member))
        for row in self.state.pair_rows:
            if isinstance(row, PairRosterRecord):
                pairs = tuple(read_group(row.round_, text) for text in row.groups)
                out.append(pairing.RosterRecord(round_=row.round_, pairs=pairs))
            else:
                self._count_turn(row.round_)
                spans = zip(row.members, row.incarnations, row.since, row.upto, strict=True)
                out.append(
                    pairing.PairRecord(
                        round_=row.round_,
                        spans=tuple(
                            pairing.Span(member=MemberId(name=name, incarnation=n), since=since, upto=upto)
                            for name, n, since, upto in spans
                        ),
                    )
                )
        self.book.replay(out)
        for member, entry in members:
            self.book.watermarks[member] = entry.watermarks[0] if entry.watermarks else 0
            if entry.settled:
                self.book.unsettled.discard(member)

    # ------------------------------------------------------------ members

    def _attach_process(self, member: MemberId, nonce: str, info: msg.ProcessInfo) -> None:
        super()._attach_process(member, nonce, info)
        if self.gossips and self.book.live.get(member.name) != member:
            self._obey_book(self.book.join(member))

    def _log_fence(self, member: MemberId, why: str, *, refused: bool) -> None:
        super()._log_fence(member, why, refused=refused)
        if self.gossips:
            self._obey_book(self.book.fence(member))
            if self.stopping is None and not self.ended:
                self._obey_book(self.book.plan_anew())

    def _round_is_open(self) -> bool:
        """Whether a group of the present round has no outcome yet; those of older ones may stay open for long."""
        present = next(iter(self.book.plan), None)
        return present is not None and self.book.is_open(present)

    def _in_open_pair(self, member: MemberId) -> bool:
        return self.gossips and any(member in pair.members for pair in self.book.open)

    # ------------------------------------------------------------ messages and time

    def _pair_body(self, member: MemberId, body: PairTell) -> None:
        message = body.message
        if not self.gossips or message.sender != member:  # nobody reports for another one
            self.stale_messages += 1
            return
        before = message.rests_on if isinstance(message, Report) else ()
        # Merges move watermarks that the book does not see.
        for live in {member for pair in (message.pair, *(one.pair for one in before)) for member in pair.members}:
            entry = self.state.members.get(live)
            if entry is not None and entry.watermarks:
                self.book.watermarks[live] = entry.watermarks[0]
        try:
            self._obey_book(self.book.report(message) if isinstance(message, Report) else self.book.query(message))
        except LedgerContradiction as error:
            self._fence(member, f"its pair contradicts the journal: {error}", refused=False)

    def _pair_tick(self) -> None:
        """The next round's roster, once all groups of this one have an outcome, or have had time enough."""
        if not self.gossips or not self.started or self.stopping is not None or self.state.paused:
            return
        for member, process in self.roll.processes.items():
            self.book.suspected(member, process.is_suspect() or not process.ready())
        stalled = self.now - self.roster_s > STALLED_TIMEOUTS * self.plan.strategy.pair_timeout_s
        if stalled:
            self.roster_s = self.now
            self._obey_book(self.book.remind())
        if len(self.book.live.keys()) - len(self.book.suspect) < 2:
            return  # nobody could meet anybody
        if stalled or not self._round_is_open():
            self._obey_book(self.book.next_round())

    def _obey_book(self, commands: Sequence[pairing.Command]) -> None:
        for command in commands:
            match command:
                case pairing.Write(row=pairing.RosterRecord(round_=round_, pairs=pairs)):
                    self._log(PairRosterRecord(round_=round_, groups=tuple(group_text(pair) for pair in pairs)))
                case pairing.Write(row=pairing.PairRecord() as row):
                    self._log_pair(row)
                case pairing.Send(to=to, message=message):
                    self._tell(to, PairHear(message=message))
                case pairing.Publish(rounds=rounds):
                    self.roster_s = self.now
                    self._publish(rounds)
                case pairing.FenceWanted(member=member, why=why):
                    self._fence(member, why, refused=False)
        if self.state.unsettled:
            self._settle_all()
        if not self._round_is_open() and any(isinstance(command, pairing.Send) for command in commands):
            self._pair_tick()  # all groups of the round have their outcome

    def _log_pair(self, row: pairing.PairRecord) -> None:
        self._count_turn(row.round_)
        self._log(
            PairCommitRecord(
                round_=row.round_,
                members=tuple(span.member.name for span in row.spans),
                incarnations=tuple(span.member.incarnation for span in row.spans),
                since=tuple(span.since for span in row.spans),
                upto=tuple(span.upto for span in row.spans),
            )
        )
        self._grant()

    def _publish(self, rounds: Sequence[tuple[int, tuple[PairId, ...]]]) -> None:
        groups = [(round_, {member: pair for pair in pairs for member in pair.members}) for round_, pairs in rounds]
        for member in sorted(self.roll.processes):
            mine = tuple((round_, of.get(member)) for round_, of in groups)
            others = {other for _, pair in mine if pair is not None for other in pair.members}
            addresses = tuple(
                (str(other), self.roll.processes[other].info.address)
                for other in sorted(others)
                if other in self.roll.processes
            )
            self._tell(member, PairRosters(rounds=mine, addresses=addresses))
