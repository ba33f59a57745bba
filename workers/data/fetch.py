"""A pack that is somewhere else: its files come into a cache of this machine, checked against its index.

`data.path` may be a URI of any filesystem that `pyarrow.fs` knows. The cache holds one folder for each digest of a
pack, so that what is there can only be right or unfinished. Processes of one machine share it
(`workers/data/shard_cache.py`): whoever starts a run fetches the whole pack, an island each shard when it needs it.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from workers.data.corpus import default_cache_dir
from workers.data.errors import DataError
from workers.data.index import INDEX_FILE, TOKENIZER_FILE, ShardIndex, check_shared, load_index, shard_paths
from workers.data.shard_cache import Source, ensure_shard
from workers.data.tokenizers import load_tokenizer

PIECE_BYTES = 4 << 20
DIGEST = re.compile("[0-9a-f]{32}")


def is_uri(path: str) -> bool:
    """Whether `data.path` names a place by a URI, and not a folder of this machine."""
    scheme, separator, _ = path.partition("://")
    return bool(separator) and scheme.isalnum()


def local_pack(path: str, *, digest: str | None = None, cache_dir: Path | None = None) -> Path:
    """The folder of a pack on this machine: `path` itself, or a copy in the cache of what the URI `path` names.

    `digest`: of the pack that it has to be. Raises DataError naming the file, the cause and what to do.
    """
    if not is_uri(path):
        return Path(path).expanduser().resolve()
    folder = opened_pack(path, digest=digest, cache_dir=cache_dir)
    RemotePack(path).complete(folder)
    return folder


def opened_pack(uri: str, *, digest: str | None = None, cache_dir: Path | None = None) -> Path:
    """The folder in the cache of a pack behind a URI: its index, its tokenizer, and the shards that came so far.

    Raises DataError.
    """
    cache = (default_cache_dir() if cache_dir is None else cache_dir) / "packs"
    known = cache / digest if digest is not None else None
    if known is None or not (known / INDEX_FILE).is_file():
        known = RemotePack(uri).open(cache)
    if digest is not None and load_index(known).digest != digest:
        found = load_index(known).digest
        raise DataError(f"data.path = {uri!r}: the pack there has digest {found}, the run asks for {digest}")
    return known


class RemotePack:
    """A pack behind a URI."""

    def __init__(self, uri: str) -> None:
        """Raises DataError for a URI that means nothing."""
        self.uri = uri.rstrip("/")
        try:
            self.filesystem, path = fs.FileSystem.from_uri(self.uri)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise self._failed("", "cannot be used", error) from error
        self.folder = path.rstrip("/")

    def open(self, cache: Path) -> Path:
        """The pack's folder in the cache, with its index and its tokenizer."""
        text = self._read(INDEX_FILE)
        try:
            digest = str(json.loads(text)["digest"])
        except (ValueError, KeyError, TypeError):
            digest = ""
        if not DIGEST.fullmatch(digest):  # it becomes the name of a folder
            raise DataError(f"{self.uri}/{INDEX_FILE}: not a pack index; make it with `atoll data pack`")
        folder = cache / digest
        folder.mkdir(parents=True, exist_ok=True)
        staged = folder / f".index-{secrets.token_hex(4)}"
        staged.mkdir()
        try:
            (staged / INDEX_FILE).write_bytes(text)
            index = load_index(staged)
            check_shared(self.uri, index)
            if index.tokenizer.kind == "json":
                (staged / TOKENIZER_FILE).write_bytes(self._read(TOKENIZER_FILE))
                load_tokenizer(staged, index)
                os.replace(staged / TOKENIZER_FILE, folder / TOKENIZER_FILE)
            os.replace(staged / INDEX_FILE, folder / INDEX_FILE)
        finally:
            for file in staged.iterdir():
                file.unlink()
            staged.rmdir()
        return folder

    def complete(self, folder: Path) -> None:
        """Fetch every shard that is not in the cache yet."""
        index = load_index(folder)
        for _, shard, _ in shard_paths(folder, index):
            ensure_shard(folder, shard, index, [self.source()])

    def source(self) -> Source:
        """This place, as one of those that shards come from."""
        return Source(name=self.uri, fetch=self.fetch)

    def fetch(self, shard: ShardIndex, part: Path) -> None:
        """Go on with a part where it ends."""
        try:
            with part.open("ab") as out, self.filesystem.open_input_file(f"{self.folder}/{shard.file}") as source:
                if out.tell() > shard.num_bytes:
                    out.truncate(0)
                source.seek(out.tell())
                while piece := source.read(PIECE_BYTES):
                    out.write(piece)
                out.flush()
                os.fsync(out.fileno())
        except (OSError, pa.ArrowException) as error:
            raise self._failed(shard.file, "cannot be fetched", error) from error

    def _read(self, file: str) -> bytes:
        try:
            with self.filesystem.open_input_stream(f"{self.folder}/{file}") as source:
                return bytes(source.read())
        except (OSError, pa.ArrowException) as error:
            raise self._failed(file, "cannot be read", error) from error

    def _failed(self, file: str, what: str, error: Exception) -> DataError:
        why = " ".join(str(error).split())[:300]
        return DataError(f"data.path = {self.uri!r}: {file + ' ' if file else ''}{what} ({why})")
