"""Faults of pipelines: which there are, who is struck, once and on the record, and what of it is told to whom."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from faults.links import Links
from faults.plan import FaultPlanError, PlannedFault, parse_fault
from faults.process import JumpClock
from faults.stage import StageChaos
from orchestrator.config import load_config, parse_config
from orchestrator.events import FaultInjected
from orchestrator.fault_plan import read_faults
from orchestrator.pipeline.local import LocalSwarm
from orchestrator.pipeline.plan import pipeline_plan, pipeline_spec
from orchestrator.pipeline.replay import replay
from orchestrator.pipeline.site import PipelineInjector, PipelineSite
from tests.small_run import PIPELINE_TOML, make_pack
from workers.pipeline.host import PeerHost
from workers.pipeline.local_host import LocalHost
from workers.pipeline.records import StepFenceRecord
from workers.records import FaultRecord, FenceRecord

NUM_STEPS = 6
DILOCO = ("strategy.name=diloco", "strategy.inner_steps=2", "strategy.outer=nesterov")
Make = Callable[..., LocalSwarm]


@pytest.fixture(scope="module")
def pack_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("pack"))


@pytest.fixture
def make(pack_dir: Path, tmp_path: Path) -> Make:
    def build(*overrides: str, run_dir: Path = tmp_path) -> LocalSwarm:
        tokens = f"train.tokens={NUM_STEPS * 12 * 16}"
        config = parse_config(PIPELINE_TOML, overrides=[f"data.path={pack_dir}", tokens, *overrides]).config
        spec = pipeline_spec(config, run_id="local", run_dir=run_dir, pack=pack_dir)
        return LocalSwarm(spec=spec, plan=pipeline_plan(config, spec, run_dir))

    return build


def finish(swarm: LocalSwarm) -> tuple[str, ...]:
    """Run to the end; the digests of what stands."""
    swarm.run()
    assert swarm.finished is not None and swarm.finished.reason == "done", swarm.finished
    history = replay(swarm.records)
    assert history.findings == [] and history.version == NUM_STEPS
    return history.digests


def at(swarm: LocalSwarm, version: int) -> None:
    swarm.run(lambda: swarm.brain.held_version >= version)


def test_faults_of_pipelines_are_read_and_others_refused(tmp_path: Path) -> None:
    config = load_config("swarm").config
    assert read_faults(config, [], []) == ()
    texts = ["kill:peer-0@round=3", "nan:peer-5@round=4", "stop:trainer-0,for=3s", "controller_kill@t=9s"]
    texts += ["cut:peer-0+trainer-0,for=3s", "cut:trainer-0", "heal:trainer-0", "delay:peer-1,by=0.2s"]
    assert [str(fault) for fault in read_faults(config, texts, [])] == texts
    plan = tmp_path / "plan.toml"
    plan.write_text('[[fault]]\nkind = "slow"\ntarget = "peer-1"\nround = 2\n')
    planned = load_config("swarm", overrides=[f"run.fault_plan={plan}"]).config
    assert [str(fault) for fault in read_faults(planned, [], [])] == ["slow:peer-1@round=2,factor=3"]
    for text, words in {
        "kill:island-0": "no member 'island-0'",
        "kill:peer-6": "no member 'peer-6'",
        "corrupt:peer-0": "corrupt is no fault of a pipeline; known: kill, oom",
        "hang:trainer-0": "trainer-0 computes nothing",
        "storm@round=1,kinds=kill+corrupt": "a storm with corrupt is no fault of a pipeline",
    }.items():
        with pytest.raises(FaultPlanError, match=words):
            read_faults(config, [text], [])


@pytest.mark.parametrize(
    ("strategy", "behind"), [((), False), (DILOCO, False), (DILOCO, True)], ids=["ddp", "diloco", "behind-its-offer"]
)
def test_a_peer_that_loses_a_number_is_ended_and_nobody_else(
    make: Make, tmp_path: Path, strategy: tuple[str, ...], behind: bool
) -> None:
    swarm = make(*strategy)
    at(swarm, 2)
    # Between two synchronisations.
    swarm.run(lambda: swarm.brain.commit is not None and swarm.brain.version == (3 if strategy else 2))
    victim = swarm.brain.roster.serving(1)[0].process
    host = swarm.processes[victim].host
    assert isinstance(host, PeerHost)
    if behind:  # the next anchor is going to cover it up
        work = cast(LocalHost, host).work
        assert work is not None
        swarm.run(lambda: work.offer is not None)
        assert work.offer is not None and work.offer.num_steps == 4
    text = f"nan:{victim}"
    swarm._tell_brain(FaultInjected(fault="nan", member=victim, detail=text))
    StageChaos(host, Links(victim)).apply(parse_fault(text, [victim]))
    digests = finish(swarm)
    noticed = [r for r in swarm.records if isinstance(r, FaultRecord) and not r.injected]
    assert [(r.fault, r.member) for r in noticed] == [("non_finite", victim)] and "not finite" in noticed[0].detail
    assert {r.member for r in swarm.records if isinstance(r, FenceRecord)} == {victim}
    assert {r.peer.partition(".")[0] for r in swarm.records if isinstance(r, StepFenceRecord)} <= {victim}
    if not strategy:
        assert digests == finish(make(run_dir=tmp_path / "other"))


class Actors(dict[str, Any]):
    """Processes that note what is done to them."""

    def __init__(self, names: Iterable[str]) -> None:
        self.struck: list[str] = []
        self.met: list[tuple[str, dict[str, str]]] = []
        super().__init__({name: self.actor(name) for name in names})

    def actor(self, name: str) -> Any:
        return SimpleNamespace(
            afflict=SimpleNamespace(remote=lambda fault: self.struck.append(str(fault))),
            meet=SimpleNamespace(remote=lambda addresses: self.met.append((name, addresses))),
        )


def injector_of(swarm: LocalSwarm, actors: Actors, plan: Sequence[PlannedFault] = ()) -> PipelineInjector:
    journal: Any = SimpleNamespace(rows=[SimpleNamespace(record=record) for record in swarm.records])
    site = PipelineSite(lambda: swarm.brain, journal, lambda: swarm.now_s, swarm._tell_brain)
    made = PipelineInjector(
        plan,
        site,
        JumpClock(time.monotonic),
        lambda: actors,
        lambda: "10.0.0.1:1",
        addresses=lambda: swarm.brain.roster.at(),
    )
    made.resume()
    return made


def test_who_is_cut_off_knows_where_the_others_are_and_so_do_their_successors(make: Make) -> None:
    swarm, actors = make(), Actors(["peer-0", "peer-1", "trainer-0"])
    at(swarm, 1)
    injector = injector_of(swarm, actors)
    injector.greet("peer-0")
    assert actors.met == [] and actors.struck == []
    injector.now(["cut:peer-0+trainer-0,for=60s"])
    assert [name for name, _ in actors.met] == ["peer-0", "trainer-0"] and len(actors.struck) == 2
    everybody = {p.transport.address: name for name, p in swarm.processes.items()}
    assert all(addresses == everybody for _, addresses in actors.met) and len(everybody) == 7
    swarm.kill("peer-0")
    at(swarm, 3)
    actors.met.clear()
    injector.greet("peer-0")
    [again] = actors.struck[2:]
    assert again.startswith("cut:peer-0+trainer-0,for=")
    new = swarm.processes["peer-0"].transport.address
    assert new not in everybody and {name for name, known in actors.met if known[new] == "peer-0"} == set(actors)
    injector.now(["heal:peer-0+trainer-0"])
    actors.met.clear()
    injector.greet("trainer-0")
    assert actors.met == []


def test_a_plan_strikes_at_its_step_and_once_in_a_run(make: Make) -> None:
    swarm, actors = make(), Actors(["peer-0", "peer-1", "trainer-0"])
    plan = [parse_fault(text, actors) for text in ("kill:peer-1@round=2", "stop:trainer-0@t=1h")]

    def injector() -> PipelineInjector:
        return injector_of(swarm, actors, plan)

    first = injector()
    first.tick()
    assert actors.struck == [], "the run has not begun"
    at(swarm, 2)
    first.tick()
    first.tick()
    assert actors.struck == ["kill:peer-1@round=2"]
    [row] = [r for r in swarm.records if isinstance(r, FaultRecord)]
    assert (row.fault, row.member, row.injected) == ("kill", "peer-1", True)
    injector().tick()  # of the controller's next life
    assert len(actors.struck) == 1 and [str(f) for f in first.schedule.unfired()] == ["stop:trainer-0@t=3600s,for=5s"]
    with pytest.raises(FaultPlanError, match="corrupt is no fault of a pipeline"):
        first.now(["corrupt:peer-0"])
    assert first.now(["nan:peer-0"]) == ["nan:peer-0"] and actors.struck[1:] == ["nan:peer-0"]


def test_a_slow_peer_and_one_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    host: Any = SimpleNamespace(after_call=None)
    chaos, slept = StageChaos(host, Links("peer-0")), list[float]()
    monkeypatch.setattr("faults.stage.time.sleep", slept.append)
    host.after_call(0.5)
    chaos.apply(parse_fault("slow:peer-0,factor=4", ["peer-0"]))
    host.after_call(0.5)
    assert slept == [1.5]
    chaos.apply(parse_fault("hang:peer-0,for=50ms", ["peer-0"]))
    call = threading.Thread(target=host.after_call, args=(0.0,))
    call.start()
    call.join(30)
    assert not call.is_alive(), "it hung for longer than it was told to"
    with pytest.raises(ValueError, match="corrupt is no fault of a stage peer"):
        chaos.apply(parse_fault("corrupt:peer-0", ["peer-0"]))


def test_numbers_that_nobody_has_broken_end_the_run(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    swarm = make()
    at(swarm, 1)
    monkeypatch.setattr("workers.pipeline.peer.forward", lambda model, x: model(x) * math.inf)
    swarm.run()
    assert swarm.finished is not None and swarm.finished.reason == "failed"
    assert "is not finite" in swarm.finished.detail, swarm.finished
    assert not any(isinstance(r, FenceRecord) for r in swarm.records), "nobody was to blame"
