"""Look at the files that a configuration names, before any process starts (no torch, no Ray)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import UserError

if TYPE_CHECKING:
    from orchestrator.config import RunConfig
    from workers.data.index import PackIndex


def check_files(config: RunConfig) -> PackIndex | None:
    """Check the folder of the data and that of the initial weights.

    Returns:
        The index of the pack that `data.path` names; None for the embedded corpus and for data of the loop.

    Raises:
        ValueError: a missing or unreadable folder, or a pack that is not the one of `data.digest`.
    """
    _check_init_from(config.model.init_from)
    _check_loop(config)
    return check_pack(config.data.path, config.data.digest)


def _check_loop(config: RunConfig) -> None:
    """The built-in loop knows nothing of a dataset that is brought along."""
    if config.data.samples is not None and config.train.loop is None:
        message = f"data.samples = {config.data.samples}: a loop of your own brings the data, and train.loop is not set"
        remedy = "train.loop = 'package.module:function', or data.path and data.corpus for the built-in loop"
        raise UserError(message, place="data.samples", remedy=remedy)


def check_pack(path: str | None, digest: str | None) -> PackIndex | None:
    """Check the folder that `data.path` names; as `check_files`."""
    if path is None:
        return None
    from workers.data.fetch import local_pack
    from workers.data.index import check_sizes, load_index

    folder = local_pack(path, digest=digest) if "://" in path else Path(path).expanduser()
    if not folder.exists():
        remedy = f"atoll data pack SOURCE --out {path}"
        raise UserError(f"there is no folder {path!r}", place="data.path", remedy=remedy)
    index = load_index(folder)
    check_sizes(folder, index)
    if digest is not None and index.digest != digest:
        message = f"the pack in {path!r} has the digest {index.digest}, the configuration asks for {digest}"
        remedy = "the folder that this digest belongs to, or `--set data.digest=` for a new run on other data"
        raise UserError(message, place="data.digest", remedy=remedy)
    return index


def _check_init_from(init_from: str | None) -> None:
    if init_from is None:
        return
    folder = Path(init_from).expanduser()
    if not folder.is_dir():
        remedy = "a folder with config.json and *.safetensors"
        raise UserError(f"there is no folder {init_from!r}", place="model.init_from", remedy=remedy)
    if not any(folder.glob("*.safetensors")):
        message = f"there is no *.safetensors file in {init_from!r}"
        remedy = "a folder in Llama format, as `atoll export` writes it"
        raise UserError(message, place="model.init_from", remedy=remedy)
