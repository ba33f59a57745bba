"""The embedded corpus `stdlib`: the running interpreter's standard library, so that a first run needs no file.

Every .py file, in the order of its path, without tests, installed packages and what the build of the interpreter
wrote (it differs from machine to machine); files that are not UTF-8 are left out. About 12 MB, byte tokenizer. Two
machines with the same build of Python have the same corpus; `corpus_digest` tells.
"""

from __future__ import annotations

import logging
import os
import shutil
import sysconfig
import uuid
from collections.abc import Iterator
from pathlib import Path

from blake3 import blake3

from workers.data.errors import DataError
from workers.data.index import SCHEMA_VERSION, check_sizes, load_index
from workers.data.pack import pack

CORPORA = ("stdlib",)
VAL_FRACTION = 0.05
_LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_BUILD_PREFIXES = ("_sysconfigdata", "config-")
_OTHER_CACHE = "set XDG_CACHE_HOME to a folder you may write to"
_log = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    """Return where packs of embedded corpora are kept: `atoll` in `$XDG_CACHE_HOME`, else in `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "atoll"
    except RuntimeError:
        raise DataError(
            "no home folder is known to keep the embedded corpus in; set XDG_CACHE_HOME to a folder"
        ) from None


def corpus_digest(name: str) -> str:
    """Return the BLAKE3 hash (32 hex characters) of the names and contents of a corpus; reads about 12 MB."""
    whole = blake3()
    for relative, _, data in _corpus_files(name):
        whole.update(f"{relative}\0{len(data)}\0".encode())
        whole.update(data)
    return whole.hexdigest(length=16)


def resolve_corpus(name: str, *, seq_len: int, cache_dir: Path | None = None) -> Path:
    """Return the pack of an embedded corpus, made at the first call and kept in `cache_dir` (default:
    `default_cache_dir()`).

    Several processes may call this at once: each installs a whole folder by one rename, and the first one stays.
    Raises `DataError` for an unknown name, an interpreter without sources, or a cache that cannot be written.
    """
    cache = (default_cache_dir() if cache_dir is None else Path(cache_dir)) / "corpora"
    _make_cache(cache)
    target = cache / f"{name}-{corpus_digest(name)}-s{seq_len}-v{SCHEMA_VERSION}"
    if _is_whole(target):
        return target
    made = cache / f".{target.name}.made-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    files = [path for _, path, _ in _corpus_files(name)]
    try:
        pack(files, made, tokenizer="bytes", seq_len=seq_len, val_fraction=VAL_FRACTION)
        _install(made, target)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return target


def _make_cache(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        refusal = "" if os.access(cache, os.W_OK) else "not writable"
    except OSError as error:
        refusal = error.strerror or str(error)
    if refusal:
        raise DataError(f"{cache}: no place for the embedded corpus ({refusal}); {_OTHER_CACHE}")


def _install(made: Path, target: Path) -> None:
    try:
        os.rename(made, target)
    except OSError as error:
        # Another process was first, and its pack is as good as ours.
        if not _is_whole(target):
            raise DataError(
                f"{target}: no place for the embedded corpus ({error.strerror}); remove this, or {_OTHER_CACHE}"
            ) from None


def _is_whole(target: Path) -> bool:
    """Say whether a usable pack is there; one that is damaged is put out of the way, so that it is made again."""
    if not target.exists():
        return False
    try:
        check_sizes(target, load_index(target))
    except DataError as error:
        _log.warning("embedded corpus in the cache is damaged and made again: %s", error)
        aside = target.with_name(f".{target.name}.damaged-{os.getpid()}-{uuid.uuid4().hex[:8]}")
        try:
            os.rename(target, aside)
        except OSError as failure:
            raise DataError(
                f"{target}: damaged and cannot be replaced ({failure.strerror}); remove this folder"
            ) from None
        shutil.rmtree(aside, ignore_errors=True)
        return False
    return True


def _corpus_files(name: str) -> Iterator[tuple[str, Path, bytes]]:
    """Yield (relative path, path, content) in the order of the relative paths."""
    if name not in CORPORA:
        raise DataError(
            f"data.corpus {name!r}: no such corpus; there is {', '.join(map(repr, CORPORA))}, or give data.path"
        )
    root = Path(sysconfig.get_path("stdlib"))
    num_found = 0
    for relative in sorted(_python_files(root)):
        path = root / relative
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: source of the embedded corpus cannot be read ({error.strerror})") from None
        if _is_utf8(data):
            num_found += 1
            yield relative, path, data
    if not num_found:
        raise DataError(
            f"{root}: this Python has no sources of its standard library; pack files of your own with `atoll data pack`"
        )


def _python_files(root: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(root):
        folders[:] = [each for each in folders if each not in _LEFT_OUT and not each.startswith(_BUILD_PREFIXES)]
        for each in names:
            if each.endswith(".py") and not each.startswith((".", *_BUILD_PREFIXES)):
                yield Path(folder, each).relative_to(root).as_posix()


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
