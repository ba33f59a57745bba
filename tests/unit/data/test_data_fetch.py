"""A pack behind a URI: copied once into the cache of a machine, gone on with, checked, refused."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from orchestrator.build import pack_path
from orchestrator.prepare import prepare
from tests.small_run import make_pack, small_config
from workers.data import fetch
from workers.data.errors import DataError
from workers.data.fetch import RemotePack, local_pack
from workers.data.index import INDEX_FILE, load_index
from workers.data.reader import PackReader
from workers.data.shard_cache import ensure_shard


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pack that is far away; the cache of this machine is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "far").mkdir()
    return make_pack(tmp_path / "far")


def shards(folder: Path) -> list[str]:
    return [shard.file for split in load_index(folder).splits.values() for shard in split.shards]


def test_the_copy_is_the_pack_and_a_second_look_needs_nobody(far: Path, tmp_path: Path) -> None:
    here = local_pack(far.as_uri())
    digest = load_index(far).digest
    assert here == tmp_path / "cache" / "atoll" / "packs" / digest
    ids = np.arange(5, dtype=np.int64)
    PackReader(here).verify()
    assert np.array_equal(PackReader(here).batch(ids), PackReader(far).batch(ids))
    uri = far.as_uri()
    for file in far.iterdir():
        file.unlink()
    assert local_pack(uri, digest=digest) == here
    assert local_pack(str(far)) == far  # a folder is itself


def test_a_run_names_the_pack_by_its_digest_and_refuses_another(far: Path) -> None:
    config = prepare(small_config(far, f"data.path={far.as_uri()}")).config
    assert config.data.digest == load_index(far).digest
    assert pack_path(config) == local_pack(far.as_uri())
    with pytest.raises(DataError, match=r"the pack there has digest [0-9a-f]{32}, the run asks for 0{32}"):
        local_pack(far.as_uri(), digest="0" * 32)


def test_a_fetch_that_was_killed_is_gone_on_with(far: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    remote = RemotePack(far.as_uri())
    here = remote.open(tmp_path / "cache")
    index = load_index(here)
    shard = index.splits["train"].shards[0]
    part = here / f"{shard.file}.part"
    part.write_bytes((far / shard.file).read_bytes()[:1000])
    asked: list[int] = []
    real = os.fsync

    def counted(descriptor: int) -> None:
        asked.append(os.fstat(descriptor).st_size)
        real(descriptor)

    monkeypatch.setattr(fetch, "PIECE_BYTES", 512)
    monkeypatch.setattr(fetch.os, "fsync", counted)
    source = bytearray((far / shard.file).read_bytes())
    source[:1000] = bytes(1000)  # what is here already is not asked for again
    (far / shard.file).write_bytes(source)
    ensure_shard(here, shard, index, [remote.source()])
    assert asked == [shard.num_bytes] and not part.exists()


def test_what_is_not_as_its_index_says_is_named_and_not_kept(far: Path) -> None:
    shard = shards(far)[0]
    data = bytearray((far / shard).read_bytes())
    data[len(data) // 2] ^= 1
    (far / shard).write_bytes(data)
    with pytest.raises(DataError, match=rf"{shard}: not what its index says, and not kept"):
        local_pack(far.as_uri())
    data[len(data) // 2] ^= 1
    (far / shard).write_bytes(data)
    PackReader(local_pack(far.as_uri())).verify()  # it is asked for anew


def test_islands_of_one_machine_fetch_each_shard_once(far: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    real = RemotePack.fetch

    def noted(self: RemotePack, shard: object, part: Path) -> None:
        fetched.append(part.name)
        real(self, shard, part)  # type: ignore[arg-type]

    monkeypatch.setattr(RemotePack, "fetch", noted)
    with ThreadPoolExecutor(6) as pool:
        found = set(pool.map(lambda _: local_pack(far.as_uri()), range(6)))
    assert len(found) == 1
    assert sorted(fetched) == sorted(f"{file}.part" for file in shards(far))
    PackReader(found.pop()).verify()


@pytest.mark.parametrize("text", [b"", b"[]", b'{"digest": "../../x"}'])
def test_what_is_no_pack_is_refused(text: bytes, far: Path) -> None:
    (far / INDEX_FILE).write_bytes(text)
    with pytest.raises(DataError, match=r"index\.json: not a pack index"):
        local_pack(far.as_uri())


def test_a_place_that_is_not_there_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"data\.path = 'file:///.*': index\.json cannot be read"):
        local_pack((tmp_path / "nothing").as_uri())
    with pytest.raises(DataError, match=r"data\.path = 'nowhere://x': cannot be used"):
        local_pack("nowhere://x")
