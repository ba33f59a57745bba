"""Peers that say nothing while nobody asks them: the last of a stage hangs, and only forwards wait for it.

And what may arrive late of a round that is over: a withdrawal that comes before the round's first call, a fence that
comes after it. And what does not wait for the call that computes: a sign of life, the next call's tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orchestrator.config import parse_config
from orchestrator.pipeline.local import LocalSwarm
from orchestrator.pipeline.plan import pipeline_plan, pipeline_spec
from orchestrator.pipeline.replay import replay
from orchestrator.pipeline.watch import STALL_FACTOR
from tests.small_run import PIPELINE_TOML, make_pack
from workers.pipeline.accumulator import Begin
from workers.pipeline.calls import Call
from workers.pipeline.host import PeerHost
from workers.pipeline.messages import Alive, FenceStep, PeerPlace, Ping
from workers.pipeline.peer import Fetched, Reply, Request
from workers.records import FenceRecord

NUM_STEPS = 4
ALONE = ("pipeline.peers=1", "pipeline.forward_timeout_s=5", "pipeline.backward_timeout_s=10")
QUIET_S, STALL_S = 20, STALL_FACTOR * 10
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


def finish(swarm: LocalSwarm) -> list[FenceRecord]:
    swarm.run()
    assert swarm.finished is not None and swarm.finished.reason == "done", swarm.finished
    history = replay(swarm.records)
    assert history.findings == [] and history.version == NUM_STEPS
    return [r for r in swarm.records if isinstance(r, FenceRecord)]


@pytest.mark.parametrize("kind", ["every step", "delayed", "diloco"])
def test_the_last_peer_of_a_stage_hangs_while_only_forwards_wait(make: Make, kind: str) -> None:
    more = {"delayed": ["pipeline.delayed=true"], "diloco": ["strategy.name=diloco", "strategy.inner_steps=4"]}
    swarm, hung = make(*ALONE, *more.get(kind, [])), list[tuple[str, float]]()

    def watch(call: Call) -> None:
        if (call.step, call.stage, call.direction, call.microbatch) == (2, 0, "forward", 0) and not hung:
            hung.append((call.peer.partition(".")[0], swarm.now_s))
            swarm.hang(hung[0][0])

    swarm.on_call = watch
    [gone] = finish(swarm)
    [(victim, since_s)] = hung
    assert gone.member == victim and f"no sign of life for {QUIET_S} s" in gone.why, gone
    assert swarm.processes[victim].alive and not swarm.processes[victim].hangs
    assert swarm.now_s < since_s + QUIET_S + 100


def test_calls_that_never_end_are_no_life(make: Make) -> None:
    """The process answers whoever asks, and what computes hangs."""
    swarm = make(*ALONE)
    swarm.run(lambda: swarm.brain.version == 2)
    [peer] = swarm.brain.roster.serving(0)
    host, since_s, serve = swarm.processes[peer.process].host, swarm.now_s, swarm._serve
    assert isinstance(host, PeerHost)

    def hang(trainer: str, nonce: str, place: PeerPlace, peer_nonce: str, request: Request) -> None:
        if peer_nonce == peer.nonce:
            host._num_begun += 1
        else:
            serve(trainer, nonce, place, peer_nonce, request)

    swarm._serve = hang  # type: ignore[method-assign]
    swarm.run(lambda: any(isinstance(r, FenceRecord) for r in swarm.records))
    assert STALL_S < swarm.now_s - since_s < STALL_S + 10
    [gone] = finish(swarm)
    assert gone.member == peer.process and f"no call has ended for {STALL_S} s" in gone.why


def test_a_slow_peer_is_not_taken_for_one_that_hangs(make: Make) -> None:
    swarm = make(*ALONE)
    swarm.run(lambda: swarm.brain.version == 1)
    [peer] = swarm.brain.roster.serving(0)
    swarm.speeds[peer.process] = 0.04  # a backward takes it six times as long as is waited for
    assert finish(swarm) == []


def test_a_controller_that_was_away_blames_nobody(make: Make) -> None:
    swarm = make(*ALONE)
    swarm.run(lambda: swarm.brain.version == 1)
    swarm.now_s += 1000.0
    swarm._heap = [(at_s + 1000.0, serial, what) for at_s, serial, what in swarm._heap]
    assert finish(swarm) == []


def test_a_ping_is_answered_while_a_call_computes(make: Make) -> None:
    swarm = make()
    host = _host_of(swarm, 1)
    before = host.do(Ping())
    assert isinstance(before, Alive) and before.progress > 0 and not before.owes
    computes, ends = threading.Event(), threading.Event()

    def hang(seconds: float) -> None:
        computes.set()
        assert ends.wait(30)

    host.after_call = hang
    replies: list[Reply] = []
    calls = threading.Thread(target=lambda: replies.append(host.call(_request(swarm, 1, round_=1))))
    calls.start()
    assert computes.wait(30)
    assert host.do(Ping()) == Alive(progress=before.progress, owes=True)
    ends.set()
    calls.join(30)
    assert host.do(Ping()) == Alive(progress=before.progress + 1, owes=False) and len(replies) == 1


def test_the_tensors_of_a_call_come_while_another_one_computes(make: Make) -> None:
    swarm = make()
    host = _host_of(swarm, 1)
    assert host.serving is not None
    fetch, computes, fetched, ends = host.serving.fetch, threading.Event(), threading.Event(), threading.Event()

    def note(request: Request) -> Fetched:
        if computes.is_set():
            fetched.set()
        return fetch(request)

    def hang(seconds: float) -> None:
        computes.set()
        assert ends.wait(30)

    host.serving.fetch = note  # type: ignore[method-assign]
    host.after_call = hang
    replies: list[Reply] = []
    first = _request(swarm, 1, round_=1)
    second = replace(first, call=replace(first.call, microbatch=1))
    calls = [
        threading.Thread(target=lambda one: replies.append(host.call(one)), args=(request,))
        for request in (first, second)
    ]
    calls[0].start()
    assert computes.wait(30)
    calls[1].start()
    assert fetched.wait(30), "they wait for the call before them"
    assert replies == []
    ends.set()
    for call in calls:
        call.join(30)
    assert [reply.begin for reply in replies] == [Begin.DONE] * 2


# ---------------------------------------------------------------- rounds


def test_a_promise_in_a_round_holds_although_no_call_of_the_round_has_come(make: Make) -> None:
    """A call is still on its way when it is withdrawn, and the step has been begun anew since the peer's last call."""
    swarm = make()
    host = _host_of(swarm, 1)
    request = _request(swarm, 1, round_=5)
    assert host.withdraw(request.call, 5) is None
    assert host.call(request).begin is Begin.WITHDRAWN
    assert host.serving is not None and host.serving.accumulator.offer(1) == ()


