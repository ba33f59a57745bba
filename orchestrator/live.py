"""Settings that `atoll set` may change while a run goes on: those whose fields are marked `LIVE`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.names import nearest
from workers.records import Scalar


def live_keys() -> tuple[str, ...]:
    """`section.key` of every setting that can change, in the order of the sections."""
    out = []
    for section, field in RunConfig.model_fields.items():
        for key, inner in getattr(field.annotation, "model_fields", {}).items():
            extra = inner.json_schema_extra
            if isinstance(extra, dict) and extra.get("live"):
                out.append(f"{section}.{key}")
    return tuple(out)


def check_changes(
    config: RunConfig, already: Mapping[str, Scalar], wanted: Mapping[str, Any]
) -> tuple[tuple[str, Scalar], ...]:
    """`(key, value)` of what is to change, in the form in which the journal has it.

    Args:
        config: what the run was started with.
        already: what was changed since.

    Raises:
        UserError: a key cannot change, has no effect in this run, or a value does not fit.
    """
    keys = live_keys()
    if not wanted:
        raise UserError("no setting was given", remedy=f"KEY=VALUE with one of {', '.join(keys)}")
    for key in wanted:
        if key not in keys:
            near = nearest(key, keys)
            remedy = f"{near}? " if near else ""
            raise UserError(
                f"{key} cannot change while a run goes on", place=key, remedy=f"{remedy}these can: {', '.join(keys)}"
            )
    strategy = config.strategy
    if "strategy.outer_lr" in wanted and (strategy.name == "ddp" or strategy.outer == "average"):
        what = "strategy.name = 'ddp'" if strategy.name == "ddp" else "strategy.outer = 'average'"
        raise UserError("strategy.outer_lr has no effect in this run", place=what, remedy="leave it out")
    try:
        changed = config.with_values({**already, **wanted})
    except UserError as error:  # which would name the place in the run's own file
        raise UserError(error.message, place="atoll set", remedy=error.remedy) from error
    return tuple((key, _value(changed, key)) for key in wanted)


def _value(config: RunConfig, key: str) -> Scalar:
    section, _, name = key.partition(".")
    value = getattr(getattr(config, section), name)
    assert value is None or isinstance(value, int | float | str), f"{key} is marked LIVE and is no plain value"
    return value
