"""Runs that gossip: pairs between full merges, with the journal, the ledger and everything else of an ordinary run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orchestrator.errors import UserError
from orchestrator.ledger import recompute
from orchestrator.local import TURN_S, LocalRun
from orchestrator.rollback import find_target
from orchestrator.segments import read_run
from tests.small_run import make_pack, small_config
from workers.pair import MOST_UNRECORDED, PairMachine
from workers.pair_records import PairCommitRecord
from workers.pair_sync import PairSync
from workers.records import CommitRecord, Record, SettleRecord

ROUND_TOKENS = 8 * 4 * 16
NOLOCO = ("strategy.name=noloco", "strategy.merge_every=4", "strategy.outer_lr=0.7", "strategy.outer_momentum=0.5")


def start(tmp_path: Path, *values: str, islands: int = 4, rounds: int = 12, resume: bool = False) -> LocalRun:
    pack = tmp_path / "pack" if (tmp_path / "pack").exists() else make_pack(tmp_path)
    tokens = f"train.tokens={islands * rounds * ROUND_TOKENS}"
    config = small_config(pack, f"run.islands={islands}", tokens, "eval.every=0.3", *(values or NOLOCO))
    run = LocalRun(config, tmp_path / "run", resume=resume)
    run.start()
    return run


def sync_of(run: LocalRun, name: str) -> PairSync:
    sync = run.islands[name].loop.island.sync
    assert isinstance(sync, PairSync)
    return sync


def finish(run: LocalRun) -> list[Record]:
    ended = run.run(max_turns=20_000)
    run.close()
    assert ended is not None and ended.reason == "done", ended
    rows = read_run(run.run_dir).rows
    ledger = recompute(rows)
    assert not ledger.findings, ledger.findings
    fates = ledger.samples()
    assert fates["full"] == run.host.plan.total_samples and fates["partial"] == fates["dropped"] == 0
    return [row.record for row in rows]


def pairs_of(records: list[Record]) -> list[PairCommitRecord]:
    return [record for record in records if isinstance(record, PairCommitRecord)]


@pytest.mark.parametrize(
    "values", [NOLOCO, ("strategy.name=gossip", "strategy.merge_every=4", "strategy.topology=ring")]
)
def test_members_meet_in_pairs_between_full_merges(tmp_path: Path, values: tuple[str, ...]) -> None:
    run = start(tmp_path, *values)
    records = finish(run)
    merges = [record for record in records if isinstance(record, CommitRecord)]
    assert [len(record.roster) for record in merges] == [4, 4, 4], "a merge has everybody, one in four rounds"
    pairs = pairs_of(records)
    assert {len(record.members) for record in pairs} == {2}, "no exchange involves more than its pair"
    assert len(pairs) >= 14
    in_pairs = sum(b - a for record in pairs for a, b in zip(record.since, record.upto, strict=True))
    in_merges = sum(entry.upto - entry.since for record in merges for entry in record.roster)
    assert in_pairs > 2 * in_merges and in_pairs + in_merges == run.host.plan.total_samples
    losses = [e.val_loss for e in run.host.coordinator.state.evaluations]
    assert losses[0] is not None and losses[-1] is not None and losses[-1] < losses[0] - 1.0


def test_several_meetings_at_a_send_point_bring_members_closer(tmp_path: Path) -> None:
    met, apart = {}, {}
    for steps in (1, 2):
        folder = tmp_path / str(steps)
        folder.mkdir()
        values = ("strategy.name=gossip", "strategy.merge_every=8", "strategy.topology=exponential")
        run = start(folder, *values, f"strategy.gossip_steps={steps}", rounds=8)
        state, enough = run.host.coordinator.state, 0.7 * run.host.plan.total_samples
        run.run(max_turns=20_000, until=lambda state=state, enough=enough: state.committed[0] > enough)  # type: ignore[misc]
        anchors = [sync_of(run, name).pairs.anchor_N for name in sorted(run.islands)]  # type: ignore[union-attr]
        mean = torch.stack(anchors).mean(0)
        apart[steps] = float(torch.stack([(anchor - mean).norm() for anchor in anchors]).mean())
        met[steps] = len(pairs_of(finish(run)))
    assert met[2] > 1.6 * met[1], "twice as many meetings for the same samples"
    assert apart[2] < 0.8 * apart[1], apart


def test_a_member_that_dies_loses_what_it_did_since_its_last_pair(tmp_path: Path) -> None:
    run = start(tmp_path)
    state = run.host.coordinator.state
    run.run(max_turns=20_000, until=lambda: len(state.pair_rows) > 6)
    for _ in range(3):
        run.turn()
    victim = state.current["island-2"]
    committed = state.members[victim].watermarks[0]
    trained = sync_of(run, "island-2").machine.consumed
    assert trained > committed > 0
    run.kill("island-2")
    records = finish(run)
    settled = next(r for r in records if isinstance(r, SettleRecord) and (r.member, r.incarnation) == ("island-2", 1))
    assert settled.lost <= trained - committed
    assert state.members[victim].watermarks[0] == committed, "what was in a pair counts, and no more"
    later = [r for r in pairs_of(records) if ("island-2", 2) in zip(r.members, r.incarnations, strict=True)]
    assert later, "its successor meets others"


def num_met(run: LocalRun) -> int:
    return sum(isinstance(row, PairCommitRecord) for row in run.host.coordinator.state.pair_rows)


def test_a_controller_that_restarts_goes_on_with_the_pairs_of_its_journal(tmp_path: Path) -> None:
    run = start(tmp_path, *NOLOCO, "strategy.pair_timeout_s=0.3", rounds=24)
    met = []
    for _ in range(2):
        known = num_met(run)
        run.run(max_turns=20_000, until=lambda known=known: num_met(run) > known + 1)  # type: ignore[misc]
        met.append(len(pairs_of([row.record for row in read_run(run.run_dir).rows])))
        run.restart_controller()
    rounds = [record.round_ for record in pairs_of(finish(run))]
    assert 0 < met[0] < met[1] < len(rounds), "every controller's members meet"


def turns_without_controller(run: LocalRun, num: int) -> None:
    """It neither hears nor says anything, and no time passes for it."""
    syncs = [sync_of(run, name) for name in run.islands]
    for _ in range(num):
        run.now += TURN_S
        for island in run.islands.values():
            island.loop.advance(blocking=False)
            while any([sync.pump() for sync in syncs]):  # all of them, and not until one did something
                pass
        for sync in syncs:
            sync.tick()


LONG = ("strategy.name=noloco", "strategy.merge_every=8")


def without_controller(tmp_path: Path) -> tuple[LocalRun, int]:
    """A run whose controller went away after the first round, and whose members have come to an end of what they may.

    Also how many rows of pairs there are.
    """
    run = start(tmp_path, *LONG, rounds=16)
    state = run.host.coordinator.state
    run.run(max_turns=20_000, until=lambda: num_met(run) == 2)
    known = len(state.pair_rows)
    turns_without_controller(run, 200)
    steps = {name: sync_of(run, name).total_steps for name in run.islands}
    turns_without_controller(run, 10)
    assert len(state.pair_rows) == known and run.posted, "the controller heard something"
    assert steps == {name: sync_of(run, name).total_steps for name in run.islands}, "they train on, to an end"
    return run, known


def machine_of(run: LocalRun, name: str) -> PairMachine:
    machine = sync_of(run, name).pair_machine
    assert machine is not None and machine.state == "idle"
    return machine


def test_pairs_go_on_without_the_controller_up_to_a_bound(tmp_path: Path) -> None:
    run, known = without_controller(tmp_path)
    state = run.host.coordinator.state
    rounds = set()
    for name, member in state.current.items():
        machine = machine_of(run, name)
        assert machine.num_unrecorded == MOST_UNRECORDED == len(machine.untold)
        rounds |= {pair.round_ for pair in machine.untold}
        assert sync_of(run, name).machine.fragments[0].watermark > state.members[member].watermarks[0], "it was applied"
        assert sync_of(run, name).machine.waiting in ("leases", "bound"), sync_of(run, name).machine.waiting
    assert len(rounds) == MOST_UNRECORDED
    run.settle()
    met = [r for r in state.pair_rows[known:] if isinstance(r, PairCommitRecord)]
    assert {r.round_ for r in met} == rounds and len(met) == 2 * MOST_UNRECORDED, "each is reported once"
    assert not any(machine_of(run, name).untold for name in run.islands)
    finish(run)


def test_one_that_is_left_reports_what_the_dead_had_committed(tmp_path: Path) -> None:
    run, known = without_controller(tmp_path)
    state = run.host.coordinator.state
    held = {commit.pair for commit in machine_of(run, "island-0")._known()}
    others = {pair for pair in held if "island-0" not in {member.name for member in pair.members}}
    assert others, "it met nobody who had met others before"
    heard = [envelope for envelope in run.posted if envelope.name == "island-0"]
    run.posted.clear()
    run.posted.extend(heard)
    for name in ("island-1", "island-2", "island-3"):
        run.kill(name)
    run.settle()
    met = [r for r in state.pair_rows[known:] if isinstance(r, PairCommitRecord)]
    assert {(r.round_, r.members) for r in met} == {(p.round_, tuple(m.name for m in p.members)) for p in held}
    finish(run)


def test_a_run_that_is_stopped_goes_on_with_every_sample(tmp_path: Path) -> None:
    run = start(tmp_path)
    state = run.host.coordinator.state
    run.run(max_turns=20_000, until=lambda: len(state.pair_rows) > 8)
    with pytest.raises(UserError, match="the run gossips") as refused:  # as `atoll rollback --to 1` asks
        find_target(run.run_dir / "snapshots", state, 1)
    assert "atoll export --snapshot v1 " in refused.value.remedy
    run.stop()
    run.close()
    before = len(pairs_of([row.record for row in read_run(run.run_dir).rows]))
    records = finish(start(tmp_path, resume=True))
    assert len(pairs_of(records)) > before > 3


@pytest.mark.parametrize(
    ("values", "why"),
    [
        (("strategy.gamma=1.6",), "members drift apart from 1.5 on"),
        (("strategy.outer_momentum=0.9",), "members drift apart from 0.38 on"),
        (("strategy.topology=ring", "strategy.group_size=3"), "has pairs"),
        (("strategy.group_size=5",), "needs so many islands"),
        (("strategy.gossip_steps=2",), "would make an outer step with its momentum at each"),
        (("strategy.keep_gap=0.25",), "belongs to strategy.topology = 'near'"),
        (("robust.rule=clip",), "meet in pairs"),
        (("model.layers=2", "strategy.num_fragments=2"), "meet in pairs"),
        (("strategy.name=diloco",), "has no meaning"),
    ],
)
def test_what_pairs_cannot_do_is_refused(tmp_path: Path, values: tuple[str, ...], why: str) -> None:
    with pytest.raises(UserError, match=why):
        start(tmp_path, *NOLOCO, *values)