def test_a_fence_of_an_older_round_comes_late_and_fences_nothing(make: Make) -> None:
    swarm = make()
    host = _host_of(swarm, 1)
    assert host.serving is not None
    first, second = _request(swarm, 1, round_=5), _request(swarm, 1, round_=5, attempt=100)
    host.call(first)
    host.do(FenceStep(peer=host.serving.name, step=1, round_=4))
    assert host.call(second).begin is not Begin.FENCED
    host.do(FenceStep(peer=host.serving.name, step=1, round_=5))
    assert host.call(second).begin is Begin.FENCED


def _host_of(swarm: LocalSwarm, stage: int) -> PeerHost:
    """Of a stage's first peer, which has moved to version 1 and fetches zeros from now on."""
    swarm.run(lambda: swarm.brain.version == 1)
    host = swarm.processes[swarm.brain.roster.serving(stage)[0].process].host
    assert isinstance(host, PeerHost) and host.serving is not None
    swarm.run(lambda: host.held[stage].version == 1)
    values = torch.zeros(2, swarm.spec.shape.seq_len, swarm.spec.shape.dim)
    host.serving.fetch = lambda request: Fetched(x=values.clone(), other=values.clone())  # type: ignore[method-assign]
    return host


def _request(swarm: LocalSwarm, stage: int, *, round_: int, attempt: int = 99) -> Request:
    call = Call(
        step=1,
        microbatch=0,
        stage=stage,
        direction="backward",
        attempt=attempt,
        peer=swarm.brain.roster.serving(stage)[0].name,
    )
    return Request(call=call, address="", input_key="x", other_key="g", input_shape=(), round_=round_)
