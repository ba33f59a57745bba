"""Snapshots on another filesystem: written beside training, complete or not there, found again from anywhere."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from pyarrow import fs

from faults.process import FullDisk
from orchestrator.artifacts import load_anchor
from orchestrator.errors import UserError
from orchestrator.finish import build_summary
from orchestrator.local import LocalRun
from orchestrator.prepare import prepare
from orchestrator.resume import check_resumable
from orchestrator.rollback import ASIDE, PINNED, find_target, pin, set_aside_later, targets
from orchestrator.run_state import Head, RunState
from orchestrator.rundir import RunDir
from orchestrator.segments import read_run
from orchestrator.summary import Summary, save_summary
from tests.small_run import make_pack, small_config
from workers import local_state
from workers import messages as msg
from workers.messages import Version
from workers.records import FaultRecord, RevokeRecord, SnapshotRecord
from workers.replica import Replica
from workers.saved import MANIFEST, SNAPSHOT_FILES, SnapshotError
from workers.snapshot import Staged, seal_snapshot, stage_tensors
from workers.snapshot_store import SnapshotStore, open_store, stored_name
from workers.snapshot_writer import SnapshotWriter

EVERY = "run.snapshot_every_s=0.4"


@pytest.fixture(scope="module")
def pack_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("pack"))


def staged(folder: Path, value: float, version: int) -> Staged:
    return stage_tensors(
        folder,
        {"anchor/w": torch.full((64,), value)},
        {"state/0/0": torch.full((64,), -value)},
        versions=(version,),
        chains=(f"{version:032x}",),
        digests=(f"{version + 1:032x}",),
    )


def a_store(tmp_path: Path) -> SnapshotStore:
    """Below a folder that the rest of the filesystem is hidden from."""
    (tmp_path / "bucket").mkdir(exist_ok=True)
    inside = fs.SubTreeFileSystem(str(tmp_path / "bucket"), fs.LocalFileSystem())
    return SnapshotStore(inside, "models/run-1", place="bucket:models/run-1")


def publish(store: SnapshotStore, tmp_path: Path, version: int, *, name: str | None = None, keep: int = 3) -> str:
    named = seal_snapshot(tmp_path / "outbox", name, staged(tmp_path / "outbox", float(version), version), keep=1)
    store.publish(tmp_path / "outbox" / named, keep=keep)
    return named


def names(store: SnapshotStore) -> list[str]:
    return [name for name, _ in store.complete()]


def test_what_is_published_is_found_checked_and_fetched(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    assert store.complete() == []
    publish(store, tmp_path, 3)
    (name, manifest), *_ = store.complete()
    assert (name, manifest["versions"]) == ("v3", [3])
    store.check(name, manifest)
    path = store.fetch(name, manifest, tmp_path / "here")
    assert {entry.name for entry in path.iterdir()} == {*SNAPSHOT_FILES, MANIFEST}
    assert store.fetch(name, manifest, tmp_path / "here") == path


def test_only_the_newest_numbered_ones_are_kept(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    publish(store, tmp_path, 0, name="genesis")
    for version in (1, 2, 3, 12):
        publish(store, tmp_path, version, keep=2)
    assert names(store) == ["v12", "v3", "genesis"]
    left = {entry.path for entry in store.filesystem.get_file_info(fs.FileSelector(store.folder))}
    assert left == {f"{store.folder}/{name}" for name in ("genesis", "v3", "v12")}


def test_one_that_is_written_again_under_its_name_replaces_the_old_one_and_its_files(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    publish(store, tmp_path, 1, name="stop")
    publish(store, tmp_path, 2, name="stop")
    (name, manifest), *_ = store.complete()
    store.check(name, manifest)
    files = [entry for entry in store.filesystem.get_file_info(fs.FileSelector(f"{store.folder}/stop"))]
    assert manifest["versions"] == [2] and len(files) == 3


@pytest.mark.parametrize("num_files", [0, 1, 2])
def test_one_that_was_interrupted_is_none(num_files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = a_store(tmp_path)
    publish(store, tmp_path, 1)
    real, done = SnapshotStore._upload, 0

    def stops(self: SnapshotStore, file: Path, path: str) -> None:
        nonlocal done
        if done == num_files:
            raise OSError("the connection is gone")
        done += 1
        real(self, file, path)

    monkeypatch.setattr(SnapshotStore, "_upload", stops)
    monkeypatch.setattr(SnapshotStore, "_write", lambda self, path, text: stops(self, Path(), path))
    with pytest.raises(SnapshotError, match=r"v2 cannot be written .the connection is gone"):
        publish(store, tmp_path, 2)
    assert names(store) == ["v1"]


def test_an_altered_file_is_named_and_refused(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    publish(store, tmp_path, 4)
    (name, manifest), *_ = store.complete()
    file = tmp_path / "bucket" / store.folder / name / stored_name("states.safetensors", manifest)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for use in (lambda: store.check(name, manifest), lambda: store.fetch(name, manifest, tmp_path / "here")):
        with pytest.raises(SnapshotError, match=r"states-[0-9a-f]{32}.safetensors is missing or altered; remove"):
            use()
    assert not (tmp_path / "here" / name).exists()
    file.unlink()
    with pytest.raises(SnapshotError, match="is missing or altered"):
        store.check(name, manifest)


def test_a_uri_that_means_nothing_is_refused_before_anything_starts(pack_dir: Path) -> None:
    with pytest.raises(SnapshotError, match=r"run\.snapshots = 'nowhere://x' cannot be used .*s3://bucket"):
        prepare(small_config(pack_dir, "run.snapshots=nowhere://x"))


# ------------------------------------------------------------ beside training


class Slow(SnapshotStore):
    """A store whose link is as slow as the test wants."""

    def __init__(self, store: SnapshotStore) -> None:
        super().__init__(store.filesystem, store.folder, place=store.place)
        self.reached, self.go_on = threading.Event(), threading.Event()

    def publish(self, source: Path, *, keep: int) -> None:
        self.reached.set()
        assert self.go_on.wait(30)
        super().publish(source, keep=keep)


def test_training_goes_on_while_a_snapshot_is_sent_and_moves_nothing_in_it(pack_dir: Path, tmp_path: Path) -> None:
    run = LocalRun(small_config(pack_dir), tmp_path / "run")
    run.start()
    run.run(until=lambda: run.turns >= 2)
    sync = run.islands["island-0"].loop.island.sync
    assert sync is not None
    replica: Replica = sync.replica
    said: list[msg.MemberBody] = []
    store = Slow(a_store(tmp_path))
    writer = SnapshotWriter(tmp_path / "own", say=said.append, keep=3, store=store, threaded=True)
    before = {name: value.clone() for name, value in replica.anchor_tensors().items()}
    version = replica.parts[0].n
    writer.order("v0", replica)
    assert store.reached.wait(30)
    run.run(until=lambda: replica.parts[0].n > version)  # nobody waits for it
    assert not writer.finish(0.0) and said == []
    writer.order("v0", replica)  # asked again meanwhile: it is under way
    store.go_on.set()
    assert writer.finish(30)
    assert said == [msg.Saved(name=f"v{version}", versions=(version,), local=False)]
    (name, manifest), *_ = store.complete()
    path = SnapshotStore.fetch(store, name, manifest, tmp_path / "here")
    from workers.snapshot import load_anchor as read_anchor

    assert all(torch.equal(value, before[key]) for key, value in read_anchor(path).items())
    writer.close()
    run.close()


def start(pack_dir: Path, run_dir: Path, *overrides: str, resume: bool = False) -> LocalRun:
    config = small_config(pack_dir, f"run.snapshots={(run_dir.parent / 'far').as_uri()}", EVERY, *overrides)
    run_dir.mkdir(exist_ok=True)
    RunDir(run_dir).record(config.to_toml())
    run = LocalRun(config, run_dir, resume=resume)
    run.start()
    return run


def end(run: LocalRun) -> Summary:
    summary = build_summary(run.host, run.config)
    save_summary(summary, run.run_dir)
    run.close()
    return summary


def interrupted(pack_dir: Path, run_dir: Path, *overrides: str) -> str:
    """A run whose machine is lost in the middle with all that islands held; returns where its snapshots are."""
    run = start(pack_dir, run_dir, *overrides)
    run.run(until=lambda: run.host.coordinator.state.heads[:1] != [] and head(run) >= 4)
    end(run)
    return (run_dir.parent / "far").as_uri()


def head(run: LocalRun) -> int:
    return run.host.coordinator.state.heads[0].version.n


def test_a_run_goes_on_from_its_newest_snapshot_elsewhere_and_says_what_it_lost(pack_dir: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    uri = interrupted(pack_dir, run_dir)
    store = open_store(uri, "run")
    newest, manifest = store.complete()[0]
    kept = manifest["versions"][0]
    assert 0 < kept < 4 and not list(run_dir.glob("snapshots/v*"))
    note = check_resumable(RunDir(run_dir), snapshots=uri)
    each = 8 * 4
    wanted = f"{uri}/run/{newest}: {4 - kept} committed exchange"
    assert wanted in note and f"{(4 - kept) * each} samples are trained again" in note
    run = start(pack_dir, run_dir, resume=True)
    reached = run.run(max_turns=4000)
    assert reached is not None and reached.reason == "done", reached
    assert end(run).tokens_committed == run.config.train.tokens
    rows = [row.record for row in read_run(run_dir).rows]
    assert [r.n for r in rows if isinstance(r, RevokeRecord)] == list(range(4, kept, -1))
    assert load_anchor(run_dir).keys() == load_anchor(run_dir, "genesis").keys()
    assert not (run_dir / "snapshots" / "final").exists() and "final" in names(open_store(uri, "run"))


def test_an_altered_newest_snapshot_stops_the_resumption_and_the_one_before_is_good(
    pack_dir: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    uri = interrupted(pack_dir, run_dir)
    folder = tmp_path / "far" / "run"
    newest, before = [name for name in names(open_store(uri, "run")) if name.startswith("v")][:2]
    next((folder / newest).glob("anchor-*")).write_bytes(b"something else")
    with pytest.raises(SnapshotError, match=f"{newest}/anchor-.* is missing or altered; remove"):
        check_resumable(RunDir(run_dir), snapshots=uri)
    for file in (folder / newest).iterdir():
        file.unlink()
    assert f"{uri}/run/{before}" in check_resumable(RunDir(run_dir), snapshots=uri)
    manifest = json.loads((folder / before / MANIFEST).read_text())
    manifest["digests"] = ["0" * 32]
    (folder / before / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is not what the journal sealed as version"):
        check_resumable(RunDir(run_dir), snapshots=uri)


def test_without_any_snapshot_it_says_where_it_looked(pack_dir: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    interrupted(pack_dir, run_dir)
    empty = (tmp_path / "empty").as_uri()
    with pytest.raises(UserError, match="before its first snapshot"):
        check_resumable(RunDir(run_dir), snapshots=empty)


def test_a_store_that_refuses_costs_no_training_and_fails_the_run_at_its_end(
    pack_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: SnapshotStore, source: Path, *, keep: int) -> None:
        raise SnapshotError("there: no space left")

    monkeypatch.setattr(SnapshotStore, "publish", full)
    run = start(pack_dir, tmp_path / "run")
    reached = run.run(max_turns=4000)
    assert reached is not None and reached.reason == "failed"
    assert "the last snapshot cannot be written: final: there: no space left" in reached.detail
    assert run.host.coordinator.done()
    rows = [row.record for row in run.host.journal.rows]
    assert any(isinstance(r, FaultRecord) and r.fault == "snapshot_failed" for r in rows)
    assert not any(isinstance(r, SnapshotRecord) for r in rows)
    run.close()


def test_local_states_of_some_islands_only_are_said(pack_dir: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run = LocalRun(small_config(pack_dir, "run.islands=2"), run_dir)
    run.start()
    run.run(until=lambda: run.turns >= 12)
    run.stop()
    end(run)
    assert check_resumable(RunDir(run_dir)) == ""
    (run_dir / "snapshots" / "local" / "island-1" / "member.json").unlink()
    assert check_resumable(RunDir(run_dir)).startswith("island-1 left no saved state here")


# ---------------------------------------------------------------- going back


def state_with(*versions: int) -> RunState:
    """A journal's state whose history of one fragment has these versions, with the chains of `staged`."""
    state = RunState()
    state.heads = [Head(version=Version(n=max(versions), chain=f"{max(versions):032x}"), digest="")]
    chains = {n: f"{n:032x}" for n in range(max(versions) + 1)}
    state.chain = lambda fragment, n: chains.get(n)  # type: ignore[method-assign]
    return state


