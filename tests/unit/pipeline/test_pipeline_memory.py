"""Machines that no stage fits: the run is refused with the numbers, or goes on without them and says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.config import parse_config
from orchestrator.pipeline.figures import stage_table
from orchestrator.pipeline.keeper import FITS_NO_STAGE
from orchestrator.pipeline.local import LocalSwarm
from orchestrator.pipeline.plan import pipeline_plan, pipeline_spec
from orchestrator.pipeline.replay import replay
from tests.small_run import PIPELINE_TOML, make_pack
from workers.records import FaultRecord, FenceRecord, StopRecord

Make = Callable[..., LocalSwarm]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    pack = make_pack(tmp_path)

    def build(*overrides: str) -> LocalSwarm:
        own = [f"data.path={pack}", f"train.tokens={4 * 12 * 16}", *overrides]
        config = parse_config(PIPELINE_TOML, overrides=own).config
        spec = pipeline_spec(config, run_id="local", run_dir=tmp_path, pack=pack)
        swarm = LocalSwarm(spec=spec, plan=pipeline_plan(config, spec, tmp_path))
        swarm.node_of = {name: f"machine of {name}" for name in swarm.plan.peers}
        return swarm

    return build


def finish(swarm: LocalSwarm) -> None:
    swarm.run()
    assert swarm.finished is not None and swarm.finished.reason == "done", swarm.finished
    assert replay(swarm.records).findings == []


def idle(swarm: LocalSwarm) -> list[FaultRecord]:
    return [r for r in swarm.records if isinstance(r, FaultRecord) and r.fault == FITS_NO_STAGE]


def test_stages_that_fit_nobody_end_the_run_with_the_numbers(make: Make) -> None:
    swarm = make()
    swarm.memory_of = dict.fromkeys(swarm.plan.peers, 1000)
    swarm.run()
    assert swarm.finished is not None and swarm.finished.reason == "failed"
    needs = max(swarm.brain.layout.stage_bytes)
    assert f"needs {needs:,} bytes and at least 1 of 6 peers; 0 can hold it" in swarm.finished.detail
    assert "the largest has 1,000" in swarm.finished.detail and "try: more stages" in swarm.finished.detail
    [stop] = [r for r in swarm.records if isinstance(r, StopRecord)]
    assert stop.detail == swarm.finished.detail and swarm.now_s < 60


def test_who_is_still_to_come_may_be_what_is_lacking(make: Make) -> None:
    swarm = make("pipeline.peers=1")
    swarm.late_s = {"peer-2": 300.0}
    swarm.run(lambda: swarm.now_s > swarm.plan.start_timeout_s + 30)
    assert not swarm.brain.placed and "of 2 peers; 2 can hold it" in swarm.brain.why_no_move
    finish(swarm)
    assert swarm.now_s > 300


def test_a_machine_that_is_too_small_from_the_start_is_named(make: Make) -> None:
    swarm = make()
    swarm.memory_of = {"peer-4": 1000}
    finish(swarm)
    [fault] = idle(swarm)
    least = min(swarm.brain.layout.stage_bytes)
    assert fault.member == "peer-4" and not fault.injected
    assert fault.detail == f"it may take 1,000 bytes, and the smallest stage needs {least:,}: it serves none"
    assert "peer-4" not in {peer.process for stage in range(3) for peer in swarm.brain.roster.serving(stage)}


def test_a_successor_that_no_stage_fits_is_named_and_the_others_go_on(make: Make) -> None:
    swarm = make()
    swarm.run(lambda: swarm.brain.version == 1)
    victim = swarm.brain.roster.serving(1)[0].process
    swarm.memory_of[victim] = 1000
    swarm.kill(victim)
    swarm.run(lambda: bool(idle(swarm)))
    finish(swarm)
    assert [fault.member for fault in idle(swarm)] == [victim]
    assert [r.member for r in swarm.records if isinstance(r, FenceRecord)] == [victim]
    assert len(swarm.brain.roster.serving(1)) == 1


def test_peers_of_one_machine_share_its_memory(make: Make) -> None:
    swarm = make("pipeline.peers=1")
    needs = max(swarm.brain.layout.stage_bytes)
    swarm.memory_of = dict.fromkeys(swarm.plan.peers, 2 * needs)
    swarm.node_of["peer-1"] = swarm.node_of["peer-0"]
    swarm.run(lambda: swarm.brain.version == 1)
    limits = {p["peer"][:6]: p["memory_limit_bytes"] for s in stage_table(swarm.brain, {}) for p in s["serving"]}
    assert limits == {"peer-0": needs, "peer-1": needs, "peer-2": 2 * needs}
    crowded = make("pipeline.peers=1")
    crowded.memory_of, crowded.node_of = dict.fromkeys(crowded.plan.peers, 2 * needs), {}
    crowded.run()
    assert crowded.finished is not None and crowded.finished.reason == "failed"
    assert f"the largest has {2 * needs // 3:,}" in crowded.finished.detail


def test_what_is_configured_for_a_peer_is_not_shared(make: Make) -> None:
    swarm = make("pipeline.peer_memory_bytes=1000000000")
    swarm.node_of = {}
    swarm.memory_of = dict.fromkeys(swarm.plan.peers, 1_000_000_000)
    swarm.run(lambda: swarm.brain.version == 1)
    assert {p["memory_limit_bytes"] for s in stage_table(swarm.brain, {}) for p in s["serving"]} == {1_000_000_000}
