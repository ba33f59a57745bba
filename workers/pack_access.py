"""An island's way to its pack: what is lacking comes from elsewhere, and what is here is served to the others."""

from __future__ import annotations

import logging
from pathlib import Path

from workers.context import IslandContext, IslandSpec
from workers.data.errors import DataError
from workers.data.fetch import RemotePack, is_uri
from workers.data.index import INDEX_FILE, PackIndex, check_own, load_index
from workers.data.peers import PackFiles, Peers, PeerShards
from workers.data.reader import PackReader
from workers.data.shard_cache import ShardCache, Source, is_whole
from workers.jobs import MemberStore

log = logging.getLogger("atoll.island")

PATIENCE_S = 20.0


def open_own_pack(spec: IslandSpec, shared: PackIndex) -> PackReader | None:
    """The reader of the pack that only this island has, if it has one: served to nobody. Raises DataError."""
    own = spec.data.per_island.get(spec.name)
    if own is None:
        return None
    key, path = f"data.per_island.{spec.name}", Path(own.path).expanduser()
    if not (path / INDEX_FILE).is_file():
        raise DataError(
            f"{key}.path = {own.path!r}: not on this machine; {spec.name} can only train where its own pack is: start "
            "it there, or stop the run"
        )
    reader = PackReader(path)
    check_own(own.path, reader.index, shared, key)
    return reader


def open_pack(context: IslandContext, peers: Peers) -> PackReader:
    """The reader of an island's pack. It serves what it has to the others, and asks them for what it lacks."""
    spec = context.spec
    assert spec.pack is not None, "a loop's own data is no pack"
    index = load_index(spec.pack)
    assert isinstance(context.store, MemberStore)
    context.store.pack = PackFiles(spec.pack, index)
    if not spec.on_demand or is_whole(spec.pack, index):
        return PackReader(spec.pack)
    threaded = context.executor is not None
    path = spec.data.path
    sources = []
    if path is not None and is_uri(path):
        try:
            sources.append(RemotePack(path).source())
        except DataError as error:
            log.warning("%s: shards come from the other islands", error)
    others = PeerShards(
        index.digest, context.transport, peers, timeout_s=spec.timeout_s, patience_s=PATIENCE_S if threaded else 0.0
    )
    sources.append(Source(name="peers", fetch=others.fetch))
    return PackReader(spec.pack, ShardCache(spec.pack, index, sources, threaded=threaded))
