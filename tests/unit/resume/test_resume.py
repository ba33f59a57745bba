"""A stopped run goes on: exactly, where states were saved; from the newest snapshot, where none was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from orchestrator.errors import UserError
from orchestrator.finish import build_summary
from orchestrator.ledger import recompute
from orchestrator.local import LocalRun
from orchestrator.resume import check_resumable
from orchestrator.rundir import RunDir
from orchestrator.segments import read_run
from orchestrator.summary import Summary, save_summary
from tests.small_run import SEQ_LEN, make_pack, small_config
from workers.records import FaultRecord, RevokeRecord
from workers.saved import LocalStateError, SnapshotError

ALONE = {
    "adamw": (),
    "muon": ("train.optimizer=muon",),
    "error feedback": ("codec.name=int8", "codec.block=64", "codec.error_feedback=true"),
    "two fragments": ("strategy.num_fragments=2", "model.layers=2"),
    "synchronous warm-up": ("strategy.warmup_sync=0.3",),
    "data parallel": ("strategy.name=ddp", "strategy.inner_steps=1"),
}


@pytest.fixture(scope="module")
def pack_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("pack"))


def start(pack_dir: Path, run_dir: Path, *overrides: str, resume: bool = False) -> LocalRun:
    run = LocalRun(small_config(pack_dir, *overrides), run_dir, resume=resume)
    run.start()
    return run


def turns(run: LocalRun, num: int) -> LocalRun:
    run.run(until=lambda: run.turns >= num)
    return run


def heartbeat(run: LocalRun) -> None:
    """The islands say how far they are; by the clock they do so more often than they are asked here."""
    for island in run.islands.values():
        assert island.loop.island.sync is not None
        island.loop.island.sync.tick()
    run.settle()


def end(run: LocalRun) -> Summary:
    """Close the run as the controller does."""
    summary = build_summary(run.host, run.config)
    save_summary(summary, run.run_dir)
    run.close()
    return summary


def finish(run: LocalRun) -> Summary:
    reached = run.run(max_turns=4000)
    assert reached is not None and reached.reason == "done", reached
    summary = end(run)
    ledger = recompute(read_run(run.run_dir).rows)
    assert ledger.ok, ledger.findings
    assert ledger.samples()["full"] == run.host.plan.total_samples
    return summary


@pytest.mark.parametrize("case", ALONE)
def test_one_island_goes_on_bit_for_bit(case: str, pack_dir: Path, tmp_path: Path) -> None:
    whole = finish(start(pack_dir, tmp_path / "whole" / "run", *ALONE[case]))
    run_dir = tmp_path / "parts" / "run"
    run = start(pack_dir, run_dir, *ALONE[case])
    for stop in (3, 9, 30):  # in the first round, at a round's end, later
        turns(run, stop).stop()
        assert end(run).exit_reason == "stopped"
        check_resumable(RunDir(run_dir))
        run = start(pack_dir, run_dir, *ALONE[case], resume=True)
    parts = finish(run)
    assert parts.anchor_digest == whole.anchor_digest
    assert parts.final_val_loss == whole.final_val_loss
    assert (parts.tokens_lost, parts.tokens_reissued) == (0, 0)


def test_several_islands_go_on_without_loss(pack_dir: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    turns(run := start(pack_dir, run_dir, "run.islands=3"), 12).stop()
    first = end(run)
    second = finish(start(pack_dir, run_dir, "run.islands=3", resume=True))
    assert second.tokens_lost == 0
    assert second.bytes_sent > first.bytes_sent
    assert second.seconds > first.seconds


def test_a_stop_at_once_loses_what_was_not_offered_and_nothing_else(pack_dir: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run = turns(start(pack_dir, run_dir, "run.islands=2"), 21)
    heartbeat(run)
    run.stop(save=False)
    stopped = end(run)
    assert stopped.exit_reason == "stopped"
    assert stopped.tokens_committed == stopped.exchanges_committed * 2 * 8 * 4 * SEQ_LEN
    assert 0 < stopped.tokens_lost <= 2 * 8 * 4 * SEQ_LEN
    check_resumable(RunDir(run_dir))
    done = finish(start(pack_dir, run_dir, "run.islands=2", resume=True))
    assert done.tokens_lost == stopped.tokens_lost
    assert done.tokens_reissued >= done.tokens_lost
    assert not any(isinstance(row.record, RevokeRecord) for row in read_run(run_dir).rows), (
        "a committed version was lost"
    )


def test_after_the_second_stop_signal_saved_states_are_kept(pack_dir: Path, tmp_path: Path) -> None:
    """One island has saved its state when the user loses patience: it loses nothing."""
    run_dir = tmp_path / "run"
    run = turns(start(pack_dir, run_dir, "run.islands=2"), 13)
    run.stop()
    (run_dir / "snapshots" / "local" / "island-1" / "member.json").unlink()
    end(run)
    done = finish(start(pack_dir, run_dir, "run.islands=2", resume=True))
    assert done.tokens_reissued > 0


def test_everything_dies_and_the_newest_snapshot_is_what_is_left(pack_dir: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run = start(pack_dir, run_dir, "run.islands=2", "run.snapshot_every_s=0.3")
    run.run(until=lambda: run.host.coordinator.state.heads and run.host.coordinator.state.heads[0].version.n >= 6)
    run.close()  # no stop, no summary, no saved states: as after a power cut
    head = run.host.coordinator.state.heads[0].version.n
    shutil.rmtree(run_dir / "snapshots" / f"v{head}", ignore_errors=True)
    check_resumable(RunDir(run_dir))
    finish(start(pack_dir, run_dir, "run.islands=2", resume=True))
    records = [row.record for row in read_run(run_dir).rows]
    assert any(isinstance(record, RevokeRecord) for record in records)
    assert [r.fault for r in records if isinstance(r, FaultRecord)].count("state_lost") == 1


def test_the_only_island_dies_and_its_successor_takes_the_snapshot(pack_dir: Path, tmp_path: Path) -> None:
    run = start(pack_dir, tmp_path / "run", "run.snapshot_every_s=0.3")
    run.run(until=lambda: bool(run.host.coordinator.state.heads) and run.host.coordinator.state.heads[0].version.n >= 4)
    turns(run, run.turns + 3)
    heartbeat(run)
    run.kill("island-0")
    summary = finish(run)
    assert [fault.member for fault in summary.faults] == ["island-0"]
    assert summary.tokens_reissued >= summary.tokens_lost > 0


def test_without_any_snapshot_the_run_fails_and_says_why(pack_dir: Path, tmp_path: Path) -> None:
    run = turns(start(pack_dir, tmp_path / "run"), 12)
    run.kill("island-0")
    shutil.rmtree(tmp_path / "run" / "snapshots")
    reached = run.run(max_turns=2000)
    assert reached is not None and reached.reason == "failed"
    assert "no snapshot" in reached.detail
    run.close()


# ------------------------------------------------------------ what is checked before anything starts


@pytest.fixture
def stopped_dir(pack_dir: Path, tmp_path: Path) -> RunDir:
    turns(run := start(pack_dir, tmp_path / "run", "run.islands=2"), 12).stop()
    end(run)
    return RunDir(tmp_path / "run")


def test_a_damaged_local_state_is_one_clear_error(stopped_dir: RunDir) -> None:
    folder = stopped_dir.snapshots / "local" / "island-1"
    damage(folder / "tensors.safetensors")
    with pytest.raises(LocalStateError, match=r"tensors.safetensors: missing or altered; remove the folder .*island-1"):
        check_resumable(stopped_dir)
    damage(folder / "tensors.safetensors")
    check_resumable(stopped_dir)
    meta = folder / "member.json"
    whole = meta.read_text()
    for altered in (whole.replace('"consumed": ', '"consumed": 1'), whole.replace('"digest"', '"digests"')):
        assert altered != whole
        meta.write_text(altered)
        with pytest.raises(LocalStateError, match=r"member.json: altered, it has another digest than it says; remove"):
            check_resumable(stopped_dir)
    (folder / "member.json").write_text("{")
    with pytest.raises(LocalStateError, match=r"member.json: not readable"):
        check_resumable(stopped_dir)
    shutil.rmtree(folder)
    check_resumable(stopped_dir)


def test_a_damaged_snapshot_is_one_clear_error_where_it_is_needed(stopped_dir: RunDir) -> None:
    newest = stopped_dir.snapshots / "stop"
    damage(newest / "anchor.safetensors")
    check_resumable(stopped_dir)  # the islands' own states are all there
    shutil.rmtree(stopped_dir.snapshots / "local")
    with pytest.raises(SnapshotError, match=r"anchor.safetensors is missing or altered; remove its folder"):
        check_resumable(stopped_dir)
    damage(newest / "anchor.safetensors")
    check_resumable(stopped_dir)
    for text, error in ALTERED_MANIFESTS:
        manifest = json.loads((newest / "manifest.json").read_text()) | json.loads(text)
        (newest / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises((SnapshotError, UserError), match=error):
            check_resumable(stopped_dir)
    shutil.rmtree(newest)
    check_resumable(stopped_dir)
    shutil.rmtree(stopped_dir.snapshots)
    with pytest.raises(UserError, match="before its first snapshot"):
        check_resumable(stopped_dir)


ALTERED_MANIFESTS = [
    ('{"digests": ["00000000000000000000000000000000"]}', "is not what the journal sealed as version"),
    ('{"versions": [99, 99], "chains": ["", ""], "digests": ["", ""]}', "has 2 fragments, and the run 1"),
    ('{"versions": [0]}', "is no manifest; remove its folder to use the snapshot before it"),
    ('{"versions": 3}', "is no manifest"),
    ('{"versions": [0], "chains": [""], "digests": [""], "files": "none"}', "is no manifest"),
]
"""Each is put over the one before it."""


def test_a_run_that_is_done_does_not_go_on(pack_dir: Path, tmp_path: Path) -> None:
    finish(start(pack_dir, tmp_path / "run"))
    with pytest.raises(UserError, match="is done"):
        check_resumable(RunDir(tmp_path / "run"))


def test_a_run_without_its_journal_does_not_begin_anew(stopped_dir: RunDir) -> None:
    stopped_dir.journal.unlink()
    with pytest.raises(UserError, match="is gone: without it nobody knows what was committed") as caught:
        check_resumable(stopped_dir)
    assert caught.value.place is not None and "beside snapshots, metrics.jsonl" in caught.value.place


def test_a_run_that_never_began_starts(tmp_path: Path) -> None:
    check_resumable(RunDir(tmp_path))


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
