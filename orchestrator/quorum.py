"""Whether enough members are there for a commit, and what to say when they are not. Pure.

An exchange closes when more than the share `exchange.quorum` of the members that are expected to offer have offered, or
`exchange.min_members` of them where that is set. Expected are the live incarnations that have samples to offer, silent
ones too: only a fence takes a member out, and so a part of the fleet that is cut off is waited for until limbo is over,
or until somebody says that fewer are enough. Quorum is a rule for quality; that nothing is counted twice and no two
histories arise comes from the one journal (protocol H11).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from orchestrator.closing import Closing
from orchestrator.exchange_rules import Fleet, OpenExchange, expected_members
from orchestrator.settings import ExchangeConfig
from workers.records import MemberId


def shortfall(
    config: ExchangeConfig,
    open_: OpenExchange | None,
    fleet: Fleet,
    islands: Collection[str],
    reason_of: Callable[[MemberId], str],
    absent: Mapping[str, str],
    closing: Closing | None = None,
) -> str:
    """Empty while an exchange that is open can close some time; else who is missing, and what to set.

    Args:
        islands: the run's members by name. reason_of: why a member is not here, as far as it is known.
        absent: names that are not coming back, with the reason.
        closing: when exchanges close; by the quorum if nothing is said.
    """
    if open_ is None or open_.state != "open":
        return ""
    short_of_live = config.min_members is not None and len(fleet.members) < config.min_members
    if len(open_.offers) >= open_.needed > 0 and not short_of_live:  # by the look at everybody that this one follows
        return ""
    expected = expected_members(open_, fleet)
    able = [m for m in expected if m.id in open_.offers or (m.ready and not m.suspect)]
    needed = (closing or Closing()).offers_needed(config, len(expected))
    if len(able) >= needed and not short_of_live:
        return ""
    here = {m.id for m in able}
    missing = [f"{m.id} ({reason_of(m.id)})" for m in expected if m.id not in here]
    named = {m.name for m in fleet.members}
    missing += [f"{name} ({absent.get(name, 'no process yet')})" for name in sorted(set(islands) - named)]
    needed = max(needed, config.min_members or 0)
    rule = (
        f"exchange.min_members = {config.min_members}" if config.min_members else f"exchange.quorum = {config.quorum}"
    )
    remedy = f"set exchange.min_members = {len(able)} to go on with those that are here" if able else "bring one back"
    return (
        f"too few members to commit: {len(able)} are here, {needed} are needed ({rule}); missing: "
        f"{', '.join(missing) or 'nobody by name'}; training goes on up to its bound. It goes on when they are back, "
        f"when {config.limbo_s:g} s of silence fence them, or {remedy}"
    )
