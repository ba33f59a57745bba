"""Whole pipeline runs in one thread: the model that is not split is the reference, and nothing that dies changes bits.

The controller, peers and trainers are those of a run on Ray; the transport and the time are virtual.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.config import parse_config
from orchestrator.pipeline.commands import Order, Rebalance, Stop
from orchestrator.pipeline.local import LocalSwarm
from orchestrator.pipeline.plan import pipeline_plan, pipeline_spec
from orchestrator.pipeline.replay import newest_snapshot, replay
from tests.small_run import PIPELINE_TOML, make_pack
from workers.data.permutation import sample_ids
from workers.data.reader import PackReader
from workers.model.factory import next_token_loss
from workers.model.llama import Llama
from workers.pipeline.calls import Call
from workers.pipeline.host import PeerHost
from workers.pipeline.messages import Apply, Collect, Reduce, Spread
from workers.pipeline.peer import Fetched, Reply, Request
from workers.pipeline.records import ServeRecord, StageCommitRecord, StepFenceRecord, StepRecord
from workers.pipeline.spec import TIED
from workers.pipeline.state import PARAMS, Next, StageState
from workers.pipeline.trainer import TrainerHost
from workers.pipeline.whole import load_whole
from workers.records import FenceRecord
from workers.samples import evenly_spread
from workers.transport.errors import PeerUnreachable

NUM_STEPS = 5


@pytest.fixture(scope="module")
def pack_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("pack"))


Make = Callable[..., LocalSwarm]


@pytest.fixture
def make(pack_dir: Path, tmp_path: Path) -> Make:
    def build(*overrides: str, run_dir: Path = tmp_path) -> LocalSwarm:
        tokens = f"train.tokens={NUM_STEPS * 12 * 16}"
        config = parse_config(PIPELINE_TOML, overrides=[f"data.path={pack_dir}", tokens, *overrides]).config
        spec = pipeline_spec(config, run_id="local", run_dir=run_dir, pack=pack_dir)
        return LocalSwarm(spec=spec, plan=pipeline_plan(config, spec, run_dir))

    return build


def parameters(swarm: LocalSwarm) -> dict[str, torch.Tensor]:
    """Of the whole model, from whoever holds the newest version of each stage."""
    found: dict[str, torch.Tensor] = {}
    for process in swarm.processes.values():
        if not process.alive or not isinstance(process.host, PeerHost):
            continue
        for stage, state in process.host.held.items():
            if state.version == swarm.brain.version:
                for unit in swarm.spec.units_of(stage):
                    start = 0
                    for name, shape in swarm.spec.slots(unit).items():
                        size = int(np.prod(shape))
                        found[name] = state.flats[unit, PARAMS][start : start + size].view(shape)
                        start += size
    return found


Named = dict[str, torch.Tensor]


def unsplit(swarm: LocalSwarm) -> tuple[list[float], list[Named], Named]:
    """The same steps of the whole model with torch's own AdamW: losses, clipped gradients, parameters at the end."""
    spec, train = swarm.spec, swarm.spec.train
    model = Llama(spec.shape, seed=train.seed)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), eps=train.eps)
    reader, size = PackReader(spec.pack), spec.pipeline.samples_per_step
    losses, gradients = [], []
    for step in range(spec.total_steps):
        positions = np.arange(step * size, (step + 1) * size, dtype=np.int64)
        tokens = reader.batch(sample_ids(positions, size=reader.num_samples("train"), seed=train.seed))
        for group in optimizer.param_groups:
            group["lr"] = swarm.plan.rate(step)
        optimizer.zero_grad()
        loss = next_token_loss(model, torch.from_numpy(tokens))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, gradients, {name: p.detach() for name, p in model.named_parameters()}


def finish(swarm: LocalSwarm) -> tuple[str, ...]:
    """Run to the end; the digests of all commits, with the ledger looked at."""
    swarm.run()
    assert swarm.finished is not None and swarm.finished.reason == "done", swarm.finished
    history = replay(swarm.records)
    assert history.findings == [] and history.version == swarm.spec.total_steps
    last = history.commits
    return tuple(last[step][stage].digest for step in sorted(last) for stage in sorted(last[step]))


