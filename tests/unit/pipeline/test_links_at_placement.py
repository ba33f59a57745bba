"""Peers measure how far they are from the trainers before they are placed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from orchestrator.config import parse_config
from orchestrator.pipeline.commands import Order
from orchestrator.pipeline.local import LocalSwarm
from orchestrator.pipeline.plan import pipeline_plan, pipeline_spec
from orchestrator.pipeline.replay import replay
from tests.small_run import PIPELINE_TOML, make_pack
from workers.pipeline.messages import Probe, TakeStage
from workers.pipeline.pieces import PROBE, Pieces
from workers.transport.errors import PeerUnreachable


@pytest.fixture
def swarm(tmp_path: Path) -> LocalSwarm:
    pack = make_pack(tmp_path)
    overrides = [f"data.path={pack}", f"train.tokens={3 * 12 * 16}", "pipeline.stages=4", "pipeline.peers=1"]
    config = parse_config(PIPELINE_TOML, overrides=overrides).config
    spec = pipeline_spec(config, run_id="local", run_dir=tmp_path, pack=pack)
    return LocalSwarm(spec=spec, plan=pipeline_plan(config, spec, tmp_path))


def orders_of(swarm: LocalSwarm) -> list[Order]:
    seen: list[Order] = []
    swarm.on_order = seen.append
    return seen


def finish(swarm: LocalSwarm) -> None:
    swarm.run()
    assert swarm.finished is not None and swarm.finished.reason == "done", swarm.finished
    assert replay(swarm.records).findings == []


def far_away(*names: str) -> Callable[[Pieces, Sequence[str], Callable[[], float]], float]:
    """As if these peers were behind slow links."""

    def probe(pieces: Pieces, addresses: Sequence[str], clock: Callable[[], float]) -> float:
        assert addresses and all("trainer-" in address for address in addresses)
        own = pieces._transport.address.rpartition("/")[2].rpartition("-")[0]
        return 0.5 if own in names else 0.001

    return probe


def test_who_is_far_serves_an_end(swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch) -> None:
    # By its number alone peer-1 would serve a stage in the middle.
    monkeypatch.setattr(Pieces, "probe", far_away("peer-1"))
    seen = orders_of(swarm)
    finish(swarm)
    kinds = [type(order.order) for order in seen]
    assert kinds.count(Probe) == 4 and kinds.index(TakeStage) > max(i for i, kind in enumerate(kinds) if kind is Probe)
    known = {peer.process: (peer.stage, peer.link_s) for peer in swarm.brain.roster.peers.values()}
    assert known["peer-1"] in ((0, 0.5), (3, 0.5))


def test_a_probe_fetches_what_a_boundary_tensor_has(swarm: LocalSwarm) -> None:
    finish(swarm)
    peer = next(p for name, p in swarm.processes.items() if name == "peer-0")
    trainer = next(p for name, p in swarm.processes.items() if name == "trainer-0")
    [blob] = peer.transport.fetch(trainer.transport.address, (PROBE,), timeout_s=1.0, max_bytes=1 << 20)
    assert len(blob.data) >= 4 * 2 * 16 * 16  # fp32, two samples, sixteen tokens, width 16


def test_whoever_cannot_measure_is_placed_all_the_same(swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(pieces: Pieces, addresses: Sequence[str], clock: Callable[[], float]) -> float:
        raise PeerUnreachable(peer=addresses[0], cause="a test")

    monkeypatch.setattr(Pieces, "probe", fails)
    finish(swarm)
    assert all(peer.link_s is None for peer in swarm.brain.roster.peers.values())
