"""A run in one process survives the loss of its controller, and of the controller's journal with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.config import load_config
from orchestrator.ledger import recompute
from orchestrator.local import LocalRun
from orchestrator.segments import JournalError, read_run
from workers.records import FenceRecord, TermRecord

SMALL = (
    "run.islands=3",
    "train.tokens=40000",
    "data.seq_len=64",
    "model.dim=32",
    "model.layers=1",
    "strategy.inner_steps=4",
    "eval.windows=4",
    "codec.block=4096",
)


def small_run(folder: Path, *overrides: str) -> LocalRun:
    """A run that takes a second."""
    run = LocalRun(load_config("demo", overrides=[*SMALL, *overrides]).config, folder / "run")
    run.start()
    return run


def rounds(run: LocalRun) -> int:
    """Newest committed version."""
    heads = run.host.coordinator.state.heads
    return heads[0].version.n if heads else 0


def digests(run: LocalRun) -> set[str]:
    """Anchor digests of all islands, once everybody has applied the last commit."""
    for _ in range(5):
        run.turn()
    syncs = [island.loop.island.sync for island in run.islands.values()]
    return {sync.replica.digest(0) for sync in syncs if sync is not None}


@pytest.mark.parametrize("journal", ["there", "lost", "damaged"])
def test_a_run_outlives_its_controller(tmp_path: Path, journal: str) -> None:
    run = small_run(tmp_path)
    run.run(until=lambda: rounds(run) >= 3, max_turns=2000)
    committed = run.host.coordinator.state.samples_committed()
    lost = journal != "there"
    if journal == "damaged":
        path = run.run_dir / "journal.jsonl"
        path.write_text(path.read_text().replace('"upto":', '"upto":1', 1))
        with pytest.raises(JournalError, match="was altered") as caught:
            read_run(run.run_dir)
        assert caught.value.is_damage and caught.value.what.endswith(caught.value.reason)
    run.restart_controller(lost_journal=journal == "lost", damaged=journal == "damaged")
    assert bool(list(run.run_dir.glob("*.damaged"))) == (journal == "damaged")
    assert run.host.coordinator.state.samples_committed() == committed, "a committed sample was forgotten"
    finish = run.run(max_turns=4000)
    assert finish is not None and finish.reason == "done"
    assert len(digests(run)) == 1
    run.close()
    rows = read_run(run.run_dir).rows
    terms = [row.record for row in rows if isinstance(row.record, TermRecord)]
    assert [term.lineage for term in terms] == ([0, 1] if lost else [0, 0])
    fenced = [row for row in rows if isinstance(row.record, FenceRecord)]
    assert len(fenced) == (3 if lost else 0), "members join anew only when the journal was rebuilt"
    ledger = recompute(rows)
    assert ledger.ok, ledger.findings


def test_a_killed_island_is_replaced_and_starts_from_the_anchor(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    run.run(until=lambda: rounds(run) >= 2, max_turns=2000)
    run.kill("island-1")
    newcomer = run.spawn("island-1")
    run.to_spawn.clear()
    sync = newcomer.loop.island.sync
    assert sync is not None
    run.run(until=lambda: sync.machine.holds_all() and sync.total_steps == 0, max_turns=50)
    sync.boundary()
    anchors = sync.replica.anchor_tensors()
    assert all((anchors[name] == tensor).all() for name, tensor in sync.replica.tensors.items())
    finish = run.run(max_turns=4000)
    assert finish is not None and finish.reason == "done"
    assert len(digests(run)) == 1
    run.close()
    assert recompute(read_run(run.run_dir).rows).ok
