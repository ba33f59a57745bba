"""Streaming DiLoCo inside stages: equal to DiLoCo with one fragment, to a plain reference with more, exact accounts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.config import load_config, parse_config
from orchestrator.errors import UserError
from orchestrator.events import PauseRequested, SettingsRequested
from orchestrator.pipeline.commands import Order, Rebalance, Stop
from orchestrator.pipeline.local import LocalSwarm
from orchestrator.pipeline.plan import check_fragments, pipeline_plan, pipeline_spec
from orchestrator.pipeline.replay import newest_snapshot, replay
from orchestrator.pipeline.rounds import RoundBrain
from orchestrator.pipeline.work import Work
from strategies.errors import SettingError
from strategies.swarm import LayerCost, split_layers
from tests.small_run import PIPELINE_TOML, make_pack
from tests.stage_runs import Unsplit, anchors, finish
from workers.pipeline.calls import Call
from workers.pipeline.messages import Apply, LocalStep, OfferWork, Reduce, Spread
from workers.pipeline.records import StageSyncRecord, WorkLostRecord

H, NUM_STEPS = 4, 10
STREAMING = ["strategy.name=streaming", f"strategy.inner_steps={H}", "strategy.num_fragments=2"]
OVERLAPPED = ["strategy.overlap_steps=1", "strategy.merge_alpha=0.5"]

Make = Callable[..., LocalSwarm]


@pytest.fixture(scope="module")
def pack_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("pack"))


@pytest.fixture
def make(pack_dir: Path, tmp_path: Path) -> Make:
    def build(*overrides: str) -> LocalSwarm:
        tokens = f"train.tokens={NUM_STEPS * 12 * 16}"
        config = parse_config(
            PIPELINE_TOML, overrides=[*STREAMING, f"data.path={pack_dir}", tokens, "model.layers=4", *overrides]
        ).config
        spec = pipeline_spec(config, run_id="local", run_dir=tmp_path, pack=pack_dir)
        return LocalSwarm(spec=spec, plan=pipeline_plan(config, spec, tmp_path))

    return build


def syncs_of(swarm: LocalSwarm, stage: int = 0) -> list[StageSyncRecord]:
    return [r for r in swarm.records if isinstance(r, StageSyncRecord) and r.stage == stage]


def brain_of(swarm: LocalSwarm) -> RoundBrain:
    assert isinstance(swarm.brain, RoundBrain)
    return swarm.brain


# ---------------------------------------------------------------- what it computes


@pytest.mark.parametrize("codec", [[], ["codec.name=int4", "codec.error_feedback=true"]], ids=["fp32", "int4"])
def test_one_fragment_without_overlap_is_diloco_bit_for_bit(make: Make, codec: list[str]) -> None:
    streaming, diloco = make("strategy.num_fragments=1", *codec), make(
        "strategy.name=diloco", "strategy.num_fragments=1", *codec
    )  # fmt: skip
    for swarm in (streaming, diloco):
        swarm.speeds = {"peer-3": 2.0}
        finish(swarm)
    assert [(r.version, r.digest) for r in syncs_of(streaming, 1)] == [
        (r.version, r.digest) for r in syncs_of(diloco, 1)
    ]
    assert [r.version for r in syncs_of(diloco)] == [4, 8, 10]
    assert [step.loss for step in streaming.steps] == [step.loss for step in diloco.steps]
    held = anchors(diloco)
    assert all(torch.equal(value, held[name]) for name, value in anchors(streaming).items())


@pytest.mark.parametrize("overlap", [[], OVERLAPPED, [*OVERLAPPED, "strategy.merge_kappa=0.5"]])
@pytest.mark.parametrize("peers", [1, 2])
def test_it_is_streaming_diloco_of_the_model_that_is_not_split(make: Make, peers: int, overlap: list[str]) -> None:
    swarm = make("model.tie_embeddings=false", f"pipeline.peers={peers}", *overlap)
    swarm.speeds = {"peer-3": 2.0}
    history = finish(swarm)
    reference = Unsplit(swarm).follow()
    assert history.lost == history.partial == {} and history.own == {}
    assert [(r.version, r.fragments) for r in syncs_of(swarm)] == [
        (2, (0,)), (4, (1,)), (6, (0,)), (8, (1,)), (10, (0, 1))
    ]  # fmt: skip
    assert [step.loss for step in swarm.steps] == pytest.approx(reference.losses, rel=1e-4)
    held = anchors(swarm)
    assert held.keys() == reference.anchor.keys()
    for name, value in reference.anchor.items():
        torch.testing.assert_close(held[name], value, rtol=2e-3, atol=4e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_steps_go_on_while_a_fragment_is_under_way(make: Make) -> None:
    swarm = make("strategy.overlap_steps=1")
    seen: set[tuple[int, int]] = set()

    def watch(call: Call) -> None:
        if (syncing := brain_of(swarm).syncing) is not None and call.step >= 0:
            seen.add((syncing.sent, call.step))

    swarm.on_call = watch
    finish(swarm)
    # Sent after so many steps, applied a step later: that step, and no other, is made meanwhile.
    assert seen == {(sent, sent) for sent in (2, 4, 6, 8)}


def test_a_result_is_applied_at_its_step_however_slow_its_owner_is(make: Make) -> None:
    quick, slow = make(*OVERLAPPED), make(*OVERLAPPED)
    held_up: list[int] = []

    def hold(order: Order) -> None:
        if isinstance(order.order, Reduce) and len(held_up) < 3:
            held_up.append(order.order.step)
            slow.hang(order.process)
            slow._at(3.0, lambda: setattr(slow.processes[order.process], "hangs", False))

    slow.on_order = hold
    for swarm in (quick, slow):
        swarm.speeds = {"peer-3": 2.0}
    finish(quick), finish(slow)
    assert held_up
    assert [r.version for r in syncs_of(quick)] == [r.version for r in syncs_of(slow)]


def test_a_tied_matrix_is_in_one_fragment_of_both_stages(make: Make) -> None:
    swarm = make("model.tie_embeddings=true", *OVERLAPPED)
    spec = swarm.spec
    assert spec.fragment_of("tied") == 1 and all("tied" in spec.units_of(stage) for stage in (0, 2))
    names = [name for unit in spec.units for name in spec.slots(unit)]
    assert sorted(names) == sorted(spec.shapes) and len(names) == len(set(names))
    finish(swarm)
    anchors(swarm)  # compares what all holders have


def test_a_validation_is_of_the_anchors(make: Make) -> None:
    """All peers of a stage say the same then, though their own parameters differ."""
    swarm = make("eval.every=0.2", *OVERLAPPED)
    finish(swarm)
    versions = [version for version, _ in swarm.brain.evaluations]
    # After a fragment was applied, at the beginning and at the end.
    assert versions[0] == 0 and versions[-1] == NUM_STEPS and set(versions) <= {0, 3, 5, 7, 9, 10} and len(versions) > 3


# ---------------------------------------------------------------- accounts


def test_work_is_committed_when_every_fragment_has_it() -> None:
    work = Work.begin(0, 3, 2)
    for step, num in ((3, 2), (4, 4), (6, 1)):
        work.count(step, num)
    assert (work.rate(0, 6), work.rate(0, 7), work.rate(1, 3)) == (3.0, 7 / 3, 0.0)
    assert work.commit((0,), 5) == 0 and work.rate(0, 7) == 1.0 and work.rate(1, 7) == 7 / 3
    assert work.lose() == (1, 6)
    assert work.commit((1,), 4) == 2 and work.lose() == (1, 4)
    assert work.without(6).counted == {4: 4}
    assert work.commit((0, 1), 7) == 5 and not work.counted


def test_what_some_fragments_have_is_partial(make: Make) -> None:
    swarm = make()
    swarm.run(lambda: swarm.brain.version == 3 and swarm.brain.held_version == 2)
    victim = swarm.brain.roster.serving(1)[0]
    counted = dict(brain_of(swarm).work[victim.name].counted)
    swarm.kill(victim.process)
    history = finish(swarm)
    assert set(counted) == {0, 1, 2}
    assert history.partial == {1: counted[0] + counted[1]} and history.lost == {1: counted[2]}


@pytest.mark.parametrize("kind", [LocalStep, OfferWork, Reduce, Spread, Apply])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_peer_dies_at_an_order(make: Make, kind: type, when: str) -> None:
    swarm = make(*OVERLAPPED)
    killed: list[str] = []

    def watch(order: Order) -> None:
        if isinstance(order.order, kind) and swarm.brain.version >= 3 and not killed:
            killed.append(order.process)
            if when == "before":
                swarm.kill(order.process)
            else:
                swarm._at(0.0005, lambda: swarm.kill(order.process))

    swarm.on_order = watch
    history = finish(swarm)
    assert killed
    lost = [r.peer.partition(".")[0] for r in swarm.records if isinstance(r, WorkLostRecord)]
    assert set(lost) <= set(killed) and bool(lost) == bool(history.lost or history.partial)


def test_the_controller_comes_back_and_the_turn_goes_on(make: Make) -> None:
    swarm = make(*OVERLAPPED)
    for version in (3, 6):
        swarm.run(lambda wanted=version: swarm.brain.version == wanted)
        swarm.restart_controller()
    history = finish(swarm)
    turns = [record.fragments for record in syncs_of(swarm)]
    assert history.num_taken_back >= 2 and turns == [(0,), (1,), (0,), (1,), (0, 1)]
    # What a fragment lacked when the anchors were gone back to, it lacks for good.
    assert sum(history.partial.values()) > 0


@pytest.mark.parametrize("version", [2, 3, 4, 5])
@pytest.mark.parametrize("paused", [False, True])
def test_a_stop_synchronises_every_fragment_first(make: Make, version: int, paused: bool) -> None:
    swarm = make(*OVERLAPPED)
    swarm.run(lambda: swarm.brain.version == version)
    if paused:
        swarm._tell_brain(PauseRequested(paused=True, why="a test"))
        swarm.run(lambda: swarm.brain.commit is None)
    swarm._tell_brain(Stop(save=True))
    swarm.run()
    assert swarm.finished is not None and swarm.finished.reason == "stopped"
    history = replay(swarm.records)
    assert history.findings == [] and history.own == {} and version <= history.version == swarm.brain.version
    assert history.committed[0] == history.version * 6
    saved = newest_snapshot(swarm.plan.snapshots, at_most=100)
    assert saved is not None and saved.version == history.version


@pytest.mark.parametrize("seed", range(3))
def test_random_deaths_leave_exact_accounts(make: Make, seed: int) -> None:
    swarm = make("pipeline.trainers=2", "codec.name=int8", "codec.block=1024", "codec.error_feedback=true", *OVERLAPPED)
    generator = np.random.default_rng(seed)
    num_killed = 0

    def watch(call: Call) -> None:
        nonlocal num_killed
        alive = [name for name, process in swarm.processes.items() if process.alive]
        if num_killed < 6 and generator.random() < 0.03 and len(alive) > 5:
            num_killed += 1
            swarm.kill(alive[generator.integers(len(alive))])
            if generator.random() < 0.3:
                swarm.restart_controller()

    swarm.on_call = watch
    finish(swarm)
    assert num_killed > 0


def test_a_mover_leaves_nothing_behind_in_any_fragment(make: Make) -> None:
    swarm = make("pipeline.peers=3", *OVERLAPPED)
    swarm.run(lambda: len(swarm.brain.roster.serving(1)) == 3)
    for peer in swarm.brain.roster.serving(1):
        swarm.speeds[peer.process] = 0.1
    swarm.run(lambda: swarm.brain.version == 3)
    swarm._tell_brain(Rebalance())
    assert swarm.brain.rebalancer.open is not None, swarm.brain.why_no_move
    history = finish(swarm)
    assert history.moves and history.lost == history.partial == {}
    assert any(record.fragments == (0, 1) for record in syncs_of(swarm)[:-1])


# ---------------------------------------------------------------- settings


def complaint(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config("swarm-diloco", overrides=["strategy.name=streaming", *overrides])
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words", "remedy"),
    [
        (["strategy.num_fragments=3"], "strategy.inner_steps = 20 is no multiple of the 3 fragments", "18 or 21"),
        (["strategy.inner_steps=1", "strategy.num_fragments=2"], "strategy.inner_steps = 1 is less than", "2 or a"),
        (["strategy.num_fragments=2", "strategy.overlap_steps=10"], "= 10 steps after this one", "9 or less"),
        (["strategy.overlap_steps=20"], "strategy.overlap_steps = 20", "19 or less"),
        (['strategy.fragments=[["*"]]'], "strategy.fragments", "strategy.fragments = []"),
        (["pipeline.delayed=true"], "pipeline.delayed = True", "pipeline.delayed = False"),
    ],
)
def test_what_cannot_work_is_refused_with_the_nearest_value(overrides: list[str], words: str, remedy: str) -> None:
    found = complaint(*overrides)
    assert words in found and remedy in found


def test_more_fragments_than_any_stage_has_layers_are_refused() -> None:
    stages = split_layers([LayerCost(name=str(i), num_params=1) for i in range(7)], 3)
    check_fragments(stages, 3)
    with pytest.raises(SettingError, match="the longest of 3 stages has 3; set it to 3 or less"):
        check_fragments(stages, 4)


def test_outer_steps_are_counted_and_not_computed_from_the_period(make: Make) -> None:
    """Outer Adam corrects its bias by them, whatever `atoll set` makes of the period, and over deaths."""
    swarm = make("strategy.outer=adam", "strategy.outer_lr=0.1")
    seen: list[tuple[int, dict[str, int]]] = []

    def watch(order: Order) -> None:
        if isinstance(order.order, Spread) and order.order.stage == 1:
            seen.append((order.order.next_version or 0, dict(order.order.outer_rounds)))

    swarm.on_order = watch
    swarm.run(lambda: swarm.brain.version == 3)
    swarm._tell_brain(SettingsRequested(values=(("strategy.inner_steps", 2),)))
    swarm.run(lambda: swarm.brain.version == 5)
    swarm.restart_controller()
    finish(swarm)
    rounds: dict[str, list[int]] = {"stage-1.0": [], "stage-1.1": []}
    for _, found in sorted({version: found for version, found in seen}.items()):
        for unit in rounds.keys() & found.keys():
            rounds[unit].append(found[unit])
    assert all(numbers == list(range(len(numbers))) and len(numbers) >= 3 for numbers in rounds.values()), rounds
