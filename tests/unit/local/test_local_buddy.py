"""What only one island has is kept by another one: given back bit for bit, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from orchestrator.ledger import recompute
from orchestrator.local import LocalRun
from orchestrator.rundir import RunDir
from orchestrator.segments import read_run
from orchestrator.status import read_status
from tests.small_run import make_pack, small_config
from workers.buddy import LocalCopies
from workers.copies import Copy, last_seq, piece_key
from workers.optim import export_state
from workers.records import FaultRecord
from workers.sync import IslandSync


@pytest.fixture(scope="module")
def pack_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("pack"))


@pytest.fixture
def run(pack_dir: Path, tmp_path: Path) -> Iterator[LocalRun]:
    run = LocalRun(
        small_config(
            pack_dir, "run.islands=3", "exchange.quorum=0.5", "train.tokens=20_000", "codec.name=topk",
            "exchange.chunk_values=4096", "codec.error_feedback=true", "run.redundancy=buddy",
        ),
        tmp_path / "run",
    )  # fmt: skip
    run.start()
    yield run
    run.close()


def sync_of(run: LocalRun, name: str) -> IslandSync:
    sync = run.islands[name].loop.island.sync
    assert sync is not None
    return sync


def copies_of(run: LocalRun, name: str) -> LocalCopies:
    copies = sync_of(run, name).copies
    assert copies is not None
    return copies


def moments(run: LocalRun, name: str) -> dict[str, Tensor]:
    island = run.islands[name].loop.island
    return export_state(island.optimizer, island.model)


def kept(run: LocalRun, name: str) -> tuple[Copy, str] | None:
    """The newest copy of an island's state that somebody says to have, and whose name that is."""
    found = run.host.coordinator.buddies.holder_of(run.host.coordinator.state.current[name])
    return None if found is None else (found[0], found[1].name)


def run_until_kept(run: LocalRun, name: str, version: int) -> tuple[Copy, str, dict[str, Tensor], Tensor]:
    """Train until a copy of that version or a later one is kept; also what the island had when it was made."""
    seen: dict[tuple[int, ...], tuple[dict[str, Tensor], Tensor]] = {}
    copies = copies_of(run, name)
    export = copies._copy_if_due

    def watched() -> None:
        before = copies.made
        state = moments(run, name)
        residual = sync_of(run, name).replica.parts[0].residual
        export()
        if copies.made != before and residual is not None:
            seen[copies.made] = state, residual.clone()

    copies._copy_if_due = watched  # type: ignore[method-assign]
    run.run(until=lambda: (found := kept(run, name)) is not None and found[0].versions[0] >= version)
    found = kept(run, name)
    assert found is not None
    return *found, *seen[found[0].versions]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_replacement_owes_what_the_dead_one_had_not_sent(run: LocalRun) -> None:
    copy, holder, _, residual = run_until_kept(run, "island-1", 2)
    assert holder != "island-1" and copies_of(run, holder).kept["island-1"] == copy
    run.kill("island-1")
    run.spawn("island-1")
    run.to_spawn.clear()
    sync, copies = sync_of(run, "island-1"), copies_of(run, "island-1")
    run.run(until=lambda: sync.machine.consumed > 0)
    assert not copies.inheriting and copies.inherited is None
    manifest = next(iter(copies.owed.values()))[0] if copies.owed else None
    paid = sync.replica.parts[0].residual
    sent = last_seq(sync.machine.log, 0, copy.member)
    assert sync.machine.fragments[0].seq == 0, "it has not offered yet"
    assert manifest is None and paid is not None and torch.equal(paid, residual), f"last sent was offer {sent}"
    run.run()
    assert run.host.finished is not None and run.host.finished.reason == "done"
    ledger = recompute(read_run(run.run_dir).rows)
    assert ledger.ok, ledger.findings


