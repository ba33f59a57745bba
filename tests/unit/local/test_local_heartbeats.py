"""Heartbeats of a member whose training thread is busy at a step boundary, with real threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from orchestrator.build import pack_path, resolve
from orchestrator.config import load_config
from orchestrator.inline import InlineRun
from orchestrator.rundir import RunDir
from workers import messages as msg
from workers.context import IslandContext, current, enter
from workers.control_thread import Echo
from workers.loops import run_builtin_loop
from workers.pace import Pace
from workers.replica import Encoded, Replica

SMALL = (
    "run.islands=2", "train.tokens=8192", "train.batch_size=4", "data.seq_len=64", "model.dim=16", "model.layers=1",
    "model.heads=2", "strategy.inner_steps=8", "eval.every=1.0", "eval.windows=4", "exchange.heartbeat_s=0.05",
)  # fmt: skip
WANTED = 3
PATIENCE_S = 20.0


class Busy:
    """Holds up the first contribution that is encoded until heartbeats of its island have been heard meanwhile."""

    def __init__(self) -> None:
        self.name = ""
        self.enough = threading.Event()
        self.told: list[msg.Hello] = []

    def posting(self, context: IslandContext) -> None:
        real = context.post

        def post(envelope: msg.Envelope) -> None:
            real(envelope)
            if self.name == envelope.name and not self.enough.is_set():
                self.told += [body for body in envelope.bodies if isinstance(body, msg.Hello)]
                if len(self.told) >= WANTED:
                    self.enough.set()

        context.post = post

    def encoding(self) -> Any:
        real, first = Replica.encode, threading.Lock()

        def encode(replica: Replica, *arguments: Any, **options: Any) -> Encoded:
            if first.acquire(blocking=False):
                context = current()
                assert context is not None
                self.name = context.spec.name
                assert self.enough.wait(PATIENCE_S), f"no {WANTED} heartbeats while a contribution was encoded"
            return real(replica, *arguments, **options)

        return encode


def test_heartbeats_do_not_wait_for_a_contribution_that_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, busy = resolve(load_config("debug", overrides=SMALL).config), Busy()
    monkeypatch.setattr(Replica, "encode", busy.encoding())
    (tmp_path / "run").mkdir()
    run = InlineRun(config, RunDir(tmp_path / "run"), pack=pack_path(config))
    run.start()
    contexts = [run.context(index) for index in range(2)]

    def train(context: IslandContext) -> None:
        busy.posting(context)
        try:
            with enter(context):
                run_builtin_loop(context)
        except BaseException as error:
            for other in contexts:  # which would wait for this one
                if other.abort is not None:
                    other.abort(error)
            raise

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(train, context) for context in contexts]:
            future.result()
    run.finish()
    assert busy.name and len(busy.told) >= WANTED
    assert {hello.doing for hello in busy.told} == {"exchanging"}
    times = [hello.doing_s for hello in busy.told]
    assert times == sorted(times) and times[-1] > times[0], "each says how long it has lasted by then"


def test_an_echo_has_nothing_to_say_before_the_first_heartbeat_and_says_what_is_done_now() -> None:
    echo, pace = Echo(), Pace()
    info = msg.ProcessInfo(address="a", node="n", batch_size=1, weight=1)
    join = msg.Envelope(run_id="r", term=None, name="a", incarnation=None, nonce="x", bodies=(msg.Join(info=info),))
    echo.heard(join)
    assert echo.again(pace, 1.0) is None
    hello = msg.Hello(
        info=info, journal_len=3, num_leased=0, consumed=7, steps=1, bytes_sent=0, fragments=(), doing="stepping"
    )  # fmt: skip
    echo.heard(msg.Envelope(run_id="r", term=None, name="a", incarnation=2, nonce="x", bodies=(hello, join.bodies[0])))
    pace.begin("exchanging", 4.0)
    again = echo.again(pace, 5.5)
    assert again is not None and again.incarnation == 2
    (said,) = again.bodies
    assert isinstance(said, msg.Hello)
    assert (said.consumed, said.doing, said.doing_s) == (7, "exchanging", 1.5)
