"""Load by speed: shares from step times, when they change, who hears of them, and what a member makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from control import BATCH, Control
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import shares
from orchestrator.config import load_config
from orchestrator.leases import share_out
from orchestrator.ledger import recompute
from orchestrator.local import LocalRun
from orchestrator.run_state import RunState
from orchestrator.segments import read_run
from workers import messages as msg
from workers.records import CommitRecord, MemberId, SharesRecord
from workers.shares import StepTimes, fleet_samples, round_steps

H = 100
TIMES = st.dictionaries(
    st.builds(MemberId, name=st.sampled_from("abcdef"), incarnation=st.just(1)),
    st.floats(1e-4, 10.0),
    min_size=1,
)


def ids(*names: str) -> list[MemberId]:
    return [MemberId(name=name, incarnation=1) for name in names]


def speeds(**step_s: float) -> dict[MemberId, shares.Speed]:
    return {
        MemberId(name=name, incarnation=1): shares.Speed(step_s=time_s, batch_size=2) for name, time_s in step_s.items()
    }


# ---------------------------------------------------------------- the rule


@given(TIMES, st.integers(1, 1000))
def test_steps_arrive_together_and_nobody_has_none(step_s: dict[MemberId, float], inner_steps: int) -> None:
    steps = shares.steps_by_speed(step_s, inner_steps)
    quickest = min(step_s, key=lambda member: step_s[member])
    assert steps[quickest] == inner_steps, "the quickest makes the whole round"
    for member, num in steps.items():
        assert 1 <= num <= inner_steps
        late_s = num * step_s[member] - inner_steps * step_s[quickest]
        assert num == 1 or late_s <= 1e-6 * step_s[member], f"{member} would be waited for"
        assert num == inner_steps or late_s > -step_s[member] * 1.001, f"{member} would wait for more than a step"
        assert all(steps[other] >= num for other in steps if step_s[other] <= step_s[member]), "monotone in speed"


@given(TIMES)
def test_order_of_members_changes_nothing(step_s: dict[MemberId, float]) -> None:
    reversed_s = dict(reversed(list(step_s.items())))
    assert shares.steps_by_speed(step_s, H) == shares.steps_by_speed(reversed_s, H)


def test_equal_speeds_have_no_shares() -> None:
    assert shares.new_shares(None, speeds(a=0.1, b=0.1, c=0.104), H) is None
    assert shares.new_shares(None, speeds(a=0.1), H) is None
    assert shares.new_shares(None, speeds(a=0.1, b=0.4), 1) is None, "one step cannot be shared"


def test_shares_change_only_beyond_the_hysteresis() -> None:
    first = shares.new_shares(None, speeds(a=0.1, b=0.4), H)
    assert first is not None and first.steps == (100, 25) and "b.1" in first.why
    assert shares.new_shares(first, speeds(a=0.1, b=0.43), H) is None, "noise"
    assert shares.new_shares(first, speeds(a=0.105, b=0.4), H) is None
    second = shares.new_shares(first, speeds(a=0.1, b=0.2), H)
    assert second is not None and second.steps == (100, 50)
    assert shares.new_shares(second, speeds(a=0.1, b=0.2), H) is None, "settled"


def test_shares_go_with_the_quickest() -> None:
    first = shares.new_shares(None, speeds(a=0.1, b=0.4, c=0.8), H)
    left = shares.new_shares(first, speeds(b=0.4, c=0.8), H)
    assert left is not None and left.steps == (100, 50)


# ---------------------------------------------------------------- the member


def record(**steps: tuple[int, int]) -> SharesRecord:
    return SharesRecord(
        inner_steps=H, members=tuple(f"{name}.1" for name in steps), steps=tuple(n for n, _ in steps.values()),
        batch_sizes=tuple(size for _, size in steps.values()), why="measured",
    )  # fmt: skip


def test_round_of_another_length_keeps_the_proportions() -> None:
    given_ = record(a=(100, 2), b=(25, 2))
    assert [round_steps(given_, "b.1", steps) for steps in (100, 200, 8, 1)] == [25, 50, 2, 1]
    assert round_steps(given_, "new.1", 100) == 100 and round_steps(None, "b.1", 100) == 100


def test_progress_goes_on_by_what_all_plan() -> None:
    """Each member, after its own share of the round, reckons with what all of them make in it."""
    given_, live = record(a=(100, 2), b=(25, 8)), ["a.1", "b.1"]
    assert fleet_samples(given_, "a.1", live) * 100 * 2 == pytest.approx(400)
    assert fleet_samples(given_, "b.1", live) * 25 * 8 == pytest.approx(400)
    assert fleet_samples(given_, "a.1", ["a.1"]) == 1.0
    assert fleet_samples(given_, "a.1", [*live, "c.1"]) * 200 == pytest.approx(600), "an unknown one counts as the mean"
    assert fleet_samples(None, "a.1", live) == 2.0


def test_step_time_is_a_median_of_the_last_steps() -> None:
    times = StepTimes()
    for seconds in (9.0, 0.1, 0.1):
        times.add(seconds)
    assert times.median_s == 0.0, "not measured yet"
    for seconds in (0.1, 5.0, 0.0):
        times.add(seconds)
    assert times.median_s == 0.1
    for _ in range(20):
        times.add(0.3)
    assert times.median_s == 0.3


# ---------------------------------------------------------------- leases


def test_last_samples_are_shared_by_speed() -> None:
    a, b = ids("a", "b")
    assert share_out({a: (100, 1), b: (100, 1)}, 20, {a: 40, b: 10}) == {a: 16, b: 4}
    assert share_out({a: (100, 1), b: (100, 1)}, 20) == {a: 10, b: 10}


# ---------------------------------------------------------------- the controller


def test_shares_are_journalled_told_and_replayed() -> None:
    control = Control(load="by_speed", steps=8, samples=4000)
    control.start()
    control.step_s |= {"island-0": 0.1, "island-1": 0.4}
    control.hello("island-0")
    control.hello("island-1")
    assert not control.records(SharesRecord), "island-2 is not measured yet"
    control.step_s["island-2"] = 0.1
    control.hello("island-2")
    [given_] = control.records(SharesRecord)
    assert isinstance(given_, SharesRecord)
    assert dict(zip(given_.members, given_.steps, strict=True)) == {
        "island-0.1": 8,
        "island-1.1": 2,
        "island-2.1": 8,
    }
    for name in ("island-0", "island-1", "island-2"):
        rows = [row for batch in control.sent if batch.nonce == control.nonces[name] for row in batch.rows]
        assert given_ in [row.record for row in rows], f"{name} was not told"
    for _ in range(3):
        control.commit()
    assert control.records(SharesRecord) == [given_], "nothing changed"
    replayed = RunState()
    for row in control.rows:
        replayed.apply(row.record)
    assert replayed.shares == given_ == control.state.shares
    control.restart()
    assert control.state.shares == given_


def test_newcomer_has_its_share_from_its_second_round() -> None:
    control = Control(load="by_speed", steps=8, samples=4000, step_s={f"island-{i}": 0.1 for i in range(3)})
    control.start()
    control.commit()
    control.die("island-1")
    control.step_s["island-1"] = 0.0
    control.join("island-1")
    control.ready("island-1")
    control.consumed["island-1"] = 4 * BATCH
    control.hello("island-1")
    assert control.state.shares is None, "it offers with the others whatever it has made in its first round"
    control.step_s["island-1"] = 0.4
    control.hello("island-1")
    control.commit()
    [given_] = control.records(SharesRecord)
    assert isinstance(given_, SharesRecord)
    assert dict(zip(given_.members, given_.steps, strict=True))["island-1.2"] == 2


def test_equal_load_never_makes_shares() -> None:
    control = Control(steps=8, samples=4000, step_s={"island-0": 0.1, "island-1": 0.4, "island-2": 0.1})
    control.start()
    control.commit()
    assert not control.records(SharesRecord)


def test_every_token_has_the_same_weight() -> None:
    """Fewer steps are fewer tokens: the coefficient is by tokens of one step, the displacement brings the steps."""
    control = Control(load="by_speed", members=2, steps=8, samples=4000, step_s={"island-0": 0.1, "island-1": 0.4})
    control.start()
    control.offer("island-0", steps=8)
    control.offer("island-1", steps=2)
    control.reduce()
    control.have("island-0")
    control.have("island-1")
    [commit] = control.records(CommitRecord)
    assert isinstance(commit, CommitRecord)
    assert [entry.coefficient for entry in commit.roster] == [0.5, 0.5]
    assert [entry.num_steps for entry in commit.roster] == [8, 2]


# ---------------------------------------------------------------- whole runs

SMALL = (
    "run.islands=2", "train.tokens=25600", "train.batch_size=1", "data.seq_len=64", "model.dim=16", "model.layers=1",
    "model.heads=2", "strategy.inner_steps=16", "eval.every=0.5", "eval.windows=8", "codec.block=4096",
    "train.pace_s=0.05", "train.per_island.island-1.pace_s=0.2",
)  # fmt: skip


def local_run(folder: Path, *more: str) -> tuple[float, LocalRun]:
    """Virtual seconds of a run in which island-1 is four times slower."""
    run = LocalRun(load_config("debug", overrides=[*SMALL, *more]).config, folder)
    run.start()
    finish = run.run(max_turns=20_000)
    run.close()
    assert finish is not None and finish.reason == "done", finish
    ledger = recompute(read_run(folder).rows)
    assert ledger.ok, ledger.findings
    return run.now, run


@pytest.mark.timeout(180)
def test_two_islands_one_four_times_slower(tmp_path: Path) -> None:
    """Ideal 2.5: in the time of four slow steps the two make 5 in place of 2."""
    equal_s, equal = local_run(tmp_path / "equal", "run.load=equal")
    speed_s, run = local_run(tmp_path / "speed", "run.load=by_speed")
    commits = [row.record for row in read_run(run.run_dir).rows if isinstance(row.record, CommitRecord)]
    steps = {entry.member: entry.num_steps for entry in commits[len(commits) // 2].roster}
    assert steps == {"island-0": 16, "island-1": 4}
    assert equal_s / speed_s >= 2.2, f"{equal_s:.1f} s with equal steps, {speed_s:.1f} s by speed"
    losses = [r.host.coordinator.state.evaluations[-1].val_loss for r in (equal, run)]
    assert losses[0] is not None and losses[1] is not None and losses[1] <= 1.02 * losses[0], "no worse loss per token"


def test_message_of_an_older_member_has_no_speed() -> None:
    hello = Control().info("island-0")
    assert msg.Hello(
        info=hello, journal_len=0, num_leased=0, consumed=0, steps=0, bytes_sent=0, fragments=()
    ).median_step_s == 0.0  # fmt: skip
