"""The figures of a storm, on two made-up runs whose figures can be reckoned by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.plan import parse_fault
from orchestrator.metrics import ExchangeRow, Row, StepRow
from orchestrator.storm.figures import RunData, StormFigures, alive_s, storm_figures, times
from orchestrator.storm.follow import away, follow
from orchestrator.storm.run import StormPlan, fault_arguments
from orchestrator.storm.table import lines
from workers.records import CommitRecord, FaultRecord, JoinRecord, Record, RosterEntry

NAMES = ("island-0", "island-1")
ROUND_S = 2.0
SAMPLES = 10
SEQ_LEN = 4


def fault(kind: str, member: str, t_s: float, *, injected: bool = True, detail: str = "") -> FaultRecord:
    return FaultRecord(fault=kind, member=member, injected=injected, t_s=t_s, detail=detail)


def step(member: str, incarnation: int, t_s: float) -> StepRow:
    return StepRow(
        t_s=t_s, member=member, incarnation=incarnation, step=1, progress=0.0, loss=1.0, tokens_per_s=1.0, step_ms=1.0
    )


class Run:
    """Rounds of two seconds; each member in the roster brings ten samples."""

    def __init__(self, num_rounds: int, missing: dict[int, set[str]] | None = None) -> None:
        self.records: list[Record] = [JoinRecord(member=name, incarnation=1, nonce=name, node="here") for name in NAMES]
        self.rows: list[Row] = []
        consumed = dict.fromkeys(NAMES, 0)
        for n in range(1, num_rounds + 1):
            inside = [name for name in NAMES if name not in (missing or {}).get(n, set())]
            roster = []
            for name in inside:
                since, consumed[name] = consumed[name], consumed[name] + SAMPLES
                roster.append(
                    RosterEntry(
                        member=name,
                        incarnation=1,
                        seq=n,
                        since=since,
                        upto=consumed[name],
                        ranges=((since, consumed[name]),),
                        num_steps=1,
                        coefficient=0.5,
                    )
                )
            self.records.append(
                CommitRecord(
                    fragment=0,
                    n=n,
                    prev_chain="",
                    chain=str(n),
                    serial=n,
                    attempt=0,
                    roster=tuple(roster),
                    roster_digest="",
                    chunk_digests=(),
                    digest="",
                    base_samples=0,
                )
            )
            self.rows.append(
                ExchangeRow(
                    t_s=n * ROUND_S,
                    fragment=0,
                    version=n,
                    attempts=1,
                    roster=tuple(inside),
                    seconds=0.1,
                    bytes=1,
                    opened_s=n * ROUND_S - 0.1,
                    tokens_committed=0,
                )
            )

    def data(self, *, lost: int = 0, findings: int = 0) -> RunData:
        return RunData(
            records=self.records,
            rows=self.rows,
            seq_len=SEQ_LEN,
            islands=2,
            tokens_lost=lost,
            tokens_reissued=lost,
            ledger_findings=findings,
        )


@pytest.fixture
def stormy() -> Run:
    """island-1 is killed at 5 s, noticed at 5.1, back at 9, in again at 10; hangs from 20 to 24; cut from 30 to 35."""
    run = Run(25, missing={3: {"island-1"}, 4: {"island-1"}, 11: {"island-1"}, 16: {"island-1"}, 17: {"island-1"}})
    run.records += [
        fault("kill", "island-1", 5.0, detail="kill:island-1 (number 1 of storm@round=2,rate=240,seed=0)"),
        fault("died", "island-1", 5.1, injected=False),
        fault("suspect", "island-0", 5.2, injected=False),  # of somebody else
        fault("hang", "island-1", 20.0, detail="hang:island-1,for=4s"),
        fault("cut", "island-1", 30.0, detail="cut:island-1,for=5s"),
        fault("suspect", "island-1", 31.5, injected=False),
        fault("controller_kill", "", 40.0, detail="controller_kill@round=9"),
        fault("controller_restarted", "controller", 41.0, injected=False),
    ]
    run.rows += [
        step("island-1", 1, 4.9),
        step("island-1", 2, 9.0),
        step("island-1", 2, 19.9),
        step("island-1", 2, 24.1),
        step("island-1", 2, 33.0),  # it trains while it is cut off
        step("island-1", 2, 35.2),
    ]
    return run


def test_each_fault_is_followed_to_its_end(stormy: Run) -> None:
    kill, hang, cut, controller = follow(stormy.records, stormy.rows)
    assert (kill.detected_s, kill.detected_as, kill.next_commit_s) == (5.1, "died", 6.0)
    assert (kill.back_s, kill.contributed_s, kill.replaced) == (9.0, 10.0, True)
    assert (hang.detected_s, hang.back_s, hang.contributed_s, hang.replaced) == (None, 24.1, 26.0, False)
    assert (cut.detected_s, cut.back_s, cut.contributed_s) == (31.5, 35.2, 36.0)
    assert (controller.detected_s, controller.next_commit_s, controller.back_s) == (41.0, 42.0, None)


def test_a_verdict_belongs_to_the_last_fault_before_it(stormy: Run) -> None:
    stormy.records.append(fault("stop", "island-1", 31.0, detail="stop:island-1,for=1s"))
    stormy.records.sort(key=lambda record: getattr(record, "t_s", -1.0))
    followed = {one.kind: one for one in follow(stormy.records, stormy.rows)}
    assert followed["cut"].detected_s is None
    assert followed["stop"].detected_s == 31.5


def test_who_is_dead_or_hangs_is_not_alive_and_who_is_cut_off_is(stormy: Run) -> None:
    faults = follow(stormy.records, stormy.rows)
    assert away(faults, "island-1", 50.0) == [(5.0, 9.0), (20.0, 24.1)]
    assert away(faults, "island-1", 50.0, linked=True) == [(5.0, 9.0), (20.0, 24.1), (30.0, 35.2)]
    assert away(faults, "island-0", 50.0, linked=True) == []
    assert alive_s(faults, "island-1", (6.0, 50.0)) == pytest.approx(44.0 - 3.0 - 4.1)


def figures(stormy: Run, *, findings: int = 0) -> StormFigures:
    return storm_figures(Run(11).data(), stormy.data(lost=40, findings=findings), rate=240.0, seed=7)


def test_the_figures_of_both_runs(stormy: Run) -> None:
    found = figures(stormy)
    # Without faults 2 x 10 samples of 4 tokens in 2 s. With them: 5 of 48 contributions are missing in 24 rounds.
    assert found.fault_free_tokens_per_s == 40.0
    assert found.seconds == 48.0
    assert found.tokens_per_s == pytest.approx((48 - 5) * 40 / 48)
    possible = 20 * 48.0 + 20 * (48.0 - 4.0 - 4.1)
    assert found.throughput == pytest.approx((48 - 5) * 40 / possible)
    # The commits at 6 and 8 s, 22 s, 32 and 34 s: island-1 was not there, and is not missed.
    assert found.participation == 1.0
    assert found.participation_low == 0.0
    assert found.undetected == ["hang island-1@20.0"]
    assert found.kinds["kill"].detection.median_s == pytest.approx(0.1)
    assert found.kinds["kill"].contributed.max_s == pytest.approx(5.0)
    assert found.kinds["hang"].detected_as == {}
    assert (found.digest_mismatches, found.ledger_findings, found.tokens_lost) == (0, 0, 40)


def test_who_lives_and_is_left_out_counts_against_participation() -> None:
    run = Run(11, missing={5: {"island-0"}, 6: {"island-0"}})
    found = figures(run)
    assert found.participation == pytest.approx(1 - 2 * 0.5 / 11)
    assert found.participation_low == pytest.approx(2 / 11)


def test_only_the_time_of_the_storm_counts(stormy: Run) -> None:
    stormy.records.append(fault("storm", "", 11.0, detail="storm@round=2,for=20s,rate=240,seed=0,kinds=kill"))
    found = figures(stormy)
    assert found.seconds == 18.0  # from the commit at 12 s to that at 30 s
    assert found.tokens_per_s == pytest.approx((18 - 1) * 40 / 18)


def test_mismatches_and_contradictions_are_counted(stormy: Run) -> None:
    stormy.records.append(fault("digest_mismatch", "", 44.0, injected=False))
    found = figures(stormy, findings=3)
    assert (found.digest_mismatches, found.ledger_findings) == (1, 3)
    assert ("ledger", "3 contradictions") in lines(found)


def test_the_figures_survive_json(stormy: Run) -> None:
    found = figures(stormy)
    assert StormFigures.model_validate_json(found.model_dump_json()) == found


def test_a_run_without_a_common_commit_has_figures_too() -> None:
    found = storm_figures(Run(0).data(), Run(0).data(), rate=1.0, seed=0)
    assert (found.throughput, found.participation, found.commits) == (0.0, 0.0, 0)


def test_times_of_some() -> None:
    found = times([None, *map(float, range(1, 21))])
    assert (found.num, found.median_s, found.p95_s, found.max_s) == (20, 10.5, 19.0, 20.0)


def test_the_faults_of_a_plan_are_faults() -> None:
    plan = StormPlan(
        folder=Path(), seconds=600.0, rate=240.0, islands=8, seed=1, kinds=("kill", "hang", "cut"), head=True
    )
    storm, controller, head = (parse_fault(text, NAMES) for text in fault_arguments(plan))
    assert (storm.kind, storm.for_s, storm.rate) == ("storm", 600.0, 240.0)
    assert controller.round is not None and head.round is not None
    assert 2 < controller.round < head.round < 600 / 2.4
    assert plan.calm_s == 120.0
