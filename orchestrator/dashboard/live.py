"""What only a living controller knows: who it hears, which exchanges are open, and why they are not done.

Runs inside the controller, once for each question of a dashboard, and looks at every member once. Pure.
"""

from __future__ import annotations

from typing import Any

from orchestrator import exchange_rules as rules
from orchestrator.coordinator import Coordinator
from orchestrator.exchange import FragmentExchange
from orchestrator.exchange_rules import OpenExchange

MOST_NAMES = 6


def live_view(coordinator: Coordinator, now: float) -> dict[str, Any]:
    """The present state, JSON-ready; moments in seconds of the run. `now`: the clock that the coordinator is given."""
    return {
        "seconds": now - coordinator.zero_s,
        "progress": coordinator.progress(),
        "bytes_sent": coordinator.bytes_sent() - coordinator.bytes_counted,
        "members": {
            member.name: {
                "incarnation": member.incarnation,
                "status": process.status,
                "reason": process.reason,
                "steps": process.hello.steps if process.hello else 0,
                "waiting": process.hello.waiting if process.hello else "state",
                "silent_s": round(now - process.heard_s, 2),
                "leaving": member.name in coordinator.leaving,
            }
            for member, process in sorted(coordinator.roll.processes.items())
        },
        "missing": {name: round(since, 3) for name, since in coordinator.missing_since.items()},
        "away": {name: round(since, 3) for name, since in coordinator.away_since.items()},
        "given_up": dict(coordinator.given_up),
        "stopping": coordinator.stopping is not None,
        "exchanges": [
            _exchange(coordinator, exchange, exchange.open)
            for exchange in coordinator.exchanges
            if exchange.open is not None
        ],
        "discarded": sum(exchange.discards for exchange in coordinator.exchanges),
    }


def _exchange(coordinator: Coordinator, exchange: FragmentExchange, open_: OpenExchange) -> dict[str, Any]:
    return {
        "id": str(open_.id),
        "fragment": exchange.fragment,
        "version": open_.base.n + 1,
        "state": open_.state,
        "opened_s": round(open_.opened_s - coordinator.zero_s, 3),
        "attempt": open_.attempt,
        "num_offers": len(open_.offers),
        "num_reduced": len(open_.reduced),
        "num_chunks": exchange.num_chunks,
        "num_holders": len(open_.haves),
        "why": _why(coordinator, exchange, open_),
    }


def _why(coordinator: Coordinator, exchange: FragmentExchange, open_: OpenExchange) -> str:
    """What an open exchange waits for."""
    if open_.state == "open":
        fleet = coordinator._fleet(exchange.fragment)
        late = [str(view.id) for view in rules.expected_members(open_, fleet) if view.id not in open_.offers]
        needed = exchange.closing.offers_needed(exchange.config, len(late) + len(open_.offers))
        grace = "grace runs" if len(open_.offers) >= needed else f"{needed} make a quorum"
        return f"waits for the offers of {_some(late)}; {grace}" if late else "everybody has offered"
    if open_.state == "reducing":
        waiting = sorted({str(o) for chunk, o in enumerate(open_.owners) if chunk not in open_.reduced})
        return f"{open_.closed_because}; waits for the parts of {_some(waiting)}"
    holders, copies = len(open_.haves), exchange.config.copies
    return f"{open_.closed_because}; {holders} of the {copies} copies that a commit needs are there"


def _some(names: list[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
