"""Settings that may change while a run goes on: which, how they are checked, and what they give. Pure.

A change is a row of the journal (`SettingsRecord`) from which on it holds, also for a controller that replays it. Who
wants one calls `check_changes` and then hands the coordinator a `SetSettings`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from orchestrator.errors import UserError
from orchestrator.names import nearest
from orchestrator.settings import ExchangeConfig

LIVE = ("exchange.grace_s", "exchange.min_members", "exchange.quorum")
"""What the controller alone decides by: a change needs no member's agreement."""


def changed_exchange(exchange: ExchangeConfig, values: Mapping[str, Any]) -> ExchangeConfig:
    """The section with changes; keys of other sections are left to those who know them."""
    own = {key.partition(".")[2]: value for key, value in values.items() if key.startswith("exchange.")}
    return ExchangeConfig.model_validate({**exchange.model_dump(), **own}) if own else exchange


def check_changes(exchange: ExchangeConfig, values: Mapping[str, Any]) -> ExchangeConfig:
    """The section as it would be.

    Raises:
        UserError: a setting that cannot change while a run goes on, or a value that it cannot have.
    """
    for key in values:
        if key not in LIVE:
            near = nearest(key, list(LIVE))
            remedy = f"{near}; these can change: {', '.join(LIVE)}" if near else f"one of {', '.join(LIVE)}"
            raise UserError(f"{key} cannot change while the run goes on", remedy=remedy)
    try:
        return changed_exchange(exchange, values)
    except ValidationError as error:
        first = error.errors()[0]
        key = f"exchange.{first['loc'][0]}"
        raise UserError(f"{key} = {values.get(key)!r}: {first['msg']}", remedy="the run goes on as it was") from error
