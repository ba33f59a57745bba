"""What people ask of a pipeline while it goes on: pauses, snapshots, the way back, settings, faults, notifications."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.alarms import Alarms, NotifyConfig
from orchestrator.cli.inspect import status as status_command
from orchestrator.cli.why import why as why_command
from orchestrator.config import RunConfig, load_config, parse_config
from orchestrator.errors import UserError
from orchestrator.events import (
    FaultInjected,
    Operated,
    PauseRequested,
    RollbackRequested,
    SaveRequested,
    SettingsRequested,
)
from orchestrator.journal import open_segment
from orchestrator.pipeline.commands import StepDone
from orchestrator.pipeline.controls import check_pipeline_changes, find_snapshot
from orchestrator.pipeline.figures import Figures
from orchestrator.pipeline.local import LocalSwarm
from orchestrator.pipeline.plan import pipeline_plan, pipeline_spec
from orchestrator.pipeline.planner import pipeline_cost
from orchestrator.pipeline.replay import newest_snapshot, replay, saved_snapshots
from orchestrator.pipeline.telemetry import PipelineAlarms, PipelineTelemetry
from orchestrator.pipeline.views import PipelineStatus, read_pipeline_status
from orchestrator.planner import Case
from orchestrator.report.build import build_report
from orchestrator.report.load import load_run
from orchestrator.rundir import RunDir
from orchestrator.telemetry.catalogue import COMMON, PIPELINES
from orchestrator.telemetry.exposition import render
from strategies.errors import SettingError
from tests.small_run import PIPELINE_TOML, make_pack
from workers.config import ModelConfig
from workers.model.shape import resolve_shape
from workers.pipeline.records import StageCommitRecord, StageSyncRecord
from workers.records import FaultRecord, FenceRecord, OperatorRecord, PauseRecord, SettingRecord, SnapshotRecord

NUM_STEPS = 6
DILOCO = ("strategy.name=diloco", "strategy.inner_steps=2", "strategy.outer=nesterov")


@pytest.fixture(scope="module")
def pack_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("pack"))


Make = Callable[..., LocalSwarm]


@pytest.fixture
def make(pack_dir: Path, tmp_path: Path) -> Make:
    def build(*overrides: str, run_dir: Path = tmp_path) -> LocalSwarm:
        config = config_of(pack_dir, *overrides)
        spec = pipeline_spec(config, run_id="local", run_dir=run_dir, pack=pack_dir)
        return LocalSwarm(spec=spec, plan=pipeline_plan(config, spec, run_dir))

    return build


def config_of(pack_dir: Path, *overrides: str) -> RunConfig:
    tokens = f"train.tokens={NUM_STEPS * 12 * 16}"
    return parse_config(PIPELINE_TOML, overrides=[f"data.path={pack_dir}", tokens, *overrides]).config


def finish(swarm: LocalSwarm) -> tuple[str, ...]:
    """Run to the end; the digests of what stands."""
    swarm.run()
    assert swarm.finished is not None and swarm.finished.reason == "done", swarm.finished
    history = replay(swarm.records)
    assert history.findings == [] and history.version == NUM_STEPS
    return history.digests


def at(swarm: LocalSwarm, version: int) -> None:
    swarm.run(lambda: swarm.brain.held_version >= version)


def test_a_pause_ends_between_two_steps_and_changes_no_bit(make: Make, tmp_path: Path) -> None:
    swarm = make()
    at(swarm, 2)
    swarm._tell_brain(PauseRequested(paused=True, why="asked to"))
    swarm.run(lambda: swarm.brain.commit is None)
    resting, now_s = swarm.brain.version, swarm.now_s
    swarm.run(lambda: swarm.now_s > now_s + 300)
    assert swarm.brain.version == resting and replay(swarm.records).paused
    # It rests as well in the controller's next life.
    swarm.restart_controller()
    now_s = swarm.now_s
    swarm.run(lambda: swarm.now_s > now_s + 100)
    assert swarm.brain.paused and swarm.brain.version == resting
    swarm._tell_brain(PauseRequested(paused=False, why="asked to"))
    digests = finish(swarm)
    assert [r.paused for r in swarm.records if isinstance(r, PauseRecord)] == [True, False]
    assert not any(isinstance(r, FenceRecord) for r in swarm.records), "somebody was taken to hang"
    assert digests == finish(make(run_dir=tmp_path / "other"))


def test_a_snapshot_is_written_while_a_step_goes_on(make: Make, tmp_path: Path) -> None:
    swarm = make()
    at(swarm, 3)
    assert swarm.brain.snapshot_name == "v3"
    swarm._tell_brain(SaveRequested())
    swarm._tell_brain(SaveRequested())
    swarm.run(lambda: any(isinstance(r, SnapshotRecord) for r in swarm.records))
    saved = newest_snapshot(tmp_path / "snapshots", at_most=9)
    assert saved is not None and saved.version == 3 and len(list(saved.folder.glob("stage-*"))) == 3
    finish(swarm)
    assert [r.name for r in swarm.records if isinstance(r, SnapshotRecord)] == ["v3", "final"]


@pytest.mark.parametrize("strategy", [(), DILOCO], ids=["ddp", "diloco"])
def test_the_way_back_ends_where_the_run_would_have(make: Make, tmp_path: Path, strategy: tuple[str, ...]) -> None:
    swarm = make(*strategy)
    for version in (2, 4):
        at(swarm, version)
        swarm._tell_brain(SaveRequested())
        swarm.run(lambda v=version: len(saved_snapshots(tmp_path / "snapshots")) == v // 2)  # type: ignore[misc]
    before = {p.nonce for p in swarm.processes.values()}
    swarm._tell_brain(RollbackRequested(name="v2", versions=(2,) * 3, chains=("",) * 3, why="asked to"))
    history = replay(swarm.records)
    assert (history.version, history.goes_back_to) == (2, "v2") and history.findings == []
    # Its controller dies before anything has begun again: the next one goes on from the snapshot as well.
    swarm.restart_controller()
    at(swarm, 3)
    assert before.isdisjoint(p.nonce for p in swarm.processes.values() if p.alive)
    assert [s.version for s in saved_snapshots(tmp_path / "snapshots")] == [2], "what was taken back is no snapshot"
    digests = finish(swarm)
    history = replay(swarm.records)
    assert history.num_taken_back >= 2 and len(history.rollbacks) == 1 and history.goes_back_to is None
    kind = StageSyncRecord if strategy else StageCommitRecord
    assert len([r for r in swarm.records if isinstance(r, kind)]) > 3 * NUM_STEPS // (2 if strategy else 1)
    if not strategy:  # the inner optimizers of peers are no part of a snapshot
        assert digests == finish(make(run_dir=tmp_path / "other"))


def test_there_is_a_way_back_to_snapshots_alone(make: Make, tmp_path: Path) -> None:
    swarm = make()
    at(swarm, 3)
    history = replay(swarm.records)
    with pytest.raises(UserError, match=r"no snapshot of version 2.*\n?.*none yet"):
        find_snapshot(tmp_path / "snapshots", history, 2)
    with pytest.raises(UserError, match="is at version 3"):
        find_snapshot(tmp_path / "snapshots", history, 3)


def test_settings_hold_at_once_and_in_the_next_life(make: Make) -> None:
    swarm = make(*DILOCO, "pipeline.rebalance_s=0")
    at(swarm, 2)
    changes = (("strategy.inner_steps", 3), ("pipeline.rebalance_s", 7.0))
    swarm._tell_brain(SettingsRequested(values=changes))
    swarm.restart_controller()
    assert swarm.brain.plan.sync_steps == 3 and swarm.brain.plan.pipeline.rebalance_s == 7.0
    finish(swarm)
    syncs = [r.version for r in swarm.records if isinstance(r, StageSyncRecord) and r.stage == 0]
    assert syncs == [2, 5, 6]
    assert [(r.key, r.value) for r in swarm.records if isinstance(r, SettingRecord)] == list(changes)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"strategy.outer_lr": 0.5}, "strategy.outer_lr cannot change while a pipeline goes on"),
        ({"pipeline.rebalance": 3}, "pipeline.rebalance_s\\? "),
        ({"strategy.inner_steps": 3}, "strategy.inner_steps has no effect in this run"),
        ({"pipeline.hysteresis": 0.5}, "pipeline.hysteresis"),
        ({}, "no setting was given"),
    ],
)
def test_what_cannot_be_set_is_refused(values: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_pipeline_changes(load_config("swarm").config, {}, values)


def test_what_can_be_set_is_checked_with_what_was_set_before() -> None:
    config = load_config("swarm-diloco").config
    assert check_pipeline_changes(config, {"pipeline.rebalance_s": 3.0}, {"strategy.inner_steps": 5}) == (
        ("strategy.inner_steps", 5),
    )


# ---------------------------------------------------------------- telling


def test_metrics_and_curves_of_a_pipeline(make: Make, pack_dir: Path, tmp_path: Path) -> None:
    swarm = make("eval.every=0.5")
    config = config_of(pack_dir, "metrics.tensorboard=true")
    figures = Figures(config, swarm.spec, RunDir(tmp_path), 16)
    telemetry = PipelineTelemetry(config, tmp_path / "run", figures, seq_len=16)
    told: list[tuple[dict[str, float], int]] = []
    telemetry.trackers[0].note = lambda values, tokens: told.append((dict(values), tokens))  # type: ignore[method-assign]
    at(swarm, 2)
    swarm.kill(victim := swarm.brain.roster.serving(2)[0].process)
    figures.of_peer("peer-0", {"busy_s": 2.0, "bytes_sent": 50.0, "memory_bytes": 9.0})
    figures.died("peer-0", 3.0)
    figures.of_peer("peer-0", {"busy_s": 1.0, "bytes_sent": 5.0, "memory_bytes": 9.0})
    at(swarm, 4)
    telemetry.records(swarm.records, swarm.brain)
    swarm.brain.moves.append("one")
    for done in swarm.steps:
        telemetry.step_done(done, swarm.brain)
    text = render(tuple(telemetry.samples(swarm.brain, swarm.now_s)))
    families = {family.name: family for family in text_string_to_metric_families(text)}
    served = {one.name for family in families.values() for one in family.samples}
    assert served == {metric.name for metric in (*COMMON, *PIPELINES)}
    values = {(one.name, *one.labels.values()): one.value for f in families.values() for one in f.samples}
    assert values["atoll_pipeline_steps_total", "run"] == 4 and values["atoll_version", "run", "2"] == 4
    assert values["atoll_faults_total", "run", "died"] == 1 and values["atoll_sent_bytes_total", "run"] == 55
    assert values["atoll_pipeline_loss", "run"] == swarm.steps[-1].loss
    assert values["atoll_tokens_committed_total", "run"] == 4 * 12 * 16
    busy = {k[-1]: v for k, v in values.items() if k[0] == "atoll_peer_busy_seconds_total"}
    assert list(busy.values()) == [3.0], "a successor's seconds are added to those of the one before"
    assert victim and sum("run/loss" in values for values, _ in told) == 4
    assert {"run/val_loss"} == told[0][0].keys() and told[-1][1] == 4 * 12 * 16


def test_alarms_of_a_pipeline(make: Make) -> None:
    swarm = make()
    alarms = PipelineAlarms(Alarms(NotifyConfig(command="say", below_quorum_s=5.0), num_islands=0))
    at(swarm, 1)
    assert alarms.on_time(swarm.brain, 10.0) == []
    for peer in swarm.brain.roster.serving(1):
        peer.stage = None
    assert alarms.on_time(swarm.brain, 20.0) == []
    [below] = alarms.on_time(swarm.brain, 26.0)
    assert (below.kind, below.detail) == ("below_quorum", "nobody serves stage 1, for 6 s")
    [nan] = alarms.on_step(StepDone(step=1, loss=math.nan, seconds=1.0, attempts=1), 30.0)
    assert nan.kind == "loss_nan"
    fault = FaultRecord(fault="died", member="peer-0", injected=False, t_s=31.0, detail="SIGKILL")
    [dead] = alarms.on_records([fault], 31.0)
    assert (dead.kind, dead.member) == ("member_dead", "peer-0")


def test_what_a_dashboard_asked_for_is_on_the_record(make: Make) -> None:
    swarm = make()
    at(swarm, 1)
    swarm._tell_brain(Operated(action="pause", member="", by="a test", outcome="asked"))
    [row] = [r for r in swarm.records if isinstance(r, OperatorRecord)]
    assert (row.action, row.by, row.outcome) == ("pause", "a test", "asked")


# ---------------------------------------------------------------- what is read afterwards


@pytest.fixture
def told(make: Make, pack_dir: Path, tmp_path: Path) -> Path:
    """The directory of a run in which a peer was killed on purpose."""
    swarm, config = make(), config_of(pack_dir, "eval.every=0.5")
    directory = RunDir(tmp_path / "run")
    directory.path.mkdir()
    directory.config.write_text(config.to_toml())
    figures = Figures(config, swarm.spec, directory, 16)
    journal, written = open_segment(directory.path, controller="c"), 0
    victim = ""
    while swarm.finished is None:
        known = len(swarm.steps)
        swarm.run(lambda n=known: len(swarm.steps) > n)  # type: ignore[misc]
        journal.append(swarm.records[written:])
        written = len(swarm.records)
        if len(swarm.steps) > known:
            figures.step_done(swarm.steps[-1], swarm.brain, swarm.now_s)
        if len(swarm.steps) == 2 and not victim:
            victim = swarm.brain.roster.serving(1)[0].process
            swarm._tell_brain(FaultInjected(fault="kill", member=victim, detail=f"kill:{victim}"))
            swarm.kill(victim)
    journal.close(merge=True)
    return directory.path


def test_why_tells_who_served_and_who_counted(told: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def why(*words: str) -> str:
        result = CliRunner().invoke(why_command, [*words, "--run", str(told)])
        return result.output if result.exit_code == 0 else f"{result.exit_code} {result.exception}"

    run = why()
    assert "3 stages" in run and "steps 0 to 1 were counted once in every stage" in run
    victim = next(line.split(" kill ")[1].split()[0] for line in run.splitlines() if "injected: kill" in line)
    member = why(victim)
    assert f"{victim} is gone: killed" in member and f"noticed: died {victim}" in member
    assert member.count(f"{victim} serves stage") == 2
    step = why("2")
    assert "step 2 was opened with samples 24 to 35, round 0" in step and step.count(" counted ") >= 3
    assert "held the next state" in step
    assert "step 99 was never opened; the newest is 5" in why("99") and "knows no process 'reef'" in why("reef")


def test_the_report_of_a_pipeline(told: Path) -> None:
    page = build_report(told).read_text()
    text = page.replace("\u00a0", " ")
    assert "3 stages with " in text and "Stages at the newest step" in text
    data = load_run(told)
    assert not any("metrics.jsonl" in note for note in data.notes), "its figures are in another file"
    [fault] = data.faults
    assert (fault.fault, fault.estimated) == ("kill", False) and fault.next_commit_s is not None
    assert fault.detected_s is not None and fault.injected_s is not None and fault.injected_s < fault.detected_s
    assert data.num_member_steps() == NUM_STEPS and data.steps["all stages", 1].loss[-1] > 0


# ---------------------------------------------------------------- before anything is started


@pytest.mark.parametrize(
    "more", [("pipeline.boundary=int8", "codec.name=int8"), (*DILOCO, "codec.name=int8", "strategy.inner_steps=3")]
)
def test_planned_bytes_are_those_that_a_run_sends(make: Make, pack_dir: Path, more: tuple[str, ...]) -> None:
    plain = ("pipeline.buddies=false", "exchange.copies=1", "model.tie_embeddings=false", "codec.block=256", *more)
    made = make(*plain)
    swarm = LocalSwarm(spec=made.spec, plan=replace(made.plan, eval_every=0.0))
    swarm.run(lambda: len(swarm.brain.roster.assignment()) == 6)  # states are pulled; nobody has answered a call
    before = {name: process.transport.bytes_sent for name, process in swarm.processes.items()}
    finish(swarm)
    sent = {name: process.transport.bytes_sent - before[name] for name, process in swarm.processes.items()}
    config = config_of(pack_dir, *plain)
    shape = swarm.spec.shape
    case = Case(num_params=1, num_islands=2, link_bit_per_s=1e9, rtt_s=0.01, step_s=1.0, shape=shape)
    row = pipeline_cost("own", config, case)
    assert [stage.params for stage in row.stages] == list(swarm.plan.layout.params)
    tokens = 6 * NUM_STEPS * 2 * 2 * 16 * 8 + 6 * NUM_STEPS * 2 * 16 * 8  # the first stage's twice, and the targets
    assert sent["trainer-0"] == pytest.approx(NUM_STEPS * row.trainer_bytes_per_step + tokens, rel=0.1)
    synchronised = NUM_STEPS // row.inner_steps
    planned = sum(2 * stage.gradient_bytes * synchronised for stage in row.stages)
    planned += sum(2 * stage.boundary_bytes * NUM_STEPS for stage in row.stages)
    planned -= NUM_STEPS * row.trainer_bytes_per_step  # what peers receive
    peers = sum(num for name, num in sent.items() if name.startswith("peer-"))
    assert peers == pytest.approx(planned, rel=0.1), (row, sent)


def test_faster_links_and_longer_rounds_help_a_pipeline() -> None:
    shape = resolve_shape(ModelConfig(layers=12, dim=768, heads=12), vocab_size=32_000, seq_len=1024)
    slow = Case(num_params=1, num_islands=4, link_bit_per_s=100e6, rtt_s=0.05, step_s=60.0, shape=shape)
    quick = replace(slow, link_bit_per_s=10e9, rtt_s=0.001)
    presets = {name: load_config(name).config for name in ("swarm", "swarm-diloco")}
    share = {
        (name, case.link_bit_per_s): pipeline_cost(name, config, case).utilisation
        for name, config in presets.items()
        for case in (slow, quick)
    }
    assert share["swarm", 100e6] < share["swarm-diloco", 100e6] < share["swarm-diloco", 10e9] <= 1
    delayed = presets["swarm"].with_values({"pipeline.delayed": True})
    assert pipeline_cost("swarm", delayed, slow).step_s < pipeline_cost("swarm", presets["swarm"], slow).step_s
    stages = presets["swarm"].pipeline.model_copy(update={"stages": 15})
    deep = presets["swarm"].model_copy(update={"pipeline": stages})
    with pytest.raises(SettingError, match="15 stages, but the model has 14 layers"):
        pipeline_cost("swarm", deep, slow)
    with pytest.raises(SettingError, match="give RUN in place of --params"):
        pipeline_cost("swarm", presets["swarm"], replace(slow, shape=None))


def test_the_status_of_a_pipeline_elsewhere(told: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = read_pipeline_status(told).model_dump(mode="json")

    @contextmanager
    def connect(target: str | None, token_file: Path | None) -> Iterator[Any]:
        yield SimpleNamespace(ask=lambda what, run: {**values, "paused": True, "state": "running"})

    monkeypatch.setattr("orchestrator.client.connect", connect)
    shown = CliRunner().invoke(status_command, ["10.0.0.1:6379", "--json"], standalone_mode=False)
    assert PipelineStatus.model_validate_json(shown.output).stages[2].serving, shown.output
    table = CliRunner().invoke(status_command, ["10.0.0.1:6379"], standalone_mode=False).output
    assert "running, paused" in " ".join(table.split()) and "placed" in table