def test_moments_are_restored_bit_for_bit(run: LocalRun) -> None:
    copy, _, state, _ = run_until_kept(run, "island-1", 2)
    run.kill("island-1")
    run.spawn("island-1")
    run.to_spawn.clear()
    copies = copies_of(run, "island-1")
    restored: list[dict[str, Tensor]] = []
    begin = copies._begin_from

    def watched(*args: object) -> None:
        assert not moments(run, "island-1").keys() & state.keys() - {k for k in state if k.startswith("group/")}
        begin(*args)  # type: ignore[arg-type]
        restored.append(moments(run, "island-1"))

    copies._begin_from = watched  # type: ignore[method-assign]
    run.run(until=lambda: bool(restored))
    assert equal(restored[0], state)
    assert sync_of(run, "island-1").machine.consumed == 0, "before its first step"
    assert any(row.what == "restored" for row in read_copies(run)), "status and metrics say so"
    assert copy.member.incarnation == 1


def read_copies(run: LocalRun) -> list[object]:
    from orchestrator.metrics import CopyRow, read_rows

    return [row for row in read_rows(run.run_dir / "metrics.jsonl") if isinstance(row, CopyRow)]


def test_a_copy_that_was_altered_is_refused_and_the_island_begins_afresh(run: LocalRun) -> None:
    copy, holder, _, _ = run_until_kept(run, "island-1", 1)
    store = sync_of(run, holder).store
    piece = store.get(piece_key(copy.digest, 0))
    assert piece is not None
    wrong = bytearray(piece)
    wrong[-1] ^= 1
    store.put(piece_key(copy.digest, 0), bytes(wrong))
    run.kill("island-1")
    run.spawn("island-1")
    run.to_spawn.clear()
    run.run(until=lambda: sync_of(run, "island-1").machine.consumed > 0)
    faults = [row.record for row in run.host.journal.rows if isinstance(row.record, FaultRecord)]
    lost = [fault for fault in faults if fault.fault == "copy_lost"]
    assert len(lost) == 1 and lost[0].member == "island-1" and "not what its manifest names" in lost[0].detail


def test_another_one_takes_over_when_the_buddy_is_lost(run: LocalRun) -> None:
    _, holder, _, _ = run_until_kept(run, "island-1", 1)
    third = ({"island-0", "island-2"} - {holder}).pop()
    run.kill(holder)
    run.to_spawn.clear()
    run.run(until=lambda: (found := kept(run, "island-1")) is not None and found[1] == third)
    assert copies_of(run, third).kept["island-1"].member.name == "island-1"
    run.kill("island-1")
    run.spawn("island-1")
    run.to_spawn.clear()
    run.run(until=lambda: sync_of(run, "island-1").machine.consumed > 0)
    assert any(row.what == "restored" and row.member == "island-1" for row in read_copies(run))


def test_the_ward_keeps_nothing_that_its_buddy_has_and_status_says_who_has_it(run: LocalRun) -> None:
    copy, holder, _, _ = run_until_kept(run, "island-1", 1)
    copies = copies_of(run, "island-1")
    run.run(until=lambda: copies.mine != copy)
    assert not sync_of(run, "island-1").store.keys(f"local/{copy.digest}")
    assert len([key for key in sync_of(run, holder).store.keys("local") if key.endswith("manifest")]) <= 4
    row = next(row for row in reversed(read_copies(run)) if row.member == "island-1")
    assert row.what == "kept" and row.other.startswith(holder) and row.num_bytes > 0
    (run.run_dir / "config.toml").write_text(run.config.to_toml())
    with RunDir(run.run_dir).lock():
        status = read_status(run.run_dir)
    assert "keeps island-1.1 after version" in status.members["island-1"].local_state


def test_without_redundancy_nothing_is_kept(pack_dir: Path, tmp_path: Path) -> None:
    run = LocalRun(small_config(pack_dir, "run.islands=2", "train.tokens=3840"), tmp_path / "run")
    run.start()
    run.run()
    assert sync_of(run, "island-0").copies is None and not read_copies(run)
    run.close()
