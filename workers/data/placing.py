"""Where the pack of a run is on one machine: under its path, or in a folder of the cache that fills up. No torch."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

from workers.config import DataConfig
from workers.data.corpus import default_cache_dir
from workers.data.errors import DataError
from workers.data.fetch import is_uri, opened_pack
from workers.data.index import INDEX_FILE, TOKENIZER_FILE, check_shared, load_index

log = logging.getLogger("atoll.island")

AskFiles = Callable[[], Mapping[str, bytes]]
"""Asks the controller for the index of the run's pack, and its tokenizer if it has one, by file name."""


def pack_here(data: DataConfig, pack: Path, ask: AskFiles, *, cache_dir: Path | None = None) -> tuple[Path, bool]:
    """The folder of the pack on this machine, and whether shards may be lacking there that can be had.

    Where the path of the run means nothing on this machine, or is a URI, it is a folder in the cache with the index
    alone to begin with; from the controller where the URI cannot be reached from here. Raises DataError.
    """
    if data.path is not None and is_uri(data.path):
        try:
            return opened_pack(data.path, digest=data.digest, cache_dir=cache_dir), True
        except DataError as error:
            log.warning("%s: its index comes from the controller, its shards from the other islands", error)
            return adopt(ask(), cache_dir=cache_dir), True
    if (pack / INDEX_FILE).is_file():
        return pack, False
    log.info("%s is not on this machine: its shards come from the other islands", pack)
    return adopt(ask(), cache_dir=cache_dir), True


def adopt(files: Mapping[str, bytes], *, cache_dir: Path | None = None) -> Path:
    """A folder in the cache for a pack of which only the index is known, and its tokenizer. Raises DataError."""
    if INDEX_FILE not in files:
        raise DataError(f"the pack of the run has no {INDEX_FILE} on the controller's machine either")
    packs = (default_cache_dir() if cache_dir is None else cache_dir) / "packs"
    staged = packs / f".index-{secrets.token_hex(4)}"
    staged.mkdir(parents=True)
    try:
        (staged / INDEX_FILE).write_bytes(files[INDEX_FILE])
        index = load_index(staged)
        check_shared("the run's pack", index)
        folder = packs / index.digest
        folder.mkdir(exist_ok=True)
        for name in (TOKENIZER_FILE, INDEX_FILE):
            if name in files:
                (staged / name).write_bytes(files[name])
                os.replace(staged / name, folder / name)
    finally:
        for file in staged.iterdir():
            file.unlink()
        staged.rmdir()
    return folder


def pack_files(pack: Path) -> dict[str, bytes]:
    """What `adopt` needs of a pack: small files, that may travel with control messages. Raises DataError."""
    if (pack / INDEX_FILE).is_file():
        check_shared(pack, load_index(pack))
    return {name: (pack / name).read_bytes() for name in (INDEX_FILE, TOKENIZER_FILE) if (pack / name).is_file()}
