"""What a pipeline refuses, with the numbers, and what its journal must add up to."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest

from orchestrator.build import num_islands, resolve
from orchestrator.config import load_config
from orchestrator.errors import UserError
from orchestrator.journal import open_segment
from orchestrator.pipeline.commands import Sealed
from orchestrator.pipeline.plan import check_memory
from orchestrator.pipeline.replay import newest_snapshot, replay, seal
from orchestrator.pipeline.views import pipeline_ledger
from orchestrator.resume import check_resumable
from orchestrator.rundir import RunDir
from strategies.errors import SettingError
from workers.config import ModelConfig
from workers.model.shape import resolve_shape
from workers.pipeline.config import PipelineConfig
from workers.pipeline.records import PipelineGenesisRecord, StageCommitRecord, StepFenceRecord, StepRecord
from workers.record_base import Record
from workers.records import StopRecord


def complaint(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config("swarm", overrides=overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("pipeline.stages=7", "pipeline.stages = 7, and the model has 6 layers"),
        ("pipeline.microbatches=2", "pipeline.microbatches = 2 is less than pipeline.stages = 3"),
        ("pipeline.in_flight=9", "pipeline.in_flight = 9 is more than pipeline.microbatches = 8"),
        ("pipeline.trainers=9", "pipeline.trainers = 9"),
        ("pipeline.min_peers=3", "pipeline.min_peers = 3 is more than pipeline.peers = 2"),
        ("pipeline.backward_timeout_s=5", "pipeline.backward_timeout_s = 5 is shorter than"),
        ("pipeline.pace_of.peer-6=1.0", "'peer-6'"),
        ("strategy.name=decoupled", "strategy.name = 'decoupled', and a pipeline"),
        ("run.elastic=true", "run.elastic = True, and a pipeline"),
        ("train.device=auto", "train.device = 'auto', and a pipeline"),
        ("codec.error_feedback=true", "codec.error_feedback = True, and a pipeline"),
    ],
)
def test_what_cannot_run_is_refused_with_the_numbers(override: str, words: str) -> None:
    assert words in complaint(override)


SHAPE = resolve_shape(ModelConfig(layers=4, dim=64, heads=4), vocab_size=256, seq_len=64)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peer_memory_bytes": 100_000}, "the largest of 6 peers has 100,000"),
        ({"trainer_memory_bytes": 10_000}, "and may take 10,000"),
        ({"stages": 7}, "7 stages, but the model has 6 layers"),
    ],
)
def test_a_stage_that_fits_nobody_is_refused_with_the_numbers(settings: dict[str, int], words: str) -> None:
    pipeline = PipelineConfig(**{"stages": 3, **settings})  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=words):
        check_memory(SHAPE, pipeline, machine_bytes=1 << 34, on_one_machine=True)


def test_the_memory_of_the_machine_that_starts_a_run_is_not_that_of_others() -> None:
    pipeline, own = PipelineConfig(stages=3), 4_000_000
    assert len(check_memory(SHAPE, pipeline, machine_bytes=own, on_one_machine=False)) == 3
    with pytest.raises(SettingError, match=f"the largest of 6 peers has {own // 7:,}"):
        check_memory(SHAPE, pipeline, machine_bytes=own, on_one_machine=True)
    told = PipelineConfig(stages=3, peer_memory_bytes=own)
    with pytest.raises(SettingError, match="the largest of 6 peers has 4,000,000"):
        check_memory(SHAPE, told, machine_bytes=1 << 34, on_one_machine=False)


def test_the_preset_has_room_and_counts_its_processes() -> None:
    config = resolve(load_config("swarm").config)
    assert num_islands(config) == config.run.islands == 7
    stages = check_memory(SHAPE, config.pipeline, machine_bytes=1 << 34, on_one_machine=True)
    assert [stage.index for stage in stages] == [0, 1, 2]


# ---------------------------------------------------------------- the ledger


def rows(*, counted: tuple[str, ...] = ("peer-0.2:0,2", "peer-1.2:1"), round_: int = 0) -> list[Record]:
    commits = [
        StageCommitRecord(step=0, round=round_, stage=stage, digest="d", counted=counted, holders=("peer-0", "peer-1"))
        for stage in (0, 1)
    ]
    return [
        PipelineGenesisRecord(digests=("a", "b"), num_params=7, num_microbatches=3, samples_per_step=6),
        StepRecord(step=0, round=round_, ranges=((0, 6),), trainers=("trainer-0.1",)),
        *commits,
    ]


def test_a_sound_journal_adds_up() -> None:
    history = replay(rows())
    assert history.findings == [] and (history.version, history.num_samples) == (1, 6)
    assert history.digests == ("d", "d")


LOST, TWICE, FOREIGN = ("peer-0.2:0,1",), ("peer-0.2:0,1,2", "peer-1.2:2"), ("peer-0.2:0,1,2,3",)


@pytest.mark.parametrize("counted", [LOST, TWICE, FOREIGN], ids=["lost", "twice", "foreign"])
def test_a_microbatch_that_does_not_count_once_is_found(counted: tuple[str, ...]) -> None:
    assert any("were counted" in finding for finding in replay(rows(counted=counted)).findings)


def test_other_contradictions_are_found() -> None:
    fenced = rows()
    fenced.insert(2, StepFenceRecord(peer="peer-1.2", step=0, round=0, why="it died"))
    assert any("was fenced" in finding for finding in replay(fenced).findings)
    again = rows()
    assert any("committed twice" in finding for finding in replay([*again, again[-1]]).findings)
    skipped = [*rows(), StepRecord(step=3, round=0, ranges=((18, 24),), trainers=())]
    assert any("was opened at version 1" in finding for finding in replay(skipped).findings)
    assert any("was not open" in finding for finding in replay([rows()[0], *rows()[2:]]).findings)


def test_what_a_snapshot_takes_back_is_no_longer_committed() -> None:
    back = PipelineGenesisRecord(digests=("a", "b"), num_params=7, num_microbatches=3, samples_per_step=6, version=0)
    history = replay([*rows(), back])
    assert (history.version, history.num_taken_back, history.findings) == (0, 1, [])


def test_the_newest_complete_snapshot_that_is_committed(tmp_path: Path) -> None:
    for name, version in (("v2", 2), ("v5", 5), ("v9", 9)):
        (tmp_path / name).mkdir()
        if name != "v5":
            (tmp_path / name / "pipeline.json").write_text(json.dumps({"version": version}))
    found = newest_snapshot(tmp_path, at_most=8)
    assert found is not None and found.version == 2
    assert newest_snapshot(tmp_path / "nothing", at_most=8) is None


def test_what_a_resumed_pipeline_goes_on_from_is_said(tmp_path: Path) -> None:
    def journal(*more: Record) -> RunDir:
        with suppress(FileNotFoundError):
            (tmp_path / "journal.jsonl").unlink()
        journal = open_segment(tmp_path, controller="c")
        journal.append([*rows(), *more])
        journal.close(merge=True)
        return RunDir(tmp_path)

    assert "has no snapshot and begins anew: 1 committed steps" in check_resumable(journal())
    seal(Sealed(folder=str(_folder(tmp_path / "snapshots" / "v1")), version=1, digests=("d",)), keep=8)
    assert check_resumable(RunDir(tmp_path)) == ""
    with pytest.raises(UserError, match="is done"):
        check_resumable(journal(StopRecord(reason="done")))


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def test_older_snapshots_go(tmp_path: Path) -> None:
    for version in (1, 2, 3):
        folder = tmp_path / ("final" if version == 3 else f"v{version}")
        folder.mkdir()
        (folder / "stage-0.safetensors").touch()
        seal(Sealed(folder=str(folder), version=version, digests=("a",)), keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "v2"]


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline_ledger(tmp_path, as_json=True) == 0
    (tmp_path / "summary.json").write_text(json.dumps({"tokens_committed": 5, "seq_len": 1}))
    assert pipeline_ledger(tmp_path, as_json=False) == 5
    assert "summary.json says 5 tokens" in capsys.readouterr().out
