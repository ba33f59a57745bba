"""What owners are asked to do in an exchange: who works on which part, by which recipe, and what their answers say.

`(MEASURING ->) REDUCING -> SPREAD`: the middle of `orchestrator/exchange.py`, and pure as that is. Distances are
measured first where the rule of `[robust]` needs them (`strategies/robust.py`); with `robust.verify` two members work
on each part (`orchestrator/checking.py`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from orchestrator import checking
from orchestrator import exchange_rules as rules
from orchestrator.exchange_effects import Blame, Effect, Note, ToAll
from orchestrator.exchange_rules import Fleet, OpenExchange
from orchestrator.settings import RobustConfig
from strategies.robust import decide, to_measure, whole_squares
from workers import messages as msg
from workers.records import MemberId, OfferId, roster_digest, work_digest


class OwnersWork:
    """The part of an exchange in which owners work; `FragmentExchange` is the whole."""

    fragment: int
    num_chunks: int
    robust: RobustConfig
    open: OpenExchange | None

    def discard(self, why: str) -> list[Effect]:
        """End the exchange without a commit."""
        raise NotImplementedError

    def _able(self, fleet: Fleet) -> list[MemberId]:
        able = rules.able_owners(fleet)
        if self.open is None or self.open.state == "open":
            return able
        return [m for m in able if m in self.open.candidates and m not in self.open.removed_owners]

    # ------------------------------------------------------------ MEASURING, REDUCING

    def _begin_work(self, open_: OpenExchange, fleet: Fleet, now: float) -> list[Effect]:
        """A new roster: everything about it is decided anew, by distances where the rule needs them."""
        offers = [(e.member_id, open_.offers[e.member_id][1]) for e in open_.roster]
        open_.base_shares = tuple(rules.coefficients(offers, fleet))
        open_.reduced = rules.parts_after_roster_change(open_.reduced)
        open_.answers, open_.measured = {}, {}
        open_.recipe = to_measure(
            self.robust.rule, self._lengths(open_), history=self.robust.history, clip_times=self.robust.clip_times
        )
        if open_.recipe is None:
            return self._decide(open_, fleet, now)
        open_.state = "measuring"
        self._weigh(open_, open_.base_shares)
        return self._assign(open_, fleet, now)

    def _lengths(self, open_: OpenExchange) -> list[float]:
        """Of the contributions, where the rule asks for them."""
        if self.robust.rule == "mean":
            return []
        return [rules.length_of(open_.offers[entry.member_id][1]) for entry in open_.roster]

    def _decide(self, open_: OpenExchange, fleet: Fleet, now: float) -> list[Effect]:
        """Lengths and distances are known: what becomes of the contributions."""
        robust, lengths = self.robust, self._lengths(open_)
        squares = whole_squares([open_.measured[c] for c in range(self.num_chunks)]) if open_.measured else None
        decision = decide(
            robust.rule, open_.base_shares, lengths, squares, num_wrong=robust.num_wrong, bucket=robust.bucket,
            seed=str(open_.id), history=robust.history, clip_times=robust.clip_times,
        )  # fmt: skip
        open_.recipe, open_.state = decision.recipe, "reducing"
        open_.answers, open_.measured = {}, {}
        self._weigh(open_, decision.weights)
        notes = [Note(text=f"exchange {open_.id}: {robust.rule}, {decision.why}")] if robust.rule != "mean" else []
        return [*notes, *self._assign(open_, fleet, now)]

    def _weigh(self, open_: OpenExchange, weights: Sequence[float]) -> None:
        open_.roster = tuple(
            entry.weighed(weight) for entry, weight in zip(open_.roster, rules.as_fp32(weights), strict=True)
        )

    def _assign(self, open_: OpenExchange, fleet: Fleet, now: float) -> list[Effect]:
        open_.attempt += 1
        if open_.state != "measuring":
            open_.state = "reducing"
        open_.entries_digest = roster_digest(open_.roster)
        open_.roster_digest = work_digest(open_.entries_digest, open_.recipe)
        open_.haves = {}
        open_.progress_s = {worker: now for chunk in range(self.num_chunks) for worker in open_.workers(chunk)}
        open_.assignment = self._assignment(open_, fleet)
        return [ToAll(body=open_.assignment)]

    def _assignment(self, open_: OpenExchange, fleet: Fleet) -> msg.Assign:
        included = [entry.member_id for entry in open_.roster]
        return msg.Assign(
            fragment=self.fragment,
            exchange=open_.id,
            attempt=open_.attempt,
            base=open_.base,
            base_samples=open_.base_samples,
            roster=open_.roster,
            roster_digest=open_.roster_digest,
            owners=open_.owners,
            recipe=open_.recipe,
            checkers=tuple(tuple(checkers) for checkers in open_.checkers),
            owner_addresses=tuple(
                (str(m), fleet.members[m].address) for m in sorted(set(open_.owners)) if m in fleet.members
            ),
            offers=tuple((m, *open_.offers[m]) for m in included),
        )

    def _shrink(self, open_: OpenExchange, offer: OfferId, why: str, fleet: Fleet, now: float) -> list[Effect]:
        left = tuple(entry for entry in open_.roster if entry.offer != offer)
        if left == open_.roster:
            return []
        if not left:
            return self.discard(f"nobody is left in the roster ({why})")
        note = Note(text=f"exchange {open_.id}: {offer} leaves the roster: {why}", member=offer.member.name)
        open_.roster = left
        return [note, *self._begin_work(open_, fleet, now)]

    def _works(self, member: MemberId) -> bool:
        open_ = self.open
        return open_ is not None and (member in open_.owners or any(member in checkers for checkers in open_.checkers))

    def _remove_owner(self, open_: OpenExchange, owner: MemberId, fleet: Fleet, now: float) -> list[Effect]:
        if not self._works(owner):
            open_.removed_owners.add(owner)
            return []
        open_.removed_owners.add(owner)
        able = self._able(fleet)
        if not able:
            return self.discard("no owner is left")
        for given in open_.answers.values():
            given.pop(owner, None)
        for chunk, holder in enumerate(open_.owners):
            if holder == owner:
                open_.reduced.pop(chunk, None)
                open_.measured.pop(chunk, None)
        if not self.robust.verify:
            open_.owners = rules.redeal_chunks(open_.owners, owner, able)
            return self._assign(open_, fleet, now)
        for chunk in range(self.num_chunks):
            workers = [m for m in open_.workers(chunk) if m != owner]
            others = [m for m in able if m not in workers]
            if len(workers) < 2 and not others:
                return self.discard("nobody is left to check a part (robust.verify)")
            if len(workers) < 2:
                workers.append(others[chunk % len(others)])
            open_.owners = (*open_.owners[:chunk], workers[0], *open_.owners[chunk + 1 :])
            open_.checkers[chunk] = workers[1:]
        return [*self._assign(open_, fleet, now), *self._settle(open_, fleet, now)]

    def on_reduced(self, sender: MemberId, body: msg.Reduced, fleet: Fleet, now: float) -> list[Effect]:
        """An owner finished chunks of the present roster."""
        open_ = self.open
        if open_ is None or open_.id != body.exchange or body.roster_digest != open_.roster_digest:
            return []
        return self._answered(open_, sender, body.chunks, fleet, now) if open_.state == "reducing" else []

    def on_measured(self, sender: MemberId, body: msg.Measured, fleet: Fleet, now: float) -> list[Effect]:
        """An owner measured distances in chunks of the present roster."""
        open_ = self.open
        if open_ is None or open_.id != body.exchange or body.roster_digest != open_.roster_digest:
            return []
        return self._answered(open_, sender, body.chunks, fleet, now) if open_.state == "measuring" else []

    def _answered(
        self,
        open_: OpenExchange,
        sender: MemberId,
        chunks: Sequence[tuple[int, Hashable]],
        fleet: Fleet,
        now: float,
    ) -> list[Effect]:
        for chunk, answer in chunks:
            if 0 <= chunk < self.num_chunks and sender in open_.workers(chunk):
                open_.answers.setdefault(chunk, {}).setdefault(sender, answer)
        open_.progress_s[sender] = now
        return self._settle(open_, fleet, now)

    def _settle(self, open_: OpenExchange, fleet: Fleet, now: float) -> list[Effect]:
        """What the answers say; the next state once all parts are known."""
        asked = False
        for chunk, given in sorted(open_.answers.items()):
            workers = open_.workers(chunk)
            found = checking.outcome(given, workers, verify=self.robust.verify)
            if found.liars:
                return self._blame(open_, found.liars[0], chunk, fleet, now)
            if found.hopeless:
                return self.discard(f"three members have different results of part {chunk}")
            if found.ask_another:
                others = [m for m in self._able(fleet) if m not in workers]
                if not others:
                    return self.discard(f"part {chunk} has two results, and there is no third member to ask")
                open_.checkers[chunk].append(others[chunk % len(others)])
                asked = True
            elif found.answer is not None:
                open_.done[chunk] = found.answer  # type: ignore[assignment]
        if asked:
            return [Note(text=f"exchange {open_.id}: parts differ, others are asked"), *self._assign(open_, fleet, now)]
        if len(open_.done) < self.num_chunks:
            return []
        if open_.state == "measuring":
            return self._decide(open_, fleet, now)
        open_.state, open_.spread_s = "spread", now
        open_.results = msg.results_digest(tuple(open_.reduced[chunk] for chunk in range(self.num_chunks)))
        return [ToAll(body=self._spread(open_))]

    def _blame(self, open_: OpenExchange, liar: MemberId, chunk: int, fleet: Fleet, now: float) -> list[Effect]:
        what = "measured" if open_.state == "measuring" else "reduced"
        for part in range(self.num_chunks):  # whom it agreed with elsewhere may be another one that lies
            if liar in open_.workers(part):
                open_.reduced.pop(part, None)
                open_.measured.pop(part, None)
        blame = Blame(member=liar, why=f"it {what} part {chunk} otherwise than two others")
        return [*self._remove_owner(open_, liar, fleet, now), blame]

    def _spread(self, open_: OpenExchange) -> msg.Spread:
        digests = tuple(open_.reduced[chunk] for chunk in range(self.num_chunks))
        return msg.Spread(fragment=self.fragment, exchange=open_.id, attempt=open_.attempt, chunk_digests=digests)
