"""Delayed parameter updates: gradients are one update late and nothing else; deaths cost two steps at most."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.config import load_config, parse_config
from orchestrator.errors import UserError
from orchestrator.events import PauseRequested
from orchestrator.pipeline.commands import Order
from orchestrator.pipeline.local import LocalSwarm
from orchestrator.pipeline.plan import pipeline_plan, pipeline_spec
from orchestrator.pipeline.replay import replay
from tests.small_run import PIPELINE_TOML, make_pack
from workers.data.permutation import sample_ids
from workers.data.reader import PackReader
from workers.model.factory import next_token_loss
from workers.model.llama import Llama
from workers.pipeline.calls import Call
from workers.pipeline.host import PeerHost
from workers.pipeline.messages import Apply, Collect, Reduce, Spread
from workers.pipeline.records import StageCommitRecord, StepRecord
from workers.pipeline.state import PARAMS
from workers.records import FenceRecord

NUM_STEPS = 6
Make = Callable[..., LocalSwarm]


@pytest.fixture(scope="module")
def pack_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("pack"))


@pytest.fixture
def make(pack_dir: Path, tmp_path: Path) -> Make:
    def build(*overrides: str) -> LocalSwarm:
        more = [f"data.path={pack_dir}", f"train.tokens={NUM_STEPS * 12 * 16}", "pipeline.delayed=true", *overrides]
        config = parse_config(PIPELINE_TOML, overrides=more).config
        spec = pipeline_spec(config, run_id="local", run_dir=tmp_path, pack=pack_dir)
        return LocalSwarm(spec=spec, plan=pipeline_plan(config, spec, tmp_path))

    return build


def finish(swarm: LocalSwarm) -> list[str]:
    """Run to the end; the digests of all commits, with the ledger looked at."""
    swarm.run()
    assert swarm.finished is not None and swarm.finished.reason == "done", swarm.finished
    history = replay(swarm.records)
    assert history.findings == [] and history.version == NUM_STEPS
    return [history.commits[step][stage].digest for step in sorted(history.commits) for stage in range(3)]


def test_each_gradient_is_one_update_late(make: Make) -> None:
    swarm = make("eval.every=1.0")
    finish(swarm)
    spec, train = swarm.spec, swarm.spec.train
    model, behind = Llama(spec.shape, seed=train.seed), Llama(spec.shape, seed=train.seed)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(train.beta1, train.beta2), eps=train.eps)
    reader, size = PackReader(spec.pack), spec.pipeline.samples_per_step
    late = list(behind.parameters())
    for step in range(NUM_STEPS):
        positions = np.arange(step * size, (step + 1) * size, dtype=np.int64)
        batch = reader.batch(sample_ids(positions, size=reader.num_samples("train"), seed=train.seed))
        loss = next_token_loss(behind, torch.from_numpy(batch))
        gradients = torch.autograd.grad(loss, late)
        assert swarm.steps[step].loss == pytest.approx(float(loss.detach()), rel=1e-4), step
        behind.load_state_dict(model.state_dict())  # what the next step is made with: without this update
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = swarm.plan.rate(step)
        optimizer.step()
    held = _flat(swarm)
    for name, value in model.named_parameters():
        if name in held:
            torch.testing.assert_close(held[name], value.detach(), rtol=1e-3, atol=1e-4)
    assert set(held) >= {"model.norm.weight", "model.layers.0.input_layernorm.weight"}


def _flat(swarm: LocalSwarm) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for process in swarm.processes.values():
        if isinstance(process.host, PeerHost):
            for state in process.host.held.values():
                for unit in swarm.spec.units_of(state.stage):
                    start = 0
                    for name, shape in swarm.spec.slots(unit).items():
                        size = int(np.prod(shape))
                        found[name] = state.flats[unit, PARAMS][start : start + size].view(shape)
                        start += size
    return found


def test_a_step_goes_through_while_the_one_before_is_reduced_and_speeds_change_no_bit(make: Make) -> None:
    quiet = make()
    expected = finish(quiet)
    swarm = make()
    swarm.speeds = {"peer-0": 4.0, "peer-1": 1.0, "peer-2": 0.5, "peer-5": 2.0}
    calls: list[tuple[int, int]] = []
    swarm.on_call = lambda call: calls.append((call.step, swarm.brain.version))
    assert finish(swarm) == expected
    assert any(step == version + 1 for step, version in calls), "nothing overlapped"
    opened = [r.step for r in swarm.records if isinstance(r, StepRecord)]
    assert opened == list(range(NUM_STEPS))
    rows = [r for r in swarm.records if isinstance(r, StepRecord | StageCommitRecord)]
    ahead = [a for a, b in pairwise(rows) if isinstance(a, StepRecord) and b.step == a.step - 1]
    assert len(ahead) >= NUM_STEPS - 3, "the step before is committed after the next one was opened"


@pytest.mark.parametrize("kind", [Collect, Reduce, Spread, Apply])
@pytest.mark.parametrize("step", [1, 2])
def test_a_peer_dies_at_an_order(make: Make, kind: type, step: int) -> None:
    swarm, dead = make(), list[str]()

    def watch(order: Order) -> None:
        if isinstance(order.order, kind) and getattr(order.order, "step", -1) == step and not dead:
            dead.append(order.process)
            swarm.kill(order.process)

    swarm.on_order = watch
    finish(swarm)
    assert dead == [r.member for r in swarm.records if isinstance(r, FenceRecord)]
    back = [r.why for r in swarm.records if isinstance(r, StepRecord) and "is not whole" in r.why]
    assert len(back) <= 1 and (back or kind not in (Reduce, Spread)), "what was lost cannot be counted again"


@pytest.mark.parametrize("who", ["a peer", "a stage", "a trainer", "the controller"])
def test_whoever_dies_while_two_steps_are_open(make: Make, who: str) -> None:
    swarm, struck = make("pipeline.trainers=2"), list[str]()

    def both_open(call: Call) -> None:
        if call.step >= 2 and call.step == swarm.brain.version + 1 and not struck:
            if who == "the controller":
                struck.append("controller")
                swarm.later(swarm.restart_controller)
                return
            serving = [peer.process for peer in swarm.brain.roster.serving(1)]
            struck.extend({"a peer": serving[:1], "a stage": serving, "a trainer": ["trainer-1"]}[who])
            for name in struck:
                swarm.kill(name)

    swarm.on_call = both_open
    finish(swarm)
    assert struck
    # What a peer counted is counted again by others, where enough of them have the update under way.
    again = [r for r in swarm.records if isinstance(r, StepRecord) and (r.why or r.round)]
    assert again or who.startswith("a peer") or who == "a stage", again


def test_a_pause_and_an_evaluation_find_one_step_at_a_time(make: Make) -> None:
    swarm = make("eval.every=0.5")
    swarm.run(lambda: swarm.brain.version == 2)
    swarm._tell_brain(PauseRequested(paused=True, why="asked to"))
    swarm.run(lambda: not swarm.brain._open_commits())
    resting = swarm.brain.version
    swarm.run(lambda until=swarm.now_s + 200: swarm.now_s > until)  # type: ignore[misc]
    assert swarm.brain.version == resting
    swarm._tell_brain(PauseRequested(paused=False, why="asked to"))
    finish(swarm)
    evaluated = [row.versions[0] for row in replay(swarm.records).evaluations]
    assert (evaluated[0], evaluated[-1]) == (0, NUM_STEPS)


def test_it_is_for_gradients_alone() -> None:
    with pytest.raises(UserError, match=r"pipeline\.delayed = True, and peers that step on their own"):
        load_config("swarm-diloco", overrides=["pipeline.delayed=true"])
