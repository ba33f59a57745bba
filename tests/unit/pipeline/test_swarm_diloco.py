"""DiLoCo inside stages: equal to DiLoCo of the model that is not split, and exact accounts of what deaths cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from orchestrator.config import parse_config
from orchestrator.pipeline.commands import Order, Stop
from orchestrator.pipeline.local import LocalSwarm
from orchestrator.pipeline.plan import pipeline_plan, pipeline_spec
from orchestrator.pipeline.replay import replay
from tests.small_run import PIPELINE_TOML, make_pack
from tests.stage_runs import Unsplit, anchors, finish
from workers.pipeline.calls import Call
from workers.pipeline.local_host import LocalHost
from workers.pipeline.messages import Apply, LocalStep, OfferWork, Reduce, Spread
from workers.pipeline.records import StageSyncRecord, WorkLostRecord
from workers.pipeline.state import PARAMS

H, NUM_STEPS = 3, 6
DILOCO = [
    "strategy.name=diloco",
    f"strategy.inner_steps={H}",
    "strategy.outer_lr=0.7",
    "strategy.outer_momentum=0.9",
]

Make = Callable[..., LocalSwarm]


@pytest.fixture(scope="module")
def pack_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("pack"))


@pytest.fixture
def make(pack_dir: Path, tmp_path: Path) -> Make:
    def build(*overrides: str) -> LocalSwarm:
        tokens = f"train.tokens={NUM_STEPS * 12 * 16}"
        config = parse_config(PIPELINE_TOML, overrides=[*DILOCO, f"data.path={pack_dir}", tokens, *overrides]).config
        spec = pipeline_spec(config, run_id="local", run_dir=tmp_path, pack=pack_dir)
        return LocalSwarm(spec=spec, plan=pipeline_plan(config, spec, tmp_path))

    return build


@pytest.mark.parametrize("peers", [1, 2])
def test_it_is_diloco_of_the_model_that_is_not_split(make: Make, peers: int) -> None:
    # Untied: unsplit, the two uses of a tied matrix share one AdamW.
    swarm = make("model.tie_embeddings=false", f"pipeline.peers={peers}")
    swarm.speeds = {"peer-3": 2.0}
    history = finish(swarm)
    reference = Unsplit(swarm).follow()
    syncs = [record for record in swarm.records if isinstance(record, StageSyncRecord)]
    for version in {sync.version for sync in syncs}:
        assert sum(len(sync.contributors) for sync in syncs if sync.version == version) == 3 * peers
    assert history.num_syncs == 3 * NUM_STEPS // H and history.lost == {}
    assert [step.loss for step in swarm.steps] == pytest.approx(reference.losses, rel=1e-4)
    held = anchors(swarm)
    assert held.keys() == reference.anchor.keys()
    for name, value in reference.anchor.items():
        # Adam divides by the size of the gradient: where that is nothing, rounding is all that is left.
        torch.testing.assert_close(held[name], value, rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_backward_goes_where_the_forward_was(make: Make) -> None:
    swarm = make()
    calls: list[Call] = []
    swarm.on_call = calls.append
    finish(swarm)
    forwards = {(c.step, c.microbatch, c.stage): c.peer for c in calls if c.direction == "forward" and c.step >= 0}
    backwards = {(c.step, c.microbatch, c.stage): c.peer for c in calls if c.direction == "backward" and c.stage < 2}
    assert forwards == backwards


def test_tied_matrices_are_one_after_every_synchronisation(make: Make) -> None:
    swarm = make("model.tie_embeddings=true")
    finish(swarm)
    anchors(swarm)  # compares what both stages hold
    held = [p.host.held for p in swarm.processes.values() if isinstance(p.host, LocalHost)]
    assert sum(("tied", PARAMS) in state.flats for stages in held for state in stages.values()) >= 4


def test_residuals_of_low_bit_codecs_are_kept(make: Make) -> None:
    """Delivered and kept add up to what was moved, over all synchronisations."""
    swarm = make("codec.name=int4", "codec.error_feedback=true")
    sent: dict[str, Tensor] = {}
    moved: dict[str, Tensor] = {}

    def watch(order: Order) -> None:
        host = swarm.processes[order.process].host
        if isinstance(order.order, Apply) and isinstance(host, LocalHost) and order.order.included:
            assert host.work is not None and host.work.offer is not None and host.serving is not None
            unit = f"stage-{order.order.stage}"
            state = host.held[order.order.stage]
            before = host.work.residuals.get(unit, torch.zeros(1))
            own = host.work.displacement(state.flats)[unit]
            moved[order.process] = moved.get(order.process, 0) + own
            sent[order.process] = sent.get(order.process, 0) + own + before - host.work.offer.residuals[unit]

    swarm.on_order = watch
    history = finish(swarm)
    assert history.num_syncs == 6 and len(sent) == 6
    for process, total in moved.items():
        host = swarm.processes[process].host
        assert isinstance(host, LocalHost) and host.work is not None and host.serving is not None
        kept = host.work.residuals[f"stage-{host.serving.stage}"]
        assert kept.abs().max() > 0
        torch.testing.assert_close(sent[process] + kept, total, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- what deaths cost


@pytest.mark.parametrize("kind", [LocalStep, OfferWork, Reduce, Spread, Apply])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_peer_dies_at_an_order(make: Make, kind: type, when: str) -> None:
    swarm = make()
    killed: list[str] = []

    def watch(order: Order) -> None:
        if isinstance(order.order, kind) and swarm.brain.version >= 2 and not killed:
            killed.append(order.process)
            if when == "before":
                swarm.kill(order.process)
            else:
                swarm._at(0.0005, lambda: swarm.kill(order.process))

    swarm.on_order = watch
    history = finish(swarm)
    assert killed
    lost = [r.peer.partition(".")[0] for r in swarm.records if isinstance(r, WorkLostRecord)]
    # Once the commit is on the record, its work is in it.
    assert bool(history.lost) == bool(lost)
    if kind is Spread and when == "after":
        assert lost in ([], killed)  # the commit may be on the record before anybody knows
    else:
        assert lost == ([] if kind is Apply else killed)


def test_a_peer_that_dies_in_a_round_takes_its_own_steps_along(make: Make) -> None:
    swarm = make()
    swarm.run(lambda: swarm.brain.version == 2)
    victim = swarm.brain.roster.serving(1)[0]
    had = {name: one.num_microbatches for name, one in swarm.brain.work.items()}  # type: ignore[attr-defined]
    swarm.kill(victim.process)
    history = finish(swarm)
    assert history.lost == {1: had[victim.name]} and had[victim.name] > 0
    assert history.committed[0] == NUM_STEPS * 6 and history.committed[1] == NUM_STEPS * 6 - had[victim.name]


def test_a_peer_that_is_left_out_offers_again(make: Make) -> None:
    swarm = make("pipeline.forward_timeout_s=5", "pipeline.backward_timeout_s=10")
    swarm.run(lambda: swarm.brain.version == 2)
    victim = swarm.brain.roster.serving(1)[0]
    name = victim.name
    silent: list[str] = []

    def watch(order: Order) -> None:
        if isinstance(order.order, OfferWork) and order.order.peer == name and not silent:
            silent.append(order.process)
            swarm.hang(order.process)
            swarm._at(4.0, lambda: setattr(swarm.processes[order.process], "hangs", False))

    swarm.on_order = watch
    history = finish(swarm)
    syncs = [r for r in swarm.records if isinstance(r, StageSyncRecord) and r.stage == 1]
    assert silent and [name in sync.contributors for sync in syncs] == [False, True]
    assert history.lost == {} and history.committed[1] == NUM_STEPS * 6


def test_the_last_peers_of_a_stage_die_and_nothing_committed_is_lost(make: Make) -> None:
    swarm = make()
    swarm.run(lambda: swarm.brain.version == H + 1 and bool(swarm.brain.roster.buddies(1)))
    swarm.run(lambda: all(not p.taking for p in swarm.brain.roster.peers.values()))
    dead = [peer.process for peer in swarm.brain.roster.serving(1)]
    for process in dead:
        swarm.kill(process)
    history = finish(swarm)
    assert set(history.lost) >= {1} and history.committed[1] >= H * 6


def test_the_controller_comes_back_and_the_round_begins_anew(make: Make) -> None:
    swarm = make()
    for version in (2, H, H + 2):
        swarm.run(lambda wanted=version: swarm.brain.version == wanted)
        swarm.restart_controller()
    history = finish(swarm)
    assert history.num_taken_back >= 2 and history.lost == {}


def test_a_stop_synchronises_first(make: Make) -> None:
    swarm = make()
    swarm.run(lambda: swarm.brain.version == H + 1)
    swarm._tell_brain(Stop(save=True))
    swarm.run()
    assert swarm.finished is not None and swarm.finished.reason == "stopped"
    history = replay(swarm.records)
    assert history.findings == [] and H < history.version == swarm.brain.version < NUM_STEPS
    assert history.own == {} and history.committed[0] == history.version * 6


@pytest.mark.parametrize("seed", range(3))
def test_random_deaths_leave_exact_accounts(make: Make, seed: int) -> None:
    swarm = make("pipeline.trainers=2", "codec.name=int8", "codec.block=1024", "codec.error_feedback=true")
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
