"""Who is asked to go hands over: nothing is lost or counted twice, and no stage is left empty."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.config import parse_config
from orchestrator.events import LeaveRequested
from orchestrator.pipeline.commands import End
from orchestrator.pipeline.local import LocalSwarm
from orchestrator.pipeline.plan import pipeline_plan, pipeline_spec
from orchestrator.pipeline.replay import PipelineHistory, replay
from tests.small_run import PIPELINE_TOML, make_pack
from workers.pipeline.records import LeftRecord, ServeRecord, StageCommitRecord, StepFenceRecord
from workers.records import FenceRecord

NUM_STEPS = 8
Make = Callable[..., LocalSwarm]


@pytest.fixture(scope="module")
def pack_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("pack"))


@pytest.fixture
def make(pack_dir: Path, tmp_path: Path) -> Make:
    def build(*overrides: str) -> LocalSwarm:
        tokens = f"train.tokens={NUM_STEPS * 12 * 16}"
        config = parse_config(PIPELINE_TOML, overrides=[f"data.path={pack_dir}", tokens, *overrides]).config
        spec = pipeline_spec(config, run_id="local", run_dir=tmp_path, pack=pack_dir)
        return LocalSwarm(spec=spec, plan=pipeline_plan(config, spec, tmp_path))

    return build


def leave(swarm: LocalSwarm, *names: str) -> None:
    for name in names:
        swarm._tell_brain(LeaveRequested(name=name, why="asked to"))


def finish(swarm: LocalSwarm) -> PipelineHistory:
    swarm.run()
    assert swarm.finished is not None and swarm.finished.reason == "done", swarm.finished
    history = replay(swarm.records)
    assert history.findings == [] and history.version == NUM_STEPS and history.num_begun_again == 0
    assert not history.lost and not history.partial
    return history


def gone(swarm: LocalSwarm) -> list[str]:
    assert [r.member for r in swarm.records if isinstance(r, FenceRecord)] == [
        r.process for r in swarm.records if isinstance(r, LeftRecord)
    ]
    return [r.process for r in swarm.records if isinstance(r, LeftRecord)]


def digests(swarm: LocalSwarm) -> list[str]:
    return [record.digest for record in swarm.records if isinstance(record, StageCommitRecord)]


KINDS = {
    "every step": [],
    "delayed": ["pipeline.delayed=true"],
    "diloco": ["strategy.name=diloco", "strategy.inner_steps=4"],
    "streaming": [
        "strategy.name=streaming", "strategy.inner_steps=4", "strategy.num_fragments=2", "strategy.overlap_steps=1"
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", [1, 3])
def test_a_peer_leaves_with_nothing_of_its_own(make: Make, kind: str, version: int) -> None:
    swarm, undisturbed = make(*KINDS[kind]), make(*KINDS[kind])
    swarm.run(lambda: swarm.brain.version == version)
    victim = swarm.brain.roster.serving(1)[0].process
    leave(swarm, victim)
    history = finish(swarm)
    assert gone(swarm) == [victim] and not swarm.processes[victim].alive
    assert not [r for r in swarm.records if isinstance(r, StepFenceRecord)]
    assert swarm.brain.num_restarts == {} and len(swarm.brain.roster.peers) == 5
    if kind == "every step":
        finish(undisturbed)
        assert digests(swarm) == digests(undisturbed)  # whoever computes what
    elif kind != "delayed":
        assert all(history.committed[stage] == NUM_STEPS * 6 for stage in range(3))


@pytest.mark.parametrize("kind", ["every step", "diloco"])
def test_the_last_of_a_stage_waits_for_another(make: Make, kind: str) -> None:
    swarm = make(*KINDS[kind])
    swarm.run(lambda: swarm.brain.version == 1)
    both = [peer.process for peer in swarm.brain.roster.serving(1)]
    leave(swarm, *both)
    seen: list[int] = []
    swarm.on_call = lambda call: seen.append(len(swarm.brain.roster.serving(1)))
    finish(swarm)
    assert sorted(gone(swarm)) == sorted(both) and min(seen) >= 1
    moved = [r for r in swarm.records if isinstance(r, ServeRecord) and r.why.startswith("moved")]
    assert [r.stage for r in moved] == [1] and moved[0].process not in both


def test_whom_nobody_can_follow_stays_and_it_is_said_why(make: Make) -> None:
    swarm = make("pipeline.peers=1", "exchange.copies=1")
    swarm.run(lambda: swarm.brain.version == 1)
    [victim] = [peer.process for peer in swarm.brain.roster.serving(1)]
    leave(swarm, victim, "trainer-0", "peer-77")
    swarm.run(lambda: swarm.brain.version == 3)
    assert swarm.brain.waiting == {victim: "it is the last peer of stage 1", "trainer-0": "it is the last trainer"}
    finish(swarm)
    assert gone(swarm) == []


def test_the_copy_that_a_leaver_keeps_is_made_elsewhere_first(make: Make) -> None:
    swarm = make()
    swarm.run(lambda: swarm.brain.version == 1 and bool(swarm.brain.roster.buddies(1)))
    swarm.run(lambda: all(not p.taking for p in swarm.brain.roster.peers.values()))
    [buddy] = [peer.process for peer in swarm.brain.roster.buddies(1)]
    leave(swarm, buddy)
    left: list[int] = []
    obey = swarm._obey

    def watch(commands: object) -> None:
        for command in (found := list(commands)):  # type: ignore[call-overload]
            if isinstance(command, End) and command.process == buddy:
                version = swarm.brain.held_version
                left.extend(len(swarm.brain.roster.holders(stage, version)) for stage in range(3))
        obey(found)

    swarm._obey = watch  # type: ignore[method-assign]
    finish(swarm)
    assert gone(swarm) == [buddy] and len(left) == 3 and min(left) >= 2


def test_a_trainer_leaves_and_the_others_send_its_share(make: Make) -> None:
    swarm = make("pipeline.trainers=2")
    swarm.run(lambda: swarm.brain.version == 2)
    leave(swarm, "trainer-0")
    finish(swarm)
    assert gone(swarm) == ["trainer-0"] and list(swarm.brain.roster.trainers) == ["trainer-1"]


def test_who_has_left_stays_away_when_the_controller_comes_back(make: Make) -> None:
    swarm = make()
    swarm.run(lambda: swarm.brain.version == 1)
    victim = swarm.brain.roster.serving(1)[0].process
    leave(swarm, victim)
    swarm.run(lambda: victim in swarm.brain.left)
    swarm.restart_controller()
    began_s = swarm.now_s
    swarm.run(lambda: swarm.brain.commit is not None)
    assert swarm.now_s - began_s < 10, "it waited for whoever had left"
    swarm.run()
    assert swarm.finished is not None and swarm.finished.reason == "done"
    assert replay(swarm.records).findings == [] and not swarm.processes[victim].alive


def test_who_is_to_go_and_dies_is_not_started_again(make: Make) -> None:
    swarm = make()
    swarm.run(lambda: swarm.brain.version == 1 and swarm.brain.commit is not None)
    victim = swarm.brain.roster.serving(1)[0].process
    leave(swarm, victim)
    swarm.kill(victim)
    swarm.run()
    history = replay(swarm.records)
    assert history.findings == [] and history.left == {victim} and not swarm.processes[victim].alive


def test_the_last_trainer_that_is_to_go_and_dies_is_started_again(make: Make) -> None:
    """The simulator found it, with seed 18: nobody sent microbatches any more."""
    swarm = make()
    swarm.run(lambda: swarm.brain.version == 1 and swarm.brain.commit is not None)
    leave(swarm, "trainer-0")
    swarm.kill("trainer-0")
    swarm.run()
    history = replay(swarm.records)
    assert swarm.finished is not None and swarm.finished.reason == "done"
    assert history.findings == [] and history.left == set() and swarm.processes["trainer-0"].alive
