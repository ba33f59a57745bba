"""Every combination of parts that a configuration can choose trains, agrees bit for bit, and adds up."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.config import load_config
from orchestrator.ledger import recompute
from orchestrator.local import LocalRun
from orchestrator.segments import read_run

SMALL = (
    "run.islands=2",
    "train.tokens=16384",
    "train.batch_size=4",
    "data.seq_len=64",
    "model.dim=32",
    "model.layers=2",
    "strategy.inner_steps=4",
    "eval.every=0.5",
    "eval.windows=8",
    "codec.block=4096",
)

CASES = {
    "two fragments": ("strategy.num_fragments=2",),
    "data parallel": ("strategy.name=ddp", "strategy.inner_steps=1", "codec.name=fp32", "train.tokens=4096"),
    "synchronous warm-up": ("strategy.warmup_sync=0.2",),
    "plain averaging": ("strategy.outer=average", "strategy.outer_lr=1.0"),
    "error feedback": ("codec.name=int8", "codec.error_feedback=true"),
    "bf16 wire": ("codec.name=bf16",),
    "muon": ("train.optimizer=muon",),
    "accumulation": ("train.accumulation=2",),
    "unequal islands": ("train.per_island.island-1.batch_size=8",),
    "one island": ("run.islands=1",),
    "streaming": (
        *("strategy.name=streaming", "strategy.num_fragments=2", "strategy.overlap_steps=3"),
        *("strategy.merge_alpha=0.5", "codec.name=e3m0", "codec.block=256", "codec.error_feedback=true"),
    ),
    "fragments of your own": ("strategy.name=streaming", 'strategy.fragments=[["*embed*", "*.1.*"], ["*"]]'),
    "eager": ("strategy.name=eager", "strategy.outer_lr=0.5"),
    "delayed, two fragments": ("strategy.name=delayed", "strategy.outer_lr=0.5", "strategy.num_fragments=2"),
    "asynchronous": (
        *("strategy.name=async-dn", "strategy.momentum_every=2", "strategy.outer_lr=0.5"),
        *("exchange.grace_s=0.0", "codec.error_feedback=true"),
    ),
    "decoupled": (
        *("strategy.name=decoupled", "strategy.num_fragments=2", "strategy.overlap_steps=2"),
        *("strategy.merge_alpha=0.5", "strategy.aggregate=radial"),
    ),
    "quadratic rule": ("strategy.qsr_alpha=0.006", "strategy.qsr_max_steps=16"),
    "outer adam": ("strategy.outer=adam", "strategy.outer_lr=0.1"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_of_each_kind_ends_with_everything_accounted_for(case: str, tmp_path: Path) -> None:
    run = LocalRun(load_config("debug", overrides=[*SMALL, *CASES[case]]).config, tmp_path / "run")
    run.start()
    finish = run.run(max_turns=4000)
    assert finish is not None and finish.reason == "done", finish
    for _ in range(5):
        run.turn()
    state = run.host.coordinator.state
    syncs = [island.loop.island.sync for island in run.islands.values()]
    for fragment, head in enumerate(state.heads):
        assert {sync.replica.digest(fragment) for sync in syncs if sync is not None} == {head.digest}
    losses = [evaluation.val_loss for evaluation in state.evaluations]
    assert losses[-1] is not None and losses[0] is not None and losses[-1] < losses[0]
    assert state.samples_committed() == run.host.plan.total_samples
    run.close()
    ledger = recompute(read_run(run.run_dir).rows)
    assert ledger.ok, ledger.findings
    if case == "unequal islands":
        given = [row.record for row in read_run(run.run_dir).rows if row.record.kind == "lease"]
        assert {record.member for record in given} == {"island-0", "island-1"}


def test_the_same_run_twice_gives_the_same_bits(tmp_path: Path) -> None:
    heads = []
    for name in ("first", "second"):
        run = LocalRun(load_config("debug", overrides=SMALL).config, tmp_path / name / "run")
        run.start()
        run.run(max_turns=4000)
        heads.append([(head.version, head.digest) for head in run.host.coordinator.state.heads])
        run.close()
    assert heads[0] == heads[1]
