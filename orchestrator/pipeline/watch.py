"""Who answers no more and does not end: peers with orders open, trainers and peers without a sign of life (pure).

The middle of `PipelineBrain`, between keeping stages and leading steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.pipeline.commands import Died, End
from orchestrator.pipeline.keeper import StageKeeper
from orchestrator.pipeline.plan import PipelinePlan
from orchestrator.pipeline.roster import Peer
from workers.pipeline.messages import Alive, Heartbeat, Ping

WATCHED = ("offer", "sums", "have", "take", "local", "work", "saved")
MAX_STRIKES, TAKE_FACTOR = 2, 10
AWAY_S = 2.0
"""Between two looks: so long the controller itself did not hear, and nobody else is to blame."""
STALL_FACTOR = 8
"""Of `backward_timeout_s`: a trainer that owes microbatches and sees nothing come or expire for so long is stuck. Its
timeouts double (`microbatches.patience`), so that one slow call after three of them is less. So is a peer that has
calls under way and sees none end."""
PING = ("ping",)
PINGS = 4
"""In each `forward_timeout_s`, to each peer."""


@dataclass(kw_only=True, slots=True)
class _Sign:
    """The newest sign of life of a trainer or a peer, and when its work last went on."""

    nonce: str
    heard_s: float
    progress: int = -1
    moved_s: float = 0.0
    queues: dict[str, int] = field(default_factory=dict)


class Watch(StageKeeper):
    """See the module."""

    def __init__(self, plan: PipelinePlan, *, first_incarnations: dict[str, int] | None = None) -> None:
        super().__init__(plan, first_incarnations=first_incarnations)
        self._signs: dict[str, _Sign] = {}
        self._looked_s: float | None = None
        self._pinged_s = 0.0

    def _died(self, event: Died) -> None:
        raise NotImplementedError

    def _failed(self, peer: Peer, about: tuple[object, ...], why: str) -> None:
        raise NotImplementedError

    # ------------------------------------------------------------ peers

    def _look_for_silence(self) -> None:
        """Orders that are not answered in time: a process that hangs must not hold a step up."""
        self._ordered_s = {ticket: at_s for ticket, at_s in self._ordered_s.items() if ticket in self._open}
        limit_s = self.plan.pipeline.forward_timeout_s
        for ticket, at_s in sorted(self._ordered_s.items()):
            process, about = self._open.get(ticket, ("", ("",)))
            # A state takes as long as it takes, and a file as well, within reason.
            most_s = limit_s * (TAKE_FACTOR if about[0] in ("take", "saved") else 1)
            if about[0] in WATCHED and self._now_s > at_s + most_s:
                del self._open[ticket]
                if (peer := self.roster.peers.get(process)) is not None:
                    self._failed(peer, about, f"no answer for {most_s:g} s")
                    self._strike(process, f"no answer to {about[0]!r} for {most_s:g} s")

    def _strike(self, process: str, why: str) -> None:
        """A peer that does not answer again and again, and says nothing in between, is ended and replaced."""
        peer = self.roster.peers.get(process)
        if peer is None:
            return
        self._strikes[process] = self._strikes.get(process, 0) + 1
        if self._strikes[process] >= MAX_STRIKES:
            del self._strikes[process]
            self._hangs(process, peer.nonce, why)

    def _hangs(self, process: str, nonce: str, why: str) -> None:
        self._out.append(End(process=process, nonce=nonce))
        self._died(Died(process=process, nonce=nonce, why=f"it hangs: {why}"))

    def _look_for_peers(self) -> None:
        """A peer that hangs while only forwards wait for it: trainers send those elsewhere, and tell nobody.

        If it is the last of its stage, that is to itself again and again. It has as long as a backward has that is
        sent, withdrawn and then fenced, and once more the time of a withdrawal.
        """
        pipeline = self.plan.pipeline
        quiet_s = pipeline.backward_timeout_s + 2 * pipeline.forward_timeout_s
        stall_s = STALL_FACTOR * pipeline.backward_timeout_s
        if is_due := self._now_s >= self._pinged_s + pipeline.forward_timeout_s / PINGS:
            self._pinged_s = self._now_s
        for process, peer in sorted(self.roster.peers.items()):
            sign = self._sign(process, peer.nonce)
            if is_due:
                self._order((process, Ping(), PING))
            if self._now_s > sign.heard_s + quiet_s:
                self._hangs(process, peer.nonce, f"no sign of life for {quiet_s:g} s")
            elif self._now_s > sign.moved_s + stall_s:
                self._hangs(process, peer.nonce, f"no call has ended for {stall_s:g} s")

    def _lives(self, peer: Peer, answer: Alive) -> None:
        self._heard_of(self._sign(peer.process, peer.nonce), answer)

    # ------------------------------------------------------------ trainers

    def _heartbeat(self, process: str, beat: Heartbeat) -> None:
        sign = self._sign(process, self.roster.trainers[process])
        sign.queues = dict(beat.queues)
        self._heard_of(sign, beat)

    def queue(self, peer: str) -> int:
        """Calls that trainers have sent to a peer and that it has not answered, by their newest heartbeats."""
        return sum(sign.queues.get(peer, 0) for name, sign in self._signs.items() if name in self.roster.trainers)

    def _heard_of(self, sign: _Sign, beat: Heartbeat | Alive) -> None:
        sign.heard_s = self._now_s
        if beat.progress != sign.progress or not beat.owes:
            sign.progress, sign.moved_s = beat.progress, self._now_s

    def _sign(self, process: str, nonce: str) -> _Sign:
        known = self._signs.get(process)
        if known is None or known.nonce != nonce:
            known = self._signs[process] = _Sign(nonce=nonce, heard_s=self._now_s, moved_s=self._now_s)
        return known

    def _forgive_absence(self) -> None:
        """Where the controller itself did not run or hear for a while, nobody else is to blame."""
        away_s = self._now_s - self._looked_s if self._looked_s is not None else 0.0
        self._looked_s = self._now_s
        if away_s > AWAY_S:
            for sign in self._signs.values():
                sign.heard_s, sign.moved_s = sign.heard_s + away_s, sign.moved_s + away_s
            self._ordered_s = {ticket: at_s + away_s for ticket, at_s in self._ordered_s.items()}

    def _look_for_trainers(self) -> None:
        """A trainer that hangs holds the step: its microbatches go to others, or its successor, in a new round."""
        quiet_s = self.plan.pipeline.trainer_timeout_s
        stall_s = STALL_FACTOR * self.plan.pipeline.backward_timeout_s
        for process, nonce in sorted(self.roster.trainers.items()):
            sign = self._sign(process, nonce)
            if self._now_s > sign.heard_s + quiet_s:
                self._hangs(process, nonce, f"no heartbeat for {quiet_s:g} s")
            elif self._now_s > sign.moved_s + stall_s:
                self._hangs(process, nonce, f"heartbeats without progress for {stall_s:g} s")
