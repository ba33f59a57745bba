"""The controller's side of one exchange: how a group agrees on one synchronisation of one fragment.

`IDLE -> OPEN -> (MEASURING ->) REDUCING -> SPREAD -> commit -> IDLE` (protocol 1.3). The machine is pure: events and
the fleet's present state come in, effects come out; the clock is an argument. What owners are asked to do is in
`orchestrator/exchange_work.py`, the rules that keep the result right in `orchestrator/exchange_rules.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from orchestrator import exchange_rules as rules
from orchestrator.checking import deal_checkers
from orchestrator.closing import Closing
from orchestrator.exchange_effects import Blame, Drop, Effect, Fence, Journal, Note, ToAll, ToOne, ToSome
from orchestrator.exchange_rules import Fleet, OpenExchange
from orchestrator.exchange_work import OwnersWork
from orchestrator.settings import ExchangeConfig, RobustConfig
from workers import messages as msg
from workers.messages import Offer
from workers.records import (
    CommitRecord,
    MemberId,
    RosterEntry,
    Term,
    version_chain,
)

__all__ = ["Blame", "Drop", "Effect", "Fence", "FragmentExchange", "Journal", "Note", "ToAll", "ToOne", "ToSome"]

ANNOUNCED_TO_ALL = 2
"""So many first offers are announced to everybody; among many members one: that a few miss it holds nobody up."""
MEMBERS_AN_ANNOUNCEMENT = 64
"""Owners hear of so many times fewer offers at once than there are members; of what is left with the next tick."""
PARTED_S = 30.0
"""How long an owner is kept from parts after it could not reach a contributor, unless it says before that it can."""

# ---------------------------------------------------------------- the machine


class FragmentExchange(OwnersWork):
    """Exchanges of one fragment, one after the other."""

    def __init__(
        self,
        *,
        fragment: int,
        num_chunks: int,
        config: ExchangeConfig,
        term: Term,
        closing: Closing | None = None,
        robust: RobustConfig | None = None,
    ) -> None:
        """`num_chunks`: parts that owners reduce; `term`: the controller life that names the exchanges.

        `closing`: when they close, by quorum and grace if nothing is said; `robust`: what is done about wrong updates.
        """
        self.fragment = fragment
        self.num_chunks = num_chunks
        self.config = config
        self.term = term
        self.closing = closing or Closing()
        self.robust = robust or RobustConfig()
        self.serial = 0
        self.open: OpenExchange | None = None
        self.discards = 0
        self.disagreements = 0
        self.may_close = True  # not once a stop was asked for: what each saves must be what is committed
        self.sync_s = 0.0  # from the last closing to its commit
        self.turned_away: set[MemberId] = set()  # offered while an exchange was under way, and were in none since
        self.parted: dict[rules.Pair, float] = {}  # when an owner last could not reach a contributor

    # ------------------------------------------------------------ OPEN

    def on_offer(self, sender: MemberId, offer: Offer, fleet: Fleet, now: float) -> list[Effect]:
        """A member offers. Repeats are no-ops; an invalid offer is answered with the records that the sender lacks."""
        member = fleet.members[sender]
        problem = rules.offer_problem(offer, member, fleet.head)
        if problem is None and len(offer.chunk_digests) != self.num_chunks:
            problem = f"it has {len(offer.chunk_digests)} chunks, expected {self.num_chunks}"
        if problem is not None:
            if offer.base != fleet.head:
                self.turned_away.add(sender)
            return [ToOne(member=sender, body=None), Note(text=f"offer {sender}/{offer.seq} refused: {problem}")]
        staleness = fleet.head.n - offer.born
        limit = self.closing.staleness_limit(self.config, fleet)
        if staleness > limit:
            told = f"exchange.staleness_limit is {self.config.staleness_limit}"
            of_all = f", for each member: {limit}" if limit > self.config.staleness_limit else ""
            why = f"its oldest step is {staleness} versions old, {told}{of_all}"
            return [Drop(member=sender, upto=offer.upto, why=why)]
        if self.open is None:
            self.serial += 1
            self.open = OpenExchange(id=rules.make_exchange_id(self.term, self.serial), base=fleet.head, opened_s=now)
        if self.open.state != "open":
            if sender not in self.open.offers:
                self.turned_away.add(sender)
            return []
        if sender in self.open.offers:
            return []
        self.open.offers[sender] = (member.address, offer)
        announced = self._announce(self.open, sender, offer, fleet, now)
        return announced if self._waits_for_more(self.open, fleet, now) else [*announced, *self.tick(fleet, now)]

    def _announce(self, open_: OpenExchange, sender: MemberId, offer: Offer, fleet: Fleet, now: float) -> list[Effect]:
        """The first offers tell everybody that there is an exchange; of the others only those hear who may reduce them.

        They pull their pieces ahead of the assignment. Of N offers to N members all but a few would concern nobody.
        """
        if not open_.likely:
            expected = [m.id for m in rules.expected_members(open_, fleet)]
            open_.likely = rules.deal_chunks(self.num_chunks, self._reaching(fleet, expected, now) or [sender])
            open_.likely_names = tuple(str(owner) for owner in open_.likely)
        body = msg.Announce(offer_by=sender, address=open_.offers[sender][0], offer=offer, owners=open_.likely_names)
        open_.first = open_.first or body
        if len(open_.offers) <= (1 if len(fleet.members) > MEMBERS_AN_ANNOUNCEMENT else ANNOUNCED_TO_ALL):
            return [ToAll(body=body)]
        open_.unannounced.append(body)
        enough = len(open_.unannounced) >= len(fleet.members) // MEMBERS_AN_ANNOUNCEMENT
        return self._tell_owners(open_) if enough else []

    def welcome(self, member: MemberId) -> list[Effect]:
        """Who comes while an exchange is open hears of it as everybody did: it offers before its time, to be in it."""
        open_ = self.open
        if open_ is None or open_.state != "open" or open_.first is None:
            return []
        return [ToOne(member=member, body=open_.first)]

    def _tell_owners(self, open_: OpenExchange) -> list[Effect]:
        bodies, open_.unannounced = tuple(open_.unannounced), []
        return [ToSome(members=tuple(dict.fromkeys(open_.likely)), bodies=bodies)] if bodies and open_.likely else []

    def _waits_for_more(self, open_: OpenExchange, fleet: Fleet, now: float) -> bool:
        """Whether one more offer closes nothing, by the last look at everybody: only what may is worth another look."""
        if self.closing.rule == "push":
            return False
        if len(open_.offers) < open_.needed:
            return True
        awaited = open_.waits_for
        graceful = self.closing.rule == "quorum" and open_.quorum_s is not None
        if not graceful or awaited is None or awaited in open_.offers or awaited not in fleet.members:
            return False
        if self.config.quorum < 1 and now >= (open_.quorum_s or 0.0) + self.config.grace_s:
            return False
        alone = rules.expected_members(open_, fleet, (fleet.members[awaited],))
        return bool(rules.awaited_members(open_, alone))

    def _reaching(self, fleet: Fleet, roster: Iterable[MemberId], now: float) -> list[MemberId]:
        """Who can own parts of what this roster offers, as far as is known of cuts between members.

        Whoever is left out this time needs the results like the others: he would wait in vain for those of an owner
        that he cannot reach, be late for the next roster, and so again.
        """
        self.parted = {pair: at_s for pair, at_s in self.parted.items() if now - at_s <= PARTED_S}
        everybody = {*roster, *(m for m, view in fleet.members.items() if not view.suspect)} if self.parted else ()
        return rules.reaching_owners(self._able(fleet), everybody, self.parted)

    def _close(self, open_: OpenExchange, fleet: Fleet, now: float, because: str) -> list[Effect]:
        refused = rules.refused_lengths(open_.offers, self.robust.refuse_times) if self.robust.rule != "mean" else {}
        if refused:
            fleet = replace(fleet, members={m: view for m, view in fleet.members.items() if m not in refused})
        fences = [Fence(member=m, why=f"contribution refused: {why}", refused=True) for m, why in refused.items()]
        able = self._reaching(fleet, open_.offers.keys() - refused.keys(), now)
        if self.robust.verify and len(able) == 1:
            return []  # nobody is there to check it: it stays open until somebody is
        for member in refused:
            del open_.offers[member]
        if not able:
            return [*fences, *self.discard(f"no member can own a part of fragment {self.fragment}")]
        open_.roster = tuple(
            RosterEntry(*member, offer.seq, offer.since, offer.upto, offer.ranges, offer.num_steps, coefficient=0.0)
            for member, offer in ((member, open_.offers[member][1]) for member in sorted(open_.offers))
        )
        open_.state, open_.closed_s, open_.closed_because = "reducing", now, because
        open_.base_samples = fleet.samples_committed
        self.turned_away = (self.turned_away - set(open_.offers)) & set(fleet.members)
        open_.candidates = frozenset(able)  # the set of owners only shrinks, so that attempts are bounded (H1)
        open_.owners = rules.deal_chunks(self.num_chunks, able)
        open_.checkers = deal_checkers(open_.owners, able) if self.robust.verify else []
        note = Note(text=f"exchange {open_.id} closes: {because}")
        return [note, *self._begin_work(open_, fleet, now), *fences]

    # ------------------------------------------------------------ what owners cannot do

    def on_missing(self, sender: MemberId, body: msg.Missing, fleet: Fleet, now: float) -> list[Effect]:
        """An owner lacks a piece: another owner if the contributor lives and one can reach it (H7), else it leaves."""
        open_ = self.open
        if open_ is None or not rules.is_current(open_, body.exchange, body.attempt) or not self._works(sender):
            return []
        lost = body.offer.member
        if lost not in {entry.member_id for entry in open_.roster}:
            return []
        open_.bad_pairs.add((sender, lost))
        if lost in fleet.members:
            self.parted[sender, lost] = now
        blamed = {contributor for owner, contributor in open_.bad_pairs if owner == sender}
        others = [m for m in self._able(fleet) if m != sender and (m, lost) not in open_.bad_pairs]
        if (lost in fleet.members and others) or (len(blamed) >= 2 and others):
            note = Note(text=f"{sender} cannot reach {lost} ({body.why}): its parts go to others")
            return [note, *self._remove_owner(open_, sender, fleet, now)]
        return self._shrink(open_, body.offer, f"no owner can get its pieces: {body.why}", fleet, now)

    def on_reached(self, sender: MemberId, other: MemberId) -> None:
        """Two that could not reach each other can again: both may own parts as before."""
        self.parted.pop((sender, other), None)

    def on_refused(self, sender: MemberId, body: msg.Refused, fleet: Fleet, now: float) -> list[Effect]:
        """An owner found bad content: a roster without it for all parts, and the contributor is fenced (H4)."""
        open_ = self.open
        if open_ is None or not rules.is_current(open_, body.exchange, body.attempt) or not self._works(sender):
            return []
        fence = Fence(member=body.offer.member, why=f"contribution refused: {body.why}", refused=True)
        return [fence, *self._shrink(open_, body.offer, body.why, fleet, now)]

    # ------------------------------------------------------------ SPREAD

    def on_have(self, sender: MemberId, body: msg.Have, fleet: Fleet, now: float) -> list[Effect]:
        """A member holds the whole result; commit once enough copies agree on the next anchor."""
        open_ = self.open
        if open_ is None or not rules.is_current(open_, body.exchange, body.attempt):
            return []
        if sender in fleet.members and fleet.members[sender].trust == 0.0:  # banned: its word counts as little
            return []
        if open_.state != "spread" or body.results != open_.results:
            return []
        open_.haves[sender] = body.next_digest
        alive = {m: d for m, d in open_.haves.items() if m in fleet.members}
        if len(set(alive.values())) > 1:
            return self._disagree(open_, alive)
        if not rules.enough_copies(alive, self.config, fleet):
            return []
        return self._commit(open_, body.next_digest, now)

    def _disagree(self, open_: OpenExchange, haves: Mapping[MemberId, str]) -> list[Effect]:
        """Next anchors differ (1.7): everybody checks the anchor it holds; no majority decides."""
        story = ", ".join(f"{m}={d[:8]}" for m, d in sorted(haves.items()))
        fault = Note(text=f"next anchors of fragment {self.fragment} differ: {story}", fault="digest_mismatch")
        if open_.verified:
            self.disagreements += 1
            return [fault, *self.discard("next anchors still differ after everybody verified its own")]
        open_.verified, open_.haves = True, {}
        return [fault, ToAll(body=msg.Verify(fragment=self.fragment, exchange=open_.id, attempt=open_.attempt))]

    def _commit_record(self, open_: OpenExchange, next_digest: str) -> CommitRecord:
        chunk_digests = tuple(open_.reduced[chunk] for chunk in range(self.num_chunks))
        n, of_roster = open_.base.n + 1, open_.entries_digest
        chain = version_chain(
            open_.base.chain,
            {"f": self.fragment, "n": n, "roster": of_roster, "chunks": chunk_digests, "digest": next_digest},
        )
        return CommitRecord(
            fragment=self.fragment, n=n, prev_chain=open_.base.chain, chain=chain, serial=open_.id.serial,
            attempt=open_.attempt, roster=open_.roster, roster_digest=of_roster,
            chunk_digests=chunk_digests, digest=next_digest, base_samples=open_.base_samples,
        )  # fmt: skip

    def committed(self) -> OpenExchange | None:
        """The commit is in the journal: the exchange is over; returns it for the metrics."""
        done, self.open = self.open, None
        self.disagreements = 0
        return done

    # ------------------------------------------------------------ time and membership

    def discard(self, why: str) -> list[Effect]:
        """End the exchange without a commit; offers stay pending at their members (H1)."""
        if self.open is None:
            return []
        ended, self.open = self.open, None
        self.discards += 1
        body = msg.Discarded(fragment=self.fragment, exchange=ended.id, why=why)
        return [Note(text=f"exchange {ended.id} discarded: {why}"), ToAll(body=body)]

    def holds(self, member: MemberId) -> bool:
        """Whether `member` is in a fixed roster: its samples may still be committed (C3)."""
        open_ = self.open
        return open_ is not None and open_.state != "open" and any(e.member_id == member for e in open_.roster)

    def needs(self, member: MemberId) -> bool:
        """Whether `member` has a share in the open exchange: its offer, or parts that it owns."""
        open_ = self.open
        return open_ is not None and (member in open_.offers or self._works(member))

    def on_gone(self, member: MemberId, fleet: Fleet, now: float) -> list[Effect]:
        """An incarnation was fenced: its open offer leaves, its parts move; a fixed roster keeps it."""
        open_ = self.open
        if open_ is None:
            return []
        if open_.state == "open":
            open_.offers.pop(member, None)
            if not open_.offers:
                return self.discard("the only offer was of a fenced member")
            return self.tick(fleet, now)
        open_.haves.pop(member, None)
        if self._works(member):
            if open_.state == "spread" and any(m in fleet.members for m in open_.haves):
                return []
            return self._remove_owner(open_, member, fleet, now)
        return self.tick(fleet, now)

    def tick(self, fleet: Fleet, now: float) -> list[Effect]:
        """Timers: close after grace, move the parts of owners that are suspect or make no progress."""
        open_ = self.open
        if open_ is None:
            return []
        if open_.state == "open" and not self.may_close:
            return []
        if open_.state == "open":
            expected = rules.expected_members(open_, fleet)
            open_.needed = self.closing.offers_needed(self.config, len(expected))
            if open_.quorum_s is None and len(open_.offers) >= open_.needed:
                open_.quorum_s = now
            awaited = rules.awaited_members(open_, expected) if open_.quorum_s is not None else []
            if len(open_.offers) >= open_.needed and (
                because := self.closing.reason(
                    open_, fleet, awaited, self.config, now, turned_away=self.turned_away, sync_s=self.sync_s
                )
            ):
                return self._close(open_, fleet, now, because)
            slowest = max(awaited, key=lambda m: (m.step_s, m.id), default=None)
            open_.waits_for = slowest.id if slowest is not None else None
            told = self._tell_owners(open_)
            views = [fleet.members.get(owner) for owner in set(open_.likely)]
            if any(view is None or view.suspect or not view.ready for view in views):
                open_.likely = ()  # others will own the parts
            return told
        if open_.state == "spread":
            return self._try_commit(open_, fleet, now) or self._unstick(open_, fleet, now)
        for owner in sorted(open_.progress_s):
            pending = any(
                owner in open_.workers(c) and c not in open_.done and owner not in open_.answers.get(c, {})
                for c in range(self.num_chunks)
            )
            view = fleet.members.get(owner)
            stuck = now - open_.progress_s.get(owner, now) > self.config.progress_timeout_s
            if pending and (view is None or view.suspect or stuck):
                why = "gone" if view is None else "suspect" if view.suspect else "no progress"
                return [
                    Note(text=f"owner {owner} loses its parts: {why}"),
                    *self._remove_owner(open_, owner, fleet, now),
                ]
        return []

    def _try_commit(self, open_: OpenExchange, fleet: Fleet, now: float) -> list[Effect]:
        alive = {m: d for m, d in open_.haves.items() if m in fleet.members}
        if alive and len(set(alive.values())) == 1 and rules.enough_copies(alive, self.config, fleet):
            return self._commit(open_, next(iter(alive.values())), now)
        return []

    def _commit(self, open_: OpenExchange, next_digest: str, now: float) -> list[Effect]:
        self.sync_s = now - open_.closed_s
        return [Journal(record=self._commit_record(open_, next_digest))]

    def _unstick(self, open_: OpenExchange, fleet: Fleet, now: float) -> list[Effect]:
        """Too few copies for too long: owners that are suspect lose their parts, at last the exchange is discarded."""
        waited = now - open_.spread_s
        if waited <= self.config.progress_timeout_s:
            return []
        if not any(m in fleet.members for m in open_.haves):
            for owner in sorted(set(open_.owners)):
                view = fleet.members.get(owner)
                if view is None or view.suspect:
                    note = Note(text=f"nobody holds the result and owner {owner} is gone or suspect: its parts move")
                    return [note, *self._remove_owner(open_, owner, fleet, now)]
        if waited <= 3 * self.config.progress_timeout_s:
            return []
        return self.discard(f"after {waited:.0f} s only {len(open_.haves)} members hold the result")

    def lacks_news(self, report: msg.FragmentReport) -> bool:
        """Whether a member that reports this has not heard of the present attempt, or of its results."""
        open_ = self.open
        if open_ is None or open_.state == "open":
            return False
        if report.exchange != open_.id or report.attempt != open_.attempt:
            return True
        return open_.state == "spread" and not report.spread

    def repeat(self, member: MemberId) -> list[Effect]:
        """What a member that may have missed messages needs to take part in the open exchange."""
        open_ = self.open
        if open_ is None or open_.state == "open":
            return []
        out: list[Effect] = [ToOne(member=member, body=open_.assignment)]
        if open_.state == "spread":
            out.append(ToOne(member=member, body=self._spread(open_)))
        return out
