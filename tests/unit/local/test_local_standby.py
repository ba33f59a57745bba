"""A process that waits, in one process with the run: it follows, takes a place, and begins from what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orchestrator.build import island_spec
from orchestrator.local import LocalIsland, LocalRun
from tests.small_run import make_pack, small_config
from workers.context import IslandContext
from workers.jobs import MemberStore
from workers.messages import News
from workers.records import JoinRecord, MemberId
from workers.standby import Standby
from workers.transport.loopback import LoopbackTransport


@pytest.fixture(scope="module")
def pack_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("pack"))


@pytest.fixture
def run(pack_dir: Path, tmp_path: Path) -> Iterator[LocalRun]:
    config = small_config(pack_dir, "run.islands=3", "exchange.quorum=0.5", "train.tokens=40_000")
    run = LocalRun(config, tmp_path / "run")
    run.start()
    yield run
    run.close()


def make_standby(run: LocalRun) -> Standby:
    spec = island_spec(run.config, 0, run_id=run.run_id, run_dir=run.run_dir, pack=run.pack, resume=False)
    store = MemberStore()
    transport = LoopbackTransport(run.network, "waits", store)
    transport.start()
    context = IslandContext(
        spec=replace(spec, name="standby-0"), nonce="waits", node="spare", store=store, transport=transport,
        post=run.posted.append, clock=run._clock,
    )  # fmt: skip

    def follow(held: int, ready: bool) -> News:
        brain = run.host.coordinator
        return News(rows_from=held, rows=tuple(brain.rows[held : brain.flushed + 1]), peers=brain.peers())

    return Standby(context, follow)


def take_place(run: LocalRun, standby: Standby, name: str) -> LocalIsland:
    index = run.host.plan.islands.index(name)
    spec = island_spec(run.config, index, run_id=run.run_id, run_dir=run.run_dir, pack=run.pack, resume=False)
    context = replace(standby.context, spec=spec)
    loop = standby.become(context)
    island = LocalIsland(loop=loop, context=context, transport=standby.context.transport)  # type: ignore[arg-type]
    run.islands[name] = island
    run.to_spawn.clear()
    loop.island.__enter__()
    run.settle()
    return island


def version(run: LocalRun) -> int:
    heads = run.host.coordinator.state.heads
    return heads[0].version.n if heads else -1


def reported(run: LocalRun) -> int:
    """The version that somebody is known to hold: a standby fetches nothing that nobody has."""
    return max((r.n for p in run.host.coordinator.roll.processes.values() if (r := p.report(0))), default=-1)


def contributors(run: LocalRun) -> set[MemberId]:
    history = run.host.coordinator.state.history
    return {entry.offer.member for commit in history[0] for entry in commit.roster} if history else set()


def test_a_standby_begins_from_the_state_that_it_holds(run: LocalRun) -> None:
    standby = make_standby(run)
    assert not standby.ready
    run.run(until=lambda: reported(run) >= 2)
    standby.look()
    assert standby.ready
    run.kill("island-1")
    island = take_place(run, standby, "island-1")
    sync = island.loop.island.sync
    assert sync is not None and sync.machine.name == "island-1" and sync.machine.incarnation == 2
    assert sync.machine.holds_all() and not sync.machine.fragments[0].fetching_state, "no state had to be fetched"
    assert sync.machine.fragments[0].n >= 2
    run.run(until=lambda: sync.machine.fragments[0].n == version(run) == reported(run))
    other = run.islands["island-0"].loop.island.sync
    assert other is not None
    mine, theirs = sync.replica.anchor_tensors(), other.replica.anchor_tensors()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    run.run(until=lambda: any(m.incarnation == 2 for m in contributors(run)))
    assert sync.total_steps >= 1
    joins = [row.record for row in run.host.journal.rows if isinstance(row.record, JoinRecord)]
    assert [(j.member, j.nonce, j.node) for j in joins if j.incarnation == 2] == [("island-1", "waits", "spare")]


def test_what_was_committed_since_is_caught_up(run: LocalRun) -> None:
    standby = make_standby(run)
    run.run(until=lambda: reported(run) >= 1)
    standby.look()
    held = standby.states[0][0].n
    run.run(until=lambda: version(run) > held + 2)
    run.kill("island-2")
    sync = take_place(run, standby, "island-2").loop.island.sync
    assert sync is not None and held <= sync.machine.fragments[0].n <= version(run)
    run.run(until=lambda: sync.machine.fragments[0].n == version(run))
    assert sync.machine.fragments[0].n == version(run) > held + 2


def test_an_old_standby_rests_between_fetches(run: LocalRun) -> None:
    standby = make_standby(run)
    run.run(until=lambda: reported(run) >= 1)
    standby.look()
    held = standby.states[0][0].n
    run.run(until=lambda: reported(run) > held)
    standby.fetched_s, standby.rest_s = run._clock(), 1e9
    standby.look()
    assert standby.states[0][0].n == held, "a twentieth of the time is for fetching, no more"
    standby.rest_s = 0.0
    standby.look()
    assert standby.states[0][0].n > held
