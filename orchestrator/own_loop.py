"""The configuration of a loop of the user's own: in a script, and inside the process of a run (no torch, no Ray)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from orchestrator.config import RunConfig, flatten, load_config, make_config
from orchestrator.errors import UserError
from workers.config import SCRIPT

if TYPE_CHECKING:
    from workers.context import IslandSpec

log = logging.getLogger("atoll.controller")

ConfigLike: TypeAlias = "str | Path | Mapping[str, Any] | RunConfig"

# What `atoll train` sets and a script does not, or what only this machine decides.
NOT_COMPARED = {"train.loop", "train.per_island", "data.digest"}
EXCHANGE_KEYS = ("chunk_values", "timeout_s", "wait_s", "heartbeat_s", "bound_rounds")


def read_config(source: ConfigLike, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """The configuration that a preset's name, a path, values or a configuration stand for, with other values set.

    Raises:
        UserError: not found, an unknown key, a wrong value, or settings that do not fit.
    """
    if isinstance(source, Mapping):
        return make_config({**flatten(source), **flatten(overrides or {})})
    config = source if isinstance(source, RunConfig) else load_config(source).config
    return make_config(overrides, base=config) if overrides else config


def script_config(source: ConfigLike | None, *, num_samples: int | None) -> RunConfig:
    """The configuration of a run that has one island, the script itself.

    Args:
        source: what the script gave.
        num_samples: samples of the dataset that it brings, if it does; they take the place of a preset's corpus.

    Raises:
        UserError: as `read_config`; or there is nothing to train on.
    """
    if source is None and num_samples is None:
        raise UserError(
            "atoll.Island needs a configuration outside of a run: tokens to train and data to train on",
            remedy='atoll.Island(model, optimizer, "debug"), a TOML file, {"train.tokens": ..., "data.path": ...}, '
            "or dataset=...",
        )
    own_data = {} if num_samples is None else {"data.samples": num_samples}
    if source is None or isinstance(source, Mapping):
        config = read_config({**own_data, **flatten(source or {})})
    else:
        config = read_config(source)
        if config.data.samples is None and own_data:
            config = make_config(own_data, base=config)
    alone: dict[str, Any] = {"run.islands": 1, "exchange.min_members": None, "train.loop": SCRIPT}
    if config.run.islands not in (1, "auto"):
        log.warning(
            "a script trains one island, the configuration has run.islands = %s: `atoll train` with train.loop = "
            "'package.module:function' runs them all",
            config.run.islands,
        )
    return make_config(alone, base=config)


def differences(source: ConfigLike, spec: IslandSpec) -> Iterator[str]:
    """In what a configuration differs from that of the run that an island belongs to, setting by setting."""
    config = read_config(source)
    here = {
        "train": config.train.for_island(spec.name),
        "data": config.data,
        "model": config.model,
        "strategy": config.strategy,
        "codec": config.codec,
        "eval": config.eval,
    }
    for section, settings in here.items():
        theirs = getattr(spec, section)
        for name in type(settings).model_fields:
            key, mine, other = f"{section}.{name}", getattr(settings, name), getattr(theirs, name)
            if mine != other and key not in NOT_COMPARED:
                yield f"{key} = {mine!r} here and {other!r} in the run"
    for name in EXCHANGE_KEYS:
        mine, other = getattr(config.exchange, name), getattr(spec, name)
        if mine != other:
            yield f"exchange.{name} = {mine!r} here and {other!r} in the run"
    if config.run.islands not in ("auto", spec.num_islands):
        yield f"run.islands = {config.run.islands} here and {spec.num_islands} in the run"
