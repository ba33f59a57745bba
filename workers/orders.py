"""What the controller asks of the training thread: evaluate, save, stop."""

from __future__ import annotations

from collections import deque

from workers import messages as msg
from workers.actions import Action, EvaluateNow, Finished, SaveNow
from workers.member import MemberMachine

DECISION_S = 5.0
"""How long a member that was asked to save and stop waits for the fate of an exchange that is being decided."""

Order = msg.Evaluate | msg.Save | msg.Stop


def next_order(orders: deque[Order], machine: MemberMachine, *, base_samples: int) -> Action | None:
    """Take the first order that can be obeyed now out of the queue; None if there is none."""
    order = next((order for order in orders if can_obey(order, machine)), None)
    if order is None:
        return None
    orders.remove(order)
    if isinstance(order, msg.Evaluate):
        here = tuple(state.n for state in machine.fragments)
        return EvaluateNow(samples=order.samples if here == order.versions else base_samples)
    if isinstance(order, msg.Stop) and order.save:
        machine.still = True
    return SaveNow(order=order) if isinstance(order, msg.Save) else Finished(save=order.save)


def can_obey(order: Order, machine: MemberMachine) -> bool:
    """One that cannot be obeyed yet (or any more: its version was revoked) does not hold up the others."""
    here = [state.n for state in machine.fragments]
    if isinstance(order, msg.Evaluate):
        known = all(mine >= asked for mine, asked in zip(here, order.versions, strict=True))
        return known and machine.holds_all()
    if isinstance(order, msg.Stop):
        # What it holds may be about to be committed on its word: saved before that, the version would be nobody's.
        return not order.save or not machine.is_deciding() or machine.now - machine.stop_asked_s >= DECISION_S
    if order.local:
        return True
    return min(here) >= 0 and machine.log.genesis is not None  # the last act of a fenced one, too
