"""Whole runs with members that do wrong: production code in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.attacker import begin_attack, end_attack
from orchestrator.events import UnbanRequested
from orchestrator.ledger import recompute
from orchestrator.local import LocalRun
from orchestrator.segments import read_run
from orchestrator.status import read_status
from tests.small_run import make_pack, small_config
from workers.records import FaultRecord, RefusalRecord, StandingRecord
from workers.replica import Replica

ROUND_TOKENS = 8 * 4 * 16


def start(tmp_path: Path, islands: int, rounds: int, *values: str) -> LocalRun:
    tokens = f"train.tokens={islands * rounds * ROUND_TOKENS}"
    config = small_config(make_pack(tmp_path), f"run.islands={islands}", tokens, "eval.every=1.0", *values)
    run = LocalRun(config, tmp_path / "run")
    run.run_dir.mkdir()
    (run.run_dir / "config.toml").write_text(run.config.to_toml())
    run.start()
    return run


def replica_of(run: LocalRun, name: str) -> Replica:
    sync = run.islands[name].loop.island.sync
    assert sync is not None
    return sync.replica


def refusals(run: LocalRun) -> list[RefusalRecord]:
    return run.host.coordinator.state.refusals


def finish(run: LocalRun) -> None:
    ended = run.run(max_turns=20_000)
    run.close()
    assert ended is not None and ended.reason == "done", ended
    ledger = recompute(read_run(run.run_dir).rows)
    assert not ledger.findings, ledger.findings
    state = run.host.coordinator.state
    assert state.samples_accounted() == run.host.plan.total_samples


@pytest.mark.parametrize("attack", ["sign_flip", "noise", "send_nan"])
def test_attackers_are_named_banned_and_nobody_else_is(attack: str, tmp_path: Path) -> None:
    run = start(tmp_path, 5, 7, "robust.rule=clip")
    for name in ("island-1", "island-3"):
        begin_attack(replica_of(run, name), attack)
    run.run(
        max_turns=20_000,
        until=lambda: bool(run.host.coordinator.state.heads) and run.host.coordinator.state.num_commits >= 5,
    )
    assert {r.member for r in refusals(run)} == {"island-1", "island-3"}, "named within five exchanges"
    finish(run)
    state = run.host.coordinator.state
    assert {r.member for r in refusals(run)} == {"island-1", "island-3"}
    assert {n: state.bans.standing(n) for n in run.islands} == {
        n: "banned" if n in ("island-1", "island-3") else "member" for n in run.islands
    }
    shown = read_status(run.run_dir).members
    assert shown["island-1"].standing == "banned" and len(shown["island-1"].refusals) == 3
    assert shown["island-0"].standing == "member" and not shown["island-0"].refusals


@pytest.mark.parametrize("rule", ["median", "trimmed", "krum", "centered_clip", "nnm"])
def test_every_rule_trains_without_attackers_and_agrees_on_every_version(rule: str, tmp_path: Path) -> None:
    history = ["robust.history=true"] if rule == "centered_clip" else []
    run = start(tmp_path, 5, 4, f"robust.rule={rule}", "robust.verify=true", *history)
    finish(run)
    losses = [e.val_loss for e in run.host.coordinator.state.evaluations]
    assert losses[0] is not None and losses[-1] is not None and losses[-1] < losses[0] - 0.2
    assert not refusals(run), "nobody is refused"
    assert not [r for r in read_run(run.run_dir).rows if isinstance(r.record, FaultRecord)]


def test_a_lying_owner_is_blamed_and_its_results_reach_no_version(tmp_path: Path) -> None:
    (tmp_path / "clean").mkdir()
    (tmp_path / "attacked").mkdir()
    clean = start(tmp_path / "clean", 4, 4, "robust.verify=true")
    finish(clean)
    run = start(tmp_path / "attacked", 4, 4, "robust.verify=true")
    begin_attack(replica_of(run, "island-2"), "lying_owner")
    run.run(max_turns=20_000, until=lambda: run.host.coordinator.state.num_commits >= 2)
    assert {r.member for r in refusals(run)} == {"island-2"} and all(r.as_owner for r in refusals(run))
    end_attack(replica_of(run, "island-2"))
    finish(run)
    heads = [r.host.coordinator.state.heads[0] for r in (clean, run)]
    assert heads[0].digest == heads[1].digest, "as if nobody had lied"


def test_verification_at_most_doubles_what_travels(tmp_path: Path) -> None:
    sent = {}
    for verify in ("false", "true"):
        (tmp_path / verify).mkdir()
        run = start(tmp_path / verify, 4, 4, f"robust.verify={verify}")
        transports = [island.transport for island in run.islands.values()]
        run.run(max_turns=20_000, until=lambda run=run: run.host.coordinator.state.heads != [])  # type: ignore[misc]
        before = sum(transport.bytes_sent for transport in transports)  # states of those that joined
        finish(run)
        sent[verify] = sum(transport.bytes_sent for transport in transports) - before
    assert 1.2 * sent["false"] < sent["true"] <= 2 * sent["false"], "a second one pulls all pieces, nobody more results"


def test_without_verify_a_lying_owner_is_believed(tmp_path: Path) -> None:
    """The attack is real: without a second owner it gets into the model."""
    run = start(tmp_path, 4, 4)
    begin_attack(replica_of(run, "island-2"), "lying_owner")
    run.run(max_turns=20_000)
    run.close()
    losses = [e.val_loss for e in run.host.coordinator.state.evaluations]
    assert not refusals(run) and (losses[-1] is None or losses[-1] > losses[0])  # type: ignore[operator]


def test_a_banned_member_comes_back_when_it_is_unbanned(tmp_path: Path) -> None:
    run = start(tmp_path, 3, 12, "robust.rule=clip")
    begin_attack(replica_of(run, "island-1"), "scale")
    state = run.host.coordinator.state
    run.run(max_turns=20_000, until=lambda: state.bans.standing("island-1") == "banned")
    at = state.num_commits
    end_attack(replica_of(run, "island-1"))
    run.run(max_turns=20_000, until=lambda: state.num_commits == at + 2)
    assert not [e for commit in state.history[0][-2:] for e in commit.roster if e.member == "island-1"]
    run.host.handle(UnbanRequested(member="island-1"))
    finish(run)
    rows = [r.record for r in read_run(run.run_dir).rows]
    assert [r.standing for r in rows if isinstance(r, StandingRecord)] == ["banned", "probation"]
    late = {entry.member: entry.coefficient for entry in state.history[0][-1].roster}
    assert late["island-1"] < 0.2 * late["island-0"], "it contributes again, with a small weight"
