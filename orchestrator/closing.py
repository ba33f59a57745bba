"""When an exchange closes, by strategy. Pure.

| strategies | an exchange closes |
|---|---|
| those with rounds | when everybody has offered, or a quorum has and `exchange.grace_s` is over (`close_reason`) |
| `decoupled` | likewise; the grace is what is to spare until the first who offered must wait for the result |
| `async-dn` | at once, with whoever has offered: a push |

Pushes that arrive while another one is under way cannot be in it. Their members are moved along and push again on the
next version, all at about the same time; that exchange is held open for them, up to `exchange.grace_s`. Without this
the one with the shortest way to the controller would always be first, and the others would come to their bound.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from orchestrator import exchange_rules as rules
from orchestrator.exchange_rules import Fleet, OpenExchange
from orchestrator.settings import ExchangeConfig
from strategies.config import StrategyConfig
from workers.records import MemberId

if TYPE_CHECKING:
    from orchestrator.fleet import MemberView


@dataclass(frozen=True, kw_only=True, slots=True)
class Closing:
    """How a strategy closes exchanges. `overlap_steps`, `grace_share`: of the adaptive grace."""

    rule: Literal["quorum", "adaptive", "push"] = "quorum"
    overlap_steps: int = 0
    grace_share: float = 0.0

    def offers_needed(self, config: ExchangeConfig, num_expected: int) -> int:
        """Offers with which an exchange can close."""
        return 1 if self.rule == "push" else rules.offers_needed(config, num_expected)

    def staleness_limit(self, config: ExchangeConfig, fleet: Fleet) -> int:
        """Versions after which late work is dropped: where each push is a version, for each live member so many."""
        members = max(len(fleet.members), 1) if self.rule == "push" else 1
        return config.staleness_limit * members

    def reason(
        self,
        open_: OpenExchange,
        fleet: Fleet,
        awaited: Sequence[MemberView],
        config: ExchangeConfig,
        now: float,
        *,
        turned_away: Collection[MemberId],
        sync_s: float,
    ) -> str | None:
        """Why an exchange closes now, or None. `awaited`: whose offers are still to come, by the same look.

        `turned_away`: who offered too late for an exchange and was in none.
        `sync_s`: seconds that the last exchange took from its closing to its commit.
        """
        if self.rule == "push":
            return push_reason(open_, fleet, config, now, turned_away)
        if self.rule == "adaptive":
            grace_s = self.grace_s(open_, fleet, sync_s)
            return rules.close_reason(open_, fleet, awaited, config.model_copy(update={"grace_s": grace_s}), now)
        return rules.close_reason(open_, fleet, awaited, config, now)

    def grace_s(self, open_: OpenExchange, fleet: Fleet, sync_s: float) -> float:
        """Grace of an open exchange, by the step time of the quickest member: it would be the first to wait."""
        step_s = min((m.step_s for m in fleet.members.values() if m.step_s > 0.0), default=0.0)
        quorum_s = open_.quorum_s - open_.opened_s if open_.quorum_s is not None else 0.0
        return adaptive_grace_s(
            overlap_steps=self.overlap_steps, step_s=step_s, quorum_s=quorum_s, sync_s=sync_s, share=self.grace_share
        )


def closing_of(strategy: StrategyConfig) -> Closing:
    """How the strategy that `[strategy]` names closes exchanges."""
    if strategy.own_pace:
        return Closing(rule="push")
    if strategy.name == "decoupled":
        return Closing(rule="adaptive", overlap_steps=strategy.overlap_steps, grace_share=strategy.grace_share)
    return Closing()


def adaptive_grace_s(*, overlap_steps: int, step_s: float, quorum_s: float, sync_s: float, share: float) -> float:
    """`gamma (tau xi_step - xi_quorum - xi_sync)`, never negative: waiting for the late holds nobody up.

    Source: Decoupled DiLoCo (arXiv 2604.21428). `quorum_s`: from the first offer to the quorum; `sync_s`: of one
    exchange, from closing to commit.
    """
    return max(share * (overlap_steps * step_s - quorum_s - sync_s), 0.0)


def push_reason(
    open_: OpenExchange, fleet: Fleet, config: ExchangeConfig, now: float, turned_away: Collection[MemberId]
) -> str | None:
    """Why a push closes now: at once, unless somebody who was turned away is about to push again."""
    if not open_.offers or len(fleet.members) < (config.min_members or 1):
        return None
    awaited = [
        m
        for m in fleet.members.values()
        if m.id in turned_away and m.id not in open_.offers and m.ready and not m.suspect and not m.blocked
    ]
    pushed = ", ".join(str(member) for member in sorted(open_.offers))
    if not awaited:
        return f"push of {pushed}"
    if now < open_.opened_s + config.grace_s:
        return None
    names = ", ".join(str(m.id) for m in awaited)
    return f"push of {pushed}; {config.grace_s:g} s of grace are over, not waiting for {names}"