def test_a_rollback_finds_its_version_in_the_store_and_keeps_it_there(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    for version in (3, 6, 9):
        publish(store, tmp_path, version)
    state = state_with(10)
    local = tmp_path / "run" / "snapshots"
    assert [max(target.versions) for target in targets(local, state, store)] == [9, 6, 3]
    with pytest.raises(UserError, match="no snapshot of version 5") as caught:
        find_target(local, state, 5, store)
    assert "9, 6, 3" in str(caught.value.remedy) and "bucket:models/run-1" in str(caught.value.place)
    target = find_target(local, state, 6, store)
    pin(local, target, store)
    pin(local, find_target(local, state, 6, store), store)  # pinned already: by whichever name it is found
    for version in (10, 11, 12):
        publish(store, tmp_path, version)
    assert "v6" not in names(store)
    (manifest,) = [manifest for name, manifest in store.complete() if name == PINNED]
    store.check(PINNED, manifest)
    assert manifest["versions"] == [6]
    set_aside_later(local, (6,), store)
    assert names(store) == [PINNED], "what was saved later passes for the newest model no more"
    aside = SnapshotStore(store.filesystem, f"{store.folder}/{ASIDE}", place="aside")
    assert names(aside) == ["v12", "v11", "v10"]
    aside.check("v12", dict(aside.complete())["v12"])
    set_aside_later(local, (6,), store)
    assert names(aside) == [], "until the next rollback"


def test_a_rollback_to_an_altered_snapshot_of_the_store_is_refused(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    publish(store, tmp_path, 3)
    manifest = dict(store.complete())["v3"]
    file = tmp_path / "bucket" / store.folder / "v3" / stored_name(SNAPSHOT_FILES[0], manifest)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(SnapshotError, match="missing or altered"):
        find_target(tmp_path, state_with(4), 3, store)


# ---------------------------------------------------------------- full disks


def test_a_full_disk_costs_a_snapshot_and_not_the_island(pack_dir: Path, tmp_path: Path) -> None:
    run = LocalRun(small_config(pack_dir, "run.islands=2", "train.tokens=20_000", EVERY), tmp_path / "run")
    run.start()
    run.run(until=lambda: run.host.coordinator.started)
    writers = [island.loop.island.writer for island in run.islands.values()]
    replica = run.islands["island-0"].loop.island.sync.replica  # type: ignore[union-attr]
    disk = FullDisk()
    disk.fill()
    try:
        writers[0].order("v1", replica)
    finally:
        disk.free()
    assert not list(writers[0].folder.glob(".*staged")), "half a copy would keep the disk full"
    run.run()
    assert run.host.finished is not None and run.host.finished.reason == "done"
    faults = [row.record for row in read_run(run.run_dir).rows if isinstance(row.record, FaultRecord)]
    assert [(f.fault, f.member) for f in faults] == [("snapshot_failed", "island-0")]
    run.close()


def test_a_stop_with_a_full_disk_says_whose_state_is_not_kept(
    pack_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = LocalRun(small_config(pack_dir, "run.islands=2", "train.tokens=40_000"), tmp_path / "run")
    run.start()
    run.run(until=lambda: run.host.coordinator.progress() > 0.2)
    save = local_state.save_local

    def full(folder: Path, *rest: object) -> None:
        if folder.name == "island-1":
            folder.mkdir(parents=True)
            raise OSError(28, "No space left on device", str(folder))
        save(folder, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(local_state, "save_local", full)
    run.stop()
    assert run.host.finished is not None and run.host.finished.reason == "stopped"
    assert "but not of island-1: no space" in run.host.finished.detail
    run.close()
    faults = [row.record for row in read_run(run.run_dir).rows if isinstance(row.record, FaultRecord)]
    assert [(f.fault, f.member) for f in faults] == [("local_state_failed", "island-1")]
    (run.run_dir / "config.toml").write_text(run.config.to_toml())
    assert check_resumable(RunDir(run.run_dir)).startswith("island-1 left no saved state here")
    monkeypatch.setattr(local_state, "save_local", save)
    again = LocalRun(run.config, run.run_dir, resume=True)
    again.start()
    again.run()
    assert again.host.finished is not None and again.host.finished.reason == "done"
    again.close()
