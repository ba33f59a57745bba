"""An island with a pack of its own: it trains on it, nobody else does, and nobody can have its shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from test_local_standby import make_standby, take_place

from orchestrator.build import first_islands, machine_labels, resolve, run_plan
from orchestrator.cli.main import main
from orchestrator.config import RunConfig
from orchestrator.leases import waiting
from orchestrator.ledger import recompute
from orchestrator.local import LocalRun
from orchestrator.prepare import prepare
from orchestrator.segments import read_run
from orchestrator.status import read_status
from tests.small_run import SEQ_LEN, make_pack, small_config
from workers.data.errors import DataError
from workers.data.index import load_index
from workers.data.pack import pack
from workers.data.peers import PackFiles, shard_key
from workers.data.placing import adopt, pack_files
from workers.data.reader import PackReader
from workers.records import LeaseRecord

TOKENS, OWN_TOKENS = 12_800, 3200


@pytest.fixture(scope="module")
def pack_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("pack"))


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of island-1, of letters that the run's pack does not have."""
    folder = tmp_path_factory.mktemp("secret")
    texts = folder / "texts"
    texts.mkdir()
    for number in range(60):
        (texts / f"{number}.txt").write_text("QXZ" * (60 + number), encoding="utf-8")
    words = ["data", "pack", str(texts), "--out", str(folder / "pack"), "--seq-len", str(SEQ_LEN)]
    assert main([*words, "--val-fraction", "0.2", "--scope", "island"]) == 0
    return folder / "pack"


def config_of(pack_dir: Path, own: Path, *more: str) -> RunConfig:
    of = "data.per_island.island-1"
    return small_config(
        pack_dir, "run.islands=2", f"train.tokens={TOKENS}", f"{of}.path={own}", f"{of}.tokens={OWN_TOKENS}",
        "exchange.quorum=0.5", *more,
    )  # fmt: skip


class Watched:
    """Everything that islands of a local run read, by island."""

    def __init__(self, run: LocalRun) -> None:
        self.read: dict[str, list[bytes]] = {}
        for name, island in run.islands.items():
            source, texts = island.loop.island.source, self.read.setdefault(name, [])
            batch = source.batch

            def watched(ids: object, batch: object = batch, texts: list[bytes] = texts) -> object:
                tokens = batch(ids)  # type: ignore[operator]
                texts.extend(bytes(row.tolist()) for row in tokens)
                return tokens

            source.batch = watched  # type: ignore[method-assign]


@pytest.fixture
def run(pack_dir: Path, secret: Path, tmp_path: Path) -> Iterator[LocalRun]:
    run = LocalRun(config_of(pack_dir, secret), tmp_path / "run")
    run.start()
    yield run
    run.close()


def test_only_its_island_trains_on_it_once_each_sample(run: LocalRun) -> None:
    watched = Watched(run)
    run.run()
    secrets = {name: [text for text in texts if b"Q" in text] for name, texts in watched.read.items()}
    assert secrets["island-0"] == []
    assert len(secrets["island-1"]) == OWN_TOKENS // SEQ_LEN
    assert any(b"coral" in text or b"wave" in text for text in watched.read["island-1"]), "shared ones as well"
    found = recompute(read_run(run.run_dir).rows)
    assert found.ok and found.samples()["full"] == TOKENS // SEQ_LEN and found.waiting == ()


