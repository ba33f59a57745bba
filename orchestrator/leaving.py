"""When a member that was asked to leave may go: nothing that it did is lost, and nobody needs what it holds.

Pure. The member finishes its step, offers what it has (`MemberMachine.leaving`), and says that it waits; the controller
then ends its incarnation by a fence like any other, and its unused samples go back. Asked for by `atoll leave`, by a
machine that shuts down, and by Ray's drain.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from orchestrator.exchange import FragmentExchange
from orchestrator.membership import Process
from orchestrator.run_state import Membership
from workers.messages import Version


def has_handed_over(process: Process, entry: Membership, exchanges: Sequence[FragmentExchange]) -> bool:
    """Whether everything that it trained on is committed, and no open exchange counts on it."""
    waits = process.hello is not None and process.hello.waiting == "leaving"
    committed = process.consumed <= min(entry.watermarks, default=0)
    return waits and committed and not any(exchange.needs(process.id) for exchange in exchanges)


def is_held(heads: Sequence[Version], others: Collection[Process]) -> bool:
    """Whether the present version of each fragment is applied by somebody else."""
    return all(
        any((report := other.report(fragment)) is not None and report.n >= head.n for other in others)
        for fragment, head in enumerate(heads)
    )
