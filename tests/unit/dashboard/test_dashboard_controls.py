"""What a dashboard's buttons ask for is there in the controller, and a refusal is an answer."""

from __future__ import annotations

import asyncio
import inspect
from types import SimpleNamespace

import pytest

from orchestrator.actors import ControllerActor
from orchestrator.dashboard.controls import carry_out
from orchestrator.dashboard.feed import ACTIONS, NEEDED
from orchestrator.errors import UserError
from orchestrator.events import Operated
from orchestrator.island_actor import IslandActor
from orchestrator.pipeline.controller import PipelineActor


@pytest.mark.parametrize("action", [action for action in ACTIONS if action != "kill"])
def test_the_controller_has_a_method_for_each_button(action: str) -> None:
    actor = ControllerActor.__ray_metadata__.modified_class
    assert inspect.iscoroutinefunction(getattr(actor, NEEDED.get(action, action), None))
    pipeline = PipelineActor.__ray_metadata__.modified_class
    assert inspect.iscoroutinefunction(getattr(pipeline, NEEDED.get(action, action), None))


def test_islands_can_be_killed() -> None:
    assert callable(IslandActor.__ray_metadata__.modified_class.die)


def test_what_is_asked_for_too_early_is_refused_and_journalled() -> None:
    async def save() -> None:
        raise UserError("the run has not begun: there is nothing to save", remedy="wait for the first round")

    handled: list[object] = []
    controller = SimpleNamespace(failure="", is_over=lambda: False, put_on_record=handled.append, save=save)
    outcome = asyncio.run(carry_out(controller, "save", "", "a test"))
    assert outcome == "refused: the run has not begun: there is nothing to save"
    assert handled == [Operated(action="save", member="", by="a test", outcome=outcome)]