@pytest.mark.parametrize("tied", ["true", "false"])
def test_losses_and_gradients_are_those_of_the_unsplit_model(
    make: Make, tied: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = make(f"model.tie_embeddings={tied}")
    seen: dict[tuple[int, str], torch.Tensor] = {}
    compute_next = StageState.compute_next

    def record(state: StageState, gradients: Named, *, lr: float, scale: float, **others: Any) -> Next:
        seen.update({(state.version, unit): flat * scale for unit, flat in gradients.items()})
        return compute_next(state, gradients, lr=lr, scale=scale, **others)

    monkeypatch.setattr(StageState, "compute_next", record)
    finish(swarm)
    losses, gradients, reference = unsplit(swarm)
    assert [step.loss for step in swarm.steps] == pytest.approx(losses, rel=1e-4)
    for (step, unit), mine in seen.items():
        wanted = torch.cat([gradients[step][name].reshape(-1) for name in swarm.spec.slots(unit)])
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6, msg=lambda m, n=unit: f"{n}: {m}")
    assert seen.keys() == {(step, unit) for step in range(NUM_STEPS) for unit in swarm.spec.units}
    held = parameters(swarm)
    assert held.keys() == reference.keys()
    for name, value in reference.items():
        # Adam divides by the size of the gradient: where that is nothing, rounding is all that is left.
        torch.testing.assert_close(held[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_validation_losses_are_those_of_the_unsplit_model(make: Make) -> None:
    swarm = make("eval.every=0.5")
    dead: list[str] = []

    def watch(call: Call) -> None:
        if call.step < -1 and not dead:
            dead.append(call.peer.partition(".")[0])
            swarm.kill(dead[0])

    swarm.on_call = watch
    swarm.run(lambda: swarm.brain.version == 1)
    first = dict(swarm.brain.evaluations)
    finish(swarm)
    rows = replay(swarm.records).evaluations
    assert dead and [row.versions[0] for row in rows] == [0, 3, 5]  # at the beginning, past the half, at the end
    model, reader = Llama(swarm.spec.shape, seed=swarm.spec.train.seed), PackReader(swarm.spec.pack)
    tokens = torch.from_numpy(reader.batch(evenly_spread(reader.num_samples("val"), 5), "val"))
    with torch.no_grad():
        assert first[0] == pytest.approx(float(next_token_loss(model, tokens)), rel=1e-5)
        model.load_state_dict(parameters(swarm), strict=False)
        assert rows[-1].val_loss == pytest.approx(float(next_token_loss(model, tokens)), rel=1e-5)


def test_both_holders_of_the_tied_matrix_have_the_same_bits(make: Make) -> None:
    swarm = make()
    finish(swarm)
    held = [p.host.held for p in swarm.processes.values() if isinstance(p.host, PeerHost)]
    states = [state for stages in held for state in stages.values()]
    matrices = [state.flats[TIED, PARAMS] for state in states if (TIED, PARAMS) in state.flats]
    assert len(matrices) >= 4 and all(torch.equal(matrices[0], matrix) for matrix in matrices)


# ---------------------------------------------------------------- nothing that dies changes bits


@pytest.fixture(scope="module")
def expected(pack_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("expected")
    config = parse_config(
        PIPELINE_TOML, overrides=[f"data.path={pack_dir}", f"train.tokens={NUM_STEPS * 12 * 16}"]
    ).config
    spec = pipeline_spec(config, run_id="local", run_dir=folder, pack=pack_dir)
    return finish(LocalSwarm(spec=spec, plan=pipeline_plan(config, spec, folder)))


def test_speeds_change_who_does_what_and_no_bit(make: Make, expected: tuple[str, ...]) -> None:
    swarm = make()
    swarm.speeds = {"peer-0": 4.0, "peer-1": 1.0, "peer-2": 0.5, "peer-5": 2.0}
    assert finish(swarm) == expected
    commits = [r for r in swarm.records if isinstance(r, StageCommitRecord)]
    counted = Counter(len(entry.split(",")) for commit in commits for entry in commit.counted)
    assert len(counted) > 1, "speeds made no difference"


@pytest.mark.parametrize("kind", [Collect, Reduce, Spread, Apply])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_peer_dies_at_an_order(make: Make, expected: tuple[str, ...], kind: type, when: str) -> None:
    swarm = make()
    killed: list[str] = []

    def watch(order: Order) -> None:
        if isinstance(order.order, kind) and order.order.step == 2 and not killed:
            killed.append(order.process)
            if when == "before":
                swarm.kill(order.process)
            else:
                swarm._at(0.0005, lambda: swarm.kill(order.process))

    swarm.on_order = watch
    assert finish(swarm) == expected
    assert killed


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_peer_dies_in_a_call(make: Make, expected: tuple[str, ...], direction: str, stage: int) -> None:
    if (direction, stage) == ("forward", 2):
        direction = "backward"  # the last stage's forward is in its backward
    swarm = make()
    killed: list[str] = []

    def watch(call: Call) -> None:
        if (call.step, call.stage, call.direction) == (2, stage, direction) and call.microbatch >= 2 and not killed:
            killed.append(call.peer.partition(".")[0])
            swarm.kill(killed[0])

    swarm.on_call = watch
    assert finish(swarm) == expected
    assert killed


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_last_peers_of_a_stage_die_at_once(make: Make, expected: tuple[str, ...], stage: int) -> None:
    swarm = make()
    swarm.run(lambda: swarm.brain.version == 2 and bool(swarm.brain.roster.buddies(stage)))
    swarm.run(lambda: all(not p.taking for p in swarm.brain.roster.peers.values()))
    dead = [peer.process for peer in swarm.brain.roster.serving(stage)]
    died_s, before = swarm.now_s, len(swarm.records)
    for process in dead:
        swarm.kill(process)
    version = swarm.brain.version
    swarm.run(lambda: swarm.brain.version > version)
    assert dead and swarm.now_s - died_s < 60
    assert finish(swarm) == expected
    # Its buddy, or a peer that another stage could spare, served it before anybody could have been started anew.
    since = swarm.records[before:]
    assert any(isinstance(r, ServeRecord) and r.stage == stage and r.process not in dead for r in since)


@pytest.mark.parametrize("silent", [0, 1])
def test_a_newcomer_pulls_its_stage_from_all_who_hold_it(make: Make, expected: tuple[str, ...], silent: int) -> None:
    """Whoever does not answer leaves all of its chunks to the others, not some."""
    swarm = make()
    swarm.run(lambda: swarm.brain.version == 1 and bool(swarm.brain.roster.buddies(1)))
    swarm.run(lambda: all(not p.taking for p in swarm.brain.roster.peers.values()))
    victim = swarm.brain.roster.serving(1)[0].process
    nonce = swarm.processes[victim].nonce
    swarm.kill(victim)
    swarm.run(lambda: swarm.processes[victim].nonce != nonce)
    holders = sorted(p.address for p in swarm.brain.roster.holders(1, swarm.brain.version))
    transport, asked = swarm.processes[victim].transport, list[str]()
    fetch = transport.fetch

    def pull(address: str, keys: Sequence[str], **how: Any) -> Any:
        if keys[0].startswith("state/1/"):
            asked.append(address)
            if address in holders[:silent]:
                raise PeerUnreachable(peer=address, cause="it does not answer")
        return fetch(address, keys, **how)

    transport.fetch = pull  # type: ignore[method-assign]
    assert finish(swarm) == expected
    assert set(asked) == set(holders) and len(holders) == 2
    # In one order: each once, and whoever answers a second time for what the other one leaves.
    assert len(asked) == 2 + silent, asked


def test_a_trainer_dies_and_its_microbatches_are_anothers(make: Make, expected: tuple[str, ...]) -> None:
    swarm = make("pipeline.trainers=2")
    swarm.run(lambda: swarm.brain.version == 1)
    # In the middle of a step.
    calls: list[Call] = []
    swarm.on_call = calls.append
    swarm.run(lambda: len(calls) == 9)
    swarm.kill("trainer-1")
    assert finish(swarm) == expected
    assert replay(swarm.records).num_begun_again == 1


def test_the_controller_comes_back(make: Make, expected: tuple[str, ...]) -> None:
    swarm = make()
    for version in (1, 3):
        swarm.run(lambda wanted=version: swarm.brain.version == wanted)
        swarm.restart_controller()
    assert finish(swarm) == expected


def test_a_peer_that_hangs_is_ended_and_replaced(make: Make, expected: tuple[str, ...]) -> None:
    swarm = make()
    swarm.run(lambda: swarm.brain.version == 1)
    victim = swarm.brain.roster.serving(1)[0]
    swarm.hang(victim.process)
    assert finish(swarm) == expected
    fences = [r for r in swarm.records if isinstance(r, FenceRecord)]
    assert [fence.member for fence in fences] == [victim.process] and "it hangs" in fences[0].why
    assert swarm.processes[victim.process].nonce != victim.nonce


def test_the_only_peer_of_a_stage_is_fenced_and_lives(make: Make, expected: tuple[str, ...]) -> None:
    times = ("pipeline.forward_timeout_s=5", "pipeline.backward_timeout_s=10", "pipeline.trainer_timeout_s=100")
    swarm = make("pipeline.peers=1", *times)
    hung: list[str] = []

    def watch(call: Call) -> None:
        if (call.step, call.stage, call.direction) == (2, 1, "backward") and not hung:
            hung.append(call.peer.partition(".")[0])
            swarm.hang(hung[0])
            swarm._at(17.0, lambda: setattr(swarm.processes[hung[0]], "hangs", False))

    swarm.on_call = watch
    assert finish(swarm) == expected
    assert [r.peer.partition(".")[0] for r in swarm.records if isinstance(r, StepFenceRecord)] == hung
    again = [r.why for r in swarm.records if isinstance(r, StepRecord) and r.round > 0]
    assert again == ["everybody who serves stage 1 was fenced"]


@pytest.mark.parametrize("num_trainers", [1, 2])
def test_a_trainer_that_hangs_is_ended_and_its_microbatches_count_once(
    make: Make, expected: tuple[str, ...], num_trainers: int
) -> None:
    swarm = make(f"pipeline.trainers={num_trainers}")
    swarm.run(lambda: swarm.brain.version == 1)
    calls: list[Call] = []
    swarm.on_call = calls.append
    swarm.run(lambda: len(calls) == 9)
    victim = f"trainer-{num_trainers - 1}"
    nonce, since_s = swarm.processes[victim].nonce, swarm.now_s
    swarm.hang(victim)
    swarm.run(lambda: bool(swarm.brain.num_restarts))
    assert swarm.now_s - since_s < swarm.plan.pipeline.trainer_timeout_s + 2
    assert finish(swarm) == expected
    fences = [r for r in swarm.records if isinstance(r, FenceRecord)]
    assert [fence.member for fence in fences] == [victim] and "no heartbeat" in fences[0].why
    assert swarm.processes[victim].nonce != nonce and replay(swarm.records).num_begun_again >= 1


def test_a_trainer_that_lives_and_gets_nowhere_is_replaced(make: Make, expected: tuple[str, ...]) -> None:
    swarm = make("pipeline.backward_timeout_s=30")
    swarm.run(lambda: swarm.brain.version == 1)
    calls: list[Call] = []
    swarm.on_call = calls.append
    swarm.run(lambda: len(calls) == 5)
    stuck = swarm.processes["trainer-0"].host
    assert isinstance(stuck, TrainerHost)
    # It handles nothing any more, and its heart beats.
    stuck.machine.handle = lambda event, now_s: []  # type: ignore[method-assign]
    stuck._tell = lambda event: None  # type: ignore[method-assign]
    assert finish(swarm) == expected
    fences = [r for r in swarm.records if isinstance(r, FenceRecord)]
    assert [fence.member for fence in fences] == ["trainer-0"] and "without progress" in fences[0].why


@pytest.mark.parametrize("seed", range(3))
def test_random_deaths(make: Make, expected: tuple[str, ...], seed: int) -> None:
    swarm = make("pipeline.trainers=2")
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
    assert finish(swarm) == expected
    assert num_killed > 0


# ---------------------------------------------------------------- moves, snapshots, stops


def test_a_peer_moves_to_the_slowest_stage(make: Make, expected: tuple[str, ...]) -> None:
    swarm = make("pipeline.peers=3")
    # Placed by parameters; then one stage turns out to be slow.
    swarm.run(lambda: len(swarm.brain.roster.serving(1)) == 3)
    for peer in swarm.brain.roster.serving(1):
        swarm.speeds[peer.process] = 0.1
    swarm.run(lambda: swarm.brain.version == 2)
    swarm._tell_brain(Rebalance())
    assert swarm.brain.rebalancer.open is not None, swarm.brain.why_no_move
    assert finish(swarm) == expected
    assert [move for _, move, how in swarm.brain.rebalancer.history if how == "joined" and move.target == 1]
    assert replay(swarm.records).moves
    assert not [r for r in swarm.records if isinstance(r, StepFenceRecord)], "a move costs nobody's work"


def test_a_peer_that_joins_makes_steps_quicker_after_the_next_look(make: Make) -> None:
    swarm = make("pipeline.microbatches=12", "pipeline.in_flight=12", f"train.tokens={40 * 24 * 16}")
    swarm.late_s = {"peer-5": 300.0}
    swarm.run(lambda: "peer-5" in swarm.processes)
    before = [step.seconds for step in swarm.steps[-4:]]
    assert len(before) == 4, "it began without the one that is late"
    swarm.run(lambda: not any(peer.taking for peer in swarm.brain.roster.peers.values()))
    swarm._tell_brain(Rebalance())
    version = swarm.brain.version
    swarm.run(lambda: swarm.brain.version >= version + 4)
    after = [step.seconds for step in swarm.steps[-3:]]
    assert max(after) < 0.85 * min(before), (before, after, swarm.brain.moves, swarm.brain.why_no_move)


def test_a_peer_behind_a_slow_link_is_a_slow_peer(make: Make) -> None:
    swarm = make()
    swarm.run(lambda: swarm.brain.version == 1)
    peer = swarm.brain.roster.serving(1)[0]
    host = swarm.processes[peer.process].host
    assert isinstance(host, PeerHost) and host.serving is not None
    clock = [0.0]
    host._clock = lambda: clock[0]
    fetch = host.serving.fetch

    def slowly(request: Request) -> Fetched:
        clock[0] += 3.0  # the tensors are long on their way
        return fetch(request)

    host.serving.fetch = slowly  # type: ignore[method-assign]
    replies: list[Reply] = []
    call = host.call

    def listen(request: Request) -> Reply:
        replies.append(call(request))
        return replies[-1]

    host.call = listen  # type: ignore[method-assign]
    swarm.run(lambda: swarm.brain.version == 2)
    assert replies and all(reply.seconds == 3.0 for reply in replies) and host.busy_s < 3.0


def test_a_stopped_run_goes_on_with_the_same_bits(make: Make, expected: tuple[str, ...], tmp_path: Path) -> None:
    swarm = make(run_dir=tmp_path / "run")
    swarm.run(lambda: swarm.brain.version == 2)
    swarm._tell_brain(Stop(save=True))
    swarm.run()
    assert swarm.finished is not None and swarm.finished.reason == "stopped"
    saved = newest_snapshot(swarm.plan.snapshots, at_most=99)
    assert saved is not None and saved.version == swarm.brain.version >= 2
    again = make(run_dir=tmp_path / "run")
    again.plan = replace(again.plan, version=saved.version, from_folder=str(saved.folder))
    again.brain.__init__(again.plan)  # type: ignore[misc]
    again.records = list(swarm.records)
    assert finish(again) == expected
    whole = load_whole(again.spec, Path(again.plan.snapshot_folder(NUM_STEPS)))
    held = parameters(again)
    assert whole.keys() == held.keys() and all(torch.equal(whole[name], held[name]) for name in held)
