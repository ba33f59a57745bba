"""A member without the run's pack gets the shards that it needs from the others, and trains on the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import local
from orchestrator.build import island_spec
from orchestrator.local import LocalRun
from tests.small_run import SEQ_LEN, small_config
from workers.context import IslandSpec
from workers.data import shards
from workers.data.errors import DataError
from workers.data.index import PackIndex, ShardIndex, load_index
from workers.data.pack import pack
from workers.data.peers import PIECE_BYTES, PackFiles, PeerShards, shard_key
from workers.data.placing import adopt, pack_files, pack_here
from workers.data.reader import PackReader
from workers.data.shard_cache import ShardCache, Source, ensure_shard, is_whole
from workers.store import BlobStore, StoredBlob
from workers.transport.loopback import LoopbackNetwork, LoopbackTransport


@pytest.fixture(scope="module")
def pack_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of several shards."""
    folder = tmp_path_factory.mktemp("pack")
    text = folder / "text.txt"
    text.write_text("\n".join(f"line {i} of a text that is cut into shards" for i in range(2000)), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_TOKENS", 16_384)
        patch.setattr(shards, "SEGMENT_TOKENS", 4096)
        pack([text], folder / "pack", seq_len=SEQ_LEN, val_fraction=0.2)
    return folder / "pack"


@pytest.fixture(scope="module")
def index(pack_dir: Path) -> PackIndex:
    found = load_index(pack_dir)
    assert len(found.splits["train"].shards) > 2
    return found


class Server(BlobStore):
    """A member's store that has nothing but a pack, and notes what it is asked for."""

    def __init__(self, files: PackFiles) -> None:
        super().__init__()
        self.files, self.asked = files, list[str]()

    def find(self, key: str) -> StoredBlob | None:
        self.asked.append(key)
        return self.files.find(key)


@pytest.fixture
def network() -> Iterator[LoopbackNetwork]:
    yield LoopbackNetwork()


def serve(network: LoopbackNetwork, name: str, folder: Path) -> tuple[LoopbackTransport, Server]:
    store = Server(PackFiles(folder, load_index(folder)))
    transport = LoopbackTransport(network, name, store)
    transport.start()
    return transport, store


def source(network: LoopbackNetwork, name: str, index: PackIndex, *peers: LoopbackTransport) -> Source:
    mine = LoopbackTransport(network, name, BlobStore())
    mine.start()
    known = [(peer.address, peer.address) for peer in peers]
    return Source(name="peers", fetch=PeerShards(index.digest, mine, lambda: known, timeout_s=5).fetch)


def empty(tmp_path: Path, pack_dir: Path) -> Path:
    return adopt(pack_files(pack_dir), cache_dir=tmp_path / "cache")


# ---------------------------------------------------------------- the parts


def test_shards_come_when_they_are_read_and_only_those(
    pack_dir: Path, index: PackIndex, tmp_path: Path, network: LoopbackNetwork
) -> None:
    peer, store = serve(network, "peer", pack_dir)
    folder = empty(tmp_path, pack_dir)
    cache = ShardCache(folder, index, [source(network, "me", index, peer)], threaded=False)
    whole, reader = PackReader(pack_dir), PackReader(folder, cache)
    ids = torch.arange(3).numpy()
    needed = reader.shards_of(ids)
    assert [shard.file for shard in needed] == ["train-00000.arrow"] and not cache.has(needed)
    assert (reader.batch(ids) == whole.batch(ids)).all()
    assert {key.split("/")[2] for key in store.asked} == {"train-00000.arrow"} and not is_whole(folder, index)
    every = torch.arange(index.splits["train"].num_samples).numpy()
    assert len(reader.shards_of(every)) == len(index.splits["train"].shards)
    assert (reader.batch(every) == whole.batch(every)).all(), "samples over the border of two shards as well"
    val = torch.arange(index.splits["val"].num_samples).numpy()
    assert (reader.batch(val, "val") == whole.batch(val, "val")).all() and is_whole(folder, index)
    PackReader(folder).verify()


def test_the_order_of_the_leases_is_the_order_of_the_shards(pack_dir: Path, index: PackIndex) -> None:
    reader = PackReader(pack_dir)
    last = index.splits["train"].num_samples - 1
    files = [shard.file for shard in reader.shards_of(torch.tensor([last, 0, last, 1]).numpy())]
    assert files == [index.splits["train"].shards[-1].file, "train-00000.arrow"]


def test_what_is_wanted_is_fetched_ahead_on_a_thread(
    pack_dir: Path, index: PackIndex, tmp_path: Path, network: LoopbackNetwork
) -> None:
    peer, store = serve(network, "peer", pack_dir)
    folder = empty(tmp_path, pack_dir)
    cache = ShardCache(folder, index, [source(network, "me", index, peer)], threaded=True)
    parts = index.splits["train"].shards
    wanted = [parts[2], parts[0]]
    cache.want(wanted)
    cache.want(wanted)
    cache.close()
    assert cache._thread is not None
    cache._thread.join(timeout=20)
    assert cache.has(wanted) and not cache.has([parts[1]])
    asked = [key.split("/")[2] for key in store.asked]
    assert asked.index(wanted[0].file) < asked.index(wanted[1].file), "in the order of the wish"


def test_a_peer_that_lacks_a_shard_or_gives_another_one_is_passed_over(
    pack_dir: Path, index: PackIndex, tmp_path: Path, network: LoopbackNetwork
) -> None:
    shard = index.splits["train"].shards[0]
    lacks, _ = serve(network, "lacks", empty(tmp_path / "a", pack_dir))
    lies, store = serve(network, "lies", pack_dir)
    real = store.files.find

    def other(key: str) -> StoredBlob | None:
        blob = real(key)
        if blob is None:
            return None
        data = bytearray(blob.data)
        data[len(data) // 2] ^= 1
        changed = BlobStore()
        changed.put(key, bytes(data))
        return changed.find(key)

    store.files.find = other  # type: ignore[method-assign]
    folder = empty(tmp_path / "b", pack_dir)
    with pytest.raises(DataError, match=r"train-00000.arrow: not what its index says, and not kept"):
        ensure_shard(folder, shard, index, [source(network, "me", index, lacks, lies)])
    assert not list(folder.glob("*.part"))
    good, _ = serve(network, "good", pack_dir)
    sources = [source(network, "me2", index, lacks, lies), source(network, "me3", index, lacks, good)]
    assert ensure_shard(folder, shard, index, sources).is_file()
    with pytest.raises(DataError, match=r"is with no peer \(no peer is known\)"):
        ensure_shard(folder, index.splits["val"].shards[0], index, [source(network, "me4", index)])


def test_a_fetch_from_peers_goes_on_where_it_was_cut_off(tmp_path: Path, network: LoopbackNetwork) -> None:
    text = tmp_path / "long.txt"
    text.write_text("\n".join(f"line {i} of a long text" for i in range(5 * PIECE_BYTES // 48)), encoding="utf-8")
    pack([text], tmp_path / "pack", seq_len=SEQ_LEN, val_fraction=0.1)
    index = load_index(tmp_path / "pack")
    shard = max(index.splits["train"].shards, key=lambda shard: shard.num_bytes)
    assert shard.num_bytes > 2 * PIECE_BYTES
    peer, store = serve(network, "peer", tmp_path / "pack")
    folder = empty(tmp_path, tmp_path / "pack")
    begun = (tmp_path / "pack" / shard.file).read_bytes()[: PIECE_BYTES + 7]
    (folder / f"{shard.file}.part").write_bytes(begun)
    assert ensure_shard(folder, shard, index, [source(network, "me", index, peer)]).is_file()
    assert shard_key(index.digest, shard.file, 0) not in store.asked, "what was here was not asked for again"
    assert shard_key(index.digest, shard.file, 1) in store.asked


def test_nothing_but_shards_of_the_pack_is_served(pack_dir: Path, index: PackIndex, tmp_path: Path) -> None:
    files = PackFiles(pack_dir, index)
    for key in (
        f"pack/{index.digest}/index.json/0", f"pack/{index.digest}/../secret/0", "pack/other/train-00000.arrow/0",
        f"pack/{index.digest}/train-00000.arrow/x", f"pack/{index.digest}/train-00000.arrow/99999", "pack", "pack///",
    ):  # fmt: skip
        assert files.find(key) is None, key
    assert files.find(shard_key(index.digest, "train-00000.arrow", 0)) is not None


def test_a_machine_that_has_the_path_asks_nobody(pack_dir: Path, tmp_path: Path) -> None:
    config = small_config(pack_dir)

    def refuse() -> dict[str, bytes]:
        raise AssertionError("it is here")

    assert pack_here(config.data, pack_dir, refuse) == (pack_dir, False)
    folder, on_demand = pack_here(config.data, tmp_path / "not-here", lambda: pack_files(pack_dir), cache_dir=tmp_path)
    assert on_demand and load_index(folder).digest == load_index(pack_dir).digest
    gone = small_config(pack_dir, f"data.path={(tmp_path / 'gone').as_uri()}")
    found, on_demand = pack_here(gone.data, tmp_path, lambda: pack_files(pack_dir), cache_dir=tmp_path / "other")
    assert on_demand and found.parent == tmp_path / "other" / "packs", "a URI that cannot be reached from here"
    with pytest.raises(DataError, match=r"no index\.json on the controller's machine either"):
        pack_here(config.data, tmp_path / "not-here", dict, cache_dir=tmp_path)


# ---------------------------------------------------------------- a run


def test_a_joiner_without_the_pack_trains_on_the_same_tokens(
    pack_dir: Path, index: PackIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def result(where: Path) -> dict[str, Any]:
        run = LocalRun(small_config(pack_dir, "run.islands=2", "train.tokens=7680"), where)
        run.start()
        run.run()
        assert run.host.finished is not None and run.host.finished.reason == "done"
        sync = run.islands["island-1"].loop.island.sync
        assert sync is not None
        anchor = {name: value.clone() for name, value in sync.replica.anchor_tensors().items()}
        run.close()
        return anchor

    expected = result(tmp_path / "whole")
    folder = empty(tmp_path, pack_dir)

    def without(*args: Any, **kwargs: Any) -> IslandSpec:
        spec = island_spec(*args, **kwargs)
        return replace(spec, pack=folder, on_demand=True) if spec.name == "island-1" else spec

    monkeypatch.setattr(local, "island_spec", without)
    found = result(tmp_path / "lacking")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    here = [shard for shard in index.splits["train"].shards if (folder / shard.file).is_file()]
    assert here, "shards came from island-0"
    assert all(isinstance(shard, ShardIndex) for shard in here)