def test_while_it_is_away_its_samples_wait_and_status_and_ledger_say_so(
    run: LocalRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run.run(until=lambda: run.host.coordinator.progress() > 0.1)
    (run.run_dir / "config.toml").write_text(run.config.to_toml())
    brain = run.host.coordinator
    brain.plan = replace(brain.plan, replace_dead=False)
    run.kill("island-1")
    run.run(until=lambda: brain.tail and brain.state.samples_accounted() + sum(_waiting(run)) >= TOKENS // SEQ_LEN)
    assert not brain.done() and brain.state.samples_committed() < TOKENS // SEQ_LEN
    (num,) = _waiting(run)
    assert read_status(run.run_dir).waiting == {"island-1": num}
    assert main(["ledger", str(run.run_dir)]) == 0
    assert f"{num:,} samples wait for island-1" in capsys.readouterr().out
    stolen = [
        row.record
        for row in read_run(run.run_dir).rows
        if isinstance(row.record, LeaseRecord)
        and row.record.member == "island-0"
        and any(stop > (TOKENS - OWN_TOKENS) // SEQ_LEN for _, stop in row.record.ranges)
    ]
    assert stolen == []
    run.spawn("island-1")
    run.run()
    assert recompute(read_run(run.run_dir).rows).waiting == ()


def _waiting(run: LocalRun) -> list[int]:
    return list(waiting(run.host.coordinator.state).values())


def test_a_standby_that_takes_its_place_reads_its_pack(run: LocalRun) -> None:
    run.run(until=lambda: run.host.coordinator.progress() > 0.1)
    standby = make_standby(run)
    standby.look()
    run.kill("island-1")
    island = take_place(run, standby, "island-1")
    assert island.loop.island.source.num_own > 0
    watched = Watched(run)
    run.run()
    assert any(b"Q" in text for text in watched.read["island-1"])
    assert not any(b"Q" in text for text in watched.read["island-0"])
    assert recompute(read_run(run.run_dir).rows).waiting == ()


def test_nobody_serves_it_or_hands_it_on(run: LocalRun, pack_dir: Path, secret: Path) -> None:
    index = load_index(secret)
    assert index.scope == "island" and load_index(pack_dir).scope == "run"
    served = run.islands["island-1"].context.store
    for split in index.splits.values():
        for shard in split.shards:
            assert served.find(shard_key(index.digest, shard.file, 0)) is None
    shared = load_index(pack_dir)
    assert served.find(shard_key(shared.digest, shared.splits["train"].shards[0].file, 0)) is not None
    with pytest.raises(DataError, match="never leaves its machine"):
        PackFiles(secret, index)
    with pytest.raises(DataError, match="never leaves its machine"):
        pack_files(secret)
    with pytest.raises(DataError, match="never leaves its machine"):
        adopt({"index.json": (secret / "index.json").read_bytes()})


def test_mistakes_are_named(pack_dir: Path, secret: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"name it in \[data.per_island.NAME\]"):
        resolve(small_config(secret))
    with pytest.raises(DataError, match=r"scope = 'run'.*--scope island"):
        prepare(config_of(pack_dir, pack_dir))
    with pytest.raises(ValueError, match="does not begin with / or ~"):
        config_of(pack_dir, Path("packs/mine"))
    with pytest.raises(ValueError, match=r"data.per_island.island-7: the run has no island of this name"):
        config_of(pack_dir, secret, "data.per_island.island-7.path=/x", "data.per_island.island-7.tokens=1")
    with pytest.raises(ValueError, match=r"are more than train\.tokens"):
        config_of(pack_dir, secret, "train.tokens=100")
    notes = prepare(config_of(pack_dir, tmp_path / "elsewhere")).notes
    assert any("is not on this machine: island-1 looks at its own pack where it starts" in note for note in notes)
    other = tmp_path / "other"
    pack([secret.parent / "texts"], other, seq_len=SEQ_LEN * 2, val_fraction=0.2, scope="island")
    with pytest.raises(DataError, match="samples of so many tokens: 32, the data of all islands has 16"):
        prepare(config_of(pack_dir, other))


def test_in_a_cluster_it_is_started_where_its_pack_is(pack_dir: Path, secret: Path) -> None:
    far = config_of(pack_dir, secret, "run.address=127.0.0.1:6379", "run.labels.region=eu")
    assert machine_labels(far, "island-0") == {"region": "eu"}
    assert machine_labels(far, "island-1") == {"region": "eu", "island": "island-1"}
    assert machine_labels(config_of(pack_dir, secret), "island-1") == {}


def test_machines_that_join_may_have_packs_of_their_own(pack_dir: Path, secret: Path) -> None:
    of = "data.per_island.island-0"
    values = ["run.address=127.0.0.1:6379", "run.islands=auto", "train.per_island.island-9.batch_size=2"]
    config = resolve(config_of(pack_dir, secret, *values))
    assert config.run.elastic and first_islands(config) == ("island-0",)
    both = resolve(config_of(pack_dir, secret, *values, f"{of}.path=/x", f"{of}.tokens=32", "data.own_wait_s=5"))
    assert first_islands(both) == ("island-2",), "who is waited for at the start can be on any machine"
    assert run_plan(both, run_id="r", pack=pack_dir).own_wait_s == 5.0
    with pytest.raises(ValueError, match="the run has no island of this name"):
        config_of(pack_dir, secret, *values, "data.per_island.mine.path=/x", "data.per_island.mine.tokens=1")


def test_where_it_is_not_its_island_says_so(pack_dir: Path, tmp_path: Path) -> None:
    run = LocalRun(config_of(pack_dir, tmp_path / "elsewhere"), tmp_path / "run")
    with pytest.raises(DataError, match="island-1 can only train where its own pack is"):
        run.start()
    run.close()


def test_a_pack_for_all_is_written_as_before(pack_dir: Path, secret: Path) -> None:
    assert "scope" not in (pack_dir / "index.json").read_text(), "older versions read it"
    assert '"scope": "island"' in (secret / "index.json").read_text()
    assert PackReader(secret).index.scope == "island"
