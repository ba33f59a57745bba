"""The controller's side of a dashboard: what it hands over, and what it does when asked.

Controllers call these with themselves; `guard` ends their process if the brain fails inside, as everywhere in them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from faults.plan import FaultPlanError
from orchestrator.dashboard.feed import ACTIONS, MOST_ROWS, NEEDED, OF_A_MEMBER, FeedPart, read_part
from orchestrator.dashboard.live import live_view
from orchestrator.errors import UserError
from orchestrator.events import Operated
from orchestrator.pipeline.figures import FILE_NAME as PIPELINE

Guard = Callable[[], AbstractContextManager[None]]


async def feed_part(controller: Any, metrics_at: int, journal_at: int, guard: Guard) -> FeedPart:
    """What a dashboard lacks: metrics from a byte on, journal rows from a number on, and the present state.

    The file is read on a thread: one that asks for the whole history keeps nobody waiting.
    """
    if controller.failure:
        raise UserError(controller.failure, remedy="logs/controller.log in its directory")
    host = controller.host
    data = await asyncio.get_running_loop().run_in_executor(None, read_part, host.run_dir.metrics, metrics_at)
    with guard():
        return FeedPart(
            run_id=controller.run_id,
            config=controller.config.to_tables() if metrics_at == journal_at == 0 else {},
            metrics=data,
            rows=tuple(host.journal.rows[journal_at : journal_at + MOST_ROWS]),
            view=None if controller.over.is_set() else live_view(host.coordinator, host.clock()),
            able=_able(controller),
            ended=host.finished.reason if host.finished is not None else "",
        )


async def pipeline_part(controller: Any, metrics_at: int, journal_at: int) -> FeedPart:
    """The same of a pipeline's controller, whose metrics are the lines of `pipeline.jsonl`."""
    if controller.failure:
        raise UserError(controller.failure, remedy="logs/controller.log in its directory")
    path = controller.run_dir / PIPELINE
    data = await asyncio.get_running_loop().run_in_executor(None, read_part, path, metrics_at)
    over = controller.over.is_set() and controller.finished is not None
    return FeedPart(
        run_id=controller.run_id,
        config=controller.config.to_tables() if metrics_at == journal_at == 0 else {},
        metrics=data,
        rows=tuple(controller.journal.rows[journal_at : journal_at + MOST_ROWS]),
        view=None,
        able=_able(controller),
        ended=controller.finished.reason if over else "",
        pipeline=True,
    )


async def carry_out(controller: Any, action: str, member: str, by: str) -> str:
    """What somebody asked for at a dashboard; it is journalled with what came of it, which is returned.

    `pause`, `resume`, `save` and `stop` are of the run, `drain` and `kill` of one member. The controller is one of
    islands or of a pipeline: `is_over()`, `names_here()`, `put_on_record(event)`, and the methods of the actions.
    """
    if controller.failure or controller.is_over():
        return "refused: the run is over"
    try:
        outcome = await _act(controller, action, member)
    except UserError as error:  # of this moment: nothing to save yet, for example
        outcome = f"refused: {error.message}"
    if not controller.is_over():
        controller.put_on_record(Operated(action=action, member=member, by=by, outcome=outcome))
    return outcome


async def _act(controller: Any, action: str, member: str) -> str:
    if action in OF_A_MEMBER and member not in controller.names_here():
        return f"refused: no process of {member} is there"
    if action == "kill":
        return _kill(controller, member)
    method = getattr(controller, NEEDED.get(action, action), None) if action in ACTIONS else None
    if method is None:
        return f"refused: {action} is not available in this run"
    if action == "drain":
        await method([member], None, False)
    elif action == "stop":
        await method(True)
    else:
        await method()
    return "asked"


def _kill(controller: Any, member: str) -> str:
    """Injected fault: the process of `member` ends by SIGKILL; journalled before it happens."""
    try:
        controller.injector.now([f"kill:{member}"])
    except (FaultPlanError, UserError) as error:
        return f"refused: {error}"
    return "done"


def _able(controller: Any) -> tuple[str, ...]:
    return tuple(name for name in ACTIONS if name == "kill" or hasattr(controller, NEEDED.get(name, name)))
