"""The largest batch that fits: the rule on made-up peaks, and a probe of a real model that leaves no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from orchestrator.config import RunConfig, load_config
from orchestrator.errors import UserError
from orchestrator.local import LocalRun
from tests.small_run import make_pack, small_config
from workers import loops
from workers.batch_fit import BatchFit, fit_batch, memory_probe, remember, remembered, share_of_memory
from workers.model.errors import ModelError

MIB = 1 << 20


@given(st.integers(0, 1000), st.integers(1, 100), st.integers(1, 10_000), st.integers(1, 300))
def test_largest_power_of_two_under_the_limit(base: int, each: int, limit: int, largest: int) -> None:
    """With peaks that grow by the batch nothing larger fits, and nothing over the limit is tried beyond two sizes."""
    tried: list[int] = []

    def probe(size: int) -> int:
        tried.append(size)
        return base + each * size

    sizes = [2**k for k in range(9) if 2**k <= largest]
    fitting = [size for size in sizes if base + each * size <= limit]
    if not fitting:
        with pytest.raises(ModelError, match="memory_fraction"):
            fit_batch(probe, largest=largest, limit_bytes=limit)
        return
    fit = fit_batch(probe, largest=largest, limit_bytes=limit)
    assert fit.batch_size == fitting[-1] and fit.peak_bytes == base + each * fit.batch_size
    assert all(base + each * size <= limit for size in tried if size > 2), "no size is tried that cannot fit"


def test_a_gpu_that_says_no_is_believed() -> None:
    def probe(size: int) -> int:
        if size > 4:
            raise torch.OutOfMemoryError("no")
        return size

    assert fit_batch(probe, largest=1024, limit_bytes=10**9).batch_size == 4


def test_probe_measures_activations_and_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(64, 4096), nn.BatchNorm1d(4096), nn.Dropout(0.5), nn.Linear(4096, 64))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.random.get_rng_state()
    probe = memory_probe(
        model, lambda m, x: m(x).square().mean(), lambda size: torch.ones(256 * size, 64), later_bytes=7 * MIB
    )
    small, large = probe(1), probe(16)
    # 4096 columns of 256 rows in fp32 are 4 MiB, several times (each layer's output, and their gradients).
    assert large - small > 15 * 4 * 2 * MIB
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), generator)


def test_share_of_memory() -> None:
    whole = share_of_memory(torch.device("cpu"), num_sharing=1)
    assert whole > 64 * MIB and share_of_memory(torch.device("cpu"), num_sharing=4) == whole // 4


def test_what_was_measured_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "batch" / "island-0.json"
    assert remembered(path) is None
    fit = BatchFit(batch_size=8, peak_bytes=1, limit_bytes=2, why="because")
    remember(path, fit)
    assert remembered(path) == fit and list(path.parent.iterdir()) == [path]


def test_islands_of_a_run_take_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Island 1 has a quarter of the memory: its batch is smaller, and its weight with it."""
    peaks = {"island-0": 1000, "island-1": 300}
    names = iter(peaks)
    monkeypatch.setattr(loops, "memory_probe", lambda *args, **how: lambda size: 100 * size)
    monkeypatch.setattr(loops, "share_of_memory", lambda device, *, num_sharing: peaks[next(names)])
    config = small_config(
        make_pack(tmp_path), "run.islands=2", "train.fit_batch=true", "train.batch_size=64", "train.memory_fraction=0.9"
    )
    run = LocalRun(config, tmp_path / "run")
    run.start()
    finish = run.run(max_turns=2000)
    infos = {str(m): p.info for m, p in run.host.coordinator.roll.processes.items()}
    run.close()
    assert finish is not None and finish.reason == "done"
    assert {name: (info.batch_size, info.weight) for name, info in infos.items()} == {
        "island-0.1": (8, 8 * 16),
        "island-1.1": (2, 2 * 16),
    }
    kept = remembered(tmp_path / "run" / "batch" / "island-1.json")
    assert kept is not None and kept.batch_size == 2 and kept.limit_bytes == 270


@pytest.mark.parametrize(
    ("setting", "remedy"), [("train.accumulation=2", "train.accumulation = 1"), ("train.loop=my:loop", "batch_size")]
)
def test_settings_that_do_not_fit_are_refused(setting: str, remedy: str) -> None:
    with pytest.raises(UserError, match="fit_batch") as error:
        load_config("debug", overrides=["train.fit_batch=true", setting])
    assert remedy in str(error.value)


def test_shares_of_one_step_are_refused() -> None:
    with pytest.raises(UserError, match="by_speed"):
        load_config("ddp", overrides=["run.load=by_speed", "data.corpus=stdlib"])
    assert isinstance(load_config("debug", overrides=["run.load=by_speed"]).config, RunConfig)
